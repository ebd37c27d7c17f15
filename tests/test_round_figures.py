"""Every objective of a round is told raw, as its transforms left it, normalised and weighted; by closed forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from moalign.api import Combiner, Objective, Preference
from moalign.engine.advantages import Advantages
from moalign.engine.metrics import number
from moalign_plugins.combiners.gdpo import GDPO
from moalign_plugins.combiners.lagrangian import Lagrangian
from moalign_plugins.combiners.linear import Linear
from moalign_plugins.combiners.worst_case import WorstCase
from moalign_plugins.objectives.grpo import GRPO
from moalign_plugins.objectives.reinforce import REINFORCE
from moalign_plugins.objectives.rloo import RLOO

NAMES = ("a", "b")
REWARDS = np.array([[0.1, 2.0], [0.9, 1.0], [0.3, 0.0], [0.5, 1.5], [0.2, 0.4]])
GROUPS = np.array([3, 3, 3, 8, 8])
RATIOS = np.array([0.5, -0.2, 0.1, 0.0, 0.7])
LEANING = Preference("weights", {"a": 0.3, "b": 0.7})
EQUAL = Preference("weights", {"a": 0.5, "b": 0.5})


def figures(
    combiner: Combiner,
    preference: Preference = LEANING,
    objective: Objective | None = None,
    rewards: np.ndarray = REWARDS,
    **others: Any,
) -> dict[str, float]:
    rule = Advantages(RLOO() if objective is None else objective, combiner, preference, NAMES, "c")
    return rule.of(0, rewards, GROUPS, RATIOS, **others)[1]


def both(found: dict[str, float], what: str) -> list[float]:
    return [found[f"{name}/{what}"] for name in NAMES]


def from_mean(values: np.ndarray) -> np.ndarray:
    """The mean distance of each column from its mean."""
    return np.abs(values - values.mean(0)).mean(0)


def against_the_others(column: Sequence[float]) -> list[float]:
    """The reward less the mean of the others to the same prompt, by plain Python."""
    found = []
    for i, own in enumerate(column):
        others = [column[j] for j in range(len(column)) if j != i and GROUPS[j] == GROUPS[i]]
        found.append(own - sum(others) / len(others))
    return found


def test_raw_normalised_and_weighted_of_a_weighted_sum():
    found = figures(Linear())
    assert both(found, "reward") == pytest.approx(REWARDS.mean(0).tolist(), rel=1e-12)
    alone = [np.abs(against_the_others(column)).mean() for column in REWARDS.T.tolist()]
    assert both(found, "normalised") == pytest.approx(alone, rel=1e-12)  # the KL has no part in it
    assert both(found, "weighted") == pytest.approx((np.array([0.3, 0.7]) * from_mean(REWARDS)).tolist(), rel=1e-12)


@pytest.mark.parametrize("objective", [RLOO(), GRPO(), GRPO(kl="reward"), REINFORCE(baseline="none")])
def test_one_objective_alone_is_the_signal_and_its_advantages(objective):
    """The other one is told too, and makes nothing."""
    found = figures(Linear(), Preference("weights", {"a": 1.0, "b": 0.0}), objective)
    assert found["b/weighted"] == 0 < found["b/normalised"]
    assert found["a/weighted"] == pytest.approx(from_mean(REWARDS)[0], rel=1e-12)
    without_kl = Advantages(objective, Linear(), LEANING, NAMES, "c").of_each(REWARDS, GROUPS, 0 * RATIOS)
    assert both(found, "normalised") == pytest.approx(np.abs(without_kl).mean(1).tolist(), rel=1e-12)


def test_standardisation_makes_objectives_alike_and_weighting_after_it_not():
    """A reward in other units: alike normalised, but of the weighted sum it has as much more."""
    scaled = REWARDS * np.array([1.0, 1000.0])
    before, after = (figures(Linear(), EQUAL, GRPO(), rewards) for rewards in (REWARDS, scaled))
    assert both(after, "normalised") == pytest.approx(both(before, "normalised"), rel=1e-3)  # 1e-4 of the deviation
    assert after["b/weighted"] == pytest.approx(1000 * before["b/weighted"], rel=1e-9)
    before, after = (figures(GDPO(eps=1e-9), EQUAL, GRPO(), rewards) for rewards in (REWARDS, scaled))
    assert both(after, "weighted") == pytest.approx(both(before, "weighted"), rel=1e-6)


def test_what_decides_nothing_has_no_weight():
    """The worst of two, of which the second is never the worst: neither its own rewards nor their mean are below."""
    rewards = np.stack([REWARDS[:, 0], REWARDS[:, 1] + 5], axis=1)
    found = figures(WorstCase(), EQUAL, rewards=rewards)
    assert found["b/weighted"] == 0
    assert found["a/weighted"] == pytest.approx(from_mean(rewards)[0], rel=1e-12)


def test_a_multiplier_that_has_learned_is_the_weight():
    rule = Advantages(RLOO(), Lagrangian(rate=1.0, rescale=False), Preference("thresholds", {"b": 2.0}), NAMES, "c")
    found = rule.of(0, REWARDS, GROUPS, RATIOS)[1]
    multiplier = 2.0 - REWARDS[:, 1].mean()
    assert found["combine/multipliers/b"] == pytest.approx(multiplier)
    assert both(found, "weighted") == pytest.approx((np.array([1, multiplier]) * from_mean(REWARDS)).tolist())


def test_transformed_rewards_are_what_is_normalised_and_weighted():
    shaped = REWARDS * np.array([2.0, 0.5])
    found, plain = figures(Linear(), shaped=shaped), figures(Linear())
    assert both(found, "reward") == both(plain, "reward")
    for what in ("normalised", "weighted"):
        assert both(found, what) == pytest.approx((np.array([2, 0.5]) * both(plain, what)).tolist(), rel=1e-12)


class Fussy(Linear):
    """Has no answer where all rewards of an objective are the same."""

    def signal(self, rewards, preference, groups, state):
        if bool((rewards.std(0) == 0).any()):
            raise ZeroDivisionError("nothing to divide by")
        return super().signal(rewards, preference, groups, state)


def test_a_rule_without_an_answer_to_the_question_goes_on():
    found, plain = figures(Fussy()), figures(Linear())
    assert [number(value) for value in both(found, "weighted")] == ["nan", "nan"]  # as it stands in the metrics
    assert {name: value for name, value in found.items() if "weighted" not in name} == {
        name: value for name, value in plain.items() if "weighted" not in name
    }
