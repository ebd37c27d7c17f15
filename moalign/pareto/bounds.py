"""How far from the best a front can be at most, where the most that any policy reaches is known for some weights.

V(w) = max of w.f over all policies is convex in w. With U_i >= V(w_i) for some weights w_i, whatever is reachable lies
in the polytope {f : w_i.f <= U_i for all i}. Weights between the w_i are bounded by it, and by nothing else they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moalign.errors import MoalignError
from moalign.pareto.grid import grid
from moalign.pareto.points import matrix, refuse_empty, vector
from moalign.pareto.polytopes import MOST_OBJECTIVES, corners_of, volume_below

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[np.float64]

NOTHING = 1e-12
HARDLY = 1e-4  # of a row's weights; smaller ones make polytopes too long to be cut exactly
ROUND = 9  # digits within which gaps are equal


@dataclass(frozen=True)
class Gap:
    """What a front lacks at most. Shares are of what the best policy gains over the base, by preference.

    ``share``, ``worst``   the front has at least so much, in the mean over an even grid of weights, and for the worst
    ``weights``            [M], the preference that the worst is for: the most may be lacking there
    ``gain``               what one more policy, at whatever weights, adds at most to the mean share, the bounds staying
    """

    share: float
    worst: float
    weights: tuple[float, ...]
    gain: float


def most(wanted: ArrayLike, weights: ArrayLike, bounds: ArrayLike) -> NDArray[np.float64]:
    """The least bound [W] of w.f for the rows of ``wanted`` [W,M] over {f : weights [m,M] f <= bounds [m]}; infinite
    where nothing bounds it.

    By duality min c.bounds over c >= 0 with sum_i c_i weights_i = w.
    """
    rows, ends = _checked(weights, bounds)
    asked = matrix(wanted, "weights", columns=rows.shape[1])
    together = _least(asked, rows, ends)
    if together is not None:
        return together
    alone = [_least(asked[place : place + 1], rows, ends) for place in range(len(asked))]
    return np.array([np.inf if found is None else found[0] for found in alone])


def _least(asked: Array, rows: Array, ends: Array) -> Array | None:
    """The bounds of all that is asked for, by one linear programme in blocks; None where one of them has none."""
    from scipy import sparse
    from scipy.optimize import linprog

    if len(asked) == 0:
        return np.zeros(0)
    blocks = sparse.kron(sparse.identity(len(asked)), rows.T, format="csr")
    result = linprog(c=np.tile(ends, len(asked)), A_eq=blocks, b_eq=asked.reshape(-1))
    if result.status != 0:
        return None
    return np.asarray(result.x.reshape(len(asked), -1) @ ends)


def hypervolume_at_most(weights: ArrayLike, bounds: ArrayLike, reference: ArrayLike) -> float | None:
    """Volume above ``reference`` [M] of {f : weights [m,M] f <= bounds [m]}, which no front exceeds; None where nothing
    bounds it, and for more than five objectives, whose polytope has too many corners."""
    rows, ends = _checked(weights, bounds)
    corner = vector(reference, "reference point")
    matrix(rows, "weights", columns=len(corner))
    if len(corner) > MOST_OBJECTIVES:
        return None
    volume = volume_below(rows, ends - rows @ corner)
    return volume if np.isfinite(volume) else None


def unbounded(weights: ArrayLike) -> list[int]:
    """Objectives, by index, that no row of weights [m,M] asks for alone: nothing bounds what they reach."""
    rows = matrix(weights, "weights")
    return [place for place in range(rows.shape[1]) if not _alone(rows, place).any()]


def gap(
    points: ArrayLike,
    base: ArrayLike,
    weights: ArrayLike,
    bounds: ArrayLike,
    less: ArrayLike | None = None,
    more: ArrayLike | None = None,
) -> Gap | None:
    """What the points [n,M], with the base [M] among them, lack at most; None where an objective is unbounded.

    Share of a preference w: (max_k w.p_k - w.base) / (U(w) - w.base), 1 where there is nothing to gain.

    Where points and base are estimates, ``less`` [n,W] says how much less w.p_k may be for each w of the even grid, and
    ``more`` [W] how much more w.base: the share is then that of the least that was reached, over the most of the base.
    """
    origin = vector(base, "base")
    table = matrix(points, "points", columns=len(origin))
    refuse_empty(table, "points")
    rows, ends = _checked(weights, bounds)
    if unbounded(rows):
        return None
    asked = np.array(grid(len(origin)))
    known = (asked @ np.vstack([table, origin]).T).max(1)
    lowered = asked @ table.T - (0.0 if less is None else matrix(less, "less", columns=len(asked)).T)
    unsure = np.zeros(len(asked)) if more is None else vector(more, "more")
    untouched = asked @ origin + unsure
    reached = np.maximum(lowered.max(1), untouched)
    ends = np.maximum(ends, (rows @ np.vstack([table, origin]).T).max(1))
    limits = np.maximum(most(asked, rows, ends), known)
    smallest = NOTHING * max(1.0, float(np.abs(limits).max()))
    room = limits - untouched
    # where there may be something to gain, but the base may have all of it, nothing is known to be gained
    anything, known_room = room + 2 * unsure > smallest, room > smallest

    def lacks(best: Array) -> Array:
        """Of what can be gained, the shares [W] from what is reached to the best."""
        shares = np.clip((best - reached) / np.where(known_room, room, 1.0), 0.0, 1.0)
        return np.where(anything, np.where(known_room, shares, 1.0), 0.0)

    lacking = lacks(limits)
    added = [float(lacks(asked @ corner).mean()) for corner in best_corners(rows, ends)]
    share = 1.0 - float(lacking.mean())
    return Gap(
        share=share,
        worst=1.0 - float(lacking.max()),
        weights=tuple(asked[int(np.round(lacking, ROUND).argmax())].tolist()),
        gain=min(max(added, default=1.0), 1.0 - share),
    )


def best_corners(weights: ArrayLike, bounds: ArrayLike) -> NDArray[np.float64]:
    """Corners [c,M] of {f : weights f <= bounds}, every objective bounded alone: none of its points is better than all
    mixtures of them. Empty for more than five objectives, whose corners are too many.

    Rows that hardly ask for one of the objectives are left out, so that the corners are then those of a polytope that
    holds this one: such a row is tight only where that objective is far below all else, too far to be computed.
    """
    rows, ends = _checked(weights, bounds)
    objectives = rows.shape[1]
    if unbounded(rows):
        raise MoalignError("weights: an objective is not bounded alone; the polytope need not have corners")
    top = np.array([(ends / rows.max(1))[_alone(rows, place)].min() for place in range(objectives)])
    below = rows @ top - ends  # g = top - f >= 0 with rows . g >= below
    size = max(1.0, float(np.abs(top).max()))
    counts = (below > NOTHING * size) & ~_hardly(rows)
    cuts, below = rows[counts], below[counts]
    if len(cuts) == 0:
        return top[None]
    if objectives > MOST_OBJECTIVES:
        return np.zeros((0, objectives))
    # in a corner each g_j > 0 is held up by a tight row, so that w_j g_j <= below
    depths = np.divide(below[:, None], cuts, out=np.zeros(cuts.shape), where=cuts > NOTHING).max(0)
    depths = np.where(depths > 0, depths, size)
    scaled = cuts * depths / below[:, None]
    normals = np.vstack([-scaled, -np.eye(objectives), np.eye(objectives)])
    offsets = np.concatenate([-np.ones(len(scaled)), np.zeros(objectives), np.full(objectives, 2.0)])
    corners = corners_of(normals, offsets, np.full(objectives, 1.5))
    return np.asarray(top - corners[(corners < 1.5).all(1)] * depths)


def _checked(weights: ArrayLike, bounds: ArrayLike) -> tuple[Array, Array]:
    """Weights [m,M], none negative and no row of zeros, and bounds [m]."""
    rows, ends = matrix(weights, "weights"), vector(bounds, "bounds")
    if len(rows) != len(ends):
        raise MoalignError(f"{len(rows)} weights and {len(ends)} bounds: one bound for each")
    if (rows < 0).any() or (rows.max(1, initial=0.0) <= 0).any():
        raise MoalignError("weights: one is negative, or all of a row are 0; such a bound says nothing here")
    return rows, ends


def _alone(rows: Array, place: int) -> NDArray[np.bool_]:
    return np.asarray(np.isclose(rows[:, place], rows.sum(1), rtol=1e-9, atol=0.0))


def _hardly(rows: Array) -> NDArray[np.bool_]:
    """Rows in which an objective has a weight that is neither nothing nor much."""
    shares = rows / rows.sum(1, keepdims=True)
    return np.asarray(((shares > NOTHING) & (shares < HARDLY)).any(1))
