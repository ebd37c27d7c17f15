"""Rules for sampled responses that remember: what their state becomes, round by round."""

from __future__ import annotations

import json
from itertools import combinations, pairwise, product
from math import tanh

import numpy as np
import pytest
import torch

from moalign.api import PluginError, Preference, PreferenceError, Round
from moalign_plugins.combiners._simplex import ascended, floored
from moalign_plugins.combiners.dynamic_gradient import DynamicGradient, shortened
from moalign_plugins.combiners.dynamic_hypervolume import DynamicHypervolume, widened
from moalign_plugins.combiners.lagrangian import Lagrangian
from moalign_plugins.combiners.linear import Linear
from moalign_plugins.combiners.log_sigmoid import LogSigmoid
from moalign_plugins.combiners.schedule import Schedule

NAMES = ("a", "b", "c")
EXACT = {"rtol": 1e-12, "atol": 1e-12}
EQUAL = Preference("weights", {"a": 0.5, "b": 0.5})
THIRDS = Preference("weights", dict.fromkeys(NAMES, 1 / 3))


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def drawn(rows=40, objectives=3, seed=0):
    return torch.randn(rows, objectives, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def states(rule, preference, rewards, grams=None):
    """After each of the rounds, whose rewards are [N,M]; the state goes through JSON in between."""
    rule.check(preference)
    state, found = rule.init(preference), []
    names = NAMES[: rewards[0].shape[1]]
    for number, values in enumerate(rewards):
        groups = torch.zeros(len(values), dtype=torch.int64)
        gram = None if grams is None else grams[number]
        seen = Round(number, values, groups, rewards[0].mean(0), names, gram)
        state = rule.observe(json.loads(json.dumps(state)), seen)
        found.append(state)
    return found


def signal(rule, preference, rewards, state):
    weights = tensor(preference.vector(NAMES[: rewards.shape[1]])).expand_as(rewards)
    return rule.signal(rewards, weights, torch.zeros(len(rewards), dtype=torch.int64), state)


# --- log-sigmoid ------------------------------------------------------------------------------------------------------


def test_log_sigmoid_is_the_log_of_a_product_and_keeps_the_first_rounds_reference():
    first, second = drawn(), drawn(seed=1) + 3
    rule = LogSigmoid(slope=2.0)
    start, then = states(rule, THIRDS, [first, second])
    assert start == then
    reference = tensor(np.percentile(first.numpy(), 85, axis=0))
    torch.testing.assert_close(tensor(start["reference"]), reference, **EXACT)
    found = signal(rule, THIRDS, second, then)
    probability = torch.sigmoid(2 * (second - reference))
    torch.testing.assert_close(found, probability.prod(1).log() / 3, **EXACT)
    assert (found < 0).all()


def test_log_sigmoid_gains_ever_less_above_and_is_linear_far_below_its_reference():
    rule = LogSigmoid(reference={"b": 1.0, "a": 0.0})
    rewards = tensor([[-4.0, 1.0], [0.0, 1.0], [3.0, 1.0]]).requires_grad_()
    found = signal(rule, EQUAL, rewards, states(rule, EQUAL, [rewards.detach()])[0])
    (slopes,) = torch.autograd.grad(found.sum(), rewards)
    torch.testing.assert_close(slopes[:, 0], torch.sigmoid(-rewards.detach()[:, 0]) / 2, **EXACT)
    torch.testing.assert_close(slopes[:, 1], tensor([0.25] * 3), **EXACT)  # at its own reference
    far = tensor([[-1000.0, 1.0], [-1001.0, 1.0]])
    below = signal(rule, EQUAL, far, rule.init(EQUAL))
    assert (below[0] - below[1]).item() == pytest.approx(0.5, rel=1e-9)


# --- thresholds -----------------------------------------------------------------------------------------------------

BOUND = Preference("thresholds", {"b": 0.5})


def test_multipliers_ascend_on_the_shortfall_and_stop_at_0_and_at_the_cap():
    means = [0.1, 0.3, 0.5, 2.0, 0.0, 0.0, -9.0]
    rewards = [tensor([[0.0, mean - 1], [0.0, mean + 1]]) for mean in means]
    rule = Lagrangian(rate=0.5, start=0.2, cap=1.0)
    found = [state["multipliers"]["b"] for state in states(rule, BOUND, rewards)]
    expected = [0.2 + 0.5 * 0.4]
    for mean in means[1:]:
        expected.append(min(1.0, max(0.0, expected[-1] + 0.5 * (0.5 - mean))))
    assert found == pytest.approx(expected, rel=1e-12) and 0.0 in found and found[-1] == 1.0
    assert states(Lagrangian(), BOUND, rewards)[-1]["multipliers"]["b"] > 1.0  # without a cap


@pytest.mark.parametrize("rescale", [False, True])
def test_the_signal_is_the_lagrangian(rescale):
    preference, rewards = Preference("thresholds", {"a": -1.0, "c": 0.25}), drawn()
    rule = Lagrangian(rescale=rescale)
    state = rule.init(preference) | {"multipliers": {"c": 3.0, "a": 0.5}}
    expected = rewards[:, 1] + 0.5 * (rewards[:, 0] + 1) + 3 * (rewards[:, 2] - 0.25)
    torch.testing.assert_close(signal(rule, preference, rewards, state), expected / (4.5 if rescale else 1), **EXACT)


def test_on_a_policy_that_follows_its_signal_the_threshold_is_met_exactly_or_the_multiplier_is_0():
    """pi = ref exp(signal / beta) / Z is the best policy for each signal: dual ascent finds the constrained optimum."""
    rewards, beta = tensor([[1.0, 0.0], [0.6, 0.7], [0.0, 1.0]]), 0.2
    for bound, rescale in product((0.5, 0.05), (False, True)):
        preference, rule = Preference("thresholds", {"b": bound}), Lagrangian(rate=1.0, rescale=rescale)
        state = rule.init(preference)
        for number in range(400):
            policy = (signal(rule, preference, rewards, state) / beta).softmax(0)
            expected = policy @ rewards  # a round with so many responses of each kind
            seen = Round(number, expected[None], torch.zeros(1, dtype=torch.int64), expected, ("a", "b"))
            state = rule.observe(state, seen)
        slack, multiplier = expected[1].item() - bound, state["multipliers"]["b"]
        assert (multiplier > 0.1 and abs(slack) < 1e-6) if bound == 0.5 else (multiplier == 0 and slack > 0.01)


def test_weights_are_the_plain_weighted_sum_and_directions_are_refused():
    rule, rewards = Lagrangian(start=2.0), drawn()
    (state,) = states(rule, THIRDS, [rewards])
    assert state == {"bounded": [], "thresholds": {}, "multipliers": {}}
    assert torch.equal(signal(rule, THIRDS, rewards, state), signal(Linear(), THIRDS, rewards, {}))
    with pytest.raises(PreferenceError, match=r"'lagrangian' has no meaning for direction .*thresholds or weights"):
        rule.check(Preference("direction", {"a": 0.6, "b": -0.8}))


# --- schedule -------------------------------------------------------------------------------------------------------


def test_weights_go_from_the_start_to_the_preference():
    preference = Preference("weights", {"a": 0.9, "b": 0.1})
    found = [state["weights"] for state in states(Schedule(rounds=4), preference, [drawn(objectives=2)] * 6)]
    assert [weights["a"] for weights in found] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 0.9], rel=1e-12)
    assert found[-1] == preference.values and found[0] == {"a": 0.5, "b": 0.5}
    assert all(sum(weights.values()) == pytest.approx(1, rel=1e-12) for weights in found)
    rule = Schedule(rounds=1, start={"b": 1.0})
    rewards, (first, second) = drawn(objectives=2), states(rule, preference, [drawn(objectives=2)] * 2)
    torch.testing.assert_close(signal(rule, preference, rewards, first), rewards[:, 1], **EXACT)
    torch.testing.assert_close(signal(rule, preference, rewards, second), rewards @ tensor([0.9, 0.1]), **EXACT)


