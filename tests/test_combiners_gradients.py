"""Rules over the objectives' gradients: closed forms, what they promise, brute force, and torchjd's own aggregators."""

from __future__ import annotations

import importlib.util
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from moalign import config, registry
from moalign.api import Combiner, ConfigError, PluginError, Preference, PreferenceError, Round
from moalign.sweeps.plan import prepare
from moalign_plugins.combiners._gradients import OverGradients
from moalign_plugins.combiners.cagrad import CAGrad
from moalign_plugins.combiners.mgda import MGDA
from moalign_plugins.combiners.upgrad import RIDGE, UPGrad

RULES: tuple[type[OverGradients], ...] = (MGDA, CAGrad, UPGrad)
NAMES = ("a", "b", "c", "d")
SOLVER = 1e-6  # of CLARABEL, whose own tolerance is 1e-8 for residuals
RAW: dict[str, Any] = {"normalise": False, "sum_to_one": False}


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def installed(kind: type[Combiner]) -> None:
    for module in kind.requires:
        pytest.importorskip(module)


def drawn(objectives: int, seed: int, size: int = 6) -> tuple[Tensor, Tensor]:
    """Gradients [K,D], of lengths that differ, and weights [K] that sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(objectives, size, generator=generator, dtype=torch.float64)
    weights = 0.1 + torch.rand(objectives, generator=generator, dtype=torch.float64)
    return gradients * torch.arange(1, objectives + 1)[:, None], weights / weights.sum()


def weights_of(rule: OverGradients, gradients: Tensor, preference: Tensor) -> Tensor:
    """What a round with these gradients makes of the weights, through the state."""
    names = NAMES[: len(preference)]
    known = Preference("weights", dict(zip(names, preference.tolist(), strict=True)))
    rule.check(known)
    rewards = torch.zeros(2, len(names), dtype=torch.float64)
    seen = Round(0, rewards, torch.zeros(2, dtype=torch.int64), rewards[0], names, gradients @ gradients.T)
    state = rule.observe(rule.init(known), seen)
    found = tensor([state["weights"][name] for name in names])
    # the signal weighs rewards with them
    for column, weight in zip(torch.eye(len(names), dtype=torch.float64), found, strict=True):
        signal = rule.signal(column[None], preference[None], torch.zeros(1, dtype=torch.int64), state)
        assert float(signal) == pytest.approx(float(weight), abs=1e-15)
    return found


def simplex(objectives: int, steps: int) -> Tensor:
    points = [each for each in product(range(steps + 1), repeat=objectives - 1) if sum(each) <= steps]
    return tensor([(*each, steps - sum(each)) for each in points]) / steps


# --- what all of them share -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RULES)
def test_an_objective_without_weight_takes_no_part_and_one_alone_keeps_all(kind):
    installed(kind)
    gradients, _ = drawn(3, 0)
    among = weights_of(kind(), gradients, tensor([0.3, 0.0, 0.7]))
    assert among[1] == 0
    expected = weights_of(kind(), gradients[[0, 2]], tensor([0.3, 0.7]))
    torch.testing.assert_close(among[[0, 2]], expected, rtol=0, atol=1e-12)
    assert weights_of(kind(), gradients, tensor([0.0, 1.0, 0.0])).tolist() == pytest.approx([0, 1, 0], abs=1e-12)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("normalise", [True, False])
def test_weights_that_are_to_sum_to_one_are_the_others_over_their_sum(kind, normalise):
    installed(kind)
    for seed in range(5):
        gradients, preference = drawn(3, seed)
        plain = weights_of(kind(normalise=normalise, sum_to_one=False), gradients, preference)
        found = weights_of(kind(normalise=normalise), gradients, preference)
        assert (plain >= 0).all() and plain.sum() > 0
        torch.testing.assert_close(found, plain / plain.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", RULES)
def test_without_any_gradient_the_weights_are_the_preference(kind):
    preference = tensor([0.3, 0.7])
    assert weights_of(kind(), torch.zeros(2, 3, dtype=torch.float64), preference).equal(preference)


@pytest.mark.parametrize("kind", RULES)
def test_all_gradients_longer_or_shorter_are_the_same_to_the_rule(kind):
    """torchjd takes short gradients for 0 where their squares sum to less than 1e-4."""
    installed(kind)
    gradients, preference = drawn(3, 1)
    expected = weights_of(kind(normalise=False), gradients, preference)
    for factor in (1e-5, 1e4):
        found = weights_of(kind(normalise=False), factor * gradients, preference)
        torch.testing.assert_close(found, expected, rtol=SOLVER, atol=SOLVER)


@pytest.mark.parametrize("kind", RULES)
def test_with_gradients_of_length_one_the_unit_of_a_reward_does_not_matter(kind):
    """The combination of unit gradients stays, so that the weight of a longer one is smaller by as much."""
    installed(kind)
    units = tensor([1.0, 10.0, 0.1])
    gradients, preference = drawn(3, 2)
    rule = kind(normalise=True, sum_to_one=False)
    expected = weights_of(rule, gradients, preference)
    found = weights_of(rule, units[:, None] * gradients, preference)
    torch.testing.assert_close(found * units, expected, rtol=SOLVER, atol=SOLVER)
    plain = kind(**RAW)
    moved = weights_of(plain, units[:, None] * gradients, preference) * units
    assert (moved - weights_of(plain, gradients, preference)).abs().max() > 0.01


@pytest.mark.parametrize("kind", RULES)
def test_with_gradients_of_length_one_an_objective_without_a_gradient_sits_out_the_round(kind):
    installed(kind)
    gradients, preference = drawn(3, 3)
    for rest in (0.0, 1e-12):  # the last bit of a mean of equal rewards is no direction
        gradients[1] *= rest
        found = weights_of(kind(normalise=True), gradients, preference)
        assert found[1] == 0 and (found[[0, 2]] > 0).all()


@pytest.mark.parametrize("kind", RULES)
def test_missing_products_and_other_preferences_are_refused(kind):
    rule = kind()
    state = rule.init(Preference("weights", {"a": 0.5, "b": 0.5}))
    seen = Round(0, tensor([[0.0, 1.0]]), torch.zeros(1, dtype=torch.int64), tensor([0.0, 1.0]), ("a", "b"))
    with pytest.raises(PluginError, match="nobody has measured"):
        rule.observe(state, seen)
    with pytest.raises(PreferenceError, match=f"'{kind.__name__.lower()}' has no meaning for direction"):
        rule.check(Preference("direction", {"a": 0.6, "b": -0.8}))


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("upgrad", "quadprog", "torchjd"), ("cagrad", "cvxpy", "cagrad")],
)
def test_a_missing_library_is_said_before_a_model_is_loaded(name, module, extra, tmp_path, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda each: None if each == module else each and there("json"))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "q"}\n')
    content = {
        "model": {"path": str(tmp_path / "no-model")},
        "objectives": {"a": {"reward": "length"}, "b": {"reward": "length"}},
        "data": {"path": str(tmp_path / "prompts.jsonl"), "reader": "prompts"},
        "rollouts": {},
        "loss": "rloo",
        "combine": name,
    }
    with pytest.raises(ConfigError, match=rf"combine.*'{name}' needs {module}.*pip install 'moalign\[{extra}\]'"):
        prepare(config.from_mapping(content), registry.discover())


# --- MGDA -----------------------------------------------------------------------------------------------------------


def shares(rule: MGDA, gradients: Tensor) -> Tensor:
    gram = gradients @ gradients.T
    return rule.shares(gram / gram.trace())


def test_for_two_gradients_the_shares_have_a_closed_form():
    ends = 0
    for seed in range(40):
        gradients, _ = drawn(2, seed, size=3)
        first, second = gradients
        apart = second - first
        expected = min(max(float(apart @ second / (apart @ apart)), 0.0), 1.0)
        found = shares(MGDA(), gradients)
        assert found.tolist() == pytest.approx([expected, 1 - expected], abs=1e-12)
        ends += expected in (0.0, 1.0)
    assert 3 < ends < 37


@pytest.mark.parametrize("objectives", [2, 3, 4])
@pytest.mark.parametrize("normalise", [True, False])
def test_every_objective_gains_in_proportion_to_its_weight(objectives, normalise):
    """<d, g_k> >= w_k |d|^2, and so it is the shortest: these are its optimality conditions."""
    rule = MGDA(normalise=normalise, sum_to_one=False)
    for seed in range(10):
        gradients, preference = drawn(objectives, seed)
        direction = weights_of(rule, gradients, preference) @ gradients
        unit = gradients / gradients.norm(dim=1, keepdim=True) if normalise else gradients
        scaled = unit / preference[:, None]
        longest = scaled.square().sum(1).max()
        assert (scaled @ direction >= direction @ direction - 1e-12 * longest).all()


def test_no_point_of_a_fine_grid_is_shorter():
    grid = simplex(3, 150)
    for seed in range(8):
        gradients, _ = drawn(3, seed)
        found = shares(MGDA(), gradients)
        assert found.sum() == pytest.approx(1, abs=1e-12) and (found >= 0).all()
        least = (grid @ gradients).square().sum(1).min()
        assert (found @ gradients).square().sum() <= least + 1e-12


def test_frank_wolfe_walks_to_it():
    """By torchjd; after t steps its square is at most 2 diameter^2 / (t + 2) above the least."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    steps = 3000
    for seed in range(8):
        gradients, _ = drawn(3 + seed % 3, seed)
        gram = gradients @ gradients.T
        walked = aggregation.MGDAWeighting(epsilon=1e-12, max_iters=steps)(gram / gram.trace())
        least, other = ((each @ gradients).square().sum() for each in (shares(MGDA(), gradients), walked))
        diameter = torch.cdist(gradients, gradients).max()
        assert least - 1e-12 <= other <= least + 2 * diameter**2 / (steps + 2)


