"""Candidates from preference to outcome: train, evaluate, write each folder whole or not at all."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from moalign import calls, disk, lora, storage
from moalign.api import Objective
from moalign.data.batching import groups_of
from moalign.data.dataset import PairDataset
from moalign.engine import companions, owned, snapshots
from moalign.engine.advantages import Advantages
from moalign.engine.batches import BatchSource, OfflineSource, RolloutSource
from moalign.engine.conditioned import ConditionedPairs, ConditionedRollouts
from moalign.engine.filtering import Filtering
from moalign.engine.model import TRAINED
from moalign.engine.reference_policy import BASE, FrozenPolicy
from moalign.engine.rollouts import Rollout
from moalign.engine.round_views import RoundViews
from moalign.engine.row_conditions import RowConditions
from moalign.engine.scored_responses import ScoredResponses
from moalign.engine.shaping import Shaping
from moalign.engine.train import train_together
from moalign.engine.trainee import FrozenReward, Job, Trained, Trainee
from moalign.engine.views import reads
from moalign.errors import ConfigError, MoalignError, UserError
from moalign.lora import posterior_file
from moalign.sweeps import anchors, conditioned, guides, outcomes, samples, starts, views
from moalign.sweeps.observe import Observer
from moalign.sweeps.workshop import Workshop
from moalign.types import Candidate, Outcome


def train_candidates(
    candidates: Sequence[Candidate], workshop: Workshop, history: Sequence[Outcome], observer: Observer
) -> Iterator[Outcome]:
    """Train these together; outcomes of those that the history does not have yet, each when its folder is whole.

    The others are trained along, because a group is the same to the last bit only as a whole. A failure is an outcome
    of status "failed", and the others go on. Where memory does not suffice for all, half of them are trained at a time.
    """
    known = {outcome.id for outcome in history}
    wanted = [candidate for candidate in candidates if candidate.id not in known]
    if not wanted:
        return
    for candidate in wanted:
        observer.on_candidate_start(candidate)
    trainees: list[tuple[Trainee, list[str]]] = []
    try:
        _train(candidates, {candidate.id for candidate in wanted}, workshop, history, observer, trainees)
    except UserError:
        raise  # disk full, data unusable: the next candidates would meet the same
    except Exception as error:
        smaller, reason = len(candidates) // 2 if isinstance(error, torch.OutOfMemoryError) else 1, _reason(error)
        spent = sum(trainee.tokens for trainee, _ in trainees)
    else:
        sampled = _held_out_samples([trainee for trainee, _ in trainees], workshop)
        for candidate, (trainee, metrics) in zip(candidates, trainees, strict=True):
            if candidate.id not in known:
                yield _finish(candidate, trainee, metrics, sampled.get(trainee.slot), workshop)
        return
    trainees.clear()  # they held the failed graph alive, as the traceback did; it is gone only here
    _free_memory()
    if len(candidates) == 1:
        yield replace(outcomes.failure(candidates[0], reason), tokens=spent)
        return
    observer.on_phase(f"{len(candidates)} candidates together: {reason}; going on with {smaller} at a time")
    for start in range(0, len(candidates), smaller):
        yield from train_candidates(candidates[start : start + smaller], workshop, history, observer)


def _reason(error: Exception) -> str:
    if isinstance(error, MoalignError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory ({str(error).splitlines()[0]}); a smaller train.tokens_per_pass needs less"
    return f"{type(error).__name__}: {error}"  # such as an error in the backward pass of a plugin's loss


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _train(
    candidates: Sequence[Candidate],
    wanted: Collection[str],
    workshop: Workshop,
    history: Sequence[Outcome],
    observer: Observer,
    trainees: list[tuple[Trainee, list[str]]],
) -> None:
    """Into ``trainees``, as far as it comes, each candidate's state and the lines of its metrics; only those wanted are
    shown."""

    def trainee(candidate: Candidate, slot: str) -> tuple[Trainee, list[str]]:
        lines: list[str] = []

        def on_step(step: int, values: dict[str, Any]) -> None:
            lines.append(json.dumps({"step": step} | values, sort_keys=True, allow_nan=False) + "\n")
            if candidate.id in wanted:
                observer.on_step(candidate, step, values)

        source = batch_source(candidate, workshop, slot)
        made = Trainee(job_of(candidate, workshop, history), source, slot, on_step)
        try:
            made.parent = starts.start(candidate, workshop, scratch)
        except UserError:
            raise
        except MoalignError as error:  # its own: the others go on without it
            made.error = error
        return made, lines

    workshop.release_guides()
    anchors.release(workshop, history)
    with disk.scratch() as scratch:
        trainees += [trainee(*each) for each in zip(candidates, slots(len(candidates)), strict=True)]
        train_together(workshop.model, [each for each, _ in trainees], workshop.cache, workshop.accelerator)


def _held_out_samples(trainees: Sequence[Trainee], workshop: Workshop) -> dict[str, list[Rollout]]:
    """By slot, those of all that were trained, sampled together; where that fails, each evaluation samples its own."""
    if workshop.plan.conditioner is not None:
        return {}  # it is not yet what it is for one preference
    slots = [trainee.slot for trainee in trainees if trainee.error is None]
    with suppress(Exception):
        return dict(zip(slots, workshop.held_out_samples(slots), strict=True))
    return {}


def _finish(
    candidate: Candidate, trainee: Trainee, metrics: list[str], sampled: list[Rollout] | None, workshop: Workshop
) -> Outcome:
    """Evaluate a trained candidate and write its folder."""

    def fill(folder: Path) -> Content:
        trained = trainee.result
        storage.write_text(folder / "metrics.jsonl", "".join(metrics))
        conditions = conditioned.keep(trainee, candidate.preference, workshop, folder)
        lora.write(workshop.model.policy, trainee.slot, folder, workshop.model.fingerprint)
        owned.write(folder, trainee.owned, workshop.model.fingerprint)
        if companions.companion_of(trainee.job.objective) is not None:
            beside = companions.slot_of(trainee.slot)
            lora.write(workshop.model.policy, beside, folder / companions.NAME, workshop.model.fingerprint)
        if trainee.moments.count:
            found = snapshots.posterior(workshop.model.policy, trainee.slot, trainee.parameters, trainee.moments)
            posterior_file.write(found, folder, workshop.model.fingerprint)
        return Content(trained.tokens, starts.parents_of(candidate), _details(trained), conditions)

    outcome = settle(candidate, trainee.slot, workshop, fill, sampled)
    return outcome if outcome.status == "done" else replace(outcome, tokens=trainee.tokens)  # spent all the same


@dataclass(frozen=True)
class Content:
    """What was written into a candidate's folder: tokens spent on it, the share of each parent, further details.

    ``conditions``: of a row, what its prompts need beside the adapter.
    """

    tokens: int = 0
    parents: Mapping[str, float] = field(default_factory=dict)
    details: dict[str, float] = field(default_factory=dict)
    conditions: RowConditions | None = None


def _details(trained: Trained) -> dict[str, float]:
    """What of the training stands among the outcome's details."""
    figures = {
        "skipped_steps": trained.skipped or None,
        "stopped_at_step": trained.stopped_at_step,
        "best_step": trained.best_step,
    }
    return {name: float(value) for name, value in figures.items() if value is not None}


