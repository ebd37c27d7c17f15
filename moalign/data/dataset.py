"""The frozen data that the engine trains on."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moalign.data.records import LARGEST
from moalign.data.tokenise import Sequence
from moalign.errors import DataError
from moalign.types import Sample


@dataclass(frozen=True, eq=False)
class PairDataset:
    """N sequences, P pairs of them, M objectives. Arrays are read-only.

    ``pairs[P,2]``         sequence numbers, chosen first where the pair is labelled
    ``pair_objective[P]``  index of the objective that judged the pair, -1: none did, the rewards' difference counts
    ``strength[P]``        of the judgement, as the data has it
    ``rewards[N,M]``       larger is better, NaN where unknown
    ``groups[N]``          sequences of one group (prompt) share a number
    ``samples[N]``         prompt and response as text, for rewards that score them
    ``counts``             what was truncated or dropped, and why
    ``advantages[N]``      of sampled responses that are units of their own (None: the pairs are); not part of the hash
    ``figures``            of a round of sampled responses, for the metrics; not part of the hash either
    ``greedy``             the greedy response to each prompt, in no pair and never trained on; where a loss needs them
    ``old_logps``, ``ref_logps``  for each, of its response tokens under the policy that sampled it, and the reference
    ``token_advantages``, ``known``  for each, of its response tokens, where a loss weighs them one by one
    ``preference[N,M]``    for which each response counts, where one model is trained for many; None: the candidate's
    ``preferred[P,M]``     share of an objective's judgements of the pair that prefer its first response, NaN where it
                           has none; of pairs that stand there once for all their judges
    ``weights[P]``         how much each counts beside the others of its step, all above 0; None: alike. A filter of
                           sampled responses has found them; not part of the hash
    ``views``              by name, the number of a further sequence that belongs to each pair, [P] each
    """

    objectives: tuple[str, ...]
    sequences: tuple[Sequence, ...]
    samples: tuple[Sample, ...]
    pairs: NDArray[np.int64]
    pair_objective: NDArray[np.int64]
    strength: NDArray[np.float64]
    rewards: NDArray[np.float64]
    groups: NDArray[np.int64]
    counts: Mapping[str, int]
    warnings: tuple[str, ...] = ()
    advantages: NDArray[np.float64] | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    greedy: PairDataset | None = None
    old_logps: tuple[NDArray[np.float32], ...] | None = None
    ref_logps: tuple[NDArray[np.float32], ...] | None = None
    token_advantages: tuple[NDArray[np.float32], ...] | None = None
    known: Mapping[str, tuple[NDArray[np.float32], ...]] = field(default_factory=dict)
    preference: NDArray[np.float64] | None = None
    preferred: NDArray[np.float64] | None = None
    weights: NDArray[np.float64] | None = None
    views: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for array in (self.pairs, self.pair_objective, self.strength, self.rewards, self.groups):
            array.setflags(write=False)

    @cached_property
    def content_hash(self) -> str:
        """sha256 over everything that training sees; equal contents have equal hashes on every machine."""
        digest = hashlib.sha256(repr(self.objectives).encode())
        lengths = [[len(sequence.ids), sequence.prompt_length] for sequence in self.sequences]
        ids = [token for sequence in self.sequences for token in sequence.ids]
        rewards = np.where(np.isnan(self.rewards), np.nan, self.rewards + 0.0)  # one NaN, and no negative zero
        parts = (np.array(lengths), np.array(ids), self.pairs, self.pair_objective, self.strength, rewards, self.groups)
        for part in parts:
            kind = "<f8" if part.dtype.kind == "f" else "<i8"
            digest.update(repr(part.shape).encode() + np.ascontiguousarray(part, dtype=kind).tobytes())
        for name, numbers in sorted(self.views.items()):
            digest.update(repr(name).encode() + np.ascontiguousarray(numbers, dtype="<i8").tobytes())
        return digest.hexdigest()

    def rows_of(self, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of all sequences of these pairs, pair after pair, those of their views behind their own."""
        columns = [self.pairs[pairs], *(numbers[pairs, None] for numbers in self.views.values())]
        return np.concatenate(columns, axis=1).reshape(-1)

    @cached_property
    def pairs_of_group(self) -> tuple[NDArray[np.int64], ...]:
        """For every group that has pairs, in the order of their numbers, the indices of its pairs."""
        group_of_pair = self.groups[self.pairs[:, 0]]
        order = np.argsort(group_of_pair, kind="stable")
        starts = np.flatnonzero(np.diff(group_of_pair[order])) + 1
        return tuple(np.split(order, starts))


def with_rewards(dataset: PairDataset, rewards: NDArray[np.floating]) -> PairDataset:
    """The same pairs with other rewards [N,M] (larger is better, NaN where a reward abstained). Labels stay."""
    values = np.array(rewards, dtype=np.float64)
    if values.shape != dataset.rewards.shape:
        raise ValueError(f"rewards have shape {values.shape}, the dataset needs {dataset.rewards.shape}")
    if np.any(np.abs(values) > LARGEST):
        raise DataError(f"a reward is beyond {LARGEST:g} in size")
    return replace(dataset, rewards=values, warnings=reward_warnings(values, dataset.objectives))


