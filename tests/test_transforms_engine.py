"""Transforms in the engine: chains in order, states over rounds, references, what a plugin must not do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from moalign import registry
from moalign.api import Responses, Transform
from moalign.data.dataset import PairDataset
from moalign.data.tokenise import Sequence
from moalign.engine.shaping import Base, Shaping
from moalign.errors import PluginError
from moalign.types import Sample

REGISTRY = registry.discover()


def transform(name: str, **options: Any) -> Transform:
    return REGISTRY.build("transform", name, options, "objectives.short.transform.0")


def dataset(rewards: np.ndarray, groups: list[int], lengths: list[int] | None = None) -> PairDataset:
    """Sampled responses of these rewards [N,2]; those of an odd length were cut."""
    count = len(rewards)
    lengths = lengths or [2] * count
    return PairDataset(
        objectives=("late", "short"),
        sequences=tuple(Sequence((1,) * (3 + length), 3, truncated=length % 2 == 1) for length in lengths),
        samples=(Sample("", ""),) * count,
        pairs=np.repeat(np.arange(count), 2).reshape(-1, 2),
        pair_objective=np.full(count, -1),
        strength=np.ones(count),
        rewards=np.array(rewards, dtype=np.float64),
        groups=np.array(groups),
        counts={},
    )


@dataclass
class Known:
    """Stands for References: rewards of the base by prompt, for the objective ``short`` alone."""

    rewards: Mapping[int, list[float]]
    samples: Mapping[str, int] = field(default_factory=lambda: {"short": 2})

    def to(self, prompts) -> list[Base]:
        return [Base(np.array(self.rewards[p])[:, None], np.array([2, 4]), np.array([True, True])) for p in prompts]


def shaping(*chain: Transform, references: Any = None) -> Shaping:
    return Shaping({"short": chain}, ("late", "short"), "c", references)


def draw(seed: int, count: int = 12) -> PairDataset:
    rewards = np.random.default_rng(seed).normal(size=(count, 2))
    return dataset(rewards, [number % 3 for number in range(count)], [2 + number % 5 for number in range(count)])


# --- one chain ------------------------------------------------------------------------------------------------------


def test_a_chain_is_applied_in_its_order_and_to_its_objective():
    double, clip = transform("scale", factor=2, offset=1), transform("clip", low=-1, high=1)
    rewards = np.array([[5.0, 0.25], [6.0, -0.25], [7.0, -3.0]])
    first, figures = shaping(double, clip).of(0, dataset(rewards, [0, 0, 0]))
    assert first.tolist() == [[5, 1], [6, 0.5], [7, -1]]
    second, _ = shaping(clip, double).of(0, dataset(rewards, [0, 0, 0]))
    assert second.tolist() == [[5, 1.5], [6, 0.5], [7, -1]]
    assert figures == pytest.approx(
        {"late/reward": 6, "late/shaped": 6, "short/reward": -1, "short/shaped": 0.5 / 3}, abs=1e-12
    )


def test_a_transform_is_told_of_lengths_ends_and_groups():
    penalty = transform("length-penalty", limit=3, per_token=0.5, truncated=8)
    shaped, _ = shaping(penalty).of(0, dataset(np.zeros((3, 2)), [7, 7, 8], [2, 4, 5]))
    assert shaped[:, 1].tolist() == [0, -0.5, -1 - 8]
    whitened, _ = shaping(transform("whiten", epsilon=1e-12)).of(0, dataset(np.eye(4)[:, :2], [1, 4, 1, 4]))
    assert whitened[:, 1] == pytest.approx([0, 0.5**0.5, 0, -(0.5**0.5)])


def test_unknown_rewards_stay_unknown_and_reach_no_transform():
    rewards = np.array([[0.0, 1.0], [0.0, np.nan], [0.0, 3.0]])
    shaped, figures = shaping(transform("whiten", over="batch", epsilon=1e-12)).of(0, dataset(rewards, [0, 0, 0]))
    assert shaped[:, 1] == pytest.approx([-(0.5**0.5), np.nan, 0.5**0.5], nan_ok=True)
    assert figures["short/reward"] == 2.0


def test_references_pass_through_what_stands_before_the_comparison():
    """par of twice the rewards, less a token's price, is 1/2 where the response is the base's own."""
    known = Known({0: [1.0, 3.0], 5: [-2.0, np.nan]})
    chain = transform("scale", factor=2), transform("length-penalty", limit=3, per_token=0.1), transform("par")
    shaped, _ = shaping(*chain, references=known).of(0, dataset(np.array([[0, 1.5], [0, -2.0]]), [0, 5]))
    odds = 1 / (1 + np.exp(-(3.0 - np.array([2.0, 6.0 - 0.1]))))
    assert shaped[:, 1] == pytest.approx([odds.mean(), 0.5], abs=1e-15)


def test_each_takes_as_many_references_as_it_asks_for():
    known = Known({0: [1.0, 50.0]})
    shaped, _ = shaping(transform("par", samples=1), references=known).of(0, dataset(np.ones((1, 2)), [0]))
    assert shaped[0, 1] == 0.5


def test_a_response_whose_prompt_has_no_reference_is_left_out():
    known = Known({0: [1.0, np.nan], 1: [np.nan, np.nan]})
    rewards = np.zeros((3, 2))
    found = shaping(transform("par", samples=2), references=known).comparable(rewards, np.array([0, 1, 0]))
    assert np.isnan(found).tolist() == [[False, False], [False, True], [False, False]]
    assert not np.isnan(rewards).any()


# --- states ---------------------------------------------------------------------------------------------------------


def test_a_state_goes_from_round_to_round():
    running = shaping(transform("whiten", over="running", epsilon=0.1))
    for number in range(3):
        found, figures = running.of(number, draw(number))
        assert figures["short/transform/0/count"] == 12 * (number + 1)
    all_rounds = np.concatenate([draw(number).rewards[:, 1] for number in range(3)])
    expected = (draw(2).rewards[:, 1] - all_rounds.mean()) / (all_rounds.std(ddof=1) + 0.1)
    np.testing.assert_allclose(found[:, 1], expected, rtol=1e-12, atol=1e-12)


def test_candidates_share_no_state():
    running = transform("whiten", over="running")
    first, second = shaping(running), shaping(running)
    for number in range(3):
        first.of(number, draw(number))
    alone = shaping(running).of(0, draw(5))[0]
    assert np.array_equal(second.of(0, draw(5))[0], alone)


class Faulty(Transform):
    """Does what it must not."""

    way: str

    def init(self) -> Any:
        return None if self.way == "init" else {}

    def apply(self, rewards, about: Responses, state) -> Any:
        ways = {
            "raises": lambda: state["missing"],
            "nan": lambda: (rewards * torch.nan, state),
            "shape": lambda: (rewards.mean(), state),
            "float32": lambda: (rewards.float(), state),
            "alone": lambda: rewards,
            "state": lambda: (rewards, None),
            "writes": lambda: (rewards.mul_(2), state),
            "random": lambda: (rewards + torch.randn(()).double(), state),
        }
        return ways[self.way]()


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("init", "in init: the state must be a mapping of plain data, not NoneType"),
        ("raises", "in apply: KeyError"),
        ("nan", "in apply: it returned nan; numbers must be finite"),
        ("shape", r"in apply: it must return float64 \[12\] on cpu, one number per response, not torch.float64 \[\]"),
        ("float32", r"not torch.float32 \[12\]"),
        ("alone", "it must return the rewards and a state, not Tensor"),
        ("state", "in apply: the state must be a mapping of plain data, not NoneType"),
        ("writes", "it changed a tensor that it was given"),
        ("random", "it used the global random generator of torch"),
    ],
)
def test_what_a_transform_must_not_do_names_it(way, message):
    with pytest.raises(PluginError, match=f"(?s)transform 'Faulty'.*{message}"):
        shaping(Faulty(way=way)).of(0, draw(0))