def settle(
    candidate: Candidate,
    slot: str,
    workshop: Workshop,
    fill: Callable[[Path], Content],
    sampled: list[Rollout] | None = None,
) -> Outcome:
    """Evaluate the adapter in the slot and write the candidate's folder, whole or not at all.

    ``fill`` writes the adapter into the folder; ``sampled``: its responses to the held-out prompts, if there are.
    """
    try:
        with calls.on_behalf_of(candidate.id), storage.new_directory(_folder(candidate.id, workshop)) as folder:
            content = fill(folder)
            beta = workshop.plan.variant(candidate.changes).beta
            told = conditioned.told(candidate, workshop)
            served = candidate.preference
            measured = workshop.evaluate(slot, beta, sampled, told, content.conditions, served)
            said = samples.text_of(measured, workshop.held_out_prompts, workshop.plan.objectives)
            storage.write_text(folder / samples.FILE, said)
            outcome = Outcome(
                id=candidate.id,
                status="done",
                preference=candidate.preference,
                scores=measured.scores,
                stderr=measured.stderr,
                kl=measured.kl,
                tokens=content.tokens,
                checksum=storage.sha256_of(folder / lora.WEIGHTS_FILE),
                details=measured.details | content.details,
                kind=candidate.kind,
                parents=content.parents,
                changes=candidate.changes,
            )
            storage.write_json(folder / "outcome.json", outcomes.to_event(outcome))
        return outcome
    except UserError:
        raise
    except Exception as error:
        reason = _reason(error)
    _free_memory()
    return outcomes.failure(candidate, reason)


def _folder(candidate: str, workshop: Workshop) -> Path:
    return workshop.directory / "candidates" / candidate


def slots(number: int) -> list[str]:
    """The places in the model where so many candidates are trained together."""
    return [TRAINED, *(f"{TRAINED}{place}" for place in range(1, number))]


def job_of(candidate: Candidate, workshop: Workshop, history: Sequence[Outcome]) -> Job:
    """Everything that decides the training of this candidate; loads the adapters that serve as its rewards."""
    plan = workshop.plan
    variant = plan.variant(candidate.changes)
    margins_from: dict[int, FrozenReward] = {}
    for name in workshop.implicit([candidate]):
        if candidate.preference.values.get(name):  # an objective without weight needs no reward
            margins_from[plan.objectives.index(name)] = anchors.reward(name, candidate, workshop, history)
    return Job(
        candidate=candidate.id,
        preference=candidate.preference.vector(plan.objectives),
        objective=variant.objective,
        combiner=plan.combiner,
        needs=plan.needs(candidate),
        objectives=plan.objectives,
        settings=variant.train,
        seed=variant.seed,
        margins_from=margins_from,
        rank=variant.lora.r,
        alpha=variant.lora.alpha,
        held_out=_looked_at(candidate, workshop),
        weighing=candidate.preference if plan.weighs_losses else None,
        conditioning=workshop.conditioning(candidate.id, seed=variant.seed),
        reference=plan.reference,
        begins_with=workshop.compared_with,
        labels_rounds=plan.labels_rounds,
        guides=workshop.guides_of(variant.objective, candidate.id) if guides.in_loss(variant.objective) else {},
    )


