"""Posteriors of adapters as mathematics: fitted to iterates, combined, told apart, drawn from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moalign.errors import MoalignError
from moalign.lora.posterior import (
    Moments,
    Posterior,
    bounds,
    combine,
    distance,
    distinct,
    draw,
    fit,
    half_width,
)

SHAPES = {"a": (3, 5), "b": (7, 3), "c": ()}


def some(seed: int) -> Posterior:
    rng = np.random.default_rng(seed)
    mean = {name: torch.tensor(rng.normal(size=shape)).float() for name, shape in SHAPES.items()}
    return Posterior(mean, {name: torch.tensor(rng.gamma(1.0, size=shape)).float() for name, shape in SHAPES.items()})


def flat(tensors) -> np.ndarray:
    return np.concatenate([tensors[name].double().numpy().ravel() for name in sorted(tensors)])


def shares_of(seed: int, number: int) -> list[float]:
    return np.random.default_rng(seed + 1000).dirichlet(np.ones(number)).tolist()


# --- from iterates --------------------------------------------------------------------------------------------------


def fitted(snapshots: Sequence[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    moments = Moments()
    for snapshot in snapshots:
        moments.note({"w": snapshot})
    found = fit(moments)
    return found.mean["w"].numpy(), found.deviation["w"].numpy()


@pytest.mark.parametrize("number", [1, 2, 17])
def test_mean_and_deviation_are_those_of_numpy(number):
    values = torch.tensor(np.random.default_rng(0).normal(2, 3, size=(number, 4, 6))).float()
    mean, deviation = fitted(list(values))
    np.testing.assert_allclose(mean, values.double().numpy().mean(0), rtol=1e-13)
    np.testing.assert_allclose(deviation, values.double().numpy().std(0, ddof=0), rtol=1e-12, atol=1e-14)
    assert (deviation == 0).all() == (number == 1)


def test_the_variance_is_the_mean_of_squares_less_the_square_of_the_mean():
    """SWAG's diagonal as the paper writes it."""
    values = np.random.default_rng(1).normal(size=(30, 11))
    _, deviation = fitted([torch.tensor(row) for row in values])
    np.testing.assert_allclose(deviation**2, (values**2).mean(0) - values.mean(0) ** 2, rtol=1e-11)


def test_small_moves_of_large_weights_are_not_cancelled():
    """Iterates that differ by 1e-5 around 1000: the difference of two means of squares in float64 loses them."""
    moves = 1e-5 * np.random.default_rng(2).normal(size=200)
    values = 1000 + moves
    _, deviation = fitted([torch.tensor(value) for value in values])
    assert float(deviation) == pytest.approx(values.std(), rel=1e-6)
    plain = float((values**2).mean() - values.mean() ** 2)
    assert abs(plain - values.std() ** 2) > 0.1 * values.std() ** 2


def test_a_snapshot_is_not_touched_and_none_is_refused():
    moved, moments = torch.ones(3), Moments()
    moments.note({"w": moved})
    moved += 1
    moments.note({"w": moved})
    assert moved.tolist() == [2.0] * 3 and fit(moments).mean["w"].tolist() == [1.5] * 3
    with pytest.raises(MoalignError, match="no snapshots"):
        fit(Moments())


# --- between preferences --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_one_hot_weight_gives_that_posterior_to_the_last_bit(place):
    posteriors = [some(seed) for seed in range(3)]
    made = combine(posteriors, [float(number == place) for number in range(3)])
    for part in ("mean", "deviation"):
        for name, tensor in getattr(posteriors[place], part).items():
            assert torch.equal(getattr(made, part)[name].float(), tensor)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), number=st.integers(1, 5))
def test_means_deviations_and_all_quantiles_are_averaged(seed, number):
    posteriors, weights = [some(seed + k) for k in range(number)], shares_of(seed, number)
    made = combine(posteriors, weights)
    for part in ("mean", "deviation"):
        expected = sum(w * flat(getattr(each, part)) for w, each in zip(weights, posteriors, strict=True))
        np.testing.assert_allclose(flat(getattr(made, part)), expected, rtol=1e-12, atol=1e-14)
    for end in (0, 1):
        averaged = sum(w * flat(bounds(each, 0.8)[end]) for w, each in zip(weights, posteriors, strict=True))
        np.testing.assert_allclose(flat(bounds(made, 0.8)[end]), averaged, rtol=1e-11, atol=1e-13)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), number=st.integers(1, 5))
def test_a_mixture_of_the_gaussians_is_never_narrower(seed, number):
    posteriors, weights = [some(seed + k) for k in range(number)], np.array(shares_of(seed, number))
    means, deviations = (np.stack([flat(getattr(p, part)) for p in posteriors]) for part in ("mean", "deviation"))
    centre = weights @ means
    mixture = weights @ (deviations**2 + means**2) - centre**2
    own = flat(combine(posteriors, weights.tolist()).deviation) ** 2
    assert (own <= mixture + 1e-12).all()
    within, between = weights @ deviations**2 - own, weights @ (means - centre) ** 2  # what is missing, in two parts
    np.testing.assert_allclose(mixture - own, within + between, atol=1e-12)
    assert (own < mixture - 1e-6).any() == (number > 1)


