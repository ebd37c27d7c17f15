"""MO-GRPO by name (arXiv 2503.21819): GRPO on the weighted sum of rewards, standardised after they are combined."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml

from moalign import config, recipes, registry
from moalign.api import Combiner, Preference
from moalign.engine.advantages import Advantages
from moalign.sweeps import front, run
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign_plugins.combiners.gdpo import GDPO
from moalign_plugins.objectives.grpo import GRPO

NAMES = ("a", "b", "c")
GROUPS = np.repeat([4, 1, 7], 5)
REWARDS = np.random.default_rng(0).normal(size=(15, 3))
WEIGHTS = np.array([0.2, 0.3, 0.5])
SHORT = (
    "train.steps=4",
    "rollouts.rounds=2",
    "rollouts.prompts=4",
    "rollouts.prompts_per_step=2",
    "evaluate.samples=1",
)


def settings(*changes: str) -> config.Config:
    return config.from_mapping(yaml.safe_load(recipes.read("mo-grpo")), changes)


@pytest.fixture(scope="module")
def named() -> tuple[GRPO, Combiner]:
    """The loss and the rule that the recipe says."""
    plan = prepare(settings(), registry.discover())
    assert isinstance(plan.objective, GRPO)
    return plan.objective, plan.combiner


def advantages(
    rewards: np.ndarray, weights: np.ndarray, loss: GRPO, combiner: Combiner, names: tuple[str, ...] = NAMES
) -> np.ndarray:
    preference = Preference("weights", dict(zip(names, weights.tolist(), strict=True)))
    return Advantages(loss, combiner, preference, names, "c").of(0, rewards, GROUPS, None)[0]


def test_it_is_the_weighted_sum_standardised_within_the_group(named):
    total = REWARDS @ WEIGHTS
    expected = np.empty_like(total)
    for group in set(GROUPS):
        own = total[group == GROUPS]
        expected[group == GROUPS] = (own - own.mean()) / (own.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(advantages(REWARDS, WEIGHTS, *named), expected, rtol=0, atol=1e-12)


def test_one_head_is_grpo(named):
    loss, combiner = named
    alone = loss.advantages(torch.from_numpy(REWARDS[:, 0]), torch.from_numpy(GROUPS), None).numpy()
    np.testing.assert_array_equal(advantages(REWARDS[:, :1], np.ones(1), loss, combiner, ("a",)), alone)
    np.testing.assert_array_equal(advantages(REWARDS, np.array([1.0, 0.0, 0.0]), loss, combiner), alone)


def test_a_head_in_other_units_changes_the_advantages_and_with_each_standardised_not(named):
    """To the 1e-9 that is added to deviations of about 1."""
    loss, linear = named
    scaled = REWARDS * np.array([1.0, 20.0, 1.0])
    plain = advantages(REWARDS, WEIGHTS, loss, linear)
    moved = advantages(scaled, WEIGHTS, loss, linear)
    assert np.abs(moved - plain).max() > 0.3
    alone = loss.advantages(torch.from_numpy(REWARDS[:, 1]), torch.from_numpy(GROUPS), None).numpy()
    assert np.corrcoef(moved, alone)[0, 1] > 0.95  # the head of the largest spread decides
    each = [advantages(rewards, WEIGHTS, loss, GDPO(eps=1e-9)) for rewards in (REWARDS, scaled)]
    np.testing.assert_allclose(each[1], each[0], rtol=0, atol=1e-8)


def test_the_recipe_trains_five_preferences(tmp_path):
    run.start(settings(*SHORT), tmp_path / "run", registry.discover(), Observer())
    assert len(front.read(tmp_path / "run")["points"]) == 5


def test_it_is_listed_where_recipes_are():
    from moalign.cli import init

    listed = str(init.__annotations__["recipe"])
    assert [name for name in recipes.names() if name not in listed] == []