def test_equal_gradients_count_alike_and_one_that_is_longer_does_not():
    same = tensor([[1.0, 2.0], [1.0, 2.0], [2.0, 4.0]])
    torch.testing.assert_close(shares(MGDA(), same), tensor([0.5, 0.5, 0.0]), rtol=0, atol=1e-12)
    turned = tensor([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)], [0.0, 0.0]])
    found = shares(MGDA(), turned)  # four that can cancel, in more than one way: the most even one
    torch.testing.assert_close(found, tensor([0.25] * 4), rtol=0, atol=1e-12)


def test_opposite_gradients_cancel_and_orthogonal_ones_count_as_preferred():
    gradients = tensor([[3.0, 4.0], [-6.0, -8.0]])
    for rule in (MGDA(), MGDA(**RAW)):
        found = weights_of(rule, gradients, tensor([0.8, 0.2]))
        assert (found > 0).all() and (found @ gradients).abs().max() < 1e-12
    preference = tensor([0.5, 0.2, 0.3])
    found = weights_of(MGDA(), torch.eye(3, dtype=torch.float64), preference)
    torch.testing.assert_close(found, preference, rtol=0, atol=1e-12)


def test_without_lengths_of_one_the_short_gradient_decides():
    """The trap that `normalise` is there for: a reward counted in thousands gets no attention."""
    gradients = tensor([[1000.0, 0.0], [0.6, 0.8]])
    raw = weights_of(MGDA(normalise=False), gradients, tensor([0.5, 0.5]))
    assert raw[0] < 1e-3 and raw[1] > 0.999
    direction = weights_of(MGDA(), gradients, tensor([0.5, 0.5])) @ gradients
    gains = gradients @ direction / gradients.norm(dim=1)
    assert gains[0] == pytest.approx(float(gains[1]), rel=1e-9)
    gradients[1] = 0
    still = weights_of(MGDA(normalise=False), gradients, tensor([0.5, 0.5]))
    assert still.tolist() == [0, 1]


