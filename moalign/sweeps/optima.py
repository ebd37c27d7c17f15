"""What no policy exceeds for the weights of each candidate, by the samples that say it best, whoever's they are.

A candidate's own samples say what could be reached for its weights (see ``engine.optimum``), but not where it has gone
astray: what it never says it does not know, and is the surer of the rest. So all candidates are asked about the weights
of each, and whom the others contradict is not believed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moalign import storage
from moalign.engine.optimum import Optimum, optimum
from moalign.errors import CorruptFileError
from moalign.sweeps import samples
from moalign.sweeps.samples import SampleLine

ERRORS = 3.0  # standard errors above an estimate at which it is taken for a bound
CONTRADICTED = 2.0  # standard errors by which another's estimate is above that
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Sampled:
    """Of N responses of a candidate: rewards [N,M], NaN where unknown, log pi / pi_ref [N], the prompts' numbers."""

    rewards: Array
    log_ratios: Array
    prompts: tuple[int, ...]

    def about(self, weights: Array, price: float) -> Optimum | None:
        """What these say of the best policy for the weights [M]."""
        counts = weights > 0  # an objective that abstains and has no weight is no matter
        return optimum(self.rewards[:, counts] @ weights[counts], self.log_ratios, self.prompts, price)

    def errors(self, weights: Array, price: float) -> Array | None:
        """Standard errors [W] of the means of w.r - price * log-ratio for the rows of ``weights`` [W,M]: of these
        prompts, not of all prompts. None where a prompt has but one response, or a response no reward."""
        columns = np.column_stack([self.rewards, self.log_ratios])
        if not np.isfinite(columns).all():
            return None
        prompts = np.array(self.prompts)
        total = np.zeros((columns.shape[1], columns.shape[1]))
        for prompt in range(prompts.max() + 1):
            own = columns[prompts == prompt]
            if len(own) < 2:
                return None
            total += np.cov(own, rowvar=False) / len(own)
        asked = np.column_stack([weights, np.full(len(weights), -price)])
        squares = np.einsum("wi,ij,wj->w", asked, total, asked)
        return np.asarray(np.sqrt(np.maximum(squares, 0.0)) / (prompts.max() + 1))


def bounds(weights: Mapping[str, Array], sampled: Mapping[str | None, Sampled], price: float) -> dict[str, float]:
    """By candidate, what no policy exceeds for its weights [M]; those of whom nothing is known are left out."""
    found = {}
    for name, wanted in weights.items():
        asked = {who: each.about(wanted, price) for who, each in sampled.items()}
        if estimates := {who: one for who, one in asked.items() if one is not None}:
            found[name] = _believed(estimates)
    return found


def _believed(estimates: Mapping[str | None, Optimum]) -> float:
    """The estimate of those samples that vary least in what they say, three standard errors added, unless others have
    more than that, two standard errors taken away; then the next.

    The base (None) says all that any policy says, and errs by chance alone: its estimate counts as it is.
    """
    others = [one.value - (0.0 if who is None else CONTRADICTED * one.stderr) for who, one in estimates.items()]
    surest = sorted(estimates.values(), key=lambda one: one.deviation)
    most = [value + ERRORS * error for value, error in (one.bound for one in surest)]
    return next(limit for limit in most if limit >= max(others))


def read(
    run_directory: Path, ids: Sequence[str], objectives: Sequence[str], base: str | None = None
) -> dict[str | None, Sampled]:
    """The samples of these candidates, and of the untouched base (None), if they are kept with rewards and log-ratios.

    ``base``: SHA-256 of the base's file, as the journal has it; None: runs of before it was kept. Raises
    CorruptFileError where a file is not what was written, or a line not one of a sample.
    """
    found: dict[str | None, Sampled] = {}
    for name in (None, *ids):
        folder = run_directory / samples.BASE if name is None else run_directory / "candidates" / name
        if (folder / samples.FILE).exists():
            if name is not None:
                storage.verify(folder, only=(samples.FILE,))
            elif base is not None:
                _verify(folder / samples.FILE, base)
            lines = samples.read(folder)
            if lines and all(line.rewards is not None and line.log_ratio is not None for line in lines):
                found[name] = _sampled(lines, objectives)
    return found


def _verify(file: Path, sha256: str) -> None:
    """The base's folder has no manifest: its samples are made again where they are gone."""
    if storage.sha256_of(file) != sha256:
        raise CorruptFileError(f"{file}: its content is not what was written; `moalign resume` makes it again")


def _sampled(lines: Sequence[SampleLine], objectives: Sequence[str]) -> Sampled:
    numbers: dict[str, int] = {}
    prompts = tuple(numbers.setdefault(line.prompt, len(numbers)) for line in lines)
    rewards = [[(line.rewards or {}).get(name, np.nan) for name in objectives] for line in lines]
    ratios = np.array([line.log_ratio for line in lines], dtype=np.float64)
    return Sampled(np.array(rewards, dtype=np.float64).reshape(-1, len(objectives)), ratios, prompts)
