"""Run a sweep in its directory: start it, or go on with it after whatever happened."""

from __future__ import annotations

import hashlib
import math
import platform
import secrets
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from moalign import calls, door, storage
from moalign.config import Config
from moalign.engine import model as models
from moalign.engine.lower_cache import LowerCache
from moalign.engine.lower_worth import worth
from moalign.errors import RunError, TrainingError
from moalign.registry import Registry
from moalign.sweeps import budget, callables, front, guides, journal, outcomes, provenance, samples, together
from moalign.sweeps import known as known_now
from moalign.sweeps.asked import ask_candidate
from moalign.sweeps.candidate import train_candidates
from moalign.sweeps.mixed import mix_candidate
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import Plan, prepare
from moalign.sweeps.proposals import next_candidates
from moalign.sweeps.watchers import watched
from moalign.sweeps.workshop import Workshop, opened_workshop
from moalign.types import Candidate, Outcome

RECORDED = "recorded"  # the event that says what run.json was
ASKED_IN_VAIN = 3  # a search may find something cheaper, once it knows that its candidates did not fit
LIBRARIES = ("moalign", "torch", "transformers", "peft", "accelerate", "numpy", "pymoo", "moocore")


def start(config: Config, directory: Path, registry: Registry, observer: Observer) -> dict[str, Any]:
    """Run a sweep in a new directory and return its front. Raises RunError where the directory holds a run already."""
    plan = prepare(config, registry)
    if (directory / "run.json").exists():
        raise RunError(
            f"{directory} already holds a run; `moalign resume {shlex.quote(str(directory))}` goes on with it, "
            "another --out starts anew"
        )
    if directory.is_file():
        raise RunError(f"{directory} is a file; choose another --out")
    if directory.exists() and any(not _ours(entry.name) for entry in directory.iterdir()):
        raise RunError(f"{directory} exists and is not empty; choose another --out")
    with watched(plan, directory, observer) as watching:
        return _execute(plan, directory, provenance.used(plan, registry), watching)


def _ours(name: str) -> bool:
    """What a start that was killed before it wrote ``run.json`` may have left."""
    return name == storage.LOCK or name.startswith(storage.TEMPORARY) or name == "cache"


def resume(
    directory: Path, registry: Registry, observer: Observer, *, accept_plugin_change: bool = False
) -> dict[str, Any]:
    """Go on with a run: what is in the journal stands, what was under way is trained again from its start.

    Raises RunError where the run does not belong to what is there now. Plugins of another version or file are let
    through with ``accept_plugin_change``; the journal then tells of it.
    """
    config = front.read_config(directory)
    callables.check(config, registry, directory)
    plan = prepare(config, registry)
    with watched(plan, directory, observer) as watching:
        return _execute(plan, directory, provenance.used(plan, registry), watching, accept_plugin_change)


def _execute(
    plan: Plan, directory: Path, plugins: provenance.Used, observer: Observer, accept_plugin_change: bool = False
) -> dict[str, Any]:
    with storage.lock(directory):
        storage.leftovers(directory)
        changed = _changed_plugins(directory, plugins)
        if changed and not accept_plugin_change:
            raise provenance.refuse(directory, changed)
        with opened_workshop(plan, directory, observer, keep_cache=True) as workshop:
            _record(plan, directory, workshop, plugins)
            if changed:
                journal.append(directory / journal.FILE, {"event": provenance.EVENT, "plugins": changed})
            _give_up(plan, directory)
            history = _settled(plan, directory, workshop)
            skipped = [outcome for outcome in history if outcome.status == "skipped"]
            observer.on_run_start(plan, workshop.material, len(history) - len(skipped))
            observer.on_skipped(skipped)
            began = budget.now()
            while proposed := _pending(plan, directory, workshop, history, observer):
                known = {outcome.id for outcome in history}
                observer.on_proposed([candidate for candidate in proposed if candidate.id not in known])
                for outcome in _outcomes(proposed, directory, workshop, history, observer):
                    journal.append(directory / journal.FILE, outcomes.to_event(outcome))
                    history.append(outcomes.as_read(outcome, plan.objectives))
                    observer.on_candidate_end(outcome)
                    began = budget.spend(plan, directory, began)
            if models.base_fingerprint(workshop.model.base) != workshop.model.fingerprint:
                raise TrainingError("the base model's weights changed during the sweep; its adapters cannot be trusted")
            if not journal.ended(directory / journal.FILE):
                journal.append(directory / journal.FILE, {"event": journal.ENDED})
        result = front.write(directory)
    observer.on_run_end(result)
    if not result["points"]:
        raise TrainingError(f"{directory}: every candidate failed; the first: {result['failed'][0]['error']}")
    return result


