"""The logarithmic barrier: its gradient, its limits, and a policy that follows it."""

from __future__ import annotations

import json

import pytest
import torch

from moalign.api import Preference, PreferenceError, Round
from moalign.testing import check_combiner
from moalign_plugins.combiners.interior_point import InteriorPoint
from moalign_plugins.combiners.lagrangian import Lagrangian
from moalign_plugins.combiners.linear import Linear

NAMES = ("a", "b", "c")
EXACT = {"rtol": 1e-12, "atol": 1e-12}
BOUNDS = Preference("thresholds", {"a": 0.1, "c": -0.3})
# Rewards [Y,M] of five responses; all of a policy's responses are these.
REWARDS = torch.tensor(
    [[0.9, 0.0, -0.2], [0.5, 0.8, 0.1], [0.1, 1.0, -0.9], [0.3, 0.4, 0.6], [-0.4, 0.7, 0.2]], dtype=torch.float64
)


def after(rule, preference, means, state=None):
    """The state after a round whose means are these."""
    row = torch.tensor([means], dtype=torch.float64)
    state = rule.init(preference) if state is None else state
    seen = Round(0, row, torch.zeros(1, dtype=torch.int64), row[0], NAMES)
    return rule.observe(json.loads(json.dumps(state)), seen)


def signal(rule, preference, state, rewards=REWARDS):
    vector = torch.tensor(preference.vector(NAMES), dtype=torch.float64).expand_as(rewards)
    return rule.signal(rewards, vector, torch.zeros(len(rewards), dtype=torch.int64), state)


def barrier(logits, t):
    """J of the policy softmax(logits) on the five responses."""
    a, b, c = logits.softmax(0) @ REWARDS
    return b + ((a - 0.1).log() + (c + 0.3).log()) / t


@pytest.mark.parametrize("t", [1.0, 20.0])
def test_following_the_signal_is_ascent_on_free_rewards_and_the_log_of_the_slack(t):
    """The policy gradient with the signal as reward, against finite differences of the barrier function."""
    logits = torch.tensor([0.3, -0.2, -1.0, 0.5, 0.1], dtype=torch.float64)
    policy = logits.softmax(0)
    rule = InteriorPoint(t=t, rescale=False)
    reward = signal(rule, BOUNDS, after(rule, BOUNDS, (policy @ REWARDS).tolist()))
    gradient = policy * (reward - policy @ reward)
    for index, step in enumerate(1e-6 * torch.eye(5, dtype=torch.float64)):
        measured = (barrier(logits + step, t) - barrier(logits - step, t)) / 2e-6
        assert gradient[index].item() == pytest.approx(measured.item(), rel=1e-6, abs=1e-9)


def test_a_tight_objective_is_pushed_up_and_never_a_free_one_held_back():
    rule = InteriorPoint(t=20.0, rescale=False)
    pushes = [after(rule, BOUNDS, [0.1 + slack, 0.0, 0.7])["multipliers"]["a"] for slack in (1.0, 0.1, 0.01, 0.002)]
    assert pushes == pytest.approx([0.05, 0.5, 5.0, 25.0], rel=1e-9)
    state = after(rule, BOUNDS, [0.15, -3.0, 0.7])
    assert state["slack"] == pytest.approx({"a": 0.05, "c": 1.0}) and list(state["multipliers"]) == ["a", "c"]
    expected = REWARDS[:, 1] + REWARDS[:, 0] / (20 * 0.05) + REWARDS[:, 2] / 20
    torch.testing.assert_close(signal(rule, BOUNDS, state), expected, **EXACT)


def test_what_misses_its_threshold_is_pushed_as_hard_as_at_the_floor_and_not_let_go():
    rule = InteriorPoint(t=20.0, floor=1e-3)
    hardest = 1 / (20 * 1e-3)
    for slack in (1e-3, 1e-4, 0.0, -0.5, -100.0):
        state = after(rule, BOUNDS, [0.1 + slack, 0.0, 0.7])
        assert state["multipliers"]["a"] == pytest.approx(hardest, rel=1e-9)
        assert state["slack"]["a"] == pytest.approx(slack, abs=1e-12)  # as it is, for the metrics
    assert rule.init(BOUNDS)["multipliers"] == pytest.approx({"a": hardest, "c": hardest})  # nothing was seen


def test_without_a_barrier_the_free_objectives_are_alone():
    rule = InteriorPoint(t=1e15)
    state = after(rule, BOUNDS, [0.3, 0.0, 0.7])
    torch.testing.assert_close(signal(rule, BOUNDS, state), REWARDS[:, 1], **EXACT)


def test_rescaled_it_stays_in_the_unit_of_the_rewards():
    rule = InteriorPoint()
    state = after(rule, BOUNDS, [-5.0, 0.0, 0.7])
    same = torch.full((2, 3), 0.8, dtype=torch.float64)
    torch.testing.assert_close(signal(rule, BOUNDS, state, same), same[:, 0], **EXACT)
    plain = signal(InteriorPoint(rescale=False), BOUNDS, state)
    torch.testing.assert_close(signal(rule, BOUNDS, state) * (1 + 50 + 0.05), plain, **EXACT)


@pytest.mark.parametrize("start", ["kept", "missed"])
def test_a_policy_that_follows_its_signal_ends_above_its_thresholds_near_the_constrained_optimum(start):
    """pi = ref exp(signal / beta) / Z for the mean of all signals so far (dual averaging)."""
    preference = Preference("thresholds", {"a": 0.4})
    rule, beta = InteriorPoint(t=50.0), 0.1
    multiplier, state = 1.0 if start == "kept" else 0.0, rule.init(preference)
    for number in range(1, 4000):
        policy = ((REWARDS[:, 1] + multiplier * REWARDS[:, 0]) / beta).softmax(0)
        state = after(rule, preference, (policy @ REWARDS).tolist(), state)
        # c, without a threshold, is free as well, and left out of what this policy follows
        multiplier += (state["multipliers"]["a"] - multiplier) / (number + 10)
    kept = (policy @ REWARDS)[0].item() - 0.4
    unbounded = (REWARDS[:, 1] / beta).softmax(0) @ REWARDS
    assert unbounded[0] < 0.4  # the threshold costs something
    assert 0 < kept < 0.05 and multiplier == pytest.approx(1 / (50 * kept), rel=0.05)


@pytest.mark.parametrize("weights", [(0.2, 0.5, 0.3), (0.0, 1.0, 0.0), (1 / 3, 1 / 3, 1 / 3)])
@pytest.mark.parametrize("rule", [InteriorPoint(), InteriorPoint(rescale=False), Lagrangian(start=1.0)])
def test_weights_are_the_linear_rule_bit_by_bit(rule, weights):
    preference = Preference("weights", dict(zip(NAMES, weights, strict=True)))
    rule.check(preference)
    state = after(rule, preference, [0.3, 0.2, 0.1])
    assert state["bounded"] == [] and state["multipliers"] == {}
    assert torch.equal(signal(rule, preference, state), signal(Linear(), preference, {}))


def test_directions_are_refused_and_the_others_conform():
    with pytest.raises(PreferenceError, match=r"'interior-point' has no meaning for direction.*thresholds or weights"):
        InteriorPoint().check(Preference("direction", {"a": 0.6, "b": -0.8, "c": 0.0}))
    for rule in (InteriorPoint(), InteriorPoint(t=0.5, floor=0.1, rescale=False)):
        check_combiner(rule)
