"""What a filter leaves of a round of scored responses, or of the labelled pairs of these; each choice with its reason.

It looks at the round when every advantage is known and takes units out of the steps, never out of the round.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from moalign import door
from moalign.api import Filter, Kept, Sampled
from moalign.data.dataset import PairDataset, of_pairs
from moalign.engine.advantages import Advantages, numbers_in
from moalign.errors import PluginError, TrainingError
from moalign.seeds import derive

RESPONSES, PAIRS = "keep_responses", "keep_pairs"
OWN = frozenset({"kept", "pairs"})  # figures that are no reasons


@dataclass(frozen=True)
class Filtering:
    """One candidate's filter. ``rule``: how rewards are combined for it, where the loss combines none; else None."""

    plugin: Filter
    objectives: tuple[str, ...]
    candidate: str
    seed: int
    rule: Advantages | None = None

    def responses(
        self, number: int, dataset: PairDataset, raw: NDArray[np.float64], signal: NDArray[np.float64]
    ) -> tuple[PairDataset, dict[str, float]]:
        """The pairs (or units) of the responses that are kept, with their weights; and figures for the metrics.

        ``raw`` [N,M]: rewards before transforms; ``signal`` [N]: combined, NaN for responses that have not all rewards.
        Raises TrainingError where no response, or no pair of two, is left, PluginError where the filter returns what it
        must not.
        """
        if not self.plugin.has(RESPONSES):
            return dataset, {}
        rows = np.flatnonzero(np.isfinite(signal))
        kept = self._asked(number, RESPONSES, len(rows), self._about(number, dataset, raw, signal, rows))
        weights = np.zeros(len(signal))
        weights[rows] = kept.weights.numpy()
        figures = _figures("filter", kept, len(rows))
        if not weights.any():
            raise TrainingError(f"round {number}: {self._who} keeps not one of {len(rows)} responses{_why(kept)}")
        first, second = dataset.pairs.T
        found = self._with(dataset, np.where(first == second, weights[first], weights[first] * weights[second]))
        if not len(found.pairs):
            raise TrainingError(
                f"round {number}: {self._who} keeps {int((weights > 0).sum())} of {len(rows)} responses, and the loss "
                f"learns from pairs: no two different ones to a prompt are left{_why(kept)}"
            )
        return found, figures

    def pairs(
        self, number: int, dataset: PairDataset, raw: NDArray[np.float64], signal: NDArray[np.float64]
    ) -> tuple[PairDataset, dict[str, float]]:
        """The same for the dataset's labelled pairs."""
        if not self.plugin.has(PAIRS):
            return dataset, {}
        rows = np.flatnonzero(np.isfinite(signal))
        pairs = torch.from_numpy(np.searchsorted(rows, dataset.pairs))
        about = self._about(number, dataset, raw, signal, rows)
        kept = self._asked(number, PAIRS, len(pairs), about, pairs)
        before = 1.0 if dataset.weights is None else dataset.weights
        found = self._with(dataset, before * kept.weights.numpy())
        if not len(found.pairs):
            raise TrainingError(f"round {number}: {self._who} keeps not one of {len(pairs)} pairs{_why(kept)}")
        return found, _figures("filter/pairs", kept, len(pairs))

    @property
    def _who(self) -> str:
        return door.origin(self.plugin).who

    def _about(
        self,
        number: int,
        dataset: PairDataset,
        raw: NDArray[np.float64],
        signal: NDArray[np.float64],
        rows: NDArray[np.int64],
    ) -> Sampled:
        sequences = [dataset.sequences[row] for row in rows.tolist()]
        return Sampled(
            number=number,
            signal=torch.from_numpy(signal[rows]),
            rewards=torch.from_numpy(raw[rows]),
            groups=torch.from_numpy(dataset.groups[rows]),
            lengths=torch.tensor([len(sequence.response) for sequence in sequences]),
            ended=torch.tensor([not sequence.truncated for sequence in sequences]),
            texts=tuple(dataset.samples[row].response for row in rows.tolist()),
            objectives=self.objectives,
        )

    def _asked(self, number: int, method: str, count: int, *given: Any) -> Kept:
        generator = Generator().manual_seed(derive(self.seed, "filter", method, number))
        found = door.call(self.plugin, method, *given, generator, candidate=self.candidate)
        return checked(found, count, f"{self._who}, in {method}")

    def _with(self, dataset: PairDataset, weights: NDArray[np.float64]) -> PairDataset:
        """The pairs that have a weight, and these where they are not all 1."""
        if not np.isfinite(weights).all():
            raise PluginError(f"{self._who}: its weights are so large that those of pairs are infinite")
        kept = weights > 0
        if kept.all() and dataset.weights is None and (weights == 1).all():
            return dataset  # the very arrays, which candidates share
        alike = bool((weights[kept] == 1).all())
        return replace(of_pairs(dataset, kept, dataset.counts), weights=None if alike else weights[kept])


def checked(found: Any, count: int, who: str) -> Kept:
    """What a filter returned for so many. Raises PluginError where it is not what ``Kept`` says."""
    if not isinstance(found, Kept):
        raise PluginError(f"{who}: it must return a moalign.api.Kept, not {type(found).__name__}")
    weights = found.weights
    good = isinstance(weights, Tensor) and weights.shape == (count,) and weights.dtype == torch.float64
    if not good or weights.device.type != "cpu":
        kind = isinstance(weights, Tensor)
        what = f"{weights.dtype} {list(weights.shape)} on {weights.device}" if kind else type(weights).__name__
        raise PluginError(f"{who}: weights must be float64 [{count}] on cpu, one of each, not {what}")
    bad = weights[~(weights.isfinite() & (weights >= 0))]
    if len(bad):
        raise PluginError(f"{who}: a weight is {float(bad[0])}; it must be finite, and not below 0")
    reasons = found.reasons
    if not (isinstance(reasons, tuple) and len(reasons) == count and all(isinstance(each, str) for each in reasons)):
        raise PluginError(f"{who}: reasons must be a tuple of {count} texts, one of each")
    for weight, reason in zip(weights.tolist(), reasons, strict=True):
        if (weight == 0) != bool(reason):
            what = "without a reason" if not reason else f"with the reason '{reason}' to leave it out"
            raise PluginError(f"{who}: one has the weight {weight:g} {what}")
        if reason in OWN or "\n" in reason or "/" in reason:
            raise PluginError(f"{who}: the reason {reason!r} cannot name a figure; write a few words")
    numbers = dict(found.figures)
    if numbers.keys() & (OWN | set(reasons)) or len(list(numbers_in(numbers))) != len(numbers):
        raise PluginError(f"{who}: figures must be numbers by names of their own, not {numbers!r}")
    return replace(found, weights=weights.detach())


def _figures(prefix: str, kept: Kept, count: int) -> dict[str, float]:
    """The share that is kept, how many are left out for each reason, and what the filter says itself."""
    figures = {f"{prefix}/kept": float((kept.weights > 0).double().mean()) if count else 0.0}
    figures |= {f"{prefix}/{reason}": float(number) for reason, number in _reasons(kept).items()}
    return figures | {f"{prefix}/{name}": value for name, value in numbers_in(dict(kept.figures))}


def _reasons(kept: Kept) -> dict[str, int]:
    return dict(sorted(Counter(filter(None, kept.reasons)).items()))


def _why(kept: Kept) -> str:
    listed = ", ".join(f"{number} {reason}" for reason, number in _reasons(kept).items())
    return f" (left out: {listed}); other options of rollouts.filter, or more rollouts.samples, usually help"
