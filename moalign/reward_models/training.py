"""Train a reward model, all its members, in the loop that trains policies; measure it; write it whole or not at all."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from moalign import calls, lora, storage
from moalign.engine import judged
from moalign.engine import model as models
from moalign.engine.batches import OfflineSource
from moalign.engine.judging import job_of
from moalign.engine.model import LanguageModel
from moalign.engine.replies import room
from moalign.engine.scoring import LogpCache
from moalign.engine.train import train_together
from moalign.engine.trainee import Trainee
from moalign.errors import ConfigError, ModelError, RunError, TrainingError
from moalign.registry import Registry
from moalign.reward_models import archive, reporting, window, writing
from moalign.reward_models.config import RewardModelConfig
from moalign.reward_models.material import Material, gather
from moalign.reward_models.members import Member
from moalign.reward_models.plan import Plan, prepare
from moalign.reward_models.rehearsal import telling_pairs
from moalign.seeds import derive
from moalign.sweeps import provenance
from moalign.sweeps.candidate import slots
from moalign.sweeps.observe import Observer
from moalign.types import Candidate, Preference

LIBRARIES = ("moalign", "torch", "transformers", "peft", "accelerate", "numpy")
NOTICEABLE = 0.05  # of a difference of scores, which are log-odds
PROBE_STEPS = 3  # the first is warm-up and does not count


@dataclass(frozen=True)
class Shop:
    """What all members share. The model's layouts are whole, so that the last token's hidden state is there to read."""

    plan: Plan
    model: LanguageModel
    material: Material
    cache: LogpCache
    accelerator: Accelerator


def train(config: RewardModelConfig, out: Path, registry: Registry, observer: Observer) -> dict[str, Any]:
    """Train what the configuration describes into the new directory ``out``; returns its report.

    Raises RunError where ``out`` holds something, and whatever is wrong with configuration, data or training.
    """
    plan = prepare(config, registry)
    _check_deaths()
    archive.check_vacant(out)
    used = provenance.used(plan, registry)
    shop = open_shop(plan, observer)
    rehearse(shop)
    members = train_members(shop, range(config.members), observer)
    report, failure = _write(shop, members, _record(shop, members, used), out, observer)
    if failure is not None:
        raise RunError(
            f"{out}: trained and written, but not measured, so there is no {archive.REPORT}: {failure}"
        ) from failure
    return report


def _write(
    shop: Shop, members: Sequence[Member], record: dict[str, Any], out: Path, observer: Observer
) -> tuple[dict[str, Any], Exception | None]:
    """The report, and why there is none: what was trained is written whatever measuring it comes to."""
    report: dict[str, Any] = {}
    failure: Exception | None = None
    observer.on_phase("writing")
    with storage.new_directory(out) as folder:
        for member in members:
            writing.write_trained(folder / member.name, shop.model, member)
            how = writing.write_classifier(folder / member.name, shop.model, shop.plan, member, shop.material)
            record["members"][member.name] |= how
            if how.get("why", writing.NOT_LINEAR) != writing.NOT_LINEAR:
                observer.on_warning(f"{member.name}: adapter and head are written, but no classifier: {how['why']}")
            if how.get("largest_difference", 0.0) > NOTICEABLE:
                observer.on_warning(
                    f"{member.name}: scores of the written classifier differ from the trained model's by up to "
                    f"{how['largest_difference']:.3g}: its weights are rounded to {record['dtype']}"
                )
        observer.on_phase("scoring the held-out responses")
        try:
            report, record["scale"] = reporting.measure(shop.model, shop.plan, shop.material, members)
            storage.write_json(folder / archive.REPORT, report)
        except Exception as error:
            failure, record["unmeasured"] = error, str(error) or type(error).__name__
        storage.write_json(folder / archive.RECORD, record)
    return report, failure


def open_shop(plan: Plan, observer: Observer) -> Shop:
    """Load the model and the data. Raises ModelError, DataError, ConfigError."""
    observer.on_phase("loading the model")
    accelerator = Accelerator()
    if accelerator.num_processes != 1:
        raise ModelError("moalign trains in one process; start it without `accelerate launch` or torchrun")
    model = models.load(plan.config.model_directory, plan.config.model, accelerator.device)
    model = replace(model, packing=replace(model.packing, whole=True))
    asked, plan = plan, window.within(plan, room(model.base))
    observer.on_phase("reading the data")
    material = gather(plan, model.tokeniser)
    if asked is not plan:
        material = replace(material, warnings=(*material.warnings, *window.warnings(plan, material.counts)))
    observer.on_training_start(material.counts, material.warnings, plan.config.train.steps, plan.config.members)
    return Shop(plan, model, material, LogpCache(model), accelerator)


def rehearse(shop: Shop) -> None:
    """One step that is thrown away and scores, on few judgements: what is wrong with a form is said before training.

    Raises TrainingError as ``train_members`` does, and PluginError.
    """
    plan, material = shop.plan, shop.material
    few = reporting.part(material.train, telling_pairs(material.train))
    (slot,) = slots(1)
    lora.add_slots(shop.model.policy, [slot])
    trainee, _ = _trainee(shop, 0, slot, Observer(), 1)
    trainee.source = OfflineSource(few, 0, len(few.pairs), cacheable=False)
    train_together(shop.model, [trainee], shop.cache, shop.accelerator)
    if trainee.error is not None:
        raise TrainingError(f"{_name(0)}: {trainee.error}") from trainee.error
    writing.linear_head(plan, trainee.owned, shop.model.width)
    for dataset in (few, material.held_out):
        if dataset is not None:
            asked = reporting.part(dataset, telling_pairs(dataset))
            about = (asked.sequences, asked.groups.tolist(), asked.rewards)
            judged.scores(shop.model, slot, plan.form, plan.objectives, trainee.owned, *about)


def train_members(shop: Shop, numbers: Sequence[int], observer: Observer) -> list[Member]:
    """Members by number, as many in one pass as ``train.together`` allows. Each is a function of its own seed.

    Raises TrainingError naming the member that failed: an ensemble that lacks one is not what was asked for.
    """
    settings, made = shop.plan.config, []
    size = _together(shop, len(numbers))
    names = slots(len(numbers))
    lora.add_slots(shop.model.policy, names)
    for start in range(0, len(numbers), size):
        trainees = [
            _trainee(shop, number, slot, observer)
            for number, slot in zip(numbers[start : start + size], names[start : start + size], strict=True)
        ]
        try:
            train_together(shop.model, [each for each, _ in trainees], shop.cache, shop.accelerator)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"out of memory ({str(error).splitlines()[0]}) with {len(trainees)} members in a pass; a smaller "
                "train.together or train.tokens_per_pass needs less"
            ) from None
        for number, (trainee, lines) in zip(numbers[start : start + size], trainees, strict=True):
            name = _name(number)
            if trainee.error is not None:
                raise TrainingError(f"{name}: {trainee.error}") from trainee.error
            own = {key: value.detach().clone() for key, value in trainee.owned.items()}
            made.append(Member(name, trainee.slot, seed_of(settings.seed, number), own, trainee.result, tuple(lines)))
    return made


def seed_of(seed: int, member: int) -> int:
    """Of first values and the order of the data. The first member has the configuration's own."""
    return seed if member == 0 else derive(seed, "member", member)