def _outcomes(
    proposed: Sequence[Candidate], directory: Path, workshop: Workshop, history: Sequence[Outcome], observer: Observer
) -> Iterator[Outcome]:
    """What becomes of a proposal, one candidate after the other; ``history`` grows while this runs."""
    trained = [candidate for candidate in proposed if candidate.kind == "trained"]
    deadly = outcomes.given_up(journal.read(directory / journal.FILE))
    harmless = [candidate for candidate in trained if candidate.id not in deadly]
    if harmless:
        groups = together.groups(trained, workshop, _size(harmless, directory, workshop, observer))
        workshop.cache.lower = _lower(len(groups), directory, workshop, observer)
        for group in groups:
            members = [candidate for candidate in group if candidate.id not in deadly]
            yield from train_candidates(members, workshop, history, observer)
    known = {outcome.id for outcome in history}
    for candidate in proposed:
        if candidate.kind != "trained" and candidate.id not in known:
            observer.on_candidate_start(candidate)
            made = mix_candidate if candidate.mixed else ask_candidate
            yield made(candidate, workshop, history)


def _changed_plugins(directory: Path, plugins: provenance.Used) -> provenance.Changes:
    if not (directory / "run.json").exists():
        return {}
    recorded = front.read_record(directory).get("plugins", {})
    return provenance.changes(recorded, journal.of_run(directory), plugins)


def _record(plan: Plan, directory: Path, workshop: Workshop, plugins: provenance.Used) -> None:
    """Write ``run.json`` once; later starts must agree with it in everything that decides the result."""
    workshop.guides_of(plan.objective)  # one that cannot be read is refused before anything is trained
    record = {
        "format": 1,
        "id": secrets.token_hex(8),
        "config": plan.config.model_dump(mode="json"),
        "evaluation": plan.evaluation_kind,
        "kl_price": plan.kl_price,
        "base": workshop.model.fingerprint,
        "tokenizer": workshop.model.tokenizer_fingerprint,
        "data": workshop.material.digest,
        "data_counts": dict(workshop.material.counts),
        "margins": dict(workshop.material.margins),
        "reference": workshop.compared_with.identity,
        "guides": guides.identities(plan.objective),
        "device": str(workshop.model.device),
        "threads": torch.get_num_threads(),
        "prompts": workshop.model.unshared or "computed once for all responses to them",
        "plugins": plugins,
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "python": platform.python_version(),
    }
    file = directory / "run.json"
    if not file.exists():
        storage.write_json(file, record)
        journal.append(directory / journal.FILE, {"event": RECORDED, "sha256": _digest(record)})
        return
    before = storage.read_json(file)
    for key, meaning in (
        ("config", "the configuration"),
        ("base", "the base model's weights"),
        ("tokenizer", "the tokenizer"),
        ("data", "the data"),
        ("reference", "an adapter of the reference"),
        ("guides", "an adapter that the loss names"),
        ("libraries", "the version of a library"),
    ):
        if _compared(before, key) != _compared(record, key):
            raise RunError(
                f"{directory}: {meaning} changed since this run was started; {_difference(before, record, key)}"
            )
    events = journal.read(directory / journal.FILE)
    if any(event["sha256"] != _digest(before) for event in events if event["event"] == RECORDED):
        raise RunError(f"{file}: not what was written when this run was started; restore it from a copy")


def _digest(record: Mapping[str, Any]) -> str:
    """Of what a run was started with, but for what may differ at a resume."""
    kept = {key: _compared(record, key) for key in ("config", "kl_price", "evaluation", "base", "data", "reference")}
    return hashlib.sha256(storage.canonical_json(kept).encode()).hexdigest()


