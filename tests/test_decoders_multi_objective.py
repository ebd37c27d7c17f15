"""Multi-objective decoding as mathematics: limits, the optimum it is meant to be, and where it is another."""

from __future__ import annotations

import math

import pytest
import torch
from tabular_decoding import CLOSE, beginnings, decoded, distribution, next_token, optimum, rewards, worth

from moalign.api import PreferenceError, Request
from moalign_plugins.decoders.multi_objective import MultiObjective, f_mixed, mixed

BETA = 0.7
WEIGHTS = (0.3, 0.5, 0.2)
NAMES = ("one", "two", "three")
REQUEST = Request(shares=dict(zip(NAMES, WEIGHTS, strict=True)))
DIVERGENCES = ("reverse-kl", "forward-kl", "alpha", "jsd")
F_PRIME = {
    "reverse-kl": lambda u: u.log(),
    "forward-kl": lambda u: -1 / u,
    "alpha": lambda u: (1 - u**-0.5) / 0.5,
    "jsd": lambda u: (2 * u / (1 + u)).log(),
}
INVERSE = {
    "reverse-kl": lambda v: v.exp(),
    "forward-kl": lambda v: -1 / v,
    "alpha": lambda v: (1 - 0.5 * v) ** -2.0,
    "jsd": lambda v: v.exp() / (2 - v.exp()),
}
LARGEST = {"reverse-kl": math.inf, "forward-kl": 0.0, "alpha": 2.0, "jsd": math.log(2)}  # f' of infinity
F = {
    "reverse-kl": lambda u: u * u.log(),
    "forward-kl": lambda u: -u.log(),
    "alpha": lambda u: (u**0.5 - 0.5 * u - 0.5) / (0.5 * (0.5 - 1)),
    "jsd": lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
}


def f_optimum(reference, reward, divergence):
    """The most of E[r] - beta E_ref f(pi / ref), its multiplier by bisection, in the plain formulas above."""
    inside = reward / BETA
    low, high = inside.max() - LARGEST[divergence], inside.max() + 1e6
    if not math.isfinite(low):
        low = inside.min() - 1e6
    for _ in range(200):
        middle = (low + high) / 2
        total = (reference.exp() * INVERSE[divergence](inside - middle)).sum()
        low, high = (middle, high) if not total < 1 else (low, middle)
    return reference + INVERSE[divergence](inside - high).log()


# --- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("level", ["token", "prefix"])
def test_all_weight_on_one_is_that_candidate_to_the_last_bit(divergence, level):
    decoder = MultiObjective(divergence=divergence, level=level)
    request = Request(shares={"one": 0.0, "two": 1.0})
    assert decoder.speakers(request) == ["two"]
    logits = torch.randn(1, 3, 50, generator=torch.Generator().manual_seed(0))
    found = decoder.scores(request, at_of(logits))
    assert torch.equal(found, logits[0])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("level", ["token", "prefix"])
def test_equal_candidates_are_themselves(divergence, level):
    policy, base = distribution(1), distribution(2)
    decoder = MultiObjective(divergence=divergence, level=level)
    found = decoded(decoder, REQUEST, dict.fromkeys(NAMES, policy) | {None: base})
    torch.testing.assert_close(found, policy, **CLOSE)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nearly_all_weight_is_nearly_that_candidate(divergence):
    logps, base = torch.stack([distribution(1, 1), distribution(2, 1)]), distribution(3, 1)
    found = f_mixed(logps, base, (1 - 1e-9, 1e-9), divergence)
    torch.testing.assert_close(found, logps[0], rtol=0, atol=1e-7)


def test_the_alpha_divergence_ends_in_both_kls():
    logps, base = torch.stack([distribution(seed, 1) for seed in (1, 2, 3)]), distribution(4, 1)
    forward = f_mixed(logps, base, WEIGHTS, "forward-kl")
    torch.testing.assert_close(f_mixed(logps, base, WEIGHTS, "alpha", 1.0), forward, **CLOSE)
    reverse = f_mixed(logps, base, WEIGHTS, "reverse-kl")
    gaps = [(f_mixed(logps, base, WEIGHTS, "alpha", alpha) - reverse).abs().max() for alpha in (1e-2, 1e-3, 1e-4)]
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.05) and gaps[1] / gaps[2] == pytest.approx(10, rel=0.05)


def test_without_a_normaliser_forward_kl_is_the_weighted_harmonic_mean():
    logps, base = torch.stack([distribution(seed, 1) for seed in (1, 2, 3)]), distribution(4, 1)
    found = f_mixed(logps, base, WEIGHTS, "forward-kl", normalise=False)
    harmonic = 1 / sum(weight / each.exp() for weight, each in zip(WEIGHTS, logps, strict=True))
    torch.testing.assert_close(found.exp(), harmonic, **CLOSE)


