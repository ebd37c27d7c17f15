"""Further sequences of pairs: texts that a loss asks for, or sampled responses; each stands once in the dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from moalign.data.dataset import PairDataset, of_pairs
from moalign.data.tokenise import Ids, Tokeniser, encode_behind
from moalign.data.tokenise import Sequence as TokenSequence
from moalign.errors import DataError
from moalign.types import Sample

CUT = "views that lost the beginning of their prompt, or their end"


@dataclass(frozen=True)
class View:
    """A sequence and its texts, or (``sequence`` None) the reason why there is none."""

    sequence: TokenSequence | None
    sample: Sample
    reason: str = ""


def texts_of(dataset: PairDataset) -> list[tuple[Sample, Sample]]:
    """Prompt and response of both sides of each pair."""
    return [(dataset.samples[chosen], dataset.samples[rejected]) for chosen, rejected in dataset.pairs.tolist()]


def encoded(
    dataset: PairDataset, asked: Sequence[Mapping[str, Sample]], tokeniser: Tokeniser, max_length: int
) -> list[dict[str, View]]:
    """The views of each pair by name, tokenised. ``max_length`` counts prompt and response.

    One with the pair's own prompt stands behind that prompt as it was cut for the pair. Other prompts are cut from the
    left where they have to be. A view that says what a side of the pair says has its ids, as a policy sampled them.
    """
    found = []
    for pair, views in zip(dataset.pairs.tolist(), asked, strict=True):
        own, prompt = dataset.samples[pair[0]].prompt, dataset.sequences[pair[0]].prompt
        said = {dataset.samples[row].response: dataset.sequences[row].response for row in reversed(pair)}
        of_pair = {}
        for name, view in views.items():
            response = said.get(view.response) or tokeniser.response(view.response)
            behind = _behind(prompt, response, view, max_length) if view.prompt == own else None
            of_pair[name] = behind or _alone(response, view, tokeniser, max_length)
        found.append(of_pair)
    return found


def _behind(prompt: Ids, response: Ids | str, view: Sample, max_length: int) -> View:
    if isinstance(response, str):
        return View(None, view, response)
    if len(prompt) + len(response) > max_length:
        return View(None, view, f"longer than max_length {max_length}")
    return View(TokenSequence((*prompt, *response), len(prompt)), view)


def _alone(response: Ids | str, view: Sample, tokeniser: Tokeniser, max_length: int) -> View:
    result = encode_behind(tokeniser, view.prompt, [response], max_length)
    return View(result.sequences[0], view, result.reasons[0] or "")


def with_views(dataset: PairDataset, found: Sequence[Mapping[str, View]]) -> PairDataset:
    """The pairs with these views beside those that they have; those that lack one are left out and counted.

    Rows of views have the group of their pair, rewards of NaN, and are shared by pairs with the same sequence; a view
    that is a sequence of the group already has no row of its own. Raises DataError where no pair is left.
    """
    names = list(dict.fromkeys(name for views in found for name in views))
    if not names:
        return dataset
    counts: Counter[str] = Counter()
    complete = np.array([_complete(views, names, counts) for views in found])
    if not complete.any():
        listed = "".join(f"\n  {number} x {reason}" for reason, number in sorted(counts.items()))
        raise DataError(f"no pair has all further sequences that the loss asks for{listed}")
    kept = of_pairs(dataset, complete, {**dataset.counts, **dict(sorted(counts.items()))})
    rows = _Rows(list(kept.sequences), list(kept.samples), kept.groups.tolist())
    of_group = kept.groups[kept.pairs[:, 0]].tolist()
    whole = [views for views, all_there in zip(found, complete, strict=True) if all_there]
    numbers = {
        name: np.array([rows.place(views[name], group) for views, group in zip(whole, of_group, strict=True)])
        for name in names
    }
    unknown = np.full((len(rows.sequences) - len(kept.sequences), kept.rewards.shape[1]), np.nan)
    return replace(
        kept,
        sequences=tuple(rows.sequences),
        samples=tuple(rows.samples),
        groups=np.array(rows.groups, dtype=np.int64),
        rewards=np.concatenate([kept.rewards, unknown]),
        views={**kept.views, **numbers},
    )


@dataclass
class _Rows:
    """The sequences of a dataset, with those of views that have been asked for so far behind them."""

    sequences: list[TokenSequence]
    samples: list[Sample]
    groups: list[int]
    places: dict[tuple[tuple[int, ...], int, int], int] = field(init=False)

    def __post_init__(self) -> None:
        both = enumerate(zip(self.sequences, self.groups, strict=True))
        self.places = {(sequence.ids, sequence.prompt_length, group): row for row, (sequence, group) in both}

    def place(self, view: View, group: int) -> int:
        """The row of the view, which belongs to pairs of this group."""
        sequence = view.sequence
        assert sequence is not None
        key = (sequence.ids, sequence.prompt_length, group)
        if key not in self.places:
            self.places[key] = len(self.sequences)
            self.sequences.append(sequence)
            self.samples.append(view.sample)
            self.groups.append(group)
        return self.places[key]


def _complete(views: Mapping[str, View], names: Sequence[str], counts: Counter[str]) -> bool:
    for name in names:
        if name not in views:
            counts[f"dropped pair: it has no view '{name}'"] += 1
            return False
        if views[name].sequence is None:
            counts[f"dropped pair: view '{name}': {views[name].reason}"] += 1
            return False
    cut = sum(view.sequence is not None and view.sequence.truncated for view in views.values())
    counts[CUT] += cut
    return True
