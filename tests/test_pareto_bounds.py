"""What a front lacks at most, in a world small enough to know all of it: softmax policies over six replies."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moalign import pareto
from moalign.errors import MoalignError

PRICE = 0.3


class World:
    """One prompt, six replies: everything about every policy is a sum of six terms."""

    def __init__(self, objectives: int, seed: int):
        rng = np.random.default_rng(seed)
        self.rewards = rng.uniform(0, 1, (6, objectives))
        self.reference = rng.dirichlet(np.ones(6))
        self.base = self.reference @ self.rewards
        self.grid = np.array(pareto.grid(objectives))

    def values(self, policy: np.ndarray) -> np.ndarray:
        """E[r_j] - price KL, [M]."""
        return policy @ self.rewards - PRICE * float(policy @ np.log(policy / self.reference))

    def best(self, weights: np.ndarray) -> np.ndarray:
        """The policy with the most w.f."""
        tilted = self.reference * np.exp(self.rewards @ weights / PRICE)
        return tilted / tilted.sum()

    def most(self, weights: np.ndarray) -> float:
        return PRICE * math.log(self.reference @ np.exp(self.rewards @ weights / PRICE))

    def share(self, points: np.ndarray) -> np.ndarray:
        """Exact, by preference of the grid; the base counts as a point."""
        origin = self.grid @ self.base
        reached = (self.grid @ np.vstack([points, self.base]).T).max(1)
        return (reached - origin) / (np.array([self.most(w) for w in self.grid]) - origin)


def worlds():
    return [World(objectives, seed) for objectives in (2, 3, 4) for seed in range(4)]


def trained(world: World, seed: int, others: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights (each objective alone among them), values of policies that are not quite the best, what the best has."""
    rng = np.random.default_rng(seed)
    objectives = world.rewards.shape[1]
    weights = np.vstack([np.eye(objectives), rng.dirichlet(np.ones(objectives), others)])
    points = []
    for w in weights:
        noisy = world.best(w) * np.exp(rng.normal(size=6) * 0.3)
        points.append(world.values(noisy / noisy.sum()))
    return weights, np.array(points), np.array([world.most(w) for w in weights])


def test_the_world_is_as_the_theory_says():
    """The optimum attains V, and a mixture of policies has at least the mixture of their values."""
    for world in worlds():
        rng = np.random.default_rng(0)
        for w in world.grid[::40]:
            assert w @ world.values(world.best(w)) == pytest.approx(world.most(w), abs=1e-12)
            assert w @ world.values(rng.dirichlet(np.ones(6))) <= world.most(w)
        one, two = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
        assert (world.values((one + two) / 2) >= (world.values(one) + world.values(two)) / 2).all()


@pytest.mark.parametrize("slack", (0.0, 0.02))
def test_the_share_is_at_least_what_is_said_for_the_mean_and_for_the_worst(slack):
    for number, world in enumerate(worlds()):
        weights, points, most = trained(world, number)
        gap, exact = pareto.gap(points, world.base, weights, most + slack), world.share(points)
        assert gap is not None
        assert 0 <= gap.share <= exact.mean() + 1e-9 and gap.worst <= exact.min() + 1e-9
        assert gap.worst <= gap.share and gap.share + gap.gain <= 1 + 1e-9
        assert sum(gap.weights) == pytest.approx(1)


def test_nothing_that_any_policy_can_be_adds_more_than_is_said():
    for number, world in enumerate(worlds()):
        weights, points, most = trained(world, number)
        gap = pareto.gap(points, world.base, weights, most)
        assert gap is not None
        limits = (world.grid @ pareto.best_corners(weights, most).T).max(1)
        origin = world.grid @ world.base
        reached = (world.grid @ np.vstack([points, world.base]).T).max(1)
        for w in np.random.default_rng(number).dirichlet(np.ones(weights.shape[1]), 50):
            new = np.maximum(world.grid @ world.values(world.best(w)), reached)
            assert ((new - reached) / (limits - origin)).mean() <= gap.gain + 1e-9