def _compared(record: Mapping[str, Any], key: str) -> Any:
    """What of a record decides the result: all of it but who watches, and how long a plugin may take."""
    value = record.get(key)
    if key == "reference":
        return value or ""  # runs of before there was another than the base
    if key == "guides":
        return value or {}  # runs of before a loss could name any
    if key == "config" and isinstance(value, dict):
        with suppress(ValueError):  # else written by another version, with keys that this one does not have
            value = Config.model_validate(value).model_dump(mode="json")  # what came in since has its default
        return {name: item for name, item in value.items() if name not in ("observers", "plugin_deadline")}
    return value


def _difference(before: dict[str, Any], now: dict[str, Any], key: str) -> str:
    old, new = _compared(before, key), _compared(now, key)
    if isinstance(old, dict) and isinstance(new, dict):
        changed = [name for name in sorted(set(old) | set(new)) if old.get(name, ...) != new.get(name, ...)]
        return f"{changed[0]} was {old.get(changed[0])}, is {new.get(changed[0])}. Start a new run, or restore it"
    return f"it was {old}, is {new}. Start a new run, or restore it"


def _settled(plan: Plan, directory: Path, workshop: Workshop) -> list[Outcome]:
    """What is already known: the journal, and candidates that were finished but not yet written into it."""
    file = directory / journal.FILE
    events = journal.read(file)
    written = samples.of_base(events)
    if all(event["event"] != "base" for event in events):
        journal.append(file, _measure_base(workshop, directory))
        events = journal.read(file)
    elif written is not None and written != _sha256(directory / samples.BASE / samples.FILE):
        again = _measure_base(workshop, directory)["samples"]  # its samples are gone, or not what was written
        if again != written:  # another machine rounds otherwise
            journal.append(file, {"event": samples.AGAIN, "samples": again})
    history = outcomes.history(events, plan.objectives)
    for folder in sorted((directory / "candidates").glob("[!.]*")):
        if folder.name not in {outcome.id for outcome in history}:
            storage.verify(folder)
            outcome = outcomes.from_event(storage.read_json(folder / "outcome.json"), plan.objectives)
            journal.append(file, outcomes.to_event(outcome))
            history.append(outcome)
    for outcome in history:
        if outcome.status == "done":
            kept = directory / "candidates" / outcome.id
            if not kept.exists():
                raise RunError(f"{kept} is gone, though it was finished; restore it from a copy")
            storage.verify(kept)
    return history


def _sha256(file: Path) -> str | None:
    return storage.sha256_of(file) if file.exists() else None


def _give_up(plan: Plan, directory: Path) -> None:
    """A candidate that ended the process before this one has failed, and is not even trained along any more."""
    file = directory / journal.FILE
    events = journal.read(file)
    proposed = {each["id"]: each for event in events if event["event"] == "proposed" for each in event["candidates"]}
    known = {outcome.id for outcome in outcomes.history(events, plan.objectives)}
    for death in calls.deaths():
        kind, name = death.call.dispensable or ("", "")
        if kind == "candidate" and name in proposed and name not in known:
            candidate = outcomes.candidate_from(proposed[name], plan.objectives)
            journal.append(file, outcomes.to_event(outcomes.failure(candidate, death.reason)) | outcomes.GIVEN_UP)


def _measure_base(workshop: Workshop, directory: Path) -> dict[str, Any]:
    """The event, once its samples are on disk."""
    measured = workshop.evaluate(None)
    said = samples.text_of(measured, workshop.held_out_prompts, workshop.plan.objectives)
    file = directory / samples.BASE / samples.FILE
    storage.write_text(file, said)
    found = {"scores": measured.scores, "stderr": measured.stderr, "details": measured.details}
    return {"event": "base", "samples": storage.sha256_of(file)} | found


