"""The arrays that diagnostics are functions of, read of policies that all meet the same pairs and prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moalign.config import EvaluateSettings
from moalign.diagnostics.material import Material, Rewards
from moalign.diagnostics.ranking import PairLogps
from moalign.engine.evaluate import HeldOut, samples
from moalign.engine.model import LanguageModel
from moalign.engine.rollouts import Rollout, sequence_of
from moalign.engine.scoring import logps_under
from moalign.types import Sample

Array = NDArray[np.float64]
BASE = "base"


@dataclass(frozen=True)
class Sampled:
    """N responses of a policy at temperature 1: ``rewards`` by name [N], NaN where unknown; ``log_ratios`` [N],
    log pi - log pi_ref of the whole response, in nats; ``reference``: log-probabilities of each one's tokens under
    pi_ref. That is the untouched base, whatever reference the run's loss compared with."""

    rollouts: tuple[Rollout, ...]
    rewards: Mapping[str, Array]
    log_ratios: Array
    reference: tuple[NDArray[np.float32], ...]

    @property
    def prompts(self) -> list[int]:
        return [rollout.prompt for rollout in self.rollouts]

    @property
    def tokens(self) -> Array:
        return np.array([len(rollout.ids) for rollout in self.rollouts], dtype=np.float64)

    @property
    def ended(self) -> Array:
        return np.array([rollout.ended for rollout in self.rollouts], dtype=np.float64)

    @property
    def answers(self) -> list[str]:
        return [rollout.text for rollout in self.rollouts]


@dataclass(frozen=True)
class Reading:
    """Of one policy; None where there are no pairs, or no prompts."""

    pairs: PairLogps | None
    sampled: Sampled | None


def readings(
    model: LanguageModel,
    slots: Mapping[str, str],
    material: Material,
    rewards: Rewards,
    settings: EvaluateSettings,
    seed: int,
) -> dict[str, Reading]:
    """By id, the base first. ``slots``: of the candidates' adapters, by id. ``settings``: of the sampling, whose
    temperature is taken to be 1, because all that is made of the samples is an estimate under the policy itself."""
    adapters: list[str | None] = [None, *slots.values()]
    names = [BASE, *slots]
    pairs = _pairs(model, adapters, material)
    sampled: Sequence[Sampled | None] = [None] * len(adapters)
    if material.asked:
        sampled = _sampled(model, adapters, material, rewards, settings, seed)
    return {name: Reading(*both) for name, both in zip(names, zip(pairs, sampled, strict=True), strict=True)}


def _pairs(model: LanguageModel, adapters: Sequence[str | None], material: Material) -> Sequence[PairLogps | None]:
    dataset = material.pairs
    if dataset is None:
        return [None] * len(adapters)
    found = logps_under(model, dataset.sequences, dataset.groups.tolist(), adapters)
    sums = [np.array([each.sum(dtype=np.float64) for each in own])[dataset.pairs] for own in found]
    tokens = np.array([len(each) for each in found[0]], dtype=np.float64)[dataset.pairs]
    return [PairLogps(own, sums[0], tokens) for own in sums]


def _sampled(
    model: LanguageModel,
    adapters: Sequence[str | None],
    material: Material,
    rewards: Rewards,
    settings: EvaluateSettings,
    seed: int,
) -> list[Sampled]:
    prompts = material.prompts
    plain = settings.model_copy(update={"temperature": 1.0})
    asked = HeldOut(None, prompts, None)
    said = samples(model, [None], asked, plain, seed)  # the base does not share a batch with adapters
    if adapters[1:]:
        said += samples(model, adapters[1:], asked, plain, seed)
    return [
        _scored(model, adapter, own, prompts, material, rewards) for adapter, own in zip(adapters, said, strict=True)
    ]


def _scored(
    model: LanguageModel,
    adapter: str | None,
    rollouts: Sequence[Rollout],
    prompts: Sequence[tuple[int, ...]],
    material: Material,
    rewards: Rewards,
) -> Sampled:
    sequences, groups = [sequence_of(each, prompts) for each in rollouts], [each.prompt for each in rollouts]
    reference, own = logps_under(model, sequences, groups, (None, adapter))
    ratios = [(mine - base).sum(dtype=np.float64) for mine, base in zip(own, reference, strict=True)]
    texts = [Sample(material.asked[each.prompt][0], each.text) for each in rollouts]
    values = {name: scorer.score(texts).values for name, scorer in rewards.scorers.items()}
    return Sampled(tuple(rollouts), values, np.array(ratios), tuple(reference))