def test_volumes_stand_in_their_order():
    """Points, mixtures of them, the exact front (a fine grid of optima and mixtures of those), what bounds it."""
    for number, world in enumerate(worlds()):
        weights, points, most = trained(world, number)
        fine = np.array([world.values(world.best(w)) for w in world.grid[::4]])
        exact = pareto.hypervolume_of_mixtures(np.vstack([fine, points]), world.base)
        at_most = pareto.hypervolume_at_most(weights, most, world.base)
        mixtures = pareto.hypervolume_of_mixtures(points, world.base)
        assert at_most is not None
        assert pareto.hypervolume(points, world.base) <= mixtures + 1e-12 and mixtures <= exact + 1e-9
        assert exact <= at_most + 1e-9


def test_bounds_close_as_weights_are_measured():
    world = World(2, 0)
    weights = np.array(pareto.even_weights(2, 40))
    points = np.array([world.values(world.best(w)) for w in weights])
    most = np.array([world.most(w) for w in weights])
    gap = pareto.gap(points, world.base, weights, most)
    assert gap is not None and gap.share > 0.9999 and gap.gain < 1e-4
    exact = pareto.hypervolume_of_mixtures(points, world.base)
    assert pareto.hypervolume_at_most(weights, most, world.base) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("objectives", (2, 3, 4, 5))
def test_corners_and_linear_programmes_bound_the_same(objectives):
    rng = np.random.default_rng(objectives)
    for _ in range(5):
        weights = np.vstack([np.eye(objectives), rng.dirichlet(np.ones(objectives), 6)])
        bounds = np.linalg.norm(weights, axis=1) * rng.uniform(0.9, 1.1, len(weights))
        corners = pareto.best_corners(weights, bounds)
        assert (corners @ weights.T <= bounds + 1e-9).all()
        asked = rng.dirichlet(np.ones(objectives), 20)
        assert (asked @ corners.T).max(1) == pytest.approx(pareto.most(asked, weights, bounds), abs=1e-7)


def test_weights_that_hardly_ask_for_an_objective_bound_as_they_should():
    """Corners of such polytopes lie too far out to be computed; shares do not need them."""
    for seed in range(12):
        rng = np.random.default_rng(seed)
        weights = np.vstack([np.eye(3), np.maximum(rng.dirichlet([0.1] * 3, 5), 1e-300)])
        weights /= weights.sum(1, keepdims=True)
        policies = np.abs(rng.normal(size=(100, 3)))
        policies /= np.linalg.norm(policies, axis=1, keepdims=True)
        bounds = (weights @ policies.T).max(1)
        grid, points = np.array(pareto.grid(3)), policies[:3] * 0.9
        reached, limits = (grid @ points.T).max(1), pareto.most(grid, weights, bounds)
        gap, corners = pareto.gap(points, np.zeros(3), weights, bounds), pareto.best_corners(weights, bounds)
        assert gap is not None and gap.share == pytest.approx((reached / limits).mean(), abs=1e-9)
        assert ((grid @ corners.T).max(1) >= limits - 1e-9).all(), "the corners are those of no smaller polytope"
        gains = [(np.maximum(grid @ policy - reached, 0) / limits).mean() for policy in policies]
        assert max(gains) <= gap.gain + 1e-9


def test_what_is_not_sure_is_not_claimed():
    points, base, ends = [[0.9, 0.2], [0.2, 0.9]], [0.1, 0.1], [1.0, 1.0]
    grid = np.array(pareto.grid(2))
    exact = pareto.gap(points, base, np.eye(2), ends)
    less, more = np.full((2, len(grid)), 0.05), np.full(len(grid), 0.02)
    assert pareto.gap(points, base, np.eye(2), ends, 0 * less, 0 * more) == exact
    found = pareto.gap(points, base, np.eye(2), ends, less, more)
    reached = (grid @ np.array(points).T).max(1) - 0.05
    shares = (reached - 0.12) / (1.0 - 0.12)
    assert found is not None
    assert (found.share, found.worst) == (pytest.approx(shares.mean()), pytest.approx(min(shares)))
    assert exact is not None and exact.share > found.share and exact.gain < found.gain
    nothing = pareto.gap(points, base, np.eye(2), ends, less, np.full(len(grid), 0.95))
    assert nothing is not None and (nothing.share, nothing.gain) == (0, 1), "the base itself may have all of it"
    above = pareto.gap([[0.9, 0.9]], [1.1, 1.1], np.eye(2), ends, less[:1], np.full(len(grid), 0.3))
    assert above is not None and above.share == 0, "a base that seems to be the best policy may be less"
    one = pareto.gap(points, base, np.eye(2), ends, np.vstack([less[0] * 99, less[1]]), more)
    assert one is not None and one.weights == (1.0, 0.0), "nobody else is for that"


