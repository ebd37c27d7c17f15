"""Batches for one model that is trained for many preferences: each prompt of a round or step is asked for one drawn.

The reference answers the prompt as it is in the data. So the policy of each preference is held to the same reference,
whatever in the prompt tells it the preference. In the first round of responses, which samples the base, so does the
policy: a base that never saw such a prompt may answer it badly, and would be trained on that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moalign.data.batching import pair_indices
from moalign.data.dataset import PairDataset
from moalign.data.tokenise import Ids
from moalign.data.tokenise import Sequence as TokenSequence
from moalign.engine.batches import Question, RolloutSource
from moalign.engine.conditioning import Conditioning, Prompt
from moalign.engine.model import LanguageModel
from moalign.engine.owned import first_values
from moalign.engine.rewards import Scored
from moalign.engine.rollouts import Rollout, prompts_of_round
from moalign.engine.row_conditions import RowConditions
from moalign.engine.scoring import logps_under
from moalign.engine.tokens import Measuring
from moalign.types import Preference

Logps = Sequence[NDArray[np.float32]]


@dataclass(frozen=True)
class Asked(Question):
    """``prompt``: its number among the prompts; ``preference`` [M]: what the answer is to serve.

    ``told``: the ids behind which the policy is trained to give the answer.
    """

    prompt: int
    preference: tuple[float, ...]
    told: tuple[int, ...]


@dataclass
class ConditionedRollouts(RolloutSource):
    """Responses that the policy sampled for drawn preferences; the responses to a prompt for one of them are a group.

    ``texts``: the prompts as they are in the data. ``parameters``: the conditioner's, as they are trained.
    ``reference``: whether the loss reads the reference's log-probabilities.
    """

    conditioning: Conditioning = field(kw_only=True)
    texts: tuple[Prompt, ...] = ()
    parameters: Mapping[str, Tensor] | None = None
    reference: bool = True
    _questions: list[Asked] = field(default_factory=list)

    def asked(self, number: int) -> list[Question]:
        chosen = prompts_of_round(len(self.prompts), self.settings.prompts, self.seed, number)
        each = [(prompt, time) for prompt in chosen for time in range(self.conditioning.conditioner.per_prompt)]
        self._questions = [self._question(place, number, *which) for place, which in enumerate(each)]
        return list(self._questions)

    def _question(self, place: int, number: int, prompt: int, time: int) -> Asked:
        wanted = self.conditioning.draw(number, prompt, time)
        told = self.conditioning.prompt(self.texts[prompt], self.prompts[prompt], wanted)
        ids = told if number else self.prompts[prompt]
        return Asked(place, ids, prompt, wanted.vector(self.objectives), told)

    def manner(self, asked: Sequence[Question]) -> dict[str, Any]:
        conditions = None if self._untold else self._conditions([question.number for question in asked])
        return {} if conditions is None else {"conditions": conditions}

    @property
    def _untold(self) -> bool:
        """Whether the responses are to prompts as they are in the data, though trained on behind the preference."""
        return any(question.ids != question.told for question in self._questions)

    def scored(self, rollouts: Sequence[Rollout]) -> Scored:
        return self.score([replace(each, prompt=self._questions[each.prompt].prompt) for each in rollouts])

    def sequence(self, rollout: Rollout) -> TokenSequence:
        told = self._questions[rollout.prompt].told
        return TokenSequence(told + rollout.ids, len(told), truncated=not rollout.ended)

    def logps(self, dataset: PairDataset, measuring: Measuring | None) -> tuple[Logps, Logps]:
        groups = dataset.groups.tolist()
        if not self.conditioning.in_prompt:
            adapters = (None, self.slot)
            known, own = logps_under(
                self.model, dataset.sequences, groups, adapters, conditions=self._conditions(groups)
            )
            return known, own
        reference = dataset.ref_logps or self._of_reference(dataset)
        if self._untold:  # the reference has sampled them
            return reference, reference
        (own,) = logps_under(self.model, dataset.sequences, groups, (self.slot,), conditions=self._conditions(groups))
        return reference, own

    def _as_dataset(self, *arguments: Any) -> PairDataset:
        dataset = super()._as_dataset(*arguments)
        preferences = [self._questions[group].preference for group in dataset.groups.tolist()]
        dataset = replace(dataset, preference=np.array(preferences))
        if self.conditioning.conditioner.tells_rewards:
            dataset = replace(dataset, sequences=tuple(map(self._with_own_rewards, *self._rows(dataset))))
        if not self.conditioning.in_prompt or not self.reference:
            return dataset
        return replace(dataset, ref_logps=tuple(self._of_reference(dataset)))

    def _rows(self, dataset: PairDataset) -> tuple[list[int], Sequence[TokenSequence], NDArray[np.float64]]:
        prompts = [self._questions[group].prompt for group in dataset.groups.tolist()]
        return prompts, dataset.sequences, dataset.rewards

    def _with_own_rewards(self, prompt: int, sequence: TokenSequence, rewards: NDArray[np.float64]) -> TokenSequence:
        """The response after the prompt that asks for what it got; as it is where that is not known."""
        if not np.isfinite(rewards).all():
            return sequence
        named = dict(zip(self.objectives, rewards.tolist(), strict=True))
        told = self.conditioning.prompt_of_rewards(self.texts[prompt], self.prompts[prompt], named)
        return _after(told, sequence)

    def _of_reference(self, dataset: PairDataset) -> Logps:
        """Under the reference, which reads the prompts as they are in the data."""
        groups = dataset.groups.tolist()
        prompts = [self.prompts[self._questions[group].prompt] for group in groups]
        plain = [_after(prompt, each) for prompt, each in zip(prompts, dataset.sequences, strict=True)]
        return logps_under(self.model, plain, groups, (None,))[0]

    @torch.no_grad()
    def _conditions(self, numbers: Sequence[int]) -> RowConditions | None:
        """For the questions of these numbers."""
        if not self.conditioning.by_row:
            return None
        own = self.parameters
        if own is None:  # nobody trains with this source yet: it is a look at what training will be like
            first = first_values(self.conditioning.conditioner, self.conditioning.shape, self.seed, self.candidate)
            own = {name: value.to(self.model.device) for name, value in first.items()}
        wanted = torch.tensor([question.preference for question in self._questions], dtype=torch.float32)
        found = self.conditioning.of_rows(wanted.to(self.model.device), own)
        return None if found is None else found.take(list(numbers))


@dataclass
class ConditionedPairs:
    """Pairs from files, those of each prompt in a step judged for one drawn preference.

    With text the sequences differ from step to step; what the reference says of them is kept, because it does not. Only
    gates leave rows as they are in the data, so that what is computed below the adapters may be kept.
    """

    model: LanguageModel
    dataset: PairDataset
    seed: int
    pairs_per_step: int
    conditioning: Conditioning
    parameters: Mapping[str, Tensor] | None = None
    reference: bool = True
    _known: dict[int, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def cacheable(self) -> bool:
        return not self.conditioning.in_prompt

    def at(self, step: int) -> tuple[PairDataset, NDArray[np.int64]]:
        dataset, pairs = self.dataset, pair_indices(self.dataset, self.seed, step, self.pairs_per_step)
        named = dataset.groups[dataset.pairs[pairs, 0]].tolist()
        drawn = {group: self.conditioning.draw(step, group) for group in dict.fromkeys(named)}
        if not self.conditioning.in_prompt:
            preferences = np.full(dataset.rewards.shape, np.nan)
            for group, wanted in drawn.items():
                preferences[dataset.groups == group] = wanted.vector(dataset.objectives)
            return replace(dataset, preference=preferences), pairs
        rows = list(dict.fromkeys(dataset.pairs[pairs].flatten().tolist()))
        place = {row: number for number, row in enumerate(rows)}
        wanted_of = [drawn[group] for group in dataset.groups[rows].tolist()]
        prompts = {
            row: self.conditioning.prompt(dataset.samples[row].prompt, dataset.sequences[row].prompt, wanted)
            for row, wanted in zip(rows, wanted_of, strict=True)
        }
        part = replace(
            dataset,
            sequences=tuple(_after(prompts[row], dataset.sequences[row]) for row in rows),
            samples=tuple(dataset.samples[row] for row in rows),
            pairs=np.array([[place[row] for row in pair] for pair in dataset.pairs[pairs].tolist()], dtype=np.int64),
            pair_objective=dataset.pair_objective[pairs],
            strength=dataset.strength[pairs],
            preferred=None if dataset.preferred is None else dataset.preferred[pairs],
            rewards=dataset.rewards[rows],
            groups=dataset.groups[rows],
            preference=np.array([wanted.vector(dataset.objectives) for wanted in wanted_of]),
            ref_logps=self._of_reference(rows) if self.reference else None,
        )
        return part, np.arange(len(pairs))

    def _of_reference(self, rows: Sequence[int]) -> tuple[NDArray[np.float32], ...]:
        new = [row for row in rows if row not in self._known]
        if new:
            sequences, groups = [self.dataset.sequences[row] for row in new], self.dataset.groups[new].tolist()
            (found,) = logps_under(self.model, sequences, groups, (None,))
            self._known |= dict(zip(new, found, strict=True))
        return tuple(self._known[row] for row in rows)


def told(dataset: PairDataset, conditioning: Conditioning, wanted: Preference) -> PairDataset:
    """The same responses, each after its prompt as the model reads it."""
    known: dict[tuple[str, Ids], Ids] = {}

    def ids(prompt: Prompt, plain: Ids) -> Ids:
        key = (repr(prompt), plain)
        if key not in known:
            known[key] = conditioning.prompt(prompt, plain, wanted)
        return known[key]

    both = zip(dataset.samples, dataset.sequences, strict=True)
    return replace(dataset, sequences=tuple(_after(ids(sample.prompt, each.prompt), each) for sample, each in both))


def _after(prompt: Ids, sequence: TokenSequence) -> TokenSequence:
    """The sequence's response after another prompt."""
    return replace(sequence, ids=prompt + sequence.response, prompt_length=len(prompt))