def test_the_variance_of_a_mixture_is_the_one_of_its_samples():
    """So that the inequality above is about mixtures: two Gaussians, one drawn from, by a coin of 0.3."""
    rng = np.random.default_rng(0)
    first = rng.random(400_000) < 0.3
    drawn = np.where(first, rng.normal(-1, 0.5, 400_000), rng.normal(2, 1.0, 400_000))
    one, other = (Posterior({"w": torch.tensor(m)}, {"w": torch.tensor(d)}) for m, d in ((-1.0, 0.5), (2.0, 1.0)))
    centre = 0.3 * -1 + 0.7 * 2
    assert drawn.var() == pytest.approx(0.3 * (0.25 + 1) + 0.7 * (1 + 4) - centre**2, rel=0.01)
    assert float(combine([one, other], [0.3, 0.7]).deviation["w"]) ** 2 == pytest.approx((0.3 * 0.5 + 0.7) ** 2)
    assert 0.3 * drawn.var() > (0.3 * 0.5 + 0.7) ** 2  # the means' distance counts for most of it


def test_equal_posteriors_combine_to_themselves_and_there_the_mixture_is_no_wider():
    made = combine([some(1)] * 3, [0.2, 0.3, 0.5])
    for part in ("mean", "deviation"):
        np.testing.assert_allclose(flat(getattr(made, part)), flat(getattr(some(1), part)), rtol=1e-14)


def test_combined_factors_lack_the_covariance_of_the_two_sides():
    """sum w B A less (sum w B)(sum w A), and nothing of second order where either side is the same for all."""
    rng = np.random.default_rng(3)
    a, b, weights = rng.normal(size=(4, 2, 6)), rng.normal(size=(4, 5, 2)), np.array(shares_of(3, 4))
    posteriors = [
        Posterior({"a": torch.tensor(x), "b": torch.tensor(y)}, {"a": torch.zeros(2, 6), "b": torch.zeros(5, 2)})
        for x, y in zip(a, b, strict=True)
    ]
    mean = combine(posteriors, weights.tolist()).mean
    made = (mean["b"] @ mean["a"]).numpy()
    mixed = np.einsum("k,kor,kri->oi", weights, b, a)
    differences = np.einsum(
        "j,k,jkor,jkri->oi", weights, weights, b[:, None] - b[None], a[:, None] - a[None], optimize=True
    )
    np.testing.assert_allclose(made, mixed - differences / 2, atol=1e-12)
    assert np.abs(made - mixed).max() > 0.1
    same = [Posterior({"a": posteriors[0].mean["a"], "b": each.mean["b"]}, each.deviation) for each in posteriors]
    mean = combine(same, weights.tolist()).mean
    np.testing.assert_allclose(mean["b"] @ mean["a"], np.einsum("k,kor,ri->oi", weights, b, a[0]), atol=1e-12)


def test_factors_in_another_basis_are_not_comparable():
    """The same adapter written with the opposite signs: alike as B A, and half of each is nothing at all."""
    mean = {"a": torch.ones(1, 2), "b": torch.ones(2, 1)}
    none = {name: torch.zeros_like(tensor) for name, tensor in mean.items()}
    turned = {name: -tensor for name, tensor in mean.items()}
    assert torch.equal(mean["b"] @ mean["a"], turned["b"] @ turned["a"])
    made = combine([Posterior(mean, none), Posterior(turned, none)], [0.5, 0.5]).mean
    assert not (made["b"] @ made["a"]).any()


@pytest.mark.parametrize(
    "weights", [[0.5, 0.4], [0.5, 0.5 + 1e-8], [1.2, -0.2], [math.nan, 1.0], [math.inf, 0.0], [1.0], [0.2, 0.3, 0.5]]
)
def test_weights_that_are_not_on_the_simplex_are_refused(weights):
    with pytest.raises(MoalignError, match=r"^weights \["):
        combine([some(0), some(1)], weights)


def test_weights_that_miss_the_simplex_by_rounding_are_taken_as_they_are():
    weights = [0.1] * 10
    assert sum(weights) != 1
    np.testing.assert_allclose(flat(combine([some(0)] * 10, weights).mean), flat(some(0).mean), rtol=1e-14)


def test_other_tensors_are_refused():
    short = Posterior({"a": torch.zeros(3, 5)}, {"a": torch.zeros(3, 5)})
    with pytest.raises(MoalignError, match="posterior 1 has not the tensors of the first"):
        combine([some(0), short], [0.5, 0.5])
    with pytest.raises(MoalignError, match="no distance"):
        distance(some(0), short)
    with pytest.raises(MoalignError, match="mean and deviation of a posterior have not the same tensors"):
        combine([Posterior(some(0).mean, short.deviation)], [1.0])


