"""What all candidates of a run share: the model, the data, the caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path

from accelerate import Accelerator

from moalign import lora
from moalign.api import Objective
from moalign.batch import AdapterShape
from moalign.data.dataset import PairDataset, judged_by, merge_judges
from moalign.engine import model as models
from moalign.engine.companions import companion_of
from moalign.engine.conditioned import told
from moalign.engine.conditioning import Conditioning
from moalign.engine.evaluate import Evaluation, HeldOut, Wish, evaluate, samples
from moalign.engine.model import LanguageModel
from moalign.engine.outside import Outside
from moalign.engine.reference_policy import BASE, FrozenPolicy
from moalign.engine.rollouts import Rollout
from moalign.engine.round_views import Known
from moalign.engine.row_conditions import RowConditions, embeddings_of
from moalign.engine.scoring import LogpCache
from moalign.engine.shaping import BaseResponses
from moalign.errors import ConfigError, ModelError, PluginError
from moalign.sweeps import checks, comparing, first_reference, guides
from moalign.sweeps.material import Material, gather
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import Plan
from moalign.types import Candidate, Preference


@dataclass
class Workshop:
    """What all candidates of a run share. ``slots`` names the frozen adapters that are loaded, by candidate id.
    ``first_round`` holds the base's own samples, and ``said`` what references that stay say in rounds, where a loss
    reads it; both by seed. ``compared_with``: what every candidate's reference begins with.

    A candidate's own seed decides its first weights, order, dropout and samples. The split of the data, the prompts and
    samples of the evaluation and the search's draws are those of the run's seed, so that candidates of several seeds
    are measured alike.
    """

    plan: Plan
    directory: Path
    model: LanguageModel
    material: Material
    cache: LogpCache
    accelerator: Accelerator
    first_round: dict[int, dict[str, PairDataset]] = field(default_factory=dict)
    said: dict[int, Known] = field(default_factory=dict)
    slots: dict[str, str] = field(default_factory=dict)
    compared_with: FrozenPolicy = BASE
    _pairs: dict[tuple[int, ...], PairDataset] = field(default_factory=dict)
    _base_responses: dict[int, BaseResponses] = field(default_factory=dict)
    _guides: dict[Path, FrozenPolicy] = field(default_factory=dict)

    def pairs_for(self, candidate: Candidate) -> PairDataset:
        """The training pairs that can count for this candidate; the same object for all who train on the same."""
        train = self.material.train
        assert train is not None
        combiner, vector = self.plan.combiner, candidate.preference.vector(self.plan.objectives)
        wanted = tuple(index for index, value in enumerate(vector) if value or not combiner.weighs_judges)
        if wanted not in self._pairs:
            judged = judged_by(train, wanted)
            self._pairs[wanted] = merge_judges(judged) if self.plan.merges_judges else judged
        return self._pairs[wanted]

    @cached_property
    def looked_at(self) -> PairDataset | None:
        """The held-out pairs whose loss decides when a candidate ends, as a step has its pairs."""
        found = self.material.looked_at
        return merge_judges(found) if found is not None and self.plan.merges_judges else found

    @property
    def base_responses(self) -> BaseResponses | None:
        """``base_responses_of`` the run's seed."""
        return self.base_responses_of(self.plan.config.seed)

    def base_responses_of(self, seed: int) -> BaseResponses | None:
        """The base's responses that transforms compare with, for all candidates of a seed; None where none does."""
        material, config = self.material, self.plan.config
        if material.score_base is None or config.rollouts is None:
            return None
        if seed not in self._base_responses:
            samples = self.plan.base_samples
            draw = None if self.outside is None else self.outside.sample
            self._base_responses[seed] = BaseResponses(
                self.model, material.prompts, material.score_base, samples, config.rollouts, seed, draw
            )
        return self._base_responses[seed]

    @cached_property
    def outside(self) -> Outside | None:
        """Who samples rounds of responses in moalign's place, where the configuration names somebody."""
        return None if self.plan.sampler is None else Outside(self.plan.sampler, self.plan.config.model_directory)

    def close(self) -> None:
        """Let go of what is not the process's own."""
        if self.outside is not None:
            self.outside.close()

    def implicit(self, candidates: Sequence[Candidate]) -> list[str]:
        """The objectives whose reward has to come from a one-hot adapter, where any of the candidates needs margins."""
        if not any("margins" in self.plan.needs(candidate) for candidate in candidates):
            return []
        return [name for name, source in self.material.margins.items() if source == "implicit"]

    def guides_of(self, objective: Objective, candidate: str = guides.CANDIDATE) -> dict[str, FrozenPolicy]:
        """The frozen adapters that a loss reads, each loaded once; without a candidate, those that serve all.

        Raises ConfigError naming the option.
        """
        found = {}
        for option, folder in guides.folders_of(objective, candidate).items():
            if guides.is_each_ones(folder):
                continue
            if folder not in self._guides:
                taken = {guide.adapter for guide in self._guides.values()}
                slot = next(name for name in map("guide{}".format, count()) if name not in taken)
                self._guides[folder] = guides.load(option, folder, slot, self.model)
            found[option] = self._guides[folder]
        return found

    def release_guides(self) -> None:
        """Let go of the guides that single candidates had for their own."""
        shared = guides.folders_of(self.plan.objective).values()
        for folder in self._guides.keys() - shared:
            slot = self._guides.pop(folder).adapter
            assert slot is not None  # it is no base
            self.model.policy.delete_adapter(slot)

    @property
    def held_out_prompts(self) -> list[str]:
        """What is evaluated on, as text."""
        decode = self.model.tokeniser.tokenizer.decode
        return [decode(ids, skip_special_tokens=True) for ids in self.material.held_out.prompts]

    def held_out_samples(self, adapters: Sequence[str | None]) -> list[list[Rollout]]:
        """Responses to the held-out prompts under each adapter (None: the untouched base), sampled in one go."""
        return samples(self.model, adapters, self.material.held_out, self.plan.config.evaluate, self.plan.config.seed)

    def evaluate(
        self,
        adapter: str | None,
        beta: float | None = None,
        rollouts: Sequence[Rollout] | None = None,
        wanted: Preference | None = None,
        conditions: RowConditions | None = None,
        served: Preference | None = None,
    ) -> Evaluation:
        """The policy with this adapter (None: the untouched base), as the configuration wants it evaluated.

        ``beta``: of its loss, if it is not the configuration's; ``rollouts``: its held-out samples, if there are.
        ``wanted``: the preference that it is told, where it is told one in the prompt; ``conditions``: of a row, with
        the vectors that tell it there. ``served``: the preference that it is to serve, told or not.
        """
        seen = None if wanted is None else replace(self._seen(wanted), conditions=conditions)
        if rollouts is None:
            config, asked = self.plan.config, seen or self.material.held_out
            (rollouts,) = samples(self.model, [adapter], asked, config.evaluate, config.seed)
        return evaluate(
            self.model,
            adapter,
            self.material.held_out,
            self.plan.objectives,
            self.plan.config.evaluate,
            self.plan.evaluation_kind,
            self.plan.variant({}).beta if beta is None else beta,
            self.cache,
            rollouts,
            seen,
            self._wish(served),
        )

    def _wish(self, served: Preference | None) -> Wish | None:
        """What the policy is measured against; only weights and a price of KL say what the best would be."""
        price = self.plan.kl_price
        if served is None or served.kind != "weights" or not price:
            return None
        return Wish(served.vector(self.plan.objectives), price)

    def conditioning(self, candidate: str, longest: int | None = None, seed: int | None = None) -> Conditioning | None:
        """The conditioner as the engine asks it; ``longest``: tokens of a prompt, if not as those sampled from;
        ``seed``: if not the run's."""
        if self.plan.conditioner is None:
            return None
        return Conditioning(
            conditioner=self.plan.conditioner,
            objectives=self.plan.objectives,
            seed=self.plan.config.seed if seed is None else seed,
            candidate=candidate,
            tokeniser=self.model.tokeniser,
            shape=self._shape,
            longest=longest or self.material.longest_prompt,
        )

    @cached_property
    def _shape(self) -> AdapterShape:
        plan, policy = self.plan, self.model.policy
        shape = AdapterShape(len(lora.layers(policy)), plan.config.model.lora.r, len(plan.objectives))
        if plan.conditioner is None or plan.conditioner.by != "vectors":
            return shape
        found = embeddings_of(self.model.base)
        return replace(shape, width=found.shape[1], spread=float(found.std()), embeddings=found)

    def _seen(self, wanted: Preference) -> HeldOut:
        """What is held out, each prompt as it is read where it tells a preference."""
        held_out, asking = self.material.held_out, self.conditioning("")
        assert asking is not None
        both = zip(held_out.texts, held_out.prompts, strict=True)
        prompts = tuple(asking.prompt(text, ids, wanted) for text, ids in both)
        pairs = held_out.pairs
        if pairs is not None:
            pairs = told(pairs, replace(asking, longest=self.plan.config.data.max_length), wanted)
        return replace(held_out, prompts=prompts, pairs=pairs)


