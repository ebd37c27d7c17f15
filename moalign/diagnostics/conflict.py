"""Whether a step for one objective is a step against another: cosines of their gradients at a policy's adapter.

From inner products G[j,k] = <g_j, g_k> of the objectives' gradients; -1: straight against each other, 0: nothing to do
with each other, 1: the same direction.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def cosines(products: ArrayLike) -> NDArray[np.float64]:
    """[M,M] -> [M,M], G[j,k] / sqrt(G[j,j] G[k,k]); NaN where a gradient is 0 or was not taken (NaN)."""
    gram = np.asarray(products, dtype=np.float64)
    sizes = np.sqrt(np.diag(gram))
    norms = np.outer(sizes, sizes)
    found = np.divide(gram, norms, out=np.full_like(gram, np.nan), where=norms > 0)
    return np.asarray(np.clip(found, -1.0, 1.0))


def worst(matrix: ArrayLike) -> tuple[int, int, float] | None:
    """(j, k, cosine) of the two that are most against each other, j < k; None where no two have one."""
    table = np.asarray(matrix, dtype=np.float64)
    pairs = [(float(table[j, k]), j, k) for j in range(len(table)) for k in range(j + 1, len(table))]
    known = [each for each in pairs if np.isfinite(each[0])]
    if not known:
        return None
    value, j, k = min(known)
    return j, k, value