# --- UPGrad ---------------------------------------------------------------------------------------------------------


def projection(gram: Tensor, place: int) -> Tensor:
    """v that minimises v' G v with v >= e_place, over all sets of bounds that may hold with equality."""
    size, bound = len(gram), torch.eye(len(gram), dtype=torch.float64)[place]
    best, least = bound, float(bound @ gram @ bound)
    for held in product([True, False], repeat=size):
        fixed = torch.tensor(held)
        v = bound.clone()
        if not all(held):
            v[~fixed] = torch.linalg.solve(gram[~fixed][:, ~fixed], -gram[~fixed][:, fixed] @ bound[fixed])
        value = float(v @ gram @ v)
        if (v >= bound - 1e-12).all() and value < least:
            best, least = v, value
    return best


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_it_is_the_sum_of_the_projections(objectives):
    installed(UPGrad)
    for seed in range(10):
        gradients, preference = drawn(objectives, seed)
        scaled = preference[:, None] * gradients
        gram = scaled @ scaled.T
        expected = sum(projection(gram, place) for place in range(objectives))
        found = weights_of(UPGrad(**RAW), gradients, preference) / preference
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # the ridge, times the condition


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_no_objective_loses(objectives):
    """(G + ridge) v >= 0 at the solution, so that what is lost is at most the ridge times the weights."""
    installed(UPGrad)
    against = 0
    for seed in range(20):
        gradients, preference = drawn(objectives, seed, size=objectives)
        found = weights_of(UPGrad(**RAW), gradients, preference)
        scaled = preference[:, None] * gradients
        total = scaled.square().sum()
        gains = scaled @ (found @ gradients) / total
        assert (gains >= -2 * RIDGE * found / preference).all()
        assert (found >= preference * (1 - 1e-9)).all()
        against += bool((scaled @ scaled.sum(0) < -1e-3 * total).any())
    assert against > 2  # the weighted sum would have lost


