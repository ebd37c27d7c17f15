"""Weights learned by a hypergradient: the first-order formula, its limit by enumeration, what it leads to, a run."""

from __future__ import annotations

import json
from itertools import pairwise, product

import pytest
import torch
from pydantic import ValidationError
from sweeps import small_config, steps_on_the_assistant

from moalign import registry
from moalign.api import PluginError, Preference, PreferenceError, Round
from moalign.sweeps.plan import prepare
from moalign.testing import check_combiner
from moalign_plugins.combiners._hypergradient import (
    disagreement,
    first_order,
    hypergradient,
    independent,
    lost_return,
    penalised,
)
from moalign_plugins.combiners.learned_weights import LearnedWeights
from moalign_plugins.combiners.linear import Linear

FORMS = ("return", "preference")
NAMES = ("a", "b", "c", "judge")
EXACT = {"rtol": 1e-12, "atol": 1e-12}
BETA, TAU = 0.4, 0.7
EVEN = Preference("weights", {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3, "judge": 0.0})
UNEVEN = Preference("weights", {"a": 0.2, "b": 0.3, "c": 0.1, "judge": 0.4})


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the formula on a quadratic ---------------------------------------------------------------------------------------

# g = (y - A x)' H (y - A x) / 2 and f = |y - c|^2 / 2 + x' B y + |x|^2 / 2, so that y* = A x
A, B, C, X = drawn(3, 2), drawn(2, 3, seed=1), drawn(3, seed=2), drawn(2, seed=3)
H = torch.eye(3, dtype=torch.float64) + drawn(3, 3, seed=4) @ drawn(3, 3, seed=4).T
ONE = torch.eye(3, dtype=torch.float64)


def inner(x, y):
    return (y - A @ x) @ H @ (y - A @ x) / 2


def outer(x, y):
    return (y - C).square().sum() / 2 + x @ B @ y + x.square().sum() / 2


def best_for_both(x, sigma):
    """What minimises sigma f + g."""
    return torch.linalg.solve(H + sigma * ONE, H @ A @ x + sigma * (C - B.T @ x))


