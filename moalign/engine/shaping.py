"""Transforms of rewards: one candidate's chains with their states, and the base's responses that some compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moalign import calls, door
from moalign.api import Transform
from moalign.batch import Responses
from moalign.config import RolloutSettings
from moalign.data.dataset import PairDataset
from moalign.engine.advantages import numbers_in, one_number_each
from moalign.engine.model import LanguageModel
from moalign.engine.rollouts import Draw, Score, prompts_of_round, sample
from moalign.errors import PluginError
from moalign.seeds import derive

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Base:
    """R responses of the untouched base to one prompt: their rewards [R,K] for some objectives, NaN where unknown."""

    rewards: Floats
    lengths: NDArray[np.int64]
    ended: NDArray[np.bool_]


@dataclass
class BaseResponses:
    """The base's responses to the prompts of a run, sampled and scored once for all candidates.

    ``samples``: how many for each of the objectives that are compared with them, and ``score`` gives the rewards [N,K]
    of just these. Rounds are looked at in their order, so that what is sampled for a prompt is a function of the seed,
    whoever asks first. ``draw``: who samples; None: ``rollouts.sample``.
    """

    model: LanguageModel
    prompts: Sequence[tuple[int, ...]]
    score: Score
    samples: Mapping[str, int]
    settings: RolloutSettings
    seed: int
    draw: Draw | None = None
    _known: dict[int, Base] = field(default_factory=dict)
    _rounds: int = 0

    def to(self, prompts: Sequence[int]) -> list[Base]:
        """The base's responses to these prompts, by number, which rounds of the run have."""
        while not self._known.keys() >= set(prompts):
            self._sample(self._rounds)
            self._rounds += 1
        return [self._known[prompt] for prompt in prompts]

    def _sample(self, number: int) -> None:
        chosen = prompts_of_round(len(self.prompts), self.settings.prompts, self.seed, number)
        new = [prompt for prompt in chosen if prompt not in self._known]
        if not new:
            return
        (rollouts,) = (self.draw or sample)(
            self.model,
            [None],
            [self.prompts[prompt] for prompt in new],
            samples=max(self.samples.values()),
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            max_new_tokens=self.settings.max_new_tokens,
            seed=derive(self.seed, "references", number),
        )
        rollouts = [replace(rollout, prompt=new[rollout.prompt]) for rollout in rollouts]
        rewards = self.score(rollouts).values
        for prompt in new:
            own = [index for index, rollout in enumerate(rollouts) if rollout.prompt == prompt]
            lengths = np.array([len(rollouts[index].ids) for index in own])
            ended = np.array([rollouts[index].ended for index in own])
            self._known[prompt] = Base(rewards[own], lengths, ended)