def test_where_nothing_is_in_conflict_it_is_the_weighted_sum():
    installed(UPGrad)
    gradients = tensor([[1.0, 0.2, 0.0], [0.3, 2.0, 0.1], [0.0, 0.5, 3.0]])
    preference = tensor([0.5, 0.2, 0.3])
    torch.testing.assert_close(weights_of(UPGrad(), gradients, preference), preference, rtol=1e-7, atol=0)
    opposite = tensor([[3.0, 4.0], [-6.0, -8.0]])
    found = weights_of(UPGrad(), opposite, tensor([0.8, 0.2]))
    assert (found @ opposite).abs().max() < 1e-5


# --- CAGrad ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objectives", [2, 3])
def test_it_is_best_for_the_worst_served_within_its_radius(objectives):
    """No direction of the ball can do better than min over a of <h_a, g> + radius |g| |h_a|, by weak duality."""
    installed(CAGrad)
    grid = simplex(objectives, 1000 if objectives == 2 else 120)
    radius = 0.4
    for seed in range(6):
        gradients, preference = drawn(objectives, seed)
        scaled = preference[:, None] * gradients
        centre = scaled.sum(0)
        found = weights_of(CAGrad(radius=radius, **RAW), gradients, preference)
        direction = found @ gradients
        assert (direction - centre).norm() == pytest.approx(radius * float(centre.norm()), rel=SOLVER)
        combined = grid @ scaled
        bound = (combined @ centre + radius * centre.norm() * combined.norm(dim=1)).min()
        worst = (scaled @ direction).min()
        slope = (1 + radius) * centre.norm() * scaled.norm(dim=1).max()  # of the bound, per share
        near = objectives / (1000 if objectives == 2 else 120)
        assert bound - slope * near <= worst <= bound + SOLVER * scaled.square().sum()
        assert worst > (scaled @ centre).min()


def test_with_radius_0_it_is_the_weighted_sum_and_where_gradients_cancel_nothing():
    installed(CAGrad)
    for seed in range(5):
        gradients, preference = drawn(3, seed)
        found = weights_of(CAGrad(radius=0.0), gradients, preference)
        torch.testing.assert_close(found, preference, rtol=SOLVER, atol=SOLVER)
    for rule in (CAGrad(), CAGrad(sum_to_one=False)):
        found = weights_of(rule, tensor([[3.0, 4.0], [-3.0, -4.0]]), tensor([0.5, 0.5]))
        assert found.tolist() == [0, 0]


# --- torchjd on the gradients themselves ----------------------------------------------------------------------------


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_the_direction_of_upgrad_is_torchjds(objectives):
    """Its aggregator sees the gradients, ours their inner products; the ridge is in other units."""
    installed(UPGrad)
    from torchjd import aggregation, linalg

    for seed in range(5):
        gradients, preference = drawn(objectives, seed)
        gradients = gradients / gradients.norm()
        ours = weights_of(UPGrad(**RAW), gradients, preference) @ gradients
        theirs = aggregation.UPGrad(preference, linalg.QuadprogProjector(norm_eps=0.0, reg_eps=1e-10))
        torch.testing.assert_close(ours, theirs(gradients), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_the_direction_of_cagrad_is_torchjds(objectives):
    installed(CAGrad)
    from torchjd import aggregation

    for seed in range(5):
        gradients, preference = drawn(objectives, seed)
        ours = weights_of(CAGrad(**RAW), gradients, preference) @ gradients
        theirs = aggregation.CAGrad(c=0.5)
        expected = objectives * theirs(preference[:, None] * gradients)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * float(expected.norm()))