def slope(function, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


@pytest.mark.parametrize("sigma", [0.5, 0.1, 1e-3])
def test_on_a_quadratic_the_error_is_proportional_to_sigma_and_known(sigma):
    exact = slope(lambda x: outer(x, A @ x), X)
    at_optimum, f_y = A @ X, A @ X - C + B.T @ X
    implicit = B @ at_optimum + X + A.T @ H @ torch.linalg.solve(H, f_y)  # dy*/dx = -g_yy^-1 g_yx = H^-1 H A
    torch.testing.assert_close(exact, implicit, **EXACT)
    moved = best_for_both(X, sigma)
    parts = [slope(lambda x, y=y: inner(x, y), X) for y in (moved, at_optimum)]
    error = first_order(slope(lambda x: outer(x, at_optimum), X), *parts, sigma) - exact
    # y_sigma - y* = -sigma (H + sigma)^-1 f_y, and dg/dx(x, y) = -A' H (y - A x)
    expected = -sigma * A.T @ torch.linalg.solve(H + sigma * ONE, f_y)
    torch.testing.assert_close(error, expected, rtol=1e-9, atol=1e-13 / sigma)


def test_with_the_outer_slope_at_the_penalised_point_it_is_the_gradient_of_the_penalised_problem():
    sigma = 0.3
    moved = best_for_both(X, sigma)
    parts = [slope(lambda x, y=y: inner(x, y), X) for y in (moved, A @ X)]
    found = first_order(slope(lambda x: outer(x, moved), X), *parts, sigma)
    both = lambda x: (sigma * outer(x, best_for_both(x, sigma)) + inner(x, best_for_both(x, sigma))) / sigma  # noqa: E731
    torch.testing.assert_close(found, slope(both, X), **EXACT)


# --- policies by enumeration ------------------------------------------------------------------------------------------

REFERENCE = drawn(6, seed=5).log_softmax(0)
REWARDS = drawn(6, 4, seed=6)
REWARDS[2, 3] = REWARDS[4, 3]  # the judge is indifferent between two
WEIGHTS = torch.tensor([0.2, 0.3, 0.1, 0.4], dtype=torch.float64)


def optimum(weights, rewards=REWARDS, reference=REFERENCE, beta=BETA):
    return (reference + rewards @ weights / beta).softmax(-1)


def loss_at(form, weights, y, rewards=REWARDS):
    """f, term by term; the judge is the last objective."""
    judged, total = rewards[:, -1], rewards @ weights
    if form == "return":
        return -(y @ judged)
    found = 0.0
    for a, b in product(range(len(y)), repeat=2):
        if judged[a] != judged[b]:
            margin = (total[a] - total[b]) / TAU * (1 if judged[a] > judged[b] else -1)
            found = found - y[a] * y[b] * torch.nn.functional.logsigmoid(margin)
    return found


def exact(form, weights=WEIGHTS, rewards=REWARDS, reference=REFERENCE):
    return slope(lambda w: loss_at(form, w, optimum(w, rewards, reference), rewards), weights)


def outer_loss(form, y, weights=WEIGHTS):
    if form == "return":
        return lost_return(y, REWARDS, REWARDS[:, -1])
    return disagreement(independent(y), REWARDS, REWARDS[:, -1], weights, TAU)


@pytest.mark.parametrize("form", FORMS)
def test_an_outer_loss_its_slopes_and_its_direct_part_are_those_of_its_definition(form):
    y = optimum(WEIGHTS)
    found = outer_loss(form, y)
    torch.testing.assert_close(found.value, loss_at(form, WEIGHTS, y), **EXACT)
    torch.testing.assert_close(found.slopes, slope(lambda p: loss_at(form, WEIGHTS, p), y), **EXACT)
    torch.testing.assert_close(found.direct, slope(lambda w: loss_at(form, w, y) + 0 * w.sum(), WEIGHTS), **EXACT)
    euler = y @ found.slopes  # of a function that is homogeneous of this degree
    torch.testing.assert_close(euler, found.degree * found.value, **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_the_hypergradient_becomes_that_of_autograd_and_its_error_halves_with_sigma(form):
    y = optimum(WEIGHTS)
    found = {sigma: hypergradient(y, REWARDS, outer_loss(form, y), BETA, sigma) for sigma in (1e-3, 5e-4, 1e-7)}
    coarse, fine, finest = (found[sigma] - exact(form) for sigma in found)
    torch.testing.assert_close(coarse / fine, torch.full_like(fine, 2.0), rtol=0.02, atol=0)
    assert finest.abs().max() < 2e-4 * coarse.abs().max()  # 1e-7 is 1e-4 of 1e-3


def test_of_the_return_it_is_a_covariance_and_for_any_sigma_the_gradient_of_the_penalised_problem():
    y = optimum(WEIGHTS)
    centred = REWARDS - y @ REWARDS
    torch.testing.assert_close(-(y * centred[:, -1]) @ centred / BETA, exact("return"), **EXACT)
    # min_y g = -beta log Z(w . r), and sigma f is sigma more of the judge's reward
    sigma, judge = 0.5, torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    free = lambda w: -BETA * (REFERENCE + REWARDS @ w / BETA).logsumexp(0)  # noqa: E731
    expected = slope(lambda w: (free(w + sigma * judge) - free(w)) / sigma, WEIGHTS)
    torch.testing.assert_close(hypergradient(y, REWARDS, outer_loss("return", y), BETA, sigma), expected, **EXACT)
    torch.testing.assert_close(penalised(y, -REWARDS[:, -1], sigma / BETA), optimum(WEIGHTS + sigma * judge), **EXACT)


# --- the rule ---------------------------------------------------------------------------------------------------------


def rule_for(form, **options):
    given = {"outer": "judge", "loss": form, "beta": BETA, "tau": TAU, "sigma": 1e-6, "rate": 1.0, "floor": 0.0}
    return LearnedWeights(**given | options)


def after(rule, preference, rounds, state=None):
    """The state after rounds of (rewards, groups); it goes through JSON in between."""
    rule.check(preference)
    state = rule.init(preference) if state is None else state
    for number, (rewards, groups) in enumerate(rounds):
        seen = Round(number, rewards, groups, rewards.mean(0), tuple(preference.values))
        state = rule.observe(json.loads(json.dumps(state)), seen)
    return state


def weights_in(state):
    return torch.tensor([state["weights"][name] for name in state["objectives"]], dtype=torch.float64)


def moved(rule, preference, rewards, groups):
    """By how much more the logarithm of each weight has risen than that of the first."""
    before, after_it = weights_in(rule.init(preference)), weights_in(after(rule, preference, [(rewards, groups)]))
    steps = (after_it / before).log()
    return steps - steps[0]


@pytest.mark.parametrize(("form", "samples"), [("return", 2), ("return", 3), ("preference", 3), ("preference", 4)])
def test_what_samples_say_is_right_on_average(form, samples):
    """Over all that could be sampled from the optimum, for three responses: each outcome by its probability."""
    rewards, reference = REWARDS[1:4], REFERENCE[1:4]
    y, rule = optimum(WEIGHTS, rewards, reference), rule_for(form)
    mean = torch.zeros(4, dtype=torch.float64)
    for chosen in product(range(3), repeat=samples):
        rows = torch.tensor(chosen)
        mean += y[rows].prod() * moved(rule, UNEVEN, rewards[rows], torch.zeros(samples, dtype=torch.int64))
    expected = -exact(form, WEIGHTS, rewards, reference)
    torch.testing.assert_close(mean, expected - expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_prompts_count_alike_whatever_their_responses_and_single_ones_say_nothing(form):
    rule, rewards = rule_for(form), drawn(12, 4, seed=7)
    groups = torch.tensor([5, 5, 5, 9, 9, 9, 9, 9, 9, 9, 9, 2])
    each = [moved(rule, UNEVEN, rewards[groups == group], groups[groups == group]) for group in (5, 9)]
    torch.testing.assert_close(moved(rule, UNEVEN, rewards, groups), sum(each) / 2, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("preference", [EVEN, UNEVEN])
def test_rewards_that_do_not_vary_within_prompts_leave_the_weights(form, preference):
    rewards, groups = drawn(4, 4).repeat_interleave(3, 0), torch.arange(4).repeat_interleave(3)
    state = after(rule_for(form, sigma=0.01), preference, [(rewards, groups)] * 3)
    torch.testing.assert_close(weights_in(state), weights_in({**state, "weights": preference.values}), **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_weights_stay_on_the_simplex_above_their_floor_and_what_has_none_gets_none(form):
    rule = rule_for(form, sigma=0.01, rate=5.0, floor=0.2)
    preference, groups = Preference("weights", {"a": 0.6, "b": 0.1, "c": 0.3, "judge": 0.0}), torch.arange(20) % 5
    state, first = None, torch.tensor([0.6, 0.1, 0.3, 0.0], dtype=torch.float64)
    at_floor = 0
    for number in range(12):
        state = after(rule, preference, [(drawn(20, 4, seed=number), groups)], state)
        weights = weights_in(state)
        assert weights.sum().item() == pytest.approx(1, rel=1e-12) and weights[3] == 0
        assert (weights >= 0.2 * first * (1 - 1e-12)).all()
        at_floor += int((weights[:3] <= 0.2 * first[:3] * (1 + 1e-12)).sum())
    assert at_floor > 0


@pytest.mark.parametrize("form", FORMS)
def test_what_the_judge_says_gains_weight_and_its_opposite_loses(form):
    names = ("same", "contrary", "flat", "judge")
    preference = Preference("weights", {"same": 0.3, "contrary": 0.3, "flat": 0.4, "judge": 0.0})
    groups, found = torch.arange(12) % 3, []
    for seed in range(10):
        judged = drawn(12, 1, seed=seed)
        rewards = torch.cat([judged, -judged, 0 * judged, judged], 1)
        found.append(after(rule_for(form, beta=1.0, sigma=0.01), preference, [(rewards, groups)])["weights"])
    assert all(tuple(weights) == names for weights in found)
    assert all(weights["same"] > 0.3 > weights["contrary"] for weights in found)
    assert all(weights["same"] / weights["flat"] > 0.75 > weights["contrary"] / weights["flat"] for weights in found)


def test_a_judge_with_weight_takes_part_and_the_only_one_with_weight_keeps_it():
    rewards, groups = drawn(12, 4), torch.arange(12) % 3
    (gaining,) = [after(rule_for("return"), UNEVEN, [(rewards, groups)])["weights"]["judge"]]
    assert gaining > 0.4  # nothing covaries more with the judge's rewards here
    alone = Preference("weights", {"a": 0.0, "b": 1.0, "c": 0.0, "judge": 0.0})
    state = after(rule_for("preference"), alone, [(rewards, groups)] * 3)
    assert state["weights"] == alone.values


@pytest.mark.parametrize("form", FORMS)
def test_the_signal_is_the_sum_by_the_learned_weights_and_the_outer_loss_is_told(form):
    rule, rewards, groups = rule_for(form), drawn(12, 4), torch.arange(12) % 3
    start, state = rule.init(EVEN), after(rule, EVEN, [(rewards, groups)])
    shown = weights_in(start).expand_as(rewards)
    assert torch.equal(rule.signal(rewards, shown, groups, start), Linear().scalarise(rewards, shown))
    torch.testing.assert_close(rule.signal(rewards, shown, groups, state), rewards @ weights_in(state), **EXACT)
    if form == "return":
        assert state["outer_loss"] == pytest.approx(-rewards[:, 3].mean().item(), rel=1e-12)
    else:  # of different responses, 4 to each prompt, where f counts each also with itself
        y = torch.full((4,), 0.25, dtype=torch.float64)
        each = [loss_at(form, weights_in(start), y, rewards[groups == group]) for group in range(3)]
        assert state["outer_loss"] == pytest.approx(float(sum(each)) / 3 * 4 / 3, rel=1e-12)


# --- what it learns ---------------------------------------------------------------------------------------------------


def sampled(y, size, shift):
    """So many responses [size], each as often as its probability asks, but for rounding."""
    places = (torch.arange(size, dtype=torch.float64) + shift) / size
    return torch.searchsorted(y.cumsum(0), places).clamp(max=len(y) - 1)


def world():
    """Four prompts of ten responses: the judge likes a, ever less of it, and b, not c, and has a taste of its own.

    The outer losses are not convex; from equal weights, those of this world have but one place to go down to.
    """
    rewards = drawn(4, 10, 4, seed=13)
    rewards[..., 3] = (
        0.8 * rewards[..., 0].tanh() + 0.5 * rewards[..., 1] - 0.4 * rewards[..., 2] + 0.3 * rewards[..., 3]
    )
    return rewards, drawn(4, 10, seed=14).log_softmax(-1)


@pytest.mark.parametrize("form", FORMS)
def test_on_a_policy_that_follows_its_weights_it_finds_nearly_the_best_of_a_grid(form):
    rewards, references = world()

    def lost(weights):
        prompts = zip(rewards, references, strict=True)
        return float(sum(loss_at(form, weights, optimum(weights, *each), each[0]) for each in prompts)) / 4

    rule, state = rule_for(form, sigma=0.01, rate=0.5 if form == "return" else 2.0), None
    groups, shifts = torch.arange(4).repeat_interleave(40), torch.Generator().manual_seed(0)
    for _ in range(150):
        weights = weights_in(state or rule.init(EVEN))
        policies = [optimum(weights, *each) for each in zip(rewards, references, strict=True)]
        shift = torch.rand((), generator=shifts, dtype=torch.float64)
        rows = [own[sampled(y, 40, shift)] for own, y in zip(rewards, policies, strict=True)]
        state = after(rule, EVEN, [(torch.cat(rows), groups)], state)
    steps = 20
    grid = [(a, b, steps - a - b) for a in range(steps + 1) for b in range(steps + 1 - a)]
    best = min(lost(torch.tensor([*each, 0], dtype=torch.float64) / steps) for each in grid)
    start, end = lost(weights_in(rule.init(EVEN))), lost(weights_in(state))
    assert end < start and end - best < 0.01 * (start - best)
    assert weights_in(state)[:2].min() > 0.2  # not at an end


# --- what goes in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preference", "words"),
    [
        (Preference("direction", {"a": 0.6, "judge": 0.8}), "has no meaning for direction.*'linear' and 'gdpo'"),
        (Preference("thresholds", {"judge": 0.5}), "has no meaning for thresholds.*'lagrangian'"),
        (Preference("weights", {"a": 0.5, "b": 0.5}), "outer: there is no objective 'judge'; known: a, b"),
    ],
)
def test_preferences_without_a_meaning_are_refused(preference, words):
    with pytest.raises(PreferenceError, match=f"combiner 'learned-weights'.*{words}|{words}"):
        rule_for("return").check(preference)


@pytest.mark.parametrize(
    "options", [{"beta": 0.0}, {"sigma": 0.0}, {"tau": 0.0}, {"rate": 0.0}, {"floor": 1.0}, {"loss": "regret"}]
)
def test_options_out_of_their_range_are_refused(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        rule_for("return", **options)


@pytest.mark.parametrize(("form", "least"), [("return", 2), ("preference", 3)])
def test_too_few_responses_to_each_prompt_are_said(form, least):
    groups = torch.arange(3).repeat_interleave(least - 1)
    words = (
        rf"'{form}' learns from {least} or more .* has more than {least - 1}; set rollouts.samples to {least} or more"
    )
    with pytest.raises(PluginError, match=words):
        after(rule_for(form), EVEN, [(drawn(len(groups), 4), groups)])


@pytest.mark.parametrize("form", FORMS)
def test_it_conforms(form):
    check_combiner(LearnedWeights(outer="concise", beta=0.1, loss=form))
    check_combiner(rule_for(form, outer="concise"))


# --- runs -------------------------------------------------------------------------------------------------------------

ROUNDS = {"rounds": 3, "samples": 4, "prompts": 3, "max_new_tokens": 8}


def test_an_unknown_judge_is_said_before_a_model_is_loaded(tiny_model_path, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"q{n}: "}) + "\n" for n in range(10)))
    changes = {
        "objectives": {name: {"reward": "length"} for name in ("helpful", "harmless")},
        "rollouts": ROUNDS,
        "loss": "rloo",
        "combine": {"name": "learned-weights", "outer": "helpfull", "beta": 0.05},
    }
    config = small_config(tiny_model_path, tmp_path / "prompts.jsonl", **changes)
    words = "combiner 'learned-weights', outer: there is no objective 'helpfull'; known: harmless, helpful"
    with pytest.raises(PreferenceError, match=words):
        prepare(config, registry.discover())


@pytest.mark.parametrize("form", FORMS)
def test_one_line_has_the_assistant_learn_weights(tmp_path, form):
    """A reply with a kind word is right; the judge says so and takes no part in the sum."""
    lines = steps_on_the_assistant(
        tmp_path,
        objectives={
            "helpful": {"reward": {"name": "tiny-assistant", "objective": "helpful"}},
            "harmless": {"reward": {"name": "tiny-assistant", "objective": "harmless"}},
            "right": {"reward": {"name": "regex", "pattern": "(Good luck|Stay safe)"}},
        },
        preferences={"even": {"helpful": 0.5, "harmless": 0.5, "right": 0.0}},
        search="listed",
        rollouts=ROUNDS,
        train={"steps": 3, "lr": 1e-3},
        loss={"name": "rloo", "beta": 0.08},
        combine={"name": "learned-weights", "outer": "right", "beta": 0.08, "loss": form},
    )
    found = [[line[f"combine/weights/{name}"] for name in ("helpful", "harmless", "right")] for line in lines]
    assert len(found) == 3 and all(sum(weights) == pytest.approx(1, rel=1e-12) for weights in found)
    assert all(weights[2] == 0 and min(weights[:2]) >= 0.05 for weights in found)
    assert any(first != second for first, second in pairwise([[0.5, 0.5, 0.0], *found]))
    if form == "return":
        expected = [-line["right/reward"] for line in lines]
        assert [line["combine/outer_loss"] for line in lines] == pytest.approx(expected, rel=1e-12)