def _looked_at(candidate: Candidate, workshop: Workshop) -> PairDataset | None:
    """What an early stop looks at; single responses with what each counts for this candidate."""
    held_out = workshop.looked_at
    if held_out is None or not workshop.plan.grouped:
        return held_out
    source = batch_source(candidate, workshop)
    assert isinstance(source, ScoredResponses)
    return source.look(held_out)


def batch_source(candidate: Candidate, workshop: Workshop, slot: str = TRAINED) -> BatchSource:
    """Pairs or responses from the data, or the policy's own samples where the configuration has rollouts."""
    config, material = workshop.plan.config, workshop.material
    variant = workshop.plan.variant(candidate.changes)
    train, seed = variant.train, variant.seed
    conditioning = workshop.conditioning(candidate.id, None if config.rollouts else config.data.max_length, seed)
    reference = "reference" in workshop.plan.needs(candidate)
    if config.rollouts is None:
        dataset = workshop.pairs_for(candidate)
        views.check_same(workshop.plan, variant.objective, dataset)
        if workshop.plan.grouped:
            _check_prompts(dataset, train.pairs_per_step, workshop)
            how = (_rule(candidate, workshop), _shaping(candidate, workshop), conditioning)
            return ScoredResponses(dataset, seed, train.pairs_per_step, *how)
        if conditioning is None:
            return OfflineSource(dataset, seed, train.pairs_per_step)
        each = train.pairs_per_step
        return ConditionedPairs(workshop.model, dataset, seed, each, conditioning, reference=reference)
    assert material.score is not None
    about: dict[str, Any] = {}
    if conditioning is not None:
        about = {"conditioning": conditioning, "texts": material.texts, "reference": reference}
    return (ConditionedRollouts if about else RolloutSource)(
        **about,
        model=workshop.model,
        slot=slot,
        objectives=workshop.plan.objectives,
        prompts=material.prompts,
        score=material.score,
        settings=config.rollouts,
        steps=train.steps,
        seed=seed,
        first_round=None if candidate.parents or candidate.shares else workshop.first_round.setdefault(seed, {}),
        candidate=candidate.id,
        advantages=_rule(candidate, workshop) if workshop.plan.grouped else None,
        labels=_rule(candidate, workshop) if workshop.plan.labels_rounds else None,
        shaping=_shaping(candidate, workshop),
        compared_with=workshop.compared_with,
        views=_views(candidate, workshop),
        filtering=_filtering(candidate, workshop),
        draw=None if workshop.outside is None else workshop.outside.sample,
        guides=_measured(variant.objective, candidate.id, workshop),
    )


def _measured(objective: Objective, candidate: str, workshop: Workshop) -> dict[str, FrozenPolicy]:
    """The policies that the loss reads where a round is measured; a companion is the base until it is trained."""
    found = workshop.guides_of(objective, candidate) if guides.in_measure(objective) else {}
    return found if companions.companion_of(objective) is None else {**found, companions.NAME: BASE}


def _check_prompts(dataset: PairDataset, responses: int, workshop: Workshop) -> None:
    """Raise ConfigError where a step has one prompt and the loss compares responses to different ones."""
    if "mismatched" in workshop.plan.objective.wants and groups_of(dataset, responses) < 2:
        raise ConfigError(
            f"train.pairs_per_step: {responses} are the responses to one prompt here, and loss "
            f"'{workshop.plan.config.loss.name}' compares with responses to others; give twice as many at least"
        )


def _rule(candidate: Candidate, workshop: Workshop) -> Advantages:
    """What a candidate makes of the rewards of a round."""
    plan = workshop.plan
    objective = plan.variant(candidate.changes).objective
    return Advantages(objective, plan.combiner, candidate.preference, plan.objectives, candidate.id)


def _views(candidate: Candidate, workshop: Workshop) -> RoundViews | None:
    """What the candidate's loss reads beside the pairs of a round."""
    config, material = workshop.plan.config, workshop.material
    variant = workshop.plan.variant(candidate.changes)
    if config.rollouts is None or not reads(variant.objective):
        return None
    about = (variant.objective, workshop.model, material.texts, config.rollouts, variant.seed)
    return RoundViews(*about, config.data.max_length, workshop.said.setdefault(variant.seed, {}))


def _filtering(candidate: Candidate, workshop: Workshop) -> Filtering | None:
    plan = workshop.plan
    if plan.filter is None:
        return None
    rule = _rule(candidate, workshop) if plan.scored else None
    seed = plan.variant(candidate.changes).seed
    return Filtering(plan.filter, plan.objectives, candidate.id, seed, rule)


def _shaping(candidate: Candidate, workshop: Workshop) -> Shaping | None:
    plan = workshop.plan
    if not plan.transforms:
        return None
    base = workshop.base_responses_of(plan.variant(candidate.changes).seed)
    return Shaping(plan.transforms, plan.objectives, candidate.id, base)
