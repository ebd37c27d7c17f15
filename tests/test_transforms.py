"""Transforms of rewards, as mathematics: ranges, fixed points, invariances, tails, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moalign import registry
from moalign.api import Responses, Transform
from moalign.errors import ConfigError
from moalign.testing import ConformanceError, check_transform

REGISTRY = registry.discover()


def transform(name: str, **options: Any) -> Transform:
    return REGISTRY.build("transform", name, options, "objectives.helpful.transform.0")


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def about(count: int, *, groups: list[int] | None = None, reference: Tensor | None = None, **more: Any) -> Responses:
    return Responses(
        number=0,
        groups=torch.tensor(groups if groups is not None else [0] * count),
        lengths=more.get("lengths", torch.full((count,), 5)),
        ended=more.get("ended", torch.ones(count, dtype=torch.bool)),
        reference=reference,
    )


def shaped(plugin: Transform, rewards: Tensor, told: Responses | None = None) -> Tensor:
    return plugin.apply(rewards, told or about(len(rewards)), plugin.init())[0]


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


EXACT = {"rtol": 1e-12, "atol": 1e-12}


# --- log-sigmoid ----------------------------------------------------------------------------------------------------


def test_log_sigmoid_at_the_reference_is_log_one_half():
    assert shaped(transform("log-sigmoid", reference=2.5), vector(2.5)).item() == pytest.approx(
        math.log(0.5), abs=1e-15
    )
    reference = vector(*range(11)).expand(1, 11)
    at = shaped(transform("log-sigmoid", percentile=85, samples=11), vector(8.5), about(1, reference=reference))
    assert at.item() == pytest.approx(math.log(0.5), abs=1e-14)  # the 85th percentile of 0..10 is 8.5


def test_log_sigmoids_add_up_to_the_log_of_the_product():
    rewards = draws(50, 3)
    references = vector(0.3, -1.0, 2.0)
    parts = [shaped(transform("log-sigmoid", reference=float(r)), rewards[:, i]) for i, r in enumerate(references)]
    product = (rewards - references).sigmoid().prod(1)
    torch.testing.assert_close(torch.stack(parts).sum(0), product.log(), **EXACT)


def test_log_sigmoid_is_bounded_and_its_slope_falls():
    plugin = transform("log-sigmoid", reference=1.0)
    rewards = vector(-30, -2, 0.5, 1, 3, 30).requires_grad_()
    values = shaped(plugin, rewards)
    assert bool((values < 0).all())
    (slope,) = torch.autograd.grad(values.sum(), rewards)
    torch.testing.assert_close(slope, (1 - rewards.detach()).sigmoid(), **EXACT)


def test_log_sigmoid_has_a_linear_tail_where_the_log_of_a_sigmoid_has_none():
    values = shaped(transform("log-sigmoid", reference=0.0), vector(-1e4, -800.0, 800.0))
    assert values.tolist() == [-1e4, -800.0, 0.0]
    assert vector(-800.0).sigmoid().log().isinf()


def test_the_reference_is_each_prompts_own_and_leaves_out_what_is_unknown():
    reference = torch.stack([vector(1, 3, math.nan), vector(math.nan, 10, 20)])
    told = about(2, groups=[4, 9], reference=reference)
    plugin = transform("log-sigmoid", percentile=50, samples=3)
    torch.testing.assert_close(shaped(plugin, vector(2, 15), told), vector(0, 0).sigmoid().log(), **EXACT)
    torch.testing.assert_close(shaped(plugin, vector(2, 2), told)[1], vector(-13).sigmoid().log()[0], **EXACT)


def test_only_a_percentile_needs_the_base():
    assert transform("log-sigmoid").references() == 10
    assert transform("log-sigmoid", samples=4).references() == 4
    assert transform("log-sigmoid", reference=0.0).references() == 0


# --- par ------------------------------------------------------------------------------------------------------------


def test_par_is_between_0_and_1_and_one_half_at_the_reference():
    reference = draws(40, 10, seed=1)
    values = shaped(transform("par"), 5 * draws(40), about(40, reference=reference))
    assert bool(((values > 0) & (values < 1)).all())
    at = shaped(transform("par", k=7), vector(3.0), about(1, reference=vector(3.0, 3.0).expand(1, 2)))
    assert at.item() == 0.5
    symmetric = shaped(transform("par", k=7), vector(3.0), about(1, reference=vector(1.0, 5.0).expand(1, 2)))
    assert symmetric.item() == pytest.approx(0.5, abs=1e-15)  # by symmetry, though neither sigmoid is 1/2


def test_par_with_one_reference_is_the_bradley_terry_probability():
    rewards, reference = draws(20), draws(20, 1, seed=1)
    values = shaped(transform("par", samples=1), rewards, about(20, reference=reference))
    strengths = torch.stack([rewards, reference[:, 0]]).exp()
    torch.testing.assert_close(values, strengths[0] / strengths.sum(0), **EXACT)


def test_par_is_a_mean_of_sigmoids():
    rewards, reference = draws(20), 3 * draws(20, 5, seed=1)
    values = shaped(transform("par", k=2.0), rewards, about(20, reference=reference))
    terms = torch.stack([(2 * (rewards - reference[:, m])).sigmoid() for m in range(5)])
    torch.testing.assert_close(values, terms.mean(0), **EXACT)
    of_the_mean = (2 * (rewards - reference.mean(1))).sigmoid()
    assert (values - of_the_mean).abs().max() > 0.05


@pytest.mark.parametrize("name", ["par", "log-sigmoid"])
def test_a_shift_of_rewards_and_references_changes_nothing(name):
    rewards, reference = draws(30), draws(30, 10, seed=1)
    plain = shaped(transform(name), rewards, about(30, reference=reference))
    moved = shaped(transform(name), rewards + 40, about(30, reference=reference + 40))
    torch.testing.assert_close(plain, moved, rtol=0, atol=1e-13)  # 40 costs 6 bits of 52


def test_par_leaves_out_references_that_are_unknown():
    reference = torch.stack([vector(0.0, math.nan, 1.0)])
    values = shaped(transform("par", samples=3), vector(0.5), about(1, reference=reference))
    assert values.item() == pytest.approx(0.5, abs=1e-15)


# --- whiten ---------------------------------------------------------------------------------------------------------


def test_whitening_over_the_batch_is_the_textbooks():
    rewards = 3 * draws(64) + 7
    values = shaped(transform("whiten", over="batch", epsilon=0.5), rewards)
    torch.testing.assert_close(values, (rewards - rewards.mean()) / (rewards.std(correction=1) + 0.5), **EXACT)


def test_whitening_over_groups_is_that_of_each_alone():
    groups = [5, 2, 5, 2, 5, 8, 2, 5]
    rewards = draws(8)
    values = shaped(transform("whiten"), rewards, about(8, groups=groups))
    for number in set(groups):
        rows = [row for row, each in enumerate(groups) if each == number]
        alone = shaped(transform("whiten", over="batch"), rewards[rows])
        torch.testing.assert_close(values[rows], alone, **EXACT)
    assert values[5] == 0  # alone to its prompt


@pytest.mark.parametrize("over", ["group", "batch", "running"])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e9])
def test_rewards_that_are_all_alike_become_exactly_0(over, value):
    assert (
        shaped(transform("whiten", over=over, epsilon=1e-12), torch.full((7,), value, dtype=torch.float64)).eq(0).all()
    )


@pytest.mark.parametrize("over", ["group", "batch", "running"])
def test_a_shift_and_a_factor_are_taken_out(over):
    rewards = draws(30)
    plugin = transform("whiten", over=over, epsilon=1e-12)
    torch.testing.assert_close(shaped(plugin, 20 * rewards - 5), shaped(plugin, rewards), rtol=1e-10, atol=1e-10)


def test_running_statistics_are_those_of_all_rounds_so_far():
    plugin, state, seen = transform("whiten", over="running", epsilon=0.01), {}, torch.empty(0, dtype=torch.float64)
    state = dict(plugin.init())
    for number in range(4):
        rewards = (number + 1) * draws(5 + number, seed=number) + 1000 * number
        seen = torch.cat([seen, rewards])
        values, state = plugin.apply(rewards, about(len(rewards)), state)
        expected = (rewards - seen.mean()) / (seen.std(correction=1) + 0.01)
        torch.testing.assert_close(values, expected, rtol=1e-11, atol=1e-11)
    assert state["count"] == len(seen) == 26
    assert state["mean"] == pytest.approx(float(seen.mean()), rel=1e-13)


def test_weights_before_and_after_whitening_are_two_rules():
    """sum_k w_k whiten(r_k) is not whiten(sum_k w_k r_k), unless one objective has all the weight."""
    first, second = draws(16), 100 * draws(16, seed=1)
    plugin = transform("whiten", over="batch")
    before = 0.5 * shaped(plugin, first) + 0.5 * shaped(plugin, second)
    after = shaped(plugin, 0.5 * first + 0.5 * second)
    assert (before - after).abs().max() > 0.5


# --- clip, scale, length-penalty ------------------------------------------------------------------------------------


def test_clipping_bounds_and_leaves_the_rest_to_the_bit():
    rewards = vector(-9, -1.0, 0.1, 1.0, 9)
    assert shaped(transform("clip", low=-1, high=1), rewards).tolist() == [-1, -1, 0.1, 1, 1]
    assert shaped(transform("clip", low=None, high=1), rewards).tolist() == [-9, -1, 0.1, 1, 1]
    assert shaped(transform("clip", low=0, high=None), rewards).tolist() == [0, 0, 0.1, 1, 9]
    assert shaped(transform("clip", low=2, high=2), rewards).tolist() == [2] * 5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clip", {"low": None, "high": None}, "give low or high"),
        ("clip", {"low": 2, "high": 1}, "low (2) is above high (1)"),
        ("scale", {"factor": -1}, "transform.0.factor: input should be greater than 0"),
        ("par", {"samples": 11}, "transform.0.samples: input should be less than or equal to 10"),
        ("par", {"k": 0}, "transform.0.k: input should be greater than 0"),
        ("log-sigmoid", {"percentile": 101}, "transform.0.percentile: input should be less than or equal to 100"),
        ("whiten", {"over": "prompt"}, "transform.0.over: input should be 'group', 'batch' or 'running'"),
        ("length-penalty", {"per_token": -0.1}, "transform.0.per_token: input should be greater than or equal to 0"),
    ],
)
def test_options_without_meaning_are_refused(name, options, message):
    with pytest.raises(ConfigError) as caught:
        transform(name, **options)
    assert message in str(caught.value)


def test_scaling_is_affine():
    rewards = draws(9)
    assert torch.equal(shaped(transform("scale", factor=4, offset=-0.5), rewards), 4 * rewards - 0.5)
    assert torch.equal(shaped(transform("scale"), rewards), rewards)


def test_tokens_beyond_the_limit_cost_and_so_does_being_cut():
    told = about(4, lengths=torch.tensor([1, 10, 13, 13]), ended=torch.tensor([True, True, True, False]))
    values = shaped(transform("length-penalty", limit=10, per_token=0.1, truncated=2), vector(1, 1, 1, 1), told)
    assert values.tolist() == [1, 1, 1 - 0.1 * 3, 1 - 0.1 * 3 - 2]  # in float64, to the bit
    assert values.dtype == torch.float64


def test_the_papers_penalty_is_the_default():
    told = about(2, lengths=torch.tensor([300, 400]), ended=torch.tensor([True, False]))
    assert shaped(transform("length-penalty"), vector(0.5, 0.5), told).tolist() == [0.5, 0.5 - 0.01 * 100]


# --- all ------------------------------------------------------------------------------------------------------------


def test_a_transform_that_is_not_told_of_the_base_says_so():
    for name in ("par", "log-sigmoid"):
        with pytest.raises(Exception, match="compares with the base's responses, and there are none"):
            shaped(transform(name), draws(3))


def test_the_kit_sees_an_honest_plugin_made_dishonest(monkeypatch):
    """The sign of the reward, in the class that ships."""
    plugin = transform("par")
    healthy = type(plugin).apply
    monkeypatch.setattr(type(plugin), "apply", lambda self, rewards, told, state: healthy(self, -rewards, told, state))
    with pytest.raises(ConformanceError, match="a response with more reward than another gets less"):
        check_transform(plugin)