@dataclass
class Shaping:
    """One candidate's chains of transforms, by objective. Begin anew to train anew: the states begin anew then."""

    chains: Mapping[str, tuple[Transform, ...]]
    objectives: tuple[str, ...]
    candidate: str
    base_responses: BaseResponses | None = None
    states: dict[str, list[Mapping[str, Any]]] = field(init=False)

    def __post_init__(self) -> None:
        self.states = {name: [self._start(each) for each in chain] for name, chain in self.chains.items()}

    def comparable(self, rewards: Floats, groups: NDArray[np.int64]) -> Floats:
        """The rewards [N,M], unknown where the base's responses to the prompt, to be compared with, have none."""
        if self.base_responses is None:
            return rewards
        compared = np.array(rewards)
        for column, (name, count) in enumerate(self.base_responses.samples.items()):
            known = [np.isfinite(base.rewards[:count, column]).any() for base in self._base(groups)]
            compared[~np.array(known), self.objectives.index(name)] = np.nan
        return compared

    def of(self, number: int, dataset: PairDataset) -> tuple[Floats, dict[str, float]]:
        """What the rewards [N,M] of round ``number`` are to count, and figures for the metrics: means and states.

        Raises PluginError where a transform returns what it must not.
        """
        self.states = {name: list(states) for name, states in self.states.items()}  # a copy of this keeps the others
        shaped = np.array(dataset.rewards)
        figures: dict[str, float] = {}
        for column, name in enumerate(self.objectives):
            rows = np.flatnonzero(np.isfinite(shaped[:, column]))
            figures[f"{name}/reward"] = float(shaped[rows, column].mean())
            if name in self.chains:
                shaped[rows, column] = self._chained(name, number, dataset, rows, shaped[rows, column])
            figures[f"{name}/shaped"] = float(shaped[rows, column].mean())
            for place, state in enumerate(self.states.get(name, ())):
                figures |= {f"{name}/transform/{place}/{key}": value for key, value in numbers_in(state)}
        return shaped, figures

    def _chained(
        self, name: str, number: int, dataset: PairDataset, rows: NDArray[np.int64], rewards: Floats
    ) -> Floats:
        sequences = [dataset.sequences[row] for row in rows]
        about = Responses(
            number,
            torch.from_numpy(dataset.groups[rows]),
            torch.tensor([len(sequence.response) for sequence in sequences]),
            torch.tensor([not sequence.truncated for sequence in sequences]),
        )
        values, states = torch.from_numpy(rewards), self.states[name]
        for place, transform in enumerate(self.chains[name]):
            wanted = door.call(transform, "references", candidate=self.candidate)
            reference = self._reference(name, number, dataset.groups[rows], place)[:, :wanted] if wanted else None
            given = replace(about, reference=reference)
            values, states[place] = self._apply(transform, values, given, states[place])
        return values.numpy()

    def _reference(self, name: str, number: int, groups: NDArray[np.int64], place: int) -> Tensor:
        """The base's rewards [N,R] as the pointwise transforms before this place of the chain leave them."""
        assert self.base_responses is not None
        column, (prompts, index) = list(self.base_responses.samples).index(name), np.unique(groups, return_inverse=True)
        bases = self._base(prompts)
        rewards = np.stack([base.rewards[:, column] for base in bases])
        known = np.isfinite(rewards)
        about = Responses(
            number,
            torch.from_numpy(np.broadcast_to(prompts[:, None], known.shape)[known]),
            torch.from_numpy(np.stack([base.lengths for base in bases])[known]),
            torch.from_numpy(np.stack([base.ended for base in bases])[known]),
        )
        values = torch.from_numpy(rewards[known])
        for transform, state in zip(self.chains[name][:place], self.states[name], strict=False):
            values, _ = self._apply(transform, values, about, state)
        rewards[known] = values.numpy()
        return torch.from_numpy(rewards[index])

    def _base(self, groups: NDArray[np.int64]) -> list[Base]:
        assert self.base_responses is not None
        with calls.on_behalf_of(self.candidate):
            return self.base_responses.to(groups.tolist())

    def _start(self, transform: Transform) -> Mapping[str, Any]:
        state = door.call(transform, "init", candidate=self.candidate)
        return _checked_state(transform, "init", state)

    def _apply(
        self, transform: Transform, rewards: Tensor, about: Responses, state: Mapping[str, Any]
    ) -> tuple[Tensor, Mapping[str, Any]]:
        found = door.call(transform, "apply", rewards, about, state, candidate=self.candidate)
        if not (isinstance(found, tuple) and len(found) == 2):
            who = door.origin(transform).who
            raise PluginError(f"{who}, in apply: it must return the rewards and a state, not {type(found).__name__}")
        values = one_number_each(transform, "apply", found[0], len(rewards))
        return values.detach(), _checked_state(transform, "apply", found[1])


def _checked_state(transform: Transform, hook: str, state: Any) -> Mapping[str, Any]:
    if not isinstance(state, Mapping):
        who = door.origin(transform).who
        raise PluginError(f"{who}, in {hook}: the state must be a mapping of plain data, not {type(state).__name__}")
    return state
