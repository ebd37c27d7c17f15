"""Value-augmented sampling and guidance as mathematics: optima, limits, and the heads' regression."""

from __future__ import annotations

import math

import pytest
import torch
from tabular_decoding import (
    CLOSE,
    STEPS,
    decoded,
    distribution,
    expected_values,
    optimum,
    rewards,
    soft_values,
    table_of,
    worth,
)
from test_decoders_multi_objective import at_of

from moalign.api import ConfigError, ModelError, NextToken, PreferenceError, Request
from moalign_plugins.decoders.guidance import Guidance
from moalign_plugins.decoders.multi_objective import MultiObjective
from moalign_plugins.decoders.value_augmented import Head, ValueAugmented, fit, load, returns

BETA = 0.7  # the price of a nat; the decoder's beta is one over it


def looking(values):
    """What a step sees: random logits [2,50], and values [2,50] of the tokens as hidden states."""
    logits = torch.randn(1, 2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    past = torch.zeros(1, 2, dtype=torch.float64)
    ids = torch.zeros(2, 1, dtype=torch.long)
    return NextToken(ids, logits, past, lambda tokens: values.gather(-1, tokens)[..., None])


VALUES = torch.randn(2, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
FIRST = Request({"worth": 1.0}, values={"worth": lambda hidden: hidden[..., 0]})


# --- value-augmented sampling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.3, 3.0])
def test_with_all_tokens_the_tilt_has_most_of_value_less_kl(beta):
    """No policy has more E[Q] - KL(pi || pi_0) / beta, which is log E_0[exp(beta Q)] / beta."""
    at = looking(VALUES)
    base = at.logits[0].log_softmax(-1)
    found = ValueAugmented(beta=beta, top_k=None).scores(FIRST, at).log_softmax(-1)
    torch.testing.assert_close(found, (base + beta * VALUES).log_softmax(-1), **CLOSE)

    def value(policy):
        return (policy.exp() * (VALUES - (policy - base) / beta)).sum(-1)

    torch.testing.assert_close(value(found), (base + beta * VALUES).logsumexp(-1) / beta, **CLOSE)
    generator = torch.Generator().manual_seed(2)
    for size in (1e-3, 0.1, 2.0):
        for _ in range(20):
            noise = size * torch.randn(2, 50, generator=generator, dtype=torch.float64)
            assert bool((value((found + noise).log_softmax(-1)) <= value(found) + 1e-12).all())


@pytest.mark.parametrize("top_k", [1, 20, None])
def test_beta_0_is_the_base_to_the_last_bit(top_k):
    at = looking(VALUES)
    assert torch.equal(ValueAugmented(beta=0.0, top_k=top_k).scores(FIRST, at), at.logits[0])


def test_values_that_are_alike_leave_the_base():
    at = looking(torch.full_like(VALUES, 3.0))
    torch.testing.assert_close(ValueAugmented(top_k=7).scores(FIRST, at), at.logits[0], **CLOSE)


def test_two_rewards_add_up():
    """Raised by both at once is raised by one and then by the other; weights are factors of beta."""
    request = Request(
        {"worth": 0.3, "more": 0.7},
        values={"worth": lambda hidden: hidden[..., 0], "more": lambda hidden: hidden[..., 0] ** 2},
    )
    at = looking(VALUES)
    both = ValueAugmented(beta=2.0, top_k=None).scores(request, at)
    first = ValueAugmented(beta=0.6, top_k=None).scores(FIRST, at)
    second = Request({"more": 1.0}, values=request.values)
    then = ValueAugmented(beta=1.4, top_k=None).scores(second, NextToken(at.ids, first[None], at.past, at.ahead))
    torch.testing.assert_close(both, then, **CLOSE)


def test_with_all_tokens_the_centre_does_not_matter():
    """What is subtracted from every token's value leaves no trace; with fewer it decides what the others get."""
    moved = looking(VALUES + torch.tensor([[5.0], [-2.0]], dtype=torch.float64))
    for top_k in (None, 50, 20):  # a constant never matters, because of the mean
        decoder = ValueAugmented(top_k=top_k)
        torch.testing.assert_close(decoder.scores(FIRST, moved), decoder.scores(FIRST, looking(VALUES)), **CLOSE)
    at = looking(VALUES)
    uncentred = (at.logits[0] + 3.0 * VALUES).log_softmax(-1)
    torch.testing.assert_close(ValueAugmented(top_k=50).scores(FIRST, at).log_softmax(-1), uncentred, **CLOSE)
    assert (ValueAugmented(top_k=20).scores(FIRST, at).log_softmax(-1) - uncentred).abs().max() > 0.1


def test_the_tokens_that_are_not_likely_get_the_mean():
    at = looking(VALUES)
    found = ValueAugmented(beta=2.0, top_k=5).scores(FIRST, at) - at.logits[0]
    for row in range(2):
        top = at.logits[0, row].topk(5).indices
        expected = torch.zeros(50, dtype=torch.float64)
        expected[top] = 2.0 * (VALUES[row, top] - VALUES[row, top].mean())
        torch.testing.assert_close(found[row], expected, **CLOSE)


def test_with_soft_values_whole_responses_are_optimal():
    """Token by token, with V = beta log E[exp(r / beta)] of what follows, it is ref exp(r / beta) / Z."""
    base, reward = distribution(0), rewards(1)
    head = table_of({step: soft_values(base, reward, BETA, step) for step in range(1, STEPS + 1)})
    decoder = ValueAugmented(beta=1 / BETA, top_k=None)
    found = decoded(decoder, Request({"worth": 1.0}, values={"worth": head}), {None: base})
    torch.testing.assert_close(found, optimum(base, reward, BETA), **CLOSE)


def test_with_the_bases_values_whole_responses_gain_and_are_not_optimal():
    """V = E[r] under the base, as it is fitted, is another policy, whose worth lies between base and optimum."""
    base, reward = distribution(0), rewards(1)
    head = table_of({step: expected_values(base, reward, step) for step in range(1, STEPS + 1)})
    decoder = ValueAugmented(beta=1 / BETA, top_k=None)
    found = decoded(decoder, Request({"worth": 1.0}, values={"worth": head}), {None: base})
    best, reached = optimum(base, reward, BETA), worth(found, base, reward, BETA)
    assert worth(base, base, reward, BETA) < reached < worth(best, base, reward, BETA) - 1e-3


def test_a_mix_of_optimal_candidates_is_value_augmented_sampling_with_their_values_mixed():
    """pi_k(s | x) = ref(s | x) exp((V_k(x s) - V_k(x)) / beta), so sum_k w_k log pi_k has sum_k w_k V_k.

    The optimum for the mixed rewards has their own soft value instead, which is never more (convexity).
    """
    base, own, weights = distribution(0), [rewards(1), rewards(2)], (0.4, 0.6)
    policies = {name: optimum(base, each, BETA) for name, each in zip("ab", own, strict=True)}
    shares = dict(zip("ab", weights, strict=True))
    mixed = decoded(MultiObjective(), Request(shares=shares), policies)
    soft = {
        name: {step: soft_values(base, each, BETA, step) for step in range(STEPS + 1)}
        for name, each in zip("ab", own, strict=True)
    }
    request = Request(shares, values={name: table_of(values) for name, values in soft.items()})
    augmented = decoded(ValueAugmented(beta=1 / BETA, top_k=None), request, {None: base})
    torch.testing.assert_close(mixed, augmented, **CLOSE)
    together = weights[0] * own[0] + weights[1] * own[1]
    for step in range(STEPS):
        one = soft_values(base, together, BETA, step)
        assert bool((one < weights[0] * soft["a"][step] + weights[1] * soft["b"][step]).all())


def test_a_value_that_is_missing_is_refused():
    with pytest.raises(PreferenceError, match=r"no value head for 'harmless', which has weight 0\.5"):
        ValueAugmented().speakers(Request({"worth": 0.5, "harmless": 0.5}, values=FIRST.values))
    with pytest.raises(PreferenceError, match="an objective with weight"):
        ValueAugmented().speakers(Request({"worth": 0.0}, values=FIRST.values))
    with pytest.raises(ConfigError, match=r"nowhere\.safetensors: no such file"):
        ValueAugmented(values={"worth": "nowhere.safetensors"}).speakers(Request({"worth": 1.0}))


# --- heads ----------------------------------------------------------------------------------------------------------


def rows(seed=0, count=40, longest=6, size=5):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, longest, size, generator=generator)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator)
    mask = torch.arange(longest)[None] < lengths[:, None]
    return hidden, mask, torch.randn(count, generator=generator)


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_the_targets_are_the_weighted_returns_of_all_lengths(lam):
    """G_t = (1 - lam) sum_n lam^(n-1) gamma^n V_(t+n) + lam^(T-t) gamma^(T-t) r, T the last token (Sutton & Barto)."""
    gamma = 0.9
    _, mask, reward = rows()
    values = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = returns(values, mask, reward.double(), lam, gamma)
    for row in range(len(mask)):
        last = int(mask[row].sum()) - 1
        for place in range(mask.shape[1]):
            rest = last - place
            if rest < 0:
                assert found[row, place] == 0
                continue
            bootstrapped = sum(
                (1 - lam) * lam ** (n - 1) * gamma**n * float(values[row, place + n]) for n in range(1, rest + 1)
            )
            assert float(found[row, place]) == pytest.approx(
                bootstrapped + (lam * gamma) ** rest * float(reward[row]), abs=1e-12
            )


