"""Points as every measure takes them: finite numbers, one row per point and one column per objective."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moalign.errors import MoalignError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def matrix(values: ArrayLike, what: str, columns: int | None = None) -> NDArray[np.float64]:
    """``values`` as finite float64 [n, M] with M >= 1 (M = ``columns`` where given). Raises MoalignError."""
    try:
        table = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise MoalignError(f"{what}: not a table of numbers: {error}") from error
    if table.ndim == 1 and table.size == 0:
        table = table.reshape(0, columns or 1)
    if table.ndim != 2 or table.shape[1] == 0:
        raise MoalignError(f"{what}: shape {table.shape}, expected one row per point and one column per objective")
    if columns is not None and table.shape[1] != columns:
        raise MoalignError(f"{what}: {table.shape[1]} objectives, expected {columns}")
    if not np.isfinite(table).all():
        row, column = np.argwhere(~np.isfinite(table))[0]
        raise MoalignError(f"{what}: row {row}, objective {column} is {table[row, column]}, not a finite number")
    return table


def vector(values: ArrayLike, what: str) -> NDArray[np.float64]:
    """``values`` [M] as finite float64. Raises MoalignError."""
    return matrix(np.asarray(values, dtype=np.float64)[None], what)[0]


def refuse_empty(table: NDArray[np.float64], what: str) -> None:
    """Raise MoalignError where there is no row."""
    if len(table) == 0:
        raise MoalignError(f"{what}: empty; at least one row is needed")
