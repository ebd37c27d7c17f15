"""The measures of a front as mathematics: against brute force, inclusion-exclusion and known cases."""

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moalign import pareto
from moalign.errors import MoalignError


@st.composite
def fronts(draw, low=-4, high=4, objectives=(1, 4), size=(0, 8)):
    """Small integers: many ties and duplicates, and exact arithmetic."""
    shape = (draw(st.integers(*size)), draw(st.integers(*objectives)))
    return draw(arrays(np.float64, shape, elements=st.integers(low, high).map(float)))


def dominates(a, b) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))


def volume_by_inclusion_exclusion(points, reference) -> float:
    total = 0.0
    for size in range(1, len(points) + 1):
        for chosen in itertools.combinations(points, size):
            total -= (-1) ** size * np.prod(np.clip(np.min(chosen, axis=0) - reference, 0, None))
    return total


@given(fronts())
def test_non_dominated_agrees_with_its_definition(points):
    expected = [not any(dominates(other, point) for other in points) for point in points]
    assert pareto.non_dominated(points).tolist() == expected


def test_copies_of_a_non_dominated_point_all_stay():
    assert pareto.non_dominated([[1, 0], [1, 0], [0, 1], [0, 0]]).tolist() == [True, True, True, False]
    assert pareto.non_dominated([[2], [2], [1]]).tolist() == [True, True, False]
    assert pareto.non_dominated([]).tolist() == [] and pareto.non_dominated(np.zeros((0, 3))).tolist() == []


@settings(deadline=None)
@given(fronts())
def test_hypervolume_agrees_with_inclusion_exclusion(points):
    reference = np.full(points.shape[1], -1.0)
    assert pareto.hypervolume(points, reference) == volume_by_inclusion_exclusion(points, reference)


@given(fronts(size=(1, 8)), st.integers(0, 7), st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_a_dominated_point_changes_nothing(points, index, below):
    reference = np.zeros(points.shape[1])
    dominated = points[index % len(points)] - np.array(below[: points.shape[1]])
    assert pareto.hypervolume([*points, dominated], reference) == pareto.hypervolume(points, reference)


@given(fronts(size=(1, 6)), st.randoms(use_true_random=False))
def test_hypervolume_does_not_see_order_and_never_shrinks_with_a_point(points, random):
    reference = np.zeros(points.shape[1])
    shuffled = list(points)
    random.shuffle(shuffled)
    assert pareto.hypervolume(shuffled, reference) == pareto.hypervolume(points, reference)
    assert 0 <= pareto.hypervolume(points[1:], reference) <= pareto.hypervolume(points, reference)


@pytest.mark.parametrize(
    ("points", "reference", "volume"),
    [
        ([(1, -1), (0.5, 0.5)], (0, 0), 0.25),  # the first is not above the reference: it adds no volume
        ([(-1, -1)], (0, 0), 0.0),
        ([(0, 5)], (0, 0), 0.0),
        ([], (0, 0), 0.0),
        ([(2, 1), (1, 2)], (0, 0), 3.0),
        ([(3,), (2,)], (1,), 2.0),
        ([(1, 1, 1), (2, 1, 0.5)], (0, 0, 0), 1.5),
        ([(1e9 + 1, 1e9 + 1)], (1e9, 1e9), 1.0),
    ],
)
def test_known_hypervolumes(points, reference, volume):
    assert pareto.hypervolume(points, reference) == volume


@given(fronts(objectives=(2, 3), size=(1, 6)))
def test_expected_utility_is_the_mean_of_the_best(points):
    weights = np.random.default_rng(0).dirichlet(np.ones(points.shape[1]), size=7)
    expected = statistics.fmean(max(float(np.dot(w, p)) for p in points) for w in weights)
    assert pareto.expected_utility(points, weights) == pytest.approx(expected, abs=1e-13)
    for point in points:  # a set serves at least as well as any of its members
        assert pareto.expected_utility(points, weights) >= pareto.expected_utility([point], weights) - 1e-13


@settings(deadline=None)
@given(fronts(objectives=(2, 2), size=(1, 6)), fronts(objectives=(2, 2), size=(1, 6)))
def test_igd_plus_agrees_with_its_definition(points, target):
    shortfall = [min(math.hypot(*np.clip(z - p, 0, None)) for p in points) for z in target]
    assert pareto.igd_plus(points, target) == pytest.approx(statistics.fmean(shortfall), abs=1e-13)


def test_igd_plus_is_zero_where_the_target_is_reached_or_passed():
    target = [(0, 1), (1, 0)]
    assert pareto.igd_plus(target, target) == 0
    assert pareto.igd_plus([(2, 2)], target) == 0
    assert pareto.igd_plus([(0, 0)], target) == 1


def test_sparsity():
    assert pareto.sparsity([(0, 2), (1, 1), (2, 0)]) == (1 + 1 + 1 + 1) / 2
    assert pareto.sparsity([(0, 2), (2, 0)]) == 8
    assert pareto.sparsity([(0, 2), (2, 0), (2, 0), (0, 0)]) == 8, "copies and dominated points are no gaps"
    assert pareto.sparsity([(1, 1)]) is None and pareto.sparsity([]) is None and pareto.sparsity([(1, 1)] * 3) is None


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20))
def test_one_value_per_cluster_is_the_usual_standard_error(values):
    mean, error = pareto.standard_error_clustered(values, range(len(values)))
    assert mean == pytest.approx(statistics.fmean(values), abs=1e-9)
    assert error == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)), abs=1e-9)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=10), st.integers(1, 5))