def _name(number: int) -> str:
    return f"member-{number}"


def _trainee(
    shop: Shop, number: int, slot: str, observer: Observer, steps: int | None = None
) -> tuple[Trainee, list[dict[str, Any]]]:
    config, name = shop.plan.config, _name(number)
    seed, settings = seed_of(config.seed, number), config.train
    if steps is not None:
        settings = settings.model_copy(update={"steps": steps, "early_stop": None})
    lines: list[dict[str, Any]] = []
    candidate = Candidate(name, Preference("weights", {}))

    def on_step(step: int, values: dict[str, Any]) -> None:
        lines.append({"step": step} | values)
        observer.on_step(candidate, step, values)

    job = job_of(
        shop.plan.form,
        shop.plan.objectives,
        name,
        seed,
        settings,
        config.model.lora,
        None if steps is not None else shop.material.looked_at,
    )
    source = OfflineSource(shop.material.train, seed, settings.pairs_per_step)
    return Trainee(job, source, slot, on_step), lines


def _together(shop: Shop, members: int) -> int:
    """How many members share a pass: all, unless the configuration says otherwise or their adapters cannot."""
    wanted = shop.plan.config.train.together
    reason = lora.why_not_together(shop.model.policy)
    if reason is None:
        return members if wanted == "auto" else min(wanted, members)
    if wanted not in ("auto", 1):
        raise ConfigError(f"train.together: {wanted} members cannot share a pass: {reason}")
    return 1


def seconds_per_step(shop: Shop) -> tuple[int, float]:
    """How many members share a pass, and the seconds of a step of theirs, by throw-away steps."""
    size = _together(shop, shop.plan.config.members)
    names = slots(size)
    times: list[float] = []
    made = [_trainee(shop, number, slot, Observer(), PROBE_STEPS)[0] for number, slot in enumerate(names)]
    made[0].on_step = lambda step, values: times.append(time.perf_counter())
    train_together(shop.model, made, shop.cache, shop.accelerator)
    for trainee in made:
        if trainee.error is not None:
            raise trainee.error
    return size, min(after - before for before, after in pairwise(times))


def _record(shop: Shop, members: Sequence[Member], used: provenance.Used) -> dict[str, Any]:
    config, model = shop.plan.config, shop.model
    return {
        "format": 1,
        "config": config.model_dump(mode="json"),
        "objectives": list(shop.plan.objectives),
        "base": model.fingerprint,
        "base_directory": config.model_directory,
        "end_token_id": model.tokeniser.end_id,
        "tokenizer": model.tokenizer_fingerprint,
        "data": shop.material.digest,
        "data_counts": dict(shop.material.counts),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "plugins": used,
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "members": {
            member.name: {
                "seed": member.seed,
                "steps": member.trained.steps,
                "skipped_steps": member.trained.skipped,
                "best_step": member.trained.best_step,
            }
            for member in members
        },
    }


def _check_deaths() -> None:
    """What ended an earlier process of this command would end this one too."""
    for death in calls.deaths():
        if (death.call.dispensable or ("",))[0] in ("candidate", calls.TOGETHER):
            raise TrainingError(death.reason)
