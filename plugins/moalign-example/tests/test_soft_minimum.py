from __future__ import annotations

from math import exp, log

import pytest
import torch
from moalign.api import Preference, PreferenceError
from moalign.testing import check_combiner

from moalign_example.soft_minimum import SoftMinimum

REWARDS = torch.tensor([[2.0, -1.0, 5.0], [0.5, 0.5, -3.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 0.8, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 10.0])
def test_conformance(sharpness):
    check_combiner(SoftMinimum(sharpness=sharpness))


def test_by_hand():
    expected = -log(0.2 * exp(-2 * 2.0) + 0.8 * exp(-2 * -1.0)) / 2
    assert SoftMinimum(sharpness=2).scalarise(REWARDS[0], WEIGHTS).item() == pytest.approx(expected, rel=1e-12)


def test_blunt_it_is_the_weighted_mean():
    """Up to s / 2 times the variance, here 1.44, and of higher order."""
    value = SoftMinimum(sharpness=1e-4).scalarise(REWARDS[0], WEIGHTS).item()
    assert value == pytest.approx(0.2 * 2 - 0.8 - 1e-4 / 2 * 1.44, abs=1e-7)


def test_sharp_it_is_the_worst_reward_with_weight():
    """Above it by at most -log(w) / s."""
    value = SoftMinimum(sharpness=1e3).scalarise(REWARDS, WEIGHTS)
    torch.testing.assert_close(value, torch.tensor([-1.0, 0.5], dtype=torch.float64), rtol=0, atol=-log(0.2) / 1e3)


def test_a_constant_added_to_all_rewards_is_added_to_it():
    rule = SoftMinimum(sharpness=3)
    moved = rule.scalarise(REWARDS + 100, WEIGHTS) - 100
    torch.testing.assert_close(moved, rule.scalarise(REWARDS, WEIGHTS), rtol=0, atol=1e-12)


def test_thresholds_are_refused():
    with pytest.raises(PreferenceError, match="not thresholds"):
        SoftMinimum().check(Preference("thresholds", {"helpful": 0.5}))
