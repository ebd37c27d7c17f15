"""Where a step's pairs come from: a dataset on disk, or groups sampled from the policy. The loop sees no difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moalign import calls
from moalign.api import Objective
from moalign.config import RolloutSettings
from moalign.data.batching import group_pair_indices, pair_indices
from moalign.data.dataset import PairDataset
from moalign.data.labelling import label
from moalign.data.tokenise import Sequence as TokenSequence
from moalign.engine.advantages import Advantages
from moalign.engine.filtering import Filtering
from moalign.engine.gram import gradient_products
from moalign.engine.model import LanguageModel
from moalign.engine.owned import first_values
from moalign.engine.reference_policy import BASE, FrozenPolicy, MovingReference, distance_on
from moalign.engine.rewards import Scored
from moalign.engine.rollouts import Draw, Rollout, Score, prompts_of_round, sample, sequence_of
from moalign.engine.round_views import RoundViews
from moalign.engine.scoring import logps_under
from moalign.engine.shaping import Shaping
from moalign.engine.tokens import Measuring
from moalign.errors import TrainingError
from moalign.seeds import derive
from moalign.types import Sample


class BatchSource(Protocol):
    """``cacheable``: the same batches come again for other candidates, so frozen log-probabilities are kept."""

    @property
    def cacheable(self) -> bool: ...

    def at(self, step: int) -> tuple[PairDataset, np.ndarray]:
        """The dataset and the indices of this step's pairs; a function of (seed, step) and the policy."""
        ...


@dataclass(frozen=True)
class OfflineSource:
    """Pairs from files: content is a function of (seed, step) alone, equal for every candidate."""

    dataset: PairDataset
    seed: int
    pairs_per_step: int
    cacheable: bool = True

    def at(self, step: int) -> tuple[PairDataset, np.ndarray]:
        return self.dataset, pair_indices(self.dataset, self.seed, step, self.pairs_per_step)


def refresh(sources: Sequence[BatchSource], step: int) -> None:
    """Rounds of rollouts that begin at this step, sampled in one call for all sources that ask the same prompts.

    Where that fails, sources that have nothing yet sample for themselves, and what is wrong is one source's error.
    """
    due: dict[Any, list[RolloutSource]] = {}
    for source in sources:
        if isinstance(source, RolloutSource) and (number := source.due(step)) is not None:
            due.setdefault((number, source.seed, source.settings, source.greedy), []).append(source)
    for (number, *_), members in due.items():
        if len(members) > 1:
            with suppress(Exception):
                sampled = members[0].sample(number, [source.slot for source in members])
                for source, rollouts in zip(members, sampled, strict=True):
                    source.take(number, rollouts)


@dataclass(frozen=True)
class Question:
    """A prompt as a policy reads it; ``number``: of the group of its responses, the prompt's if asked in one way."""

    number: int
    ids: tuple[int, ...]


