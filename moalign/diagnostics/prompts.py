"""Figures of responses, less what is their prompt's."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def numbered(prompts: Sequence[Hashable]) -> NDArray[np.int64]:
    """[N]: numbers from 0, the same for the same prompt, in the order in which prompts first appear."""
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    return np.array([numbers[prompt] for prompt in prompts], dtype=np.int64)


def within(values: ArrayLike, prompts: Sequence[Hashable]) -> NDArray[np.float64]:
    """[N,M] -> [N,M]: each column less its mean over the responses to the same prompt."""
    table, place = np.asarray(values, dtype=np.float64), numbered(prompts)
    counts = np.bincount(place)[:, None]
    sums = np.zeros((len(counts), table.shape[1]))
    np.add.at(sums, place, table)
    return np.asarray(table - (sums / counts)[place])