@pytest.mark.parametrize("start", [{"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": 0.5, "d": 0.5}, {}])
def test_a_start_that_is_no_preference_is_refused(start):
    with pytest.raises(PreferenceError, match="combiner 'schedule', start"):
        Schedule(start=start).check(EQUAL)


# --- hypervolume ----------------------------------------------------------------------------------------------------


def volume(points):
    """Above the origin, by inclusion and exclusion over the boxes between it and each point."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for chosen in combinations(points, size):
            total += (-1) ** (size + 1) * np.prod(np.clip(np.min(chosen, axis=0), 0, None))
    return total


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_contributions_add_up_to_the_volume_of_all_points(objectives):
    points = (drawn(9, objectives, seed=objectives) + 0.5).tolist()
    front, known = [], []
    for point in points:
        contribution, front = widened(front, point)
        known.append(point)
        assert contribution == pytest.approx(volume(known) - volume(known[:-1]), rel=1e-9, abs=1e-12)
        assert volume(front) == pytest.approx(volume(known), rel=1e-9, abs=1e-12)
    assert 0 < len(front) < len(points)


def test_a_point_below_the_reference_neither_adds_nor_takes_volume():
    """{(1, -1), (0.5, 0.5)} is 0.25, not -0.25."""
    contribution, front = widened([[0.5, 0.5]], [1.0, -1.0])
    assert contribution == 0 and front == [[0.5, 0.5]]
    assert widened([], [1.0, -1.0]) == (0.0, [])
    assert widened([[0.5, 0.5]], [0.5, 0.5]) == (0.0, [[0.5, 0.5]])


def at(means, rows=4):
    """A round with these mean rewards, each objective with the standard deviation 1."""
    away = tensor([[1.0], [-1.0]]).repeat(rows // 2, 1) * ((rows - 1) / rows) ** 0.5
    return tensor(means) + away


def test_the_factor_follows_the_volume_that_a_round_adds():
    rounds = [at(means) for means in ([5.0, 1.0], [5.5, 1.5], [5.2, 1.2], [6.0, 0.9], [7.0, 3.0])]
    found = states(DynamicHypervolume(), EQUAL, rounds)
    assert found[0]["scale"] == pytest.approx([1.0, 1.0], rel=1e-12)
    added = [state["contribution"] for state in found]
    assert added == pytest.approx([0, 0.25, 0, 0, 4 - 0.25], rel=1e-9)
    rule = DynamicHypervolume()
    factors = [rule.multiplier(state) for state in found]
    assert factors == pytest.approx([1.0, *(0.5 + 1.5 * tanh(each) for each in added[1:])], rel=1e-9)
    assert factors[2] == factors[3] == 0.5  # dominated, and worse than the start in one objective
    assert found[-1]["front"] == [pytest.approx([2.0, 2.0], rel=1e-12)]
    rewards = drawn(objectives=2)
    torch.testing.assert_close(signal(rule, EQUAL, rewards, found[-1]), rewards.mean(1), **EXACT)


def test_the_factor_grows_with_the_volume_and_stays_below_2():
    factors = []
    for height in (0.0, 0.1, 0.5, 1.0, 2.0, 30.0):
        state = states(DynamicHypervolume(), EQUAL, [at([0.0, 0.0]), at([height, height])])[-1]
        factors.append(DynamicHypervolume().multiplier(state))
    assert factors[0] == 0.5 and factors[-1] <= 2.0
    assert all(later > earlier for earlier, later in pairwise(factors))


def test_the_unit_of_a_reward_does_not_change_the_factor():
    rounds = [drawn(objectives=2) + shift for shift in (0.0, 0.4, 0.7)]
    expected = [state["multiplier"] for state in states(DynamicHypervolume(), EQUAL, rounds)]
    tokens = [rewards * tensor([500.0, 1.0]) - tensor([80.0, 0.0]) for rewards in rounds]
    found = [state["multiplier"] for state in states(DynamicHypervolume(), EQUAL, tokens)]
    assert found == pytest.approx(expected, rel=1e-9) and len(set(expected)) == 3
    declared = DynamicHypervolume(scale={"b": 2.0, "a": 1000.0})
    spread = [tensor([[0.0, 0.0]]), tensor([[500.0, 2.0]])]  # one response: its spread would be unknown
    assert states(declared, EQUAL, spread)[-1]["contribution"] == pytest.approx(0.5, rel=1e-12)


def test_objectives_without_weight_are_not_part_of_the_volume():
    preference = Preference("weights", {"a": 0.5, "b": 0.0, "c": 0.5})
    rounds = [at([0.0, 0.0, 0.0]), at([0.5, -7.0, 0.4])]
    assert states(DynamicHypervolume(), preference, rounds)[-1]["contribution"] == pytest.approx(0.2, rel=1e-9)


def test_rewards_without_any_spread_need_a_scale():
    with pytest.raises(PluginError, match="all responses of the first round have the same b; say under scale"):
        states(DynamicHypervolume(), EQUAL, [tensor([[1.0, 2.0], [0.0, 2.0]])])
    with pytest.raises(PreferenceError, match="it must be above 0, not -1"):
        DynamicHypervolume(scale={"a": 1.0, "b": -1.0}).check(EQUAL)


# --- gradients ------------------------------------------------------------------------------------------------------

WEIGHTS = tensor([0.2, 0.5, 0.3])
GRADIENTS = drawn(3, 6)


def test_it_is_exponentiated_gradient_ascent_on_the_simplex():
    gram = GRADIENTS @ GRADIENTS.T
    influence = GRADIENTS @ GRADIENTS.sum(0)  # the diagonal included
    expected = WEIGHTS * (0.1 * influence).exp()
    found = ascended(WEIGHTS, gram.sum(1), 0.1)
    torch.testing.assert_close(found, expected / expected.sum(), **EXACT)
    assert found.sum().item() == pytest.approx(1, rel=1e-12) and (found > 0).all()
    order = influence.argsort()
    assert (found / WEIGHTS)[order].diff().gt(0).all()  # more influence, more weight


def test_identical_and_cancelling_gradients_leave_the_weights():
    same = GRADIENTS[:1].expand(3, 6)
    torch.testing.assert_close(ascended(WEIGHTS, (same @ same.T).sum(1), 5.0), WEIGHTS, **EXACT)
    cancelling = torch.stack([GRADIENTS[0], GRADIENTS[1], -GRADIENTS[0] - GRADIENTS[1]])
    torch.testing.assert_close(
        ascended(WEIGHTS, (cancelling @ cancelling.T).sum(1), 1.0), WEIGHTS, rtol=1e-9, atol=1e-12
    )


def test_gradients_are_cut_to_a_length_in_their_inner_products():
    lengths = GRADIENTS.norm(dim=1, keepdim=True)
    longest = float(lengths.median())
    cut = GRADIENTS * (longest / lengths).clamp(max=1)
    torch.testing.assert_close(shortened(GRADIENTS @ GRADIENTS.T, longest), cut @ cut.T, **EXACT)
    assert torch.equal(shortened(torch.zeros(2, 2), 1.0), torch.zeros(2, 2))


def test_the_floor_holds_and_is_the_nearest_point_that_does():
    floors = tensor([0.05, 0.1, 0.2])
    assert torch.equal(floored(tensor([0.3, 0.4, 0.3]), floors), tensor([0.3, 0.4, 0.3]))
    torch.testing.assert_close(
        floored(tensor([0.01, 0.7, 0.29]), floors), tensor([0.05, 0.95 * 70 / 99, 0.95 * 29 / 99])
    )
    found = floored(tensor([0.01, 0.79, 0.2]), floors)  # shrinking takes the third below its floor
    torch.testing.assert_close(found, tensor([0.05, 0.75, 0.2]), **EXACT)
    weights = tensor([0.01, 0.79, 0.2])
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, 201).double()] * 2)
    grid = torch.cat([grid, 1 - grid.sum(1, keepdim=True)], 1)
    grid = grid[(grid >= floors).all(1)]
    kl = lambda point: (point * (point / weights).log()).sum(-1)  # noqa: E731
    assert kl(grid).min() >= kl(found) - 1e-12


def test_weights_move_round_by_round_and_never_below_their_floor():
    gram = tensor([[4.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 9.0]])
    preference = Preference("weights", {"a": 0.75, "b": 0.25, "c": 0.0})
    rule = DynamicGradient(step=0.5, max_norm=None, floor=0.2)
    rounds, grams = [drawn()] * 12, [gram] * 12
    found = [state["weights"] for state in states(rule, preference, rounds, grams)]
    torch.testing.assert_close(
        tensor(list(found[0].values())),
        torch.cat([ascended(tensor([0.75, 0.25]), gram[:2, :2].sum(1), 0.5), tensor([0.0])]),
    )
    assert all(weights["c"] == 0 for weights in found)
    assert found[-1] == pytest.approx({"a": 0.95, "b": 0.05, "c": 0.0}, rel=1e-9)
    free = states(rule.model_copy(update={"floor": 0.0}), preference, rounds, grams)[-1]["weights"]
    assert 0 < free["b"] < 1e-4
    torch.testing.assert_close(
        signal(rule, preference, rounds[0], {**rule.init(preference), "weights": found[-1]}),
        rounds[0] @ tensor([0.95, 0.05, 0.0]),
        rtol=1e-9,
        atol=1e-9,
    )


def test_one_hot_stays_one_hot():
    alone = Preference("weights", {"a": 0.0, "b": 1.0, "c": 0.0})
    grams = [GRADIENTS @ GRADIENTS.T] * 3
    assert states(DynamicGradient(), alone, [drawn()] * 3, grams)[-1]["weights"] == {"a": 0.0, "b": 1.0, "c": 0.0}


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (None, "nobody has measured their inner products"),
        (torch.zeros(2, 2), r"must be \[3,3\] and finite"),
        (torch.full((3, 3), torch.nan), r"must be \[3,3\] and finite"),
    ],
)
def test_without_inner_products_it_says_so(gram, message):
    with pytest.raises(PluginError, match=message):
        states(DynamicGradient(), THIRDS, [drawn()], [gram])
    assert DynamicGradient.needs_gram
