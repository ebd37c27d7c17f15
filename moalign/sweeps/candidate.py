"""One candidate from preference to outcome: train, evaluate, write its folder whole or not at all."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moalign import lora, preference, storage
from moalign.engine.batches import BatchSource, OfflineSource, RolloutSource
from moalign.engine.evaluate import Evaluation
from moalign.engine.model import TRAINED
from moalign.engine.train import FrozenReward, Job, Trained, train
from moalign.errors import MoalignError, TrainingError, UserError
from moalign.sweeps import outcomes
from moalign.sweeps.observe import Observer
from moalign.sweeps.workshop import Workshop
from moalign.types import Candidate, Outcome


def train_candidate(
    candidate: Candidate, workshop: Workshop, history: Sequence[Outcome], observer: Observer
) -> Outcome:
    """Train and evaluate; a failure becomes an outcome of status "failed", so that the other candidates go on."""
    observer.on_candidate_start(candidate)
    try:
        return _train(candidate, workshop, history, observer)
    except UserError:
        raise  # disk full, data unusable: the next candidate would meet the same
    except MoalignError as error:
        reason = str(error)
    except torch.OutOfMemoryError as error:
        reason = f"out of memory ({str(error).splitlines()[0]}); a smaller train.tokens_per_pass needs less"
    except Exception as error:  # such as an error in the backward pass of a plugin's loss
        reason = f"{type(error).__name__}: {error}"
    # the traceback held the failed graph alive; it is gone only here
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return outcomes.failure(candidate, reason)


def _train(candidate: Candidate, workshop: Workshop, history: Sequence[Outcome], observer: Observer) -> Outcome:
    model = workshop.model
    job = job_of(candidate, workshop, history)
    metrics: list[str] = []

    def on_step(step: int, values: dict[str, Any]) -> None:
        metrics.append(json.dumps({"step": step} | values, sort_keys=True, allow_nan=False) + "\n")
        observer.on_step(candidate, step, values)

    with storage.new_directory(workshop.directory / "candidates" / candidate.id) as folder:
        trained = train(model, batch_source(candidate, workshop), job, workshop.cache, workshop.accelerator, on_step)
        storage.write_text(folder / "metrics.jsonl", "".join(metrics))
        lora.write(model.policy, TRAINED, folder, model.fingerprint)
        measured = workshop.evaluate(TRAINED)
        storage.write_text(folder / "samples.jsonl", _samples(workshop, measured))
        outcome = _outcome(candidate, trained, measured, storage.sha256_of(folder / lora.WEIGHTS_FILE))
        storage.write_json(folder / "outcome.json", outcomes.to_event(outcome))
    return outcome


def job_of(candidate: Candidate, workshop: Workshop, history: Sequence[Outcome]) -> Job:
    """Everything that decides the training of this candidate; loads the adapters that serve as its rewards."""
    plan = workshop.plan
    needs = plan.needs(candidate)
    margins_from: dict[int, FrozenReward] = {}
    for name in workshop.implicit([candidate]):
        if candidate.preference.values.get(name):  # an objective without weight needs no reward
            margins_from[plan.objectives.index(name)] = _anchor(name, workshop, history)
    return Job(
        candidate=candidate.id,
        preference=candidate.preference.vector(plan.objectives),
        objective=plan.objective,
        combiner=plan.combiner,
        needs=needs,
        objectives=plan.objectives,
        settings=plan.config.train,
        seed=plan.config.seed,
        margins_from=margins_from,
    )


def _anchor(name: str, workshop: Workshop, history: Sequence[Outcome]) -> FrozenReward:
    """The adapter that was trained for this objective alone, loaded into a slot of its own."""
    for outcome in history:
        alone = preference.is_one_hot(outcome.preference) and outcome.preference.values.get(name, 0.0) > 0.0
        if alone and outcome.status == "done":
            slot = workshop.slots.get(outcome.id)
            if slot is None:
                slot = f"frozen{len(workshop.slots)}"
                policy = workshop.model.policy
                policy.add_adapter(slot, policy.peft_config[TRAINED])
                folder = workshop.directory / "candidates" / outcome.id
                try:
                    lora.read(policy, slot, folder, workshop.model.fingerprint)
                except MoalignError:
                    policy.delete_adapter(slot)
                    raise
                workshop.slots[outcome.id] = slot
            return FrozenReward(slot, outcome.checksum or outcome.id, workshop.plan.beta)
    raise TrainingError(
        f"the candidate for {name} alone, whose adapter is the reward of {name}, has failed or is missing"
    )


def batch_source(candidate: Candidate, workshop: Workshop) -> BatchSource:
    """Pairs from the data, or from the policy's own samples where the configuration has rollouts."""
    config, material = workshop.plan.config, workshop.material
    if config.rollouts is None:
        assert material.train is not None
        return OfflineSource(material.train, config.seed, config.train.pairs_per_step)
    assert material.score is not None
    return RolloutSource(
        model=workshop.model,
        objectives=workshop.plan.objectives,
        prompts=material.prompts,
        score=material.score,
        settings=config.rollouts,
        steps=config.train.steps,
        seed=config.seed,
        first_round=workshop.first_round,
    )


def _samples(workshop: Workshop, measured: Evaluation) -> str:
    decode = workshop.model.tokeniser.tokenizer.decode
    prompts = [decode(ids, skip_special_tokens=True) for ids in workshop.material.held_out.prompts]
    rows: list[Mapping[str, Any]] = [
        {"prompt": prompts[rollout.prompt], "response": rollout.text, "ended": rollout.ended}
        for rollout in measured.samples
    ]
    return "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)


def _outcome(candidate: Candidate, trained: Trained, measured: Evaluation, checksum: str) -> Outcome:
    skipped = {"skipped_steps": float(trained.skipped)} if trained.skipped else {}
    return Outcome(
        id=candidate.id,
        status="done",
        preference=candidate.preference,
        scores=measured.scores,
        stderr=measured.stderr,
        kl=measured.kl,
        tokens=trained.tokens,
        checksum=checksum,
        details=measured.details | skipped,
    )