# --- the f-divergences ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("steps", [1, 3])
def test_mixed_optima_are_the_optimum_of_mixed_rewards(divergence, steps):
    """Over whole responses, whatever their length, for policies that are optimal for one reward each."""
    base = distribution(0, steps).flatten()
    own = [rewards(seed, steps).flatten() for seed in (1, 2, 3)]
    policies = torch.stack([f_optimum(base, each, divergence) for each in own])
    torch.testing.assert_close(policies.exp().sum(-1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-9)
    found = f_mixed(policies, base, WEIGHTS, divergence)
    reward = sum(weight * each for weight, each in zip(WEIGHTS, own, strict=True))
    torch.testing.assert_close(found, f_optimum(base, reward, divergence), rtol=0, atol=1e-8)  # the bisection's

    def value(policy):
        return (policy * reward).sum() - BETA * (base.exp() * F[divergence](policy / base.exp())).sum()

    best, generator = value(found.exp()), torch.Generator().manual_seed(0)
    for size in (1e-4, 1e-2, 1.0):
        noise = size * torch.randn(20, len(base), generator=generator, dtype=torch.float64)
        for other in (found + noise).softmax(-1):
            assert value(other) <= best + 1e-12


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_for_one_token_the_decoder_is_that_optimum(divergence):
    base, own = distribution(0, 1), [rewards(seed, 1) for seed in (1, 2, 3)]
    policies = {name: f_optimum(base, each, divergence) for name, each in zip(NAMES, own, strict=True)} | {None: base}
    found = decoded(MultiObjective(divergence=divergence), REQUEST, policies)
    reward = sum(weight * each for weight, each in zip(WEIGHTS, own, strict=True))
    torch.testing.assert_close(found, f_optimum(base, reward, divergence), rtol=0, atol=1e-8)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_a_mix_is_a_distribution_however_far_the_candidates_are_apart(divergence, scale):
    generator = torch.Generator().manual_seed(0)
    logps = (scale * torch.randn(3, 40, 200, generator=generator, dtype=torch.float64)).log_softmax(-1)
    base = (scale * torch.randn(40, 200, generator=generator, dtype=torch.float64)).log_softmax(-1)
    found = f_mixed(logps, base, WEIGHTS, divergence)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(40, dtype=torch.float64), rtol=0, atol=1e-9)
    below = f_mixed(logps, base, WEIGHTS, divergence, normalise=False)
    assert bool((below.exp().sum(-1) <= 1 + 1e-12).all())  # Jensen
    assert bool((found >= below - 1e-9).all())  # and so z only ever raises


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("apart", [0.1, 2.0])
def test_a_mix_near_a_peaked_base_is_a_distribution(divergence, apart):
    """As candidates are: most tokens impossible for all of them, by however much one of them differs there."""
    generator = torch.Generator().manual_seed(0)
    logits = 8 * torch.randn(300, 349, generator=generator, dtype=torch.float64)
    base, noise = logits.log_softmax(-1), torch.randn(2, 300, 349, generator=generator, dtype=torch.float64)
    found = f_mixed((logits + apart * noise).log_softmax(-1), base, (0.4, 0.6), divergence)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(300, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_what_one_of_them_excludes_is_excluded(divergence):
    logps = torch.stack([distribution(1, 2).flatten(), distribution(2, 2).flatten()])
    base = distribution(3, 2).flatten()
    logps[0, 3] = base[5] = -torch.inf
    if divergence == "reverse-kl":  # does not know the base
        logps[1, 5] = -torch.inf
    found = f_mixed(logps.log_softmax(-1), base.log_softmax(-1), (0.4, 0.6), divergence)
    assert bool(found[[3, 5]].isneginf().all()) and found.exp().sum() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("divergence", ["forward-kl", "alpha", "jsd"])
def test_by_prefix_the_ratios_are_those_of_the_whole_beginning(divergence):
    """The last step of the paper's rule: ref(y) g(sum_k w_k f'(pi_k(y) / ref(y))) among the last tokens."""
    policies, base = [distribution(seed) for seed in (1, 2, 3)], distribution(4)
    found = decoded(
        MultiObjective(divergence=divergence, level="prefix"),
        REQUEST,
        dict(zip(NAMES, policies, strict=True)) | {None: base},
    )
    inside = sum(
        weight * F_PRIME[divergence]((each - base).exp()) for weight, each in zip(WEIGHTS, policies, strict=True)
    )
    whole = (base + INVERSE[divergence](inside).log()).log_softmax(-1)
    torch.testing.assert_close(next_token(found, 2).view(whole.shape), whole, **CLOSE)


# --- whole responses under reverse KL -------------------------------------------------------------------------------


def optimal_policies(steps=3):
    base, own = distribution(0, steps), [rewards(seed, steps) for seed in (1, 2, 3)]
    policies = [optimum(base, each, BETA) for each in own]
    reward = sum(weight * each for weight, each in zip(WEIGHTS, own, strict=True))
    return base, policies, reward


def test_the_mix_of_whole_responses_is_the_optimum_for_the_mixed_rewards():
    base, policies, reward = optimal_policies()
    whole = mixed(torch.stack(policies), WEIGHTS)
    torch.testing.assert_close(whole - whole.logsumexp((0, 1, 2)), optimum(base, reward, BETA), **CLOSE)


def test_token_by_token_it_is_that_less_what_each_step_was_normalised_by():
    """log pi(y) = sum_k w_k log pi_k(y) - sum_t log Z_t(y_<t), Z_t <= 1; what it loses is beta KL(pi || optimum)."""
    base, policies, reward = optimal_policies()
    found = decoded(MultiObjective(), REQUEST, dict(zip(NAMES, policies, strict=True)))
    normalisers = torch.zeros(1, dtype=torch.float64)
    for step in range(3):
        log_z = mixed(torch.stack([next_token(each, step) for each in policies]), WEIGHTS).logsumexp(-1)
        assert bool((log_z < 0).all())
        normalisers = (normalisers + log_z).repeat_interleave(4)
    expected = mixed(torch.stack(policies), WEIGHTS) - normalisers.view(found.shape)
    torch.testing.assert_close(found, expected, **CLOSE)

    best = optimum(base, reward, BETA)
    lost = worth(best, base, reward, BETA) - worth(found, base, reward, BETA)
    divergence = float((found.exp() * (found - best)).sum())
    assert lost == pytest.approx(BETA * divergence, abs=1e-12) and divergence > 1e-3  # they are not the same policy


def test_token_by_token_is_the_optimum_where_tokens_are_judged_one_by_one():
    """Independent tokens and rewards that add up over them: the normalisers are constants."""
    tokens = [distribution(seed, 1) for seed in (10, 11, 12)]
    base = tokens[0][:, None, None] + tokens[1][None, :, None] + tokens[2][None, None, :]
    own = []
    for seed in (1, 2, 3):
        parts = [rewards(10 * seed + place, 1) for place in range(3)]
        own.append(parts[0][:, None, None] + parts[1][None, :, None] + parts[2][None, None, :])
    policies = {name: optimum(base, each, BETA) for name, each in zip(NAMES, own, strict=True)}
    reward = sum(weight * each for weight, each in zip(WEIGHTS, own, strict=True))
    found = decoded(MultiObjective(), REQUEST, policies)
    torch.testing.assert_close(found, optimum(base, reward, BETA), **CLOSE)


def test_a_preference_between_trained_ones_needs_no_candidate_for_each_objective():
    """Candidates optimal for mixes of rewards, with shares that add up to the preference, give its optimum."""
    base, (first, second) = distribution(0, 1), (rewards(1, 1), rewards(2, 1))
    policies = {
        "a": optimum(base, 0.8 * first + 0.2 * second, BETA),
        "b": optimum(base, 0.4 * first + 0.6 * second, BETA),
    }
    found = decoded(MultiObjective(), Request(shares={"a": 0.25, "b": 0.75}), policies)
    torch.testing.assert_close(found, optimum(base, 0.5 * first + 0.5 * second, BETA), **CLOSE)


# --- options --------------------------------------------------------------------------------------------------------


def at_of(logits):
    from moalign.api import NextToken

    rows = logits.shape[1]
    past = torch.zeros(len(logits), rows, dtype=torch.float64)
    return NextToken(torch.zeros(rows, 1, dtype=torch.long), logits, past, lambda tokens: tokens[..., None].float())


def test_the_base_is_heard_where_the_formula_has_it_and_weights_come_before_the_preference():
    assert MultiObjective().speakers(REQUEST) == list(NAMES)
    assert MultiObjective(divergence="jsd").speakers(REQUEST) == [*NAMES, None]
    decoder = MultiObjective(weights={"three": 0.25, "one": 0.75})
    assert decoder.speakers(REQUEST) == ["three", "one"]
    logits = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0))
    logps = logits.double().log_softmax(-1)
    expected = (0.25 * logps[0] + 0.75 * logps[1]).float()
    assert torch.equal(decoder.scores(REQUEST, at_of(logits)), expected)


def test_bad_weights_are_refused():
    with pytest.raises(PreferenceError, match="nothing to mix"):
        MultiObjective().speakers(Request())
    for weights in ({"one": 0.5}, {"one": 1.5, "two": -0.5}, {"one": math.nan, "two": 0.5}):
        with pytest.raises(ValueError, match=r"not negative and sum to 1|finite"):
            MultiObjective(weights=weights)


def test_beginnings_add_up():
    """The helper itself: a policy is the product of its next-token distributions."""
    policy = distribution(5)
    total = beginnings(policy, 2).repeat_interleave(4) + next_token(policy, 2).flatten()
    torch.testing.assert_close(total.view(policy.shape), policy, **CLOSE)