def judged_by(dataset: PairDataset, objectives: Collection[int]) -> PairDataset:
    """The pairs that one of these objectives (indices) judged, or that no single one did; all where there are none."""
    kept = np.isin(dataset.pair_objective, [-1, *objectives])
    if kept.all() or not kept.any():
        return dataset
    return of_pairs(dataset, kept, dataset.counts)


def merge_judges(dataset: PairDataset) -> PairDataset:
    """Each two responses once, for all objectives that judged them: ``preferred`` says what each found.

    A pair stands where it is met first, in that order; no single objective judged it (-1).
    Judgements that an objective repeats are one, their mean. ``strength`` is the mean of those of all judgements.
    """
    place: dict[tuple[int, int], int] = {}
    first: list[int] = []  # where each is met first
    judgements = np.zeros((len(dataset.pairs), len(dataset.objectives)))
    preferring, strengths = np.zeros_like(judgements), np.zeros((len(dataset.pairs), 2))
    for number, (chosen, rejected) in enumerate(dataset.pairs.tolist()):
        at = place.setdefault((min(chosen, rejected), max(chosen, rejected)), len(first))
        if at == len(first):
            first.append(number)
        judge = dataset.pair_objective[number]
        judgements[at, judge] += 1
        preferring[at, judge] += chosen == dataset.pairs[first[at], 0]
        strengths[at] += dataset.strength[number], 1
    known, size = judgements[: len(first)], len(first)
    preferred = np.divide(preferring[:size], known, out=np.full(known.shape, np.nan), where=known > 0)
    return replace(
        dataset,
        pairs=dataset.pairs[first],
        pair_objective=np.full(size, -1, dtype=np.int64),
        strength=strengths[:size, 0] / strengths[:size, 1],
        preferred=preferred,
        views={name: numbers[first] for name, numbers in dataset.views.items()},
    )


def drop_unrewarded(dataset: PairDataset, objectives: Collection[str] | None = None) -> PairDataset:
    """Leave out the pairs, or responses that are units, which lack the reward of an objective, and count them.

    ``objectives``: only these have to be known; None: all. Raises DataError where no pair remains.
    """
    needed = [index for index, name in enumerate(dataset.objectives) if objectives is None or name in objectives]
    unknown = np.isnan(dataset.rewards[:, needed])
    kept = ~np.any(np.any(unknown, axis=1)[dataset.pairs], axis=1)
    dropped = int((~kept).sum())
    if not dropped:
        return dataset
    alone = bool((dataset.pairs[:, 0] == dataset.pairs[:, 1]).all())
    reason = "left out: a response that lacks a reward" if alone else "dropped pair: a response lacks a reward"
    counts = {**dataset.counts, reason: dropped}
    if dropped == len(kept):
        names = [dataset.objectives[index] for index, lacks in zip(needed, unknown.T, strict=True) if np.all(lacks)]
        which = f"; no response has one for {', '.join(names)}" if names else ""
        what = "responses lack a reward" if alone else "pairs have a response that lacks a reward"
        raise DataError(f"all {dropped} {what}{which}")
    return of_pairs(dataset, kept, counts)


def drop_cut(dataset: PairDataset) -> PairDataset:
    """Leave out the pairs of which a sequence has lost a part, and count them. Raises DataError where none remains."""
    whole = np.array([not sequence.truncated for sequence in dataset.sequences])
    kept: NDArray[np.bool_] = np.asarray(np.all(whole[dataset.pairs], axis=1))
    if kept.all():
        return dataset
    if not kept.any():
        raise DataError("no pair has room for the text of a preference; raise data.max_length")
    counts = {**dataset.counts, "dropped pair: no room for the text of a preference": int((~kept).sum())}
    return of_pairs(dataset, kept, counts)


def of_pairs(dataset: PairDataset, kept: NDArray[np.bool_], counts: Mapping[str, int]) -> PairDataset:
    """With the pairs that are ``kept`` [P] alone."""
    return replace(
        dataset,
        pairs=dataset.pairs[kept],
        pair_objective=dataset.pair_objective[kept],
        strength=dataset.strength[kept],
        preferred=None if dataset.preferred is None else dataset.preferred[kept],
        weights=None if dataset.weights is None else dataset.weights[kept],
        views={name: numbers[kept] for name, numbers in dataset.views.items()},
        counts=counts,
    )


def reward_warnings(rewards: NDArray[np.float64], objectives: tuple[str, ...]) -> tuple[str, ...]:
    """Sentences about reward columns [N,M] that cannot be meant: constant ones, and scales a million apart."""
    warnings = []
    spread = {}
    for name, column in zip(objectives, rewards.T, strict=True):
        known = column[~np.isnan(column)]
        if len(known) > 1 and (known == known[0]).all():
            warnings.append(f"{name}: all {len(known)} rewards are {known[0]:g}; it cannot tell responses apart")
        elif len(known) > 1:
            # above 0 even for the smallest numbers, whose squares, and so the standard deviation, are 0
            spread[name] = float(known.max()) - float(known.min())
    if spread:
        least, most = min(spread, key=spread.__getitem__), max(spread, key=spread.__getitem__)
        if spread[most] > 1e6 * spread[least]:
            times = spread[most] / spread[least]
            warnings.append(f"{most} varies {times:.1g} times as much as {least}; rescale one of them")
    return tuple(warnings)
