"""Places the labels of a picture so that they cover neither each other nor a point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

DISTANCES = (8.0, 12.0, 18.0, 26.0)  # from the point, in pixels at 100 dpi; farther away nobody sees whose it is
DIRECTIONS = 16


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: Box) -> bool:
        apart = self.right <= other.left or other.right <= self.left
        return not (apart or self.top <= other.bottom or other.top <= self.bottom)

    def inside(self, other: Box) -> bool:
        return (
            other.left <= self.left
            and self.right <= other.right
            and self.bottom >= other.bottom
            and self.top <= other.top
        )


def place(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    frame: Box,
    obstacles: Sequence[Box],
    lines: Sequence[tuple[float, float]] = (),
    scale: float = 1.0,
) -> list[tuple[float, float] | None]:
    """The centre of each label (None: no room), all in pixels.

    ``anchors`` are the points that the labels belong to, ``sizes`` the labels' (width, height), ``obstacles`` what
    must stay visible, ``lines`` places that are better kept free. Greedy, nearest place first; deterministic.
    """
    taken = list(obstacles)
    centres: list[tuple[float, float] | None] = []
    for anchor, size in zip(anchors, sizes, strict=True):
        best: tuple[float, tuple[float, float], Box] | None = None
        for cost, centre in _candidates(anchor, size, scale):
            if best is not None and cost >= best[0]:
                continue
            box = _around(centre, size)
            if not box.inside(frame) or any(box.overlaps(other) for other in taken):
                continue
            cost += 6.0 * sum(box.left < x < box.right and box.bottom < y < box.top for x, y in lines)
            if best is None or cost < best[0]:
                best = (cost, centre, box)
        centres.append(None if best is None else best[1])
        if best is not None:
            taken.append(best[2])
    return centres


def _candidates(
    anchor: tuple[float, float], size: tuple[float, float], scale: float
) -> list[tuple[float, tuple[float, float]]]:
    """Places around a point with their cost: near first; upper right before the rest."""
    found = []
    for distance in DISTANCES:
        for index in range(DIRECTIONS):
            angle = math.pi / 4 + 2 * math.pi * index / DIRECTIONS
            across, up = math.cos(angle), math.sin(angle)
            centre = (
                anchor[0] + across * (distance * scale + size[0] / 2),
                anchor[1] + up * (distance * scale + size[1] / 2),
            )
            found.append((distance + 2.0 * (1 - math.cos(angle - math.pi / 4)), centre))
    return found


def _around(centre: tuple[float, float], size: tuple[float, float]) -> Box:
    (x, y), (width, height) = centre, size
    return Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