@dataclass
class RolloutSource:
    """Pairs within groups of responses that the policy itself sampled, refreshed at even distances.

    ``slot`` holds the policy's adapter. A policy with fresh weights is the base in round 0, which is the same for every
    candidate: ``first_round`` is shared between those (None: the weights are not fresh). ``advantages``: each response
    is a unit of its own and has one; None: all pairs within the groups are compared. ``labels``: what says which of a
    pair is the better one; None: nothing does. ``shaping``: what transforms make
    of the rewards; None: nothing. ``owned``: the parameters of the candidate's loss, as they are trained. ``draw``: who
    samples; None: ``rollouts.sample``. ``figures``: of the last round, for the metrics. ``compared_with``: what the
    reference begins with, ``moving``: what it becomes, where it does not stay. ``views``: what the loss reads beside
    each pair; None: nothing. ``filtering``: what chooses among the scored responses; None: all are trained on.
    ``guides``: further policies that a loss reads which weighs tokens; no other reads them here.
    """

    model: LanguageModel
    slot: str
    objectives: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    score: Score
    settings: RolloutSettings
    steps: int
    seed: int
    first_round: dict[str, PairDataset] | None
    candidate: str = ""
    advantages: Advantages | None = None
    labels: Advantages | None = None
    shaping: Shaping | None = None
    owned: Mapping[str, Tensor] | None = None
    draw: Draw | None = None
    cacheable: bool = False
    figures: dict[str, float] = field(default_factory=dict)
    compared_with: FrozenPolicy = BASE
    moving: MovingReference | None = None
    views: RoundViews | None = None
    filtering: Filtering | None = None
    guides: Mapping[str, FrozenPolicy] = field(default_factory=dict)
    _round: int = -1
    _dataset: PairDataset | None = field(default=None, repr=False)
    _rewards: np.ndarray | None = field(default=None, repr=False)

    def at(self, step: int) -> tuple[PairDataset, np.ndarray]:
        current = self._round_of(step)
        if current != self._round:
            known = None if current or self.first_round is None else self.first_round.get("dataset")
            if known is None:
                self.take(current, self.sample(current, [self.slot])[0])
            else:
                self._use(known, current)
        assert self._dataset is not None
        groups = step - self._first_step(current), self.settings.prompts_per_step
        return self._dataset, group_pair_indices(self._dataset, derive(self.seed, "groups", current), *groups)

    @property
    def greedy(self) -> bool:
        """Whether the loss needs the greedy response to each prompt."""
        return self.advantages is not None and "greedy" in self.advantages.objective.wants

    def due(self, step: int) -> int | None:
        """The round that begins at this step, if it is this policy's own."""
        current = self._round_of(step)
        shared = current == 0 and self.first_round is not None
        return None if current == self._round or shared else current

    def asked(self, number: int) -> list[Question]:
        """What the policy is asked in a round."""
        chosen = prompts_of_round(len(self.prompts), self.settings.prompts, self.seed, number)
        return [Question(index, self.prompts[index]) for index in chosen]

    def sample(self, number: int, slots: Sequence[str]) -> list[list[Rollout]]:
        """A round's responses of the policies in these slots, to what is asked in that round."""
        asked = self.asked(number)
        with calls.on_behalf_of(self.candidate if len(slots) == 1 else ""):
            sampled = (self.draw or sample)(
                self.model,
                slots,
                [question.ids for question in asked],
                samples=self.settings.samples,
                temperature=self.settings.temperature,
                max_new_tokens=self.settings.max_new_tokens,
                seed=derive(self.seed, "rollouts", number),
                top_p=self.settings.top_p,
                greedy=self.greedy,
                **self.manner(asked),
            )
        return [[replace(rollout, prompt=asked[rollout.prompt].number) for rollout in rollouts] for rollouts in sampled]

    def manner(self, asked: Sequence[Question]) -> dict[str, Any]:
        """What else there is to say of how these are answered."""
        return {}

    def scored(self, rollouts: Sequence[Rollout]) -> Scored:
        """Rewards of the rollouts, which are numbered as their questions are."""
        return self.score(rollouts)

    def sequence(self, rollout: Rollout) -> TokenSequence:
        return sequence_of(rollout, self.prompts)

    def logps(
        self, dataset: PairDataset, measuring: Measuring | None
    ) -> tuple[Sequence[NDArray[np.float32]], Sequence[NDArray[np.float32]]]:
        """Log-probabilities of each response's tokens under the reference, and under the policy that sampled it."""
        adapters = (*(each.adapter for each in self.guides.values()), self._reference.adapter, self.slot)
        units = dataset.groups.tolist()
        *_, reference, own = logps_under(self.model, dataset.sequences, units, adapters, measuring)
        return reference, own

    @property
    def _reference(self) -> FrozenPolicy:
        """As it is now."""
        return self.compared_with if self.moving is None else self.moving.now

    def take(self, number: int, rollouts: Sequence[Rollout]) -> None:
        """Score a round's responses and train on them from now on."""
        dataset = self._dataset_of(rollouts)
        if number == 0 and self.first_round is not None:
            self.first_round["dataset"] = dataset
        self._use(dataset, number)

    def _use(self, dataset: PairDataset, number: int) -> None:
        """Train on these from now on, with this candidate's own transforms and advantages."""
        raw, figures = dataset.rewards, dict(dataset.figures)
        if self.moving is not None:
            rows = np.arange(len(dataset.sequences))  # all of them: what is dropped later would bias the distance
            distance = distance_on(self.model, self.slot, dataset, rows)
            self.moving.before(self._first_step(number), number, distance)
        # copies: a round that fails half-way, and is tried again, must not be seen twice
        shaping, rule, labels = copy(self.shaping), copy(self.advantages), copy(self.labels)
        if shaping is not None:
            greedy = dataset.greedy  # shaped with states that nobody keeps: all transforms are pointwise
            greedy = None if greedy is None else replace(greedy, rewards=copy(shaping).of(number, greedy)[0])
            shaped, more = shaping.of(number, dataset)
            dataset, figures = replace(dataset, rewards=shaped, greedy=greedy), figures | more
        if rule is not None:
            dataset, more = self._weighed(dataset, raw, number, rule)
            figures |= more
        if labels is not None:
            dataset, more = self._labelled(dataset, raw, number, labels)
            figures |= more
        if self.filtering is not None and labels is None:
            dataset, more = self.filtering.responses(number, dataset, raw, self._signal(dataset, raw, rule))
            figures |= more
        if self.views is not None:
            sampled = self.moving is not None and self.moving.is_policy
            dataset, more = self.views.added(dataset, number, self._reference, sampled=sampled)
            figures |= more
        self.shaping, self.advantages, self.labels = shaping, rule, labels
        self._dataset, self._round, self._rewards, self.figures = dataset, number, raw, figures

    def _labelled(
        self, dataset: PairDataset, raw: np.ndarray, number: int, rule: Advantages
    ) -> tuple[PairDataset, dict[str, float]]:
        """With the better one of each pair in front, and without those that are alike or too close; and figures."""
        rows = np.flatnonzero(np.isfinite(raw).all(axis=1))
        rule.asked = None if dataset.preference is None else dataset.preference[rows]
        signal = np.full(len(raw), np.nan)
        signal[rows], figures = rule.of_pairs(number, raw[rows], dataset.groups[rows], dataset.rewards[rows])
        if self.filtering is not None:
            dataset, more = self.filtering.responses(number, dataset, raw, signal)
            figures |= more
        found = label(dataset, signal, self.settings.pairs, self.settings.gap)
        if not len(found.dataset.pairs):
            raise TrainingError(
                f"round {number}: no pair of responses has a label: of {found.ties + found.close} pairs {found.ties} "
                f"have the same combined reward and {found.close} differ by less than rollouts.gap, "
                f"{self.settings.gap:g}; a smaller gap, or more rollouts.samples, usually helps"
            )
        figures |= found.figures
        if self.filtering is None:
            return found.dataset, figures
        dataset, more = self.filtering.pairs(number, found.dataset, raw, signal)
        return dataset, figures | more

    def _signal(self, dataset: PairDataset, raw: np.ndarray, rule: Advantages | None) -> NDArray[np.float64]:
        """The combined rewards [N] as the rule has them, that of the filter where the loss has none; NaN if unknown."""
        assert self.filtering is not None
        known, rule = np.flatnonzero(np.isfinite(raw).all(axis=1)), rule or copy(self.filtering.rule)
        assert rule is not None
        rule.asked = None if dataset.preference is None else dataset.preference[known]
        signal = np.full(len(raw), np.nan)
        signal[known] = rule.combined(dataset.rewards[known], dataset.groups[known])
        return signal

    def _weighed(
        self, dataset: PairDataset, raw: np.ndarray, number: int, advantages: Advantages
    ) -> tuple[PairDataset, dict[str, float]]:
        """With the advantage of every response that is a unit, and what the policy thinks of it now; and figures."""
        rows, needs = dataset.pairs[:, 0], advantages.objective.wants
        if dataset.preference is not None:
            advantages.asked = dataset.preference[rows]
        old = reference = measuring = None
        if "token_advantages" in needs:
            measuring = self._measuring(dataset, advantages)
        if measuring is not None or "old_logps" in needs or "reference" in needs:
            reference, old = self.logps(dataset, measuring)
        ratios = None
        if "reference" in needs and old is not None and reference is not None:
            ratios = np.array([(old[row] - reference[row]).sum(dtype=np.float64) for row in rows])
        dataset = replace(
            dataset,
            old_logps=tuple(old) if old is not None and "old_logps" in needs else None,
            ref_logps=None if reference is None else tuple(reference),
        )
        shaped, groups, gram = dataset.rewards[rows], dataset.groups[rows], None
        if measuring is not None and old is not None and reference is not None:
            tokens = measuring.tokens(rows, old, reference, number)
            given, figures = advantages.of_tokens(number, raw[rows], groups, ratios, tokens, shaped)
            weighed, known = measuring.known(rows, given)
            return replace(dataset, token_advantages=weighed, known=known), figures
        greedy = None
        if "greedy" in needs and dataset.greedy is not None:
            greedy = dataset.greedy.rewards[_places(dataset.greedy, groups)]
        if advantages.needs_gram:
            each = advantages.of_each(shaped, groups, ratios, greedy)
            preferred, own = advantages.preference.vector(self.objectives), self._parameters_of(advantages.objective)
            about = (self.model, self.slot, advantages.objective)
            gram = gradient_products(*about, dataset, each, self.candidate, preferred, own)
        values = np.zeros(len(dataset.sequences))
        values[rows], figures = advantages.of(number, raw[rows], groups, ratios, gram, shaped, greedy)
        return replace(dataset, advantages=values), figures

    def _measuring(self, dataset: PairDataset, advantages: Advantages) -> Measuring:
        objective, preferred = advantages.objective, advantages.preference.vector(self.objectives)
        own, decode = self._parameters_of(objective), self.model.tokeniser.decoded
        return Measuring(objective, preferred, dataset, own, self.candidate, tuple(self.guides), decode)

    def _parameters_of(self, objective: Objective) -> Mapping[str, Tensor]:
        if self.owned is not None:
            return self.owned
        # nobody trains with this source yet: it is a look at what training will be like
        own = first_values(objective, self.model.width, self.seed, self.candidate)
        return {name: value.to(self.model.device) for name, value in own.items()}

    def _round_of(self, step: int) -> int:
        return step * self.settings.rounds // self.steps

    def _first_step(self, number: int) -> int:
        """Of a round."""
        return -(-number * self.steps // self.settings.rounds)

    def _dataset_of(self, rollouts: Sequence[Rollout]) -> PairDataset:
        """Of the responses that every reward has scored, all pairs within the groups; or each alone."""
        with calls.on_behalf_of(self.candidate):
            scored = self.scored(rollouts)
        rewards = scored.with_constants(self._rewards)
        groups = np.array([rollout.prompt for rollout in rollouts], dtype=np.int64)
        if self.shaping is not None:
            rewards = self.shaping.comparable(rewards, groups)
        known = np.asarray(np.isfinite(rewards).all(axis=1))
        sampled = np.array([not rollout.greedy for rollout in rollouts])
        likeliest = [rollout for rollout in rollouts if rollout.greedy]
        greedy = self._as_dataset(likeliest, rewards[~sampled], groups[~sampled], []) if likeliest else None
        if likeliest:  # without its greedy response a prompt's responses have nothing to be compared with
            known &= np.isin(groups, groups[known & ~sampled])
        rollouts = [rollout for rollout in rollouts if not rollout.greedy]
        known, rewards, groups = known[sampled], rewards[sampled], groups[sampled]
        pairs = _pairs(rollouts, known) if self.advantages is None else [(i, i) for i in np.flatnonzero(known).tolist()]
        if not pairs and self.advantages is not None:
            raise TrainingError(f"of {len(rollouts)} sampled responses not one has all rewards; see why they abstain")
        if not pairs:
            abstained = int((~known).sum())
            raise TrainingError(
                f"no two different responses to one prompt have all rewards: of {len(rollouts)} sampled, {abstained} "
                f"were left unscored and {len({r.ids for r in rollouts})} are different. A policy that repeats itself "
                "has collapsed; a smaller train.lr or more rollouts.rounds usually helps"
            )
        return replace(
            self._as_dataset(rollouts, rewards, groups, pairs),
            counts={"sampled responses without a reward": int((~known).sum())},
            figures=dict(scored.figures) | {"truncated": float(sum(not rollout.ended for rollout in rollouts))},
            greedy=greedy,
        )

    def _as_dataset(
        self, rollouts: Sequence[Rollout], rewards: np.ndarray, groups: np.ndarray, pairs: list[tuple[int, int]]
    ) -> PairDataset:
        return PairDataset(
            objectives=self.objectives,
            sequences=tuple(self.sequence(rollout) for rollout in rollouts),
            samples=tuple(Sample("", rollout.text) for rollout in rollouts),
            pairs=np.array(pairs, dtype=np.int64).reshape(-1, 2),
            pair_objective=np.full(len(pairs), -1, dtype=np.int64),
            strength=np.ones(len(pairs)),
            rewards=rewards,
            groups=groups,
            counts={},
        )


def _places(dataset: PairDataset, groups: np.ndarray) -> list[int]:
    """Where the one response to each of these prompts is."""
    place = {group: row for row, group in enumerate(dataset.groups.tolist())}
    return [place[group] for group in groups.tolist()]


def _pairs(rollouts: Sequence[Rollout], known: np.ndarray) -> list[tuple[int, int]]:
    """Of different responses to the same prompt, both known."""
    return [
        (i, j)
        for i, j in combinations(range(len(rollouts)), 2)
        if rollouts[i].prompt == rollouts[j].prompt and known[i] and known[j] and rollouts[i].ids != rollouts[j].ids
    ]
