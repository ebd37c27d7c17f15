"""Views of the pairs of a round of sampled responses: made of their texts, or what the reference of the round says."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moalign.api import Objective
from moalign.config import RolloutSettings
from moalign.data.dataset import PairDataset
from moalign.data.tokenise import Ids
from moalign.data.views import CUT
from moalign.engine import views
from moalign.engine.model import LanguageModel
from moalign.engine.reference_policy import FrozenPolicy
from moalign.engine.reference_responses import Said, responses
from moalign.errors import DataError, TrainingError
from moalign.types import Message, Sample

Known = dict[tuple[str, int], dict[Ids, Said]]


@dataclass(frozen=True)
class RoundViews:
    """What one candidate's loss reads beside the pairs of its rounds.

    ``texts``: the prompts as they are in the data, by the numbers of the groups. ``max_length``: of a view. ``known``:
    what references that stay have said in each round, which is the same for all candidates of a seed.
    """

    objective: Objective
    model: LanguageModel
    texts: tuple[str | tuple[Message, ...], ...]
    settings: RolloutSettings
    seed: int
    max_length: int
    known: Known

    def added(
        self, dataset: PairDataset, number: int, reference: FrozenPolicy, *, sampled: bool
    ) -> tuple[PairDataset, dict[str, float]]:
        """The pairs of round ``number`` that have all views, with these; and figures for the metrics.

        ``sampled``: whether the responses of the round are the reference's own. Raises TrainingError where no pair has
        all views.
        """
        both = zip(dataset.samples, dataset.groups.tolist(), strict=True)
        found = replace(dataset, samples=tuple(Sample(self.texts[group], each.response) for each, group in both))
        try:
            found = views.with_asked(self.objective, found, self.model.tokeniser, self.max_length)
        except DataError as error:
            raise TrainingError(f"round {number}: {error}") from error
        if views.SAMPLED in self.objective.wants:
            own = sampled and self.settings.temperature == self.settings.top_p == 1.0  # as it speaks by itself
            said = self._first(dataset) if own else self._said(dataset, number, reference)
            found = views.with_responses(found, [said[found.sequences[row].prompt] for row in found.pairs[:, 0]])
        left_out = float(len(dataset.pairs) - len(found.pairs))
        return found, {"pairs/without_views": left_out, "pairs/cut_views": float(found.counts.get(CUT, 0))}

    def _first(self, dataset: PairDataset) -> dict[Ids, Said]:
        """The first response to each prompt: a sample like any other, whatever its rewards are."""
        both = reversed(list(zip(dataset.sequences, dataset.samples, strict=True)))
        return {sequence.prompt: Said(sequence, sample.response) for sequence, sample in both}

    def _said(self, dataset: PairDataset, number: int, reference: FrozenPolicy) -> dict[Ids, Said]:
        """A response of the reference to each prompt that the round has asked, whether or not a pair is left of it."""
        key = reference.identity, number
        if key in self.known:
            return self.known[key]
        prompts, most = [sequence.prompt for sequence in dataset.sequences], self.settings.max_new_tokens
        said = responses(self.model, reference.adapter, prompts, most, self.seed, f"round {number}")
        if reference.fixed:
            self.known[key] = said
        return said
