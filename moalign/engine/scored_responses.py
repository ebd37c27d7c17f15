"""The scored responses of a file as the one round that a loss on single responses learns from.

Nobody knows who wrote them. They count as the reference's own, as those of the first round of a policy with fresh
weights are: their log-ratios at sampling are 0. What compares a policy with the one that sampled has no place here.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from moalign.data.batching import group_pair_indices, groups_of
from moalign.data.dataset import PairDataset
from moalign.data.tokenise import Sequence as TokenSequence
from moalign.engine.advantages import Advantages
from moalign.engine.conditioning import Conditioning
from moalign.engine.shaping import Shaping


@dataclass
class ScoredResponses:
    """Whole groups (prompts) in a step, as many as have ``responses_per_step`` responses on average.

    Transforms, combiner and objective are asked once, for all responses of the file as round 0; what a step holds is
    then a function of (seed, step). ``conditioning``: each response is trained on behind the text of its own rewards;
    None: as it is in the data. ``figures``: of the round, for the metrics.
    """

    dataset: PairDataset
    seed: int
    responses_per_step: int
    advantages: Advantages
    shaping: Shaping | None = None
    conditioning: Conditioning | None = None
    cacheable: bool = True
    figures: dict[str, float] = field(default_factory=dict)
    _weighed: PairDataset | None = field(default=None, repr=False)

    def at(self, step: int) -> tuple[PairDataset, NDArray[np.int64]]:
        dataset = self._round()
        groups = groups_of(dataset, self.responses_per_step)
        return dataset, group_pair_indices(dataset, self.seed, step, groups)

    def look(self, others: PairDataset) -> PairDataset:
        """Other responses with the advantages that the rules, as they are after the round, give them.

        Transforms see them as a round after it, of which nothing is kept; the combiner observes nothing.
        """
        self._round()
        shaped = others.rewards
        if self.shaping is not None:
            shaped, _ = copy(self.shaping).of(1, _whole(others))
        rows = others.pairs[:, 0]
        values = np.zeros(len(others.sequences))
        values[rows] = self.advantages.of_others(shaped[rows], others.groups[rows], self._ratios(len(rows)))
        return replace(others, rewards=shaped, advantages=values)

    def _round(self) -> PairDataset:
        """All responses with what each counts; the data's own arrays where nothing changes them, for all candidates."""
        if self._weighed is None:
            raw, rule, shaping = self.dataset.rewards, copy(self.advantages), copy(self.shaping)
            rows = self.dataset.pairs[:, 0]
            groups, dataset = self.dataset.groups[rows], self.dataset
            figures: dict[str, float] = {}
            if shaping is not None:
                shaped, figures = shaping.of(0, _whole(dataset))
                dataset = replace(dataset, rewards=shaped)
            values = np.zeros(len(dataset.sequences))
            given = (0, raw[rows], groups, self._ratios(len(rows)), None, dataset.rewards[rows])
            values[rows], more = rule.of(*given)
            more.pop("kl_sampled", None)  # nobody measured it
            dataset = replace(dataset, advantages=values)
            if self.conditioning is not None:
                dataset = replace(dataset, sequences=_behind_own_rewards(dataset, self.conditioning))
            self.advantages, self.shaping, self.figures = rule, shaping, figures | more
            self._weighed = dataset
        return self._weighed

    def _ratios(self, count: int) -> NDArray[np.float64] | None:
        return np.zeros(count) if "reference" in self.advantages.objective.wants else None


def _whole(dataset: PairDataset) -> PairDataset:
    """With responses that have all ended: those of a file may have lost a part of their prompt, nothing else."""
    return replace(dataset, sequences=tuple(replace(sequence, truncated=False) for sequence in dataset.sequences))


def _behind_own_rewards(dataset: PairDataset, conditioning: Conditioning) -> tuple[TokenSequence, ...]:
    """Each response after its prompt as that would ask for the rewards that it got."""
    told = []
    for sample, sequence, rewards in zip(dataset.samples, dataset.sequences, dataset.rewards.tolist(), strict=True):
        named = dict(zip(dataset.objectives, rewards, strict=True))
        prompt = conditioning.prompt_of_rewards(sample.prompt, sequence.prompt, named)
        told.append(replace(sequence, ids=prompt + sequence.response, prompt_length=len(prompt)))
    return tuple(told)