# --- told apart -----------------------------------------------------------------------------------------------------


def test_the_distance_is_that_of_the_flat_vectors():
    one, other = some(0), some(1)
    number = 3 * 5 + 7 * 3 + 1
    expected = np.linalg.norm(flat(one.mean) - flat(other.mean)) / number
    expected += np.linalg.norm(flat(one.deviation) - flat(other.deviation)) / number
    assert distance(one, other) == distance(other, one) == pytest.approx(expected, rel=1e-12)
    assert distance(one, one) == 0


def at(mean: float, deviation: float = 1.0) -> Posterior:
    return Posterior({"w": torch.full((4,), mean)}, {"w": torch.full((4,), deviation)})


def test_what_is_near_a_kept_one_is_dropped_and_its_nearest_stands_for_it():
    """A step of 1 in all four means is a distance of sqrt(4) / 4."""
    given = {"x": at(0.0), "near": at(0.9), "y": at(2.1), "between": at(1.2), "wide": at(0.0, 3.0), "again": at(0.0)}
    kept, substitutes = distinct(given, 0.5)
    assert list(kept) == ["x", "y", "wide"]
    assert substitutes == {"near": "x", "between": "y", "again": "x"}
    assert all(distance(given[name], kept[other]) <= 0.5 for name, other in substitutes.items())


def test_a_chain_of_near_ones_is_not_one():
    """Each within tolerance of the one before, but that one is not kept."""
    kept, substitutes = distinct({str(k): at(0.8 * k) for k in range(5)}, 0.5)
    assert list(kept) == ["0", "2", "4"] and substitutes == {"1": "0", "3": "2"}


def test_a_tolerance_of_nothing_drops_only_equals_and_all_can_still_be_combined():
    kept, substitutes = distinct({"x": some(0), "y": some(1), "z": some(0)}, 0.0)
    assert (list(kept), substitutes) == (["x", "y"], {"z": "x"})
    with pytest.raises(MoalignError, match="tolerance -1"):
        distinct({}, -1)


# --- a draw ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mass", [0.0, 1e-6, 0.1, 0.5, 0.9, 0.999999])
def test_the_interval_lies_between_the_normal_quantiles(mass):
    lower, upper = bounds(Posterior({"w": torch.tensor(2.0)}, {"w": torch.tensor(3.0)}), mass)
    quantiles = stats.norm.ppf([(1 - mass) / 2, 1 - (1 - mass) / 2], 2, 3)
    np.testing.assert_allclose([lower["w"], upper["w"]], quantiles, rtol=1e-9)
    assert stats.norm.cdf(half_width(mass)) - stats.norm.cdf(-half_width(mass)) == pytest.approx(mass, abs=1e-12)


@pytest.mark.parametrize("mass", [-0.1, 1.0, 1.5, math.nan])
def test_a_mass_without_bounds_is_refused(mass):
    with pytest.raises(MoalignError, match="mass "):
        draw(some(0), mass, torch.Generator())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), mass=st.floats(0, 0.9999))
def test_what_is_drawn_lies_within_the_bounds(seed, mass):
    posterior = some(seed)
    lower, upper = bounds(posterior, mass)
    drawn = draw(posterior, mass, torch.Generator().manual_seed(seed))
    for name, value in drawn.items():
        assert bool(((lower[name] <= value) & (value <= upper[name])).all())
        assert value.dtype == torch.float64 and value.shape == SHAPES[name]


def test_of_no_mass_the_mean_is_drawn():
    drawn = draw(some(4), 0.0, torch.Generator().manual_seed(1))
    assert all(torch.equal(drawn[name].float(), mean) for name, mean in some(4).mean.items())


def test_it_is_uniform_over_the_interval_and_every_weight_is_its_own_draw():
    """20,000 weights of one tensor by Kolmogorov and Smirnov; one number for all would be no distribution."""
    wide = Posterior({"w": torch.zeros(100, 200)}, {"w": torch.ones(100, 200)})
    drawn = draw(wide, 0.5, torch.Generator().manual_seed(0))["w"].flatten().numpy()
    width = half_width(0.5)
    assert stats.kstest(drawn, stats.uniform(-width, 2 * width).cdf).pvalue > 0.01
    assert len(np.unique(drawn)) > 19_990
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.03


def test_one_seed_draws_the_same_quantiles_of_all_posteriors():
    """So a draw of the combination is the combination of the draws."""
    posteriors, weights = [some(seed) for seed in range(3)], shares_of(5, 3)
    together = flat(draw(combine(posteriors, weights), 0.9, torch.Generator().manual_seed(7)))
    each = [flat(draw(posterior, 0.9, torch.Generator().manual_seed(7))) for posterior in posteriors]
    np.testing.assert_allclose(together, np.array(weights) @ np.stack(each), atol=1e-12)
    other = flat(draw(combine(posteriors, weights), 0.9, torch.Generator().manual_seed(8)))
    assert np.abs(other - together).max() > 0.1