def test_copies_within_a_cluster_are_no_information(values, copies):
    once = pareto.standard_error_clustered(values, range(len(values)))
    repeated = pareto.standard_error_clustered(np.repeat(values, copies), np.repeat(range(len(values)), copies))
    assert repeated == pytest.approx(once, abs=1e-9)


def test_unequal_clusters_agree_with_the_formula():
    values, clusters = [1.0, 2.0, 6.0, 3.0], ["a", "a", "a", "b"]
    mean, error = pareto.standard_error_clustered(values, clusters)
    assert (mean, error) == (3.0, pytest.approx(math.sqrt(2 / 1 * (0.0**2 + 0.0**2)) / 4))
    _, error = pareto.standard_error_clustered([1.0, 2.0, 3.0, 6.0], clusters)
    assert error == pytest.approx(math.sqrt(2 / 1 * (3.0**2 + 3.0**2)) / 4)


def test_clustered_error_covers_the_truth():
    """Simulated prompts with answers that go together: the spread of the means is what the error says it is."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 6, size=60)
    clusters = np.repeat(np.arange(60), sizes)
    found = []
    for _ in range(400):
        values = rng.normal(size=60)[clusters] + 0.5 * rng.normal(size=len(clusters))
        found.append(pareto.standard_error_clustered(values, clusters.tolist()))
    spread = statistics.stdev(mean for mean, _ in found)
    claimed = statistics.fmean(error for _, error in found)
    # A standard deviation of 400 draws is known to 1/sqrt(800) = 3.5 %; three of those, and 2 % of small-sample bias.
    assert claimed == pytest.approx(spread, rel=0.125)


def test_one_cluster_says_nothing_about_the_error():
    assert pareto.standard_error_clustered([1.0, 3.0], ["a", "a"]) == (2.0, None)
    assert pareto.standard_error_clustered([5.0], ["a"]) == (5.0, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(bad):
    points = [(1, 1), (0, bad)]
    for call in (
        lambda: pareto.non_dominated(points),
        lambda: pareto.hypervolume(points, (0, 0)),
        lambda: pareto.hypervolume([(1, 1)], (0, bad)),
        lambda: pareto.expected_utility(points, [(1, 0)]),
        lambda: pareto.igd_plus(points, [(0, 0)]),
        lambda: pareto.igd_plus([(0, 0)], points),
        lambda: pareto.sparsity(points),
    ):
        with pytest.raises(MoalignError, match=r"objective 1 is (nan|inf|-inf)"):
            call()
    with pytest.raises(MoalignError, match="value 1"):
        pareto.standard_error_clustered([0.0, bad], [0, 1])


def test_shapes_that_do_not_fit_are_refused():
    for call in (
        lambda: pareto.hypervolume([(1, 1)], (0, 0, 0)),
        lambda: pareto.hypervolume([(1, 1), (1,)], (0, 0)),
        lambda: pareto.hypervolume([1, 1], (0, 0)),
        lambda: pareto.hypervolume([], 0.0),
        lambda: pareto.non_dominated([[], []]),
        lambda: pareto.non_dominated([["a", "b"]]),
        lambda: pareto.expected_utility([(1, 1)], [(1, 0, 0)]),
        lambda: pareto.expected_utility([], [(1, 0)]),
        lambda: pareto.igd_plus([], [(1, 0)]),
        lambda: pareto.igd_plus([(1, 0)], []),
        lambda: pareto.standard_error_clustered([], []),
        lambda: pareto.standard_error_clustered([1.0, 2.0], [0]),
    ):
        with pytest.raises(MoalignError):
            call()