def test_between_two_weights_the_bound_is_the_line_between_theirs():
    found = pareto.most([[0.25, 0.75], [1, 0], [0.5, 0.5]], np.eye(2), [4.0, 8.0])
    assert found.tolist() == pytest.approx([7, 4, 6])
    assert pareto.most([[1, 0]], [[0.5, 0.5]], [1.0]).tolist() == [math.inf], "nothing bounds what was not asked for"


def test_an_objective_that_was_never_asked_for_alone_leaves_no_share():
    weights = [[1.0, 0.0], [0.5, 0.5]]
    assert pareto.unbounded(weights) == [1] and pareto.unbounded([[0.5, 0.5]]) == [0, 1]
    assert pareto.gap([[1, 1]], [0, 0], weights, [1.0, 1.0]) is None
    with pytest.raises(MoalignError, match="not bounded alone"):
        pareto.best_corners(weights, [1.0, 1.0])


def test_single_points_copies_and_nothing_to_gain():
    one = pareto.gap([[1.0, 1.0]], [0, 0], np.eye(2), [2.0, 2.0])
    assert one is not None and (one.share, one.worst, one.gain) == (0.5, 0.5, 0.5) and one.weights == (0.0, 1.0)
    assert pareto.gap([[1.0, 1.0]] * 3, [0, 0], [*np.eye(2), *np.eye(2)], [2.0, 2.0, 2.5, 2.0]) == one
    done = pareto.gap([[0.0, 0.0]], [0, 0], np.eye(2), [0.0, 0.0])
    assert done is not None and (done.share, done.worst, done.gain) == (1, 1, 0)
    below = pareto.gap([[-1.0, -1.0]], [0, 0], np.eye(2), [1.0, 1.0])
    assert below is not None and below.share == 0, "the untouched model serves better, and is there"
    beaten = pareto.gap([[3.0, 3.0]], [0, 0], np.eye(2), [2.0, 2.0])
    assert beaten is not None and beaten.share == 1, "a bound that a policy is above gives way"
    alone = pareto.gap([[1.0]], [0], [[1.0]], [4.0])
    assert alone is not None and (alone.share, alone.gain, alone.weights) == (0.25, 0.75, (1.0,))


def test_what_is_no_bound_is_refused():
    for call in (
        lambda: pareto.gap([], [0, 0], np.eye(2), [1, 1]),
        lambda: pareto.gap([[math.nan, 0]], [0, 0], np.eye(2), [1, 1]),
        lambda: pareto.most([[1, 0]], np.eye(2), [1, math.inf]),
        lambda: pareto.most([[1, 0]], np.eye(2), [1]),
        lambda: pareto.most([[1, 0, 0]], np.eye(2), [1, 1]),
        lambda: pareto.most([[1, 0]], [[1, -1]], [1]),
        lambda: pareto.hypervolume_at_most([[0, 0]], [1], [0, 0]),
    ):
        with pytest.raises(MoalignError):
            call()


def test_six_objectives_are_bounded_without_their_corners():
    gap = pareto.gap([np.full(6, 0.5)], np.zeros(6), [*np.eye(6), np.full(6, 1 / 6)], [1.0] * 6 + [0.6])
    assert gap is not None and gap.worst == pytest.approx(0.5)
    assert gap.gain == pytest.approx(1 - gap.share), "no more is said than that everything may be closed"