@contextmanager
def opened_workshop(plan: Plan, directory: Path, observer: Observer, *, keep_cache: bool) -> Iterator[Workshop]:
    """``open_workshop``, closed with the context; a sampler that fails then has done its work, and is warned of."""
    workshop = open_workshop(plan, directory, observer, keep_cache=keep_cache)
    try:
        yield workshop
    finally:
        try:
            workshop.close()
        except PluginError as error:
            observer.on_warning(str(error))


def open_workshop(plan: Plan, directory: Path, observer: Observer, *, keep_cache: bool) -> Workshop:
    """Load the model and the data. ``keep_cache``: reference log-probabilities go to the run directory as well.

    Raises ModelError, DataError, ConfigError.
    """
    if what := checks.doubt(plan):
        observer.on_warning(what)
    observer.on_phase("loading the model")
    accelerator = Accelerator()
    if accelerator.num_processes != 1:
        raise ModelError("moalign trains in one process; start it without `accelerate launch` or torchrun")
    model = models.load(plan.config.model_directory, plan.config.model, accelerator.device)
    if model.unshared:
        observer.on_phase(f"prompts are computed anew for each response to them: {model.unshared}")
    if model.uncached:
        observer.on_phase(f"prompts are computed anew for each response that is sampled: {model.uncached}")
    _check_condition(plan, model)
    _check_companion(plan, model)
    observer.on_phase("reading the data")
    workshop = Workshop(
        plan=plan,
        directory=directory,
        model=model,
        material=gather(plan, model, observer.on_warning),
        cache=LogpCache(model, directory / "cache" if keep_cache else None),
        accelerator=accelerator,
        compared_with=first_reference.load(plan, model, observer.on_warning),
    )
    if plan.reads_levels and _implicit(workshop):
        raise ConfigError(f"data.margins: auto finds no rewards, and {checks.no_levels(plan)}")
    if plan.reference is not None and not plan.reference.fixed and _implicit(workshop):
        raise ConfigError(f"combine: '{plan.config.combine.name}' needs rewards, and {comparing.implicit(plan)}")
    if plan.conditioner is not None and (without := workshop.implicit(plan.propose(())[:1])):
        raise ConfigError(
            f"combine: '{plan.config.combine.name}' needs rewards, there are none for {' and '.join(without)}; with "
            "condition no one-hot candidates are trained whose adapters could be the rewards: give scores in the "
            "data, or objectives.NAME.reward"
        )
    return workshop


def _implicit(workshop: Workshop) -> bool:
    """Whether candidates between the objectives need adapters of others as rewards."""
    names = workshop.plan.objectives
    equal = Preference("weights", dict.fromkeys(names, 1 / len(names)))
    return bool(workshop.implicit([Candidate("equal", equal)]))


def _check_condition(plan: Plan, model: LanguageModel) -> None:
    """Raise ConfigError where the adapter sits where a conditioner's gates do not reach."""
    reason = lora.why_not_together(model.policy)
    if plan.conditioner is not None and plan.conditioner.by == "gates" and reason is not None:
        raise ConfigError(
            f"condition: it gates the adapter of linear layers row by row, and {reason}; leave that out of "
            "model.lora.targets"
        )


def _check_companion(plan: Plan, model: LanguageModel) -> None:
    """Raise ConfigError where the adapter sits where two cannot share a pass, and the loss trains two."""
    reason = lora.why_not_together(model.policy)
    if reason is not None and companion_of(plan.objective) is not None:
        raise ConfigError(
            f"loss: '{plan.config.loss.name}' trains a second adapter in the same passes, and {reason}; leave that out "
            "of model.lora.targets, or use another loss"
        )