def test_a_linear_head_on_what_was_got_is_least_squares():
    hidden, mask, reward = rows()
    head = fit(hidden, mask, reward, lam=1.0, steps=3000, lr=3e-2)
    inputs = torch.cat([hidden[mask], torch.ones(int(mask.sum()), 1)], 1).double()
    outputs = reward[:, None].expand(mask.shape)[mask].double()
    solution = torch.linalg.lstsq(inputs, outputs).solution
    torch.testing.assert_close(head.last.double(), solution[:-1], rtol=0, atol=1e-4)
    assert float(head.bias) == pytest.approx(float(solution[-1]), abs=1e-4)


@pytest.mark.parametrize("lam", [0.0, 0.95])
def test_a_head_learns_the_values_of_a_chain(lam):
    """A walk on 5 places that ends at either side, 1 at the right one: the value of place i is i / 6."""
    generator = torch.Generator().manual_seed(0)
    walks, ends = [], []
    for _ in range(600):
        place, walk = 3, [3]
        while 0 < place < 6:
            place += 1 if torch.rand((), generator=generator) < 0.5 else -1
            walk.append(place)
        walks.append(walk[1:])  # a token each; the last one is the end itself
        ends.append(float(place == 6))
    longest = max(map(len, walks))
    hidden, mask = torch.zeros(len(walks), longest, 7), torch.zeros(len(walks), longest, dtype=torch.bool)
    for row, walk in enumerate(walks):
        hidden[row, range(len(walk)), walk], mask[row, : len(walk)] = 1.0, True
    head = fit(hidden, mask, torch.tensor(ends), lam=lam, steps=1500, lr=2e-2)
    found = head(torch.eye(7))
    expected = torch.arange(7) / 6
    assert float((found[1:6] - expected[1:6]).abs().max()) < 0.08  # 600 walks: a standard error of 0.02 at the middle
    assert float((found[[0, 6]] - expected[[0, 6]]).abs().max()) < 0.01