def _pending(
    plan: Plan, directory: Path, workshop: Workshop, history: list[Outcome], observer: Observer
) -> list[Candidate]:
    """The last proposal, all of it, if any of it is not trained yet; else the search's next, written to the journal.

    The search sees the history only between its batches, so that a resumed run asks it exactly what an unbroken one
    does. What the budget does not pay is in the history at once, as skipped; a search that then wants nothing that it
    pays, three times in a row, is over. Raises ConfigError where the budget does not pay a single candidate.
    """
    known, events = {outcome.id for outcome in history}, journal.read(directory / journal.FILE)
    purse = budget.purse(plan, directory, workshop, history)
    if purse is not None:
        observer.on_phase(purse.said())
    for event in reversed(events):
        if event["event"] == "proposed":
            proposed = [outcomes.candidate_from(each, plan.objectives) for each in event["candidates"]]
            if any(candidate.id not in known for candidate in proposed):
                return proposed
            break
    space = known_now.space(plan, directory, purse)
    if not history and (reason := door.call(plan.search, "reason", space)):
        observer.on_phase(f"search {plan.config.search.name}: {reason}")
    for _ in range(budget.in_vain(events), ASKED_IN_VAIN):
        candidates = next_candidates(plan, workshop, history, space)
        candidates = [outcomes.candidate_as_read(candidate, plan.objectives) for candidate in candidates]
        kept, left_out = budget.split(candidates, purse, plan)
        if purse is not None and kept and not budget.begun([*kept, *history]):
            raise budget.refuse(purse)  # what is not trained needs what is
        if candidates:
            listed, skipped = ([outcomes.candidate_to(candidate) for candidate in each] for each in (kept, left_out))
            journal.append(directory / journal.FILE, outcomes.proposal(listed, skipped))
        if left_out:
            plural = "s" * (len(candidates) > 1)
            observer.on_phase(f"budget: {len(left_out)} of {len(candidates)} candidate{plural} cannot be paid")
            dropped = [outcomes.skipped(candidate) for candidate in left_out]
            observer.on_skipped(dropped)
            history += dropped
        if kept:
            return kept
        if not candidates:
            break
    if purse is not None and not budget.begun(history):
        raise budget.refuse(purse)
    return []


def _size(proposed: Sequence[Candidate], directory: Path, workshop: Workshop, observer: Observer) -> int:
    """How many candidates are trained together: as the journal says, or as chosen now.

    Where all of an earlier proposal went together, and there are more this time, it is chosen again.
    """
    if any(death.call.dispensable == (calls.TOGETHER, "") for death in calls.deaths()):
        return 1  # nobody can tell which of them ended the process
    for event in reversed(journal.read(directory / journal.FILE)):
        if event["event"] == "together":
            of = event.get("of", math.inf)  # runs of the first version measured once
            if event["size"] < of or len(proposed) <= of:
                return event["size"]
            break
    if workshop.plan.config.train.together == "auto":
        observer.on_phase("finding how many candidates to train together")
    size, seconds = together.chosen_size(proposed, workshop)
    if workshop.plan.config.train.together == "auto":
        journal.append(directory / journal.FILE, {"event": "together", "size": size, "of": len(proposed)})
    if len(seconds) > 1 and math.isfinite(seconds[1]):
        steps = sum(workshop.plan.variant(candidate.changes).train.steps for candidate in proposed)
        expected, alone = seconds[size] * steps, seconds[1] * steps
        observer.on_phase(f"{size} together: {expected:.0f} s of training expected, one by one {alone:.0f} s")
    elif len(proposed) > 1:
        observer.on_phase(f"{min(size, len(proposed))} together")
    return size


def _lower(groups: int, directory: Path, workshop: Workshop, observer: Observer) -> LowerCache | None:
    """Where the hidden states below the adapters are kept; as the journal says, or as the first proposal makes it."""
    model, dataset, settings = workshop.model, workshop.material.train, workshop.plan.config.train
    if not model.upper or dataset is None or workshop.plan.config.rollouts is not None:
        return None
    events = (event for event in journal.read(directory / journal.FILE) if event["event"] == "lower layers")
    event = next(events, None)
    if event is None:
        free = shutil.disk_usage(directory).free
        found = worth(model, dataset, settings.steps * settings.pairs_per_step, groups, free)
        event = {"event": "lower layers", "limit": 0 if found.against else found.limit}
        journal.append(directory / journal.FILE, event)
        what = f"up to {found.limit / 2**20:.0f} MiB in cache/" if found.against is None else f"not: {found.against}"
        observer.on_phase(f"keeping the hidden states below the adapters: {what}")
    return LowerCache(model, directory / "cache" / "lower", event["limit"]) if event["limit"] else None
