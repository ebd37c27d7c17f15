"""A reward model as the loop trains it: a loss on pairs, or on rows, without preference and combiner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Generator, Tensor

from moalign import door
from moalign.api import Combiner, Objective, RewardModel
from moalign.batch import Batch, PairTerms
from moalign.config import LoraSettings, TrainSettings
from moalign.data.dataset import PairDataset
from moalign.engine.trainee import Job


class Judging(Objective):
    """The loss of a form of reward models; errors name the form."""

    shiftable: ClassVar[bool] = False

    form: RewardModel
    objectives: tuple[str, ...]

    def model_post_init(self, context: Any) -> None:
        self._origin = door.origin(self.form)

    @property
    def wants(self) -> frozenset[str]:
        return units_of(self.form)

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return self.form.loss(batch)

    def parameters(self, width: int, generator: Generator) -> Mapping[str, Tensor]:
        return self.form.parameters(width, self.objectives, generator)

    def lr_factor(self, name: str) -> float:
        return self.form.lr_factor(name)


class Alike(Combiner):
    """Every judgement counts the same."""

    def pair_terms(self, batch: Batch) -> PairTerms:
        one = batch.strength.new_ones(len(batch.pairs))
        return PairTerms(one, one * 0, one)


def units_of(form: RewardModel) -> frozenset[str]:
    """What the form needs, in the loop's terms: without "pairs" each row is a unit of its own, as with "groups"."""
    return form.needs if "pairs" in form.needs else form.needs | {"groups"}


def job_of(
    form: RewardModel,
    objectives: tuple[str, ...],
    member: str,
    seed: int,
    settings: TrainSettings,
    adapter: LoraSettings,
    held_out: PairDataset | None = None,
) -> Job:
    """The training of one member. ``held_out``: what an early stop looks at, made as the training data is."""
    return Job(
        candidate=member,
        preference=(1.0 / len(objectives),) * len(objectives),  # nobody's: no form reads it
        objective=Judging(form=form, objectives=objectives),
        combiner=Alike(),
        needs=units_of(form),
        objectives=objectives,
        settings=settings,
        seed=seed,
        margins_from={},
        rank=adapter.r,
        alpha=adapter.alpha,
        held_out=held_out,
        reads_logps="logps" in form.needs,
    )