def test_a_hidden_layer_sees_what_a_line_cannot():
    hidden = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])[:, None]
    mask, reward = torch.ones(4, 1, dtype=torch.bool), torch.tensor([0.0, 1.0, 1.0, 0.0])
    line, deep = fit(hidden, mask, reward), fit(hidden, mask, reward, width=16, steps=2000)
    assert float((line(hidden)[:, 0] - 0.5).abs().max()) < 1e-3
    assert float((deep(hidden)[:, 0] - reward).abs().max()) < 1e-2


@pytest.mark.parametrize("width", [0, 8])
def test_a_head_is_a_function_of_its_arguments_and_survives_a_file(tmp_path, width):
    hidden, mask, reward = rows()
    before = torch.random.get_rng_state()
    first = fit(hidden, mask, reward, width=width, steps=20, seed=3)
    again = fit(hidden, mask, reward, width=width, steps=20, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    file = tmp_path / "head.safetensors"
    first.save(file)
    assert torch.equal(load(str(file))(hidden), first(hidden))
    decoder = ValueAugmented(values={"worth": str(file)})
    assert decoder.speakers(Request({"worth": 1.0})) == [None]


def test_what_is_no_head_is_refused(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ModelError, match="no value head"):
        load(str(tmp_path / "bad.safetensors"))
    from safetensors.torch import save_file

    save_file({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="no value head"):
        load(str(tmp_path / "other.safetensors"))
    hidden, mask, reward = rows()
    with pytest.raises(ConfigError, match="a token and a finite reward"):
        fit(hidden, mask, reward * math.nan)
    with pytest.raises(ConfigError, match="a token and a finite reward"):
        fit(hidden, mask & False, reward)


def test_a_head_is_linear_where_it_has_no_hidden_layer():
    head = Head(last=torch.tensor([1.0, 2.0]), bias=torch.tensor(0.5))
    assert head(torch.tensor([[3.0, 4.0]])).tolist() == [11.5]


# --- guidance -------------------------------------------------------------------------------------------------------


def test_its_ends_are_the_two_candidates_to_the_last_bit():
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    for scale, expected in ((0.0, logits[0]), (1.0, logits[1])):
        assert torch.equal(Guidance(scale=scale, towards="one").scores(Request(), at_of(logits)), expected)


@pytest.mark.parametrize("scale", [-0.5, 0.3, 1.5, 4.0])
def test_between_and_beyond_it_is_the_formula(scale):
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = Guidance(scale=scale, towards="one").scores(Request(), at_of(logits))
    torch.testing.assert_close(found, logits[0] + scale * (logits[1] - logits[0]), **CLOSE)
    normalised = Guidance(scale=scale, towards="one").scores(Request(), at_of(logits.log_softmax(-1)))
    torch.testing.assert_close(found.log_softmax(-1), normalised.log_softmax(-1), **CLOSE)


def test_from_the_base_it_tilts_each_token_by_the_scale_over_the_price():
    """Towards an optimal candidate: value-augmented sampling with its soft values at scale / beta; one token: exact."""
    base, reward = distribution(0), rewards(1)
    policies = {None: base, "one": optimum(base, reward, BETA)}
    found = decoded(Guidance(scale=2.0, towards="one"), Request(), policies)
    head = table_of({step: soft_values(base, reward, BETA, step) for step in range(1, STEPS + 1)})
    request = Request({"worth": 1.0}, values={"worth": head})
    torch.testing.assert_close(
        found, decoded(ValueAugmented(beta=2 / BETA, top_k=None), request, {None: base}), **CLOSE
    )
    base, reward = distribution(0, 1), rewards(1, 1)
    found = decoded(Guidance(scale=2.0, towards="one"), Request(), {None: base, "one": optimum(base, reward, BETA)})
    torch.testing.assert_close(found, optimum(base, reward, BETA / 2), **CLOSE)


def test_between_two_candidates_it_is_their_mix():
    """0.3 of the way from one to the other is multi-objective decoding with 0.7 and 0.3."""
    policies = {"one": distribution(1), "two": distribution(2)}
    guided = decoded(Guidance(scale=0.3, towards="two", away="one"), Request(), policies)
    torch.testing.assert_close(
        guided, decoded(MultiObjective(weights={"one": 0.7, "two": 0.3}), Request(), policies), **CLOSE
    )


def test_what_is_impossible_stays_so():
    logits = torch.zeros(2, 1, 4)
    logits[0, 0, 0] = logits[1, 0, 0] = logits[1, 0, 1] = logits[0, 0, 2] = -torch.inf
    found = Guidance(scale=3.0, towards="one").scores(Request(), at_of(logits))
    assert found.tolist() == [[-math.inf, -math.inf, -math.inf, 0.0]]


def test_where_it_goes_must_be_clear():
    assert Guidance().speakers(Request(shares={"one": 1.0})) == [None, "one"]
    with pytest.raises(ConfigError, match=r"say which candidate; of those asked for \(one, two\)"):
        Guidance().speakers(Request(shares={"one": 0.5, "two": 0.5}))
    with pytest.raises(ConfigError, match="'one' is also where guidance goes"):
        Guidance(away="one", towards="one").speakers(Request())
