"""How far two rewards are from asking for the same policies: STARC metrics for single responses. arXiv 2309.15257.

A reward R(x, y) of a response to a prompt is canonicalised by taking off what no policy can change, standardised by its
size, and compared:
    c(R)(x, y) = R(x, y) - E_{y' ~ pi}[R(x, y')],   s(R) = c(R) / ||c(R)||,   distance = ||s(R_1) - s(R_2)|| / 2
with ||.|| the root mean square over the responses. Adding a number for each prompt, or multiplying by one above 0,
changes nothing; R and -R are at 1, the largest distance. The norm that the paper leaves open is this one.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moalign.diagnostics.prompts import within

Array = NDArray[np.float64]
TRIVIAL = 1e-9  # of a reward's own size: what is left below it is rounding


def standardised(rewards: ArrayLike, prompts: Sequence[Hashable]) -> Array:
    """[N,M]: canonical, and of root mean square 1; a trivial reward, which tells no responses to one prompt apart, is 0
    everywhere.

    What is left of rounding counts as nothing: below 1e-9 of the reward's largest size.
    """
    values = np.asarray(rewards, dtype=np.float64)
    found = within(values, prompts)
    norms = np.sqrt((found**2).mean(0))
    norms[norms <= TRIVIAL * np.abs(values).max(0, initial=0.0)] = 0.0
    return np.asarray(np.divide(found, norms, out=np.zeros_like(found), where=norms > 0))


def distances(rewards: ArrayLike, prompts: Sequence[Hashable]) -> Array:
    """[N,M] rewards of N responses, ``prompts`` [N] -> [M,M] in [0, 1].

    Two trivial rewards are at 0, a trivial one and another at 1/2. For two that are not it is sqrt((1 - r) / 2), r the
    correlation within prompts.
    """
    unit = standardised(rewards, prompts)
    gaps = unit[:, :, None] - unit[:, None, :]
    return np.asarray(np.sqrt((gaps**2).mean(0)) / 2)
