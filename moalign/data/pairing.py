"""Records -> PairDataset: pairs as somebody judged them, or all pairs of responses with their rewards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations

import numpy as np

from moalign.data.dataset import PairDataset, reward_warnings
from moalign.data.records import merge
from moalign.data.tokenise import Encoded, Sequence, Tokeniser, Truncation, encode_record
from moalign.errors import DataError
from moalign.types import Pair, Record, Sample

Judged = tuple[Pair, int]  # the pair, and the index of the objective that judged it (-1: none)
Judge = Callable[[Record, Counter[str]], Iterator[Judged]]


def labelled(
    records: Iterable[Record],
    tokeniser: Tokeniser,
    objectives: Collection[str],
    *,
    max_length: int | None = None,
    truncation: Truncation = "prompt",
    directions: Mapping[str, str] | None = None,
) -> PairDataset:
    """Pairs judged by one objective each: those the data has, else (scores but no pairs) the higher score is chosen.

    ``directions``: objective -> "max" or "min"; the scores of a "min" objective are negated, and pairs stay as they
    are, with a warning where there are no scores. Ties are dropped and counted. Raises DataError where no pair is left,
    ModelError where the tokenizer does not fit the data.
    """
    signs = _signs(objectives, directions)
    found = _build(records, tokeniser, signs, max_length, truncation, partial(_judged, signs=signs))
    return replace(found, warnings=(*found.warnings, *_not_turned(found, signs)))


def scored(
    records: Iterable[Record],
    tokeniser: Tokeniser,
    objectives: Collection[str],
    *,
    max_length: int | None = None,
    truncation: Truncation = "prompt",
    directions: Mapping[str, str] | None = None,
    later: Collection[str] = (),
) -> PairDataset:
    """All pairs of responses to one prompt, judged by none: for losses that use every objective's reward difference.

    A response without a score for every objective is counted and left out, except for the objectives named in
    ``later``, whose rewards will be filled in by ``with_rewards``. Raises as ``labelled`` does.
    """
    signs = _signs(objectives, directions)
    now = [name for name in signs if name not in later]
    return _build(records, tokeniser, signs, max_length, truncation, partial(_all_pairs, objectives=now))


def rated(
    records: Iterable[Record],
    tokeniser: Tokeniser,
    objectives: Collection[str],
    *,
    max_length: int | None = None,
    truncation: Truncation = "prompt",
    directions: Mapping[str, str] | None = None,
    by_all: bool = False,
    later: Collection[str] = (),
) -> PairDataset:
    """Every response that some objective has scored, as a unit of its own: a pair of it with itself.

    ``by_all``: that every one has scored, for losses that learn from combined scores. A response without such a score
    is counted and left out; the objectives named in ``later`` count as having scored all, whose rewards will be filled
    in by ``with_rewards``. Raises as ``labelled`` does, where no response is left.
    """
    signs = _signs(objectives, directions)
    now = [name for name in signs if name not in later]
    known = partial(_known, objectives=now) if by_all else partial(_known_to_some, objectives=now, later=later)
    return _build(records, tokeniser, signs, max_length, truncation, partial(_each, known=known))


def judgements(record: Record, objective: str, sign: float = 1.0) -> Iterator[Pair]:
    """What the objective says about pairs of responses, ties (strength 0) included: its pairs, else its scores."""
    if record.pairs.get(objective):
        yield from record.pairs[objective]
        return
    scores = record.scores.get(objective, ())
    for (i, first), (j, second) in combinations(enumerate(scores), 2):
        if first is not None and second is not None:
            difference = sign * (first - second)
            yield Pair(i, j, difference) if difference >= 0 else Pair(j, i, -difference)


def _judged(record: Record, counts: Counter[str], signs: Mapping[str, float]) -> Iterator[Judged]:
    for index, (name, sign) in enumerate(signs.items()):
        if not record.pairs.get(name):
            missing = sum(value is None for value in record.scores.get(name, ()))
            counts[f"left out: a response without a score for {name}"] += missing
        for pair in judgements(record, name, sign):
            if pair.strength == 0:
                counts[f"dropped pair: tie for {name}"] += 1
            else:
                yield pair, index


def _all_pairs(record: Record, counts: Counter[str], objectives: Collection[str]) -> Iterator[Judged]:
    known = _known(record, counts, objectives)
    if len(known) == 1:
        counts["left out: a response with no other to the same prompt"] += 1
    for i, j in combinations(known, 2):
        yield Pair(i, j), -1


def _known(record: Record, counts: Counter[str], objectives: Collection[str]) -> list[int]:
    """The responses that all of these have scored; the others are counted."""
    known = []
    for index in range(len(record.responses)):
        missing = [name for name in objectives if name not in record.scores or record.scores[name][index] is None]
        if missing:
            counts[f"left out: a response without a score for {missing[0]}"] += 1
        else:
            known.append(index)
    return known


def _known_to_some(
    record: Record, counts: Counter[str], objectives: Collection[str], later: Collection[str]
) -> list[int]:
    """The responses that at least one has scored, or will; the others are counted."""
    by = [record.scores[name] for name in objectives if name in record.scores]
    known = [index for index in range(len(record.responses)) if later or any(each[index] is not None for each in by)]
    counts["left out: a response that no objective has scored"] += len(record.responses) - len(known)
    return known


def _each(record: Record, counts: Counter[str], known: Callable[[Record, Counter[str]], list[int]]) -> Iterator[Judged]:
    for index in known(record, counts):
        yield Pair(index, index), -1


@dataclass
class _Rows:
    """The sequences that pairs have asked for so far; a response gets a row when the first pair needs it."""

    signs: Mapping[str, float]
    sequences: list[Sequence] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    rewards: list[list[float]] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)

    def add(self, record: Record, response: int, sequence: Sequence, group: int) -> int:
        self.sequences.append(sequence)
        self.samples.append(Sample(record.prompt, record.responses[response]))
        values = (record.scores.get(name, (None,) * len(record.responses))[response] for name in self.signs)
        signed = zip(values, self.signs.values(), strict=True)
        self.rewards.append([np.nan if value is None else sign * float(value) for value, sign in signed])
        self.groups.append(group)
        return len(self.sequences) - 1


def _build(
    records: Iterable[Record],
    tokeniser: Tokeniser,
    signs: Mapping[str, float],
    max_length: int | None,
    truncation: Truncation,
    judge: Judge,
) -> PairDataset:
    rows, counts = _Rows(signs), Counter[str]()
    found: list[tuple[int, int, int, float]] = []
    group_numbers: dict[str, int] = {}
    for record in merge(records):
        encoded = encode_record(tokeniser, record, max_length, truncation)
        _count(encoded, truncation, counts)
        counts["left out: a prompt without responses"] += not record.responses
        row_of: dict[int, int] = {}
        for pair, objective in judge(record, counts):
            reason = _unusable(pair, record, encoded)
            if reason is not None:
                counts[reason] += 1
                continue
            group = group_numbers.setdefault(record.group, len(group_numbers))
            for response in (pair.chosen, pair.rejected):
                sequence = encoded.sequences[response]
                if response not in row_of and sequence is not None:
                    row_of[response] = rows.add(record, response, sequence, group)
            found.append((row_of[pair.chosen], row_of[pair.rejected], objective, float(pair.strength)))
    return _freeze(rows, found, {reason: number for reason, number in sorted(counts.items()) if number})


def _unusable(pair: Pair, record: Record, encoded: Encoded) -> str | None:
    chosen, rejected = encoded.sequences[pair.chosen], encoded.sequences[pair.rejected]
    if pair.chosen == pair.rejected:  # a response that is a unit of its own
        return None if chosen is not None else "left out: a response that was dropped"
    if record.responses[pair.chosen] == record.responses[pair.rejected]:
        return "dropped pair: chosen equals rejected"
    if chosen is None or rejected is None:
        return "dropped pair: one of its responses was dropped"
    if chosen.ids == rejected.ids:
        truncated = chosen.truncated or rejected.truncated
        return f"dropped pair: chosen equals rejected {'after truncation' if truncated else 'in tokens'}"
    return None


def _count(encoded: Encoded, truncation: Truncation, counts: Counter[str]) -> None:
    counts.update(f"dropped response: {reason}" for reason in encoded.reasons if reason is not None)
    cut = sum(sequence is not None and sequence.truncated for sequence in encoded.sequences)
    counts[f"truncated response: its {'prompt' if truncation == 'prompt' else 'end'} was cut"] += cut


def _freeze(rows: _Rows, found: list[tuple[int, int, int, float]], counts: Mapping[str, int]) -> PairDataset:
    if not found:
        listed = "".join(f"\n  {number} x {reason}" for reason, number in counts.items())
        raise DataError(f"no pair is left to train on{listed or ': no objective has scores or pairs'}")
    objectives = tuple(rows.signs)
    rewards = np.array(rows.rewards, dtype=np.float64)
    return PairDataset(
        objectives=objectives,
        sequences=tuple(rows.sequences),
        samples=tuple(rows.samples),
        pairs=np.array([[chosen, rejected] for chosen, rejected, _, _ in found], dtype=np.int64),
        pair_objective=np.array([objective for _, _, objective, _ in found], dtype=np.int64),
        strength=np.array([strength for *_, strength in found], dtype=np.float64),
        rewards=rewards,
        groups=np.array(rows.groups, dtype=np.int64),
        counts=counts,
        warnings=reward_warnings(rewards, objectives),
    )


def _not_turned(dataset: PairDataset, signs: Mapping[str, float]) -> Iterator[str]:
    for index, (name, sign) in enumerate(signs.items()):
        judged = int((dataset.pair_objective == index).sum())
        if sign < 0 and judged and np.isnan(dataset.rewards[:, index]).all():
            yield f"{name}: direction min negates scores; its {judged} judged pairs keep chosen above rejected"


def _signs(objectives: Collection[str], directions: Mapping[str, str] | None) -> dict[str, float]:
    directions = directions or {}
    return {name: -1.0 if directions.get(name, "max") == "min" else 1.0 for name in objectives}
