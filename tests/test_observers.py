"""Observers as plugins: what they hear, and that none of them can harm a run."""

from __future__ import annotations

import json
import random

import numpy
import pytest
import torch
from sweeps import Warned, small_config, write_pairs

from moalign import api, registry
from moalign.errors import ConfigError
from moalign.registry import Entry, Registry
from moalign.sweeps import run
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare

HEARD: list[tuple] = []


class Good(api.Observer):
    def on_run_start(self, run):
        HEARD.append(("on_run_start", run))
        return Ear()


class Ear(api.Watcher):
    def on_step(self, candidate, step, metrics):
        HEARD.append(("on_step", candidate.id, step, dict(metrics)))

    def on_candidate_end(self, outcome):
        HEARD.append(("on_candidate_end", outcome.id))

    def on_run_end(self, front):
        HEARD.append(("on_run_end", len(front["points"])))

    def close(self):
        HEARD.append(("close",))


class Raises(api.Observer):
    hook: str
    error: str = "RuntimeError"

    def on_run_start(self, run):
        if self.hook == "on_run_start":
            self.fail()
        watcher = api.Watcher()
        setattr(watcher, self.hook, self.fail)
        return watcher

    def fail(self, *arguments):
        raise {"RuntimeError": RuntimeError, "SystemExit": SystemExit}[self.error]("no reason")


class Forgets(api.Observer):
    def on_run_start(self, run):
        return None


class Meddles(api.Observer):
    """Changes all that it is given, and the state of every global generator."""

    def on_run_start(self, run):
        run.config["train"]["steps"] = 1
        return Meddler()


class Meddler(api.Watcher):
    def on_step(self, candidate, step, metrics):
        metrics.clear()
        candidate.preference.values.clear()
        torch.manual_seed(step)
        random.seed(step)
        numpy.random.seed(step)

    def on_candidate_end(self, outcome):
        outcome.scores.clear()
        outcome.details.clear()

    def on_run_end(self, front):
        front["points"].clear()


class Needy(api.Observer):
    requires = {"a_library_that_nobody_has": "moalign[nobody]"}  # noqa: RUF012


KINDS: dict[str, type[api.Observer]] = {
    "good": Good,
    "raises": Raises,
    "forgets": Forgets,
    "meddles": Meddles,
    "needy": Needy,
}


def installed() -> Registry:
    """What is installed, and the observers of this file as a stranger's."""
    strange = [Entry("observer", name, kind, "", "", "stranger", "1.2") for name, kind in KINDS.items()]
    return Registry((*registry.discover().entries, *strange))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


def settings(model, pairs, *observers):
    return small_config(model, pairs, search={"name": "grid", "points": 2}, observers=list(observers))


@pytest.fixture(scope="module")
def unwatched(tmp_path_factory, tiny_model_path, pairs):
    directory = tmp_path_factory.mktemp("runs") / "unwatched"
    return directory, run.start(settings(tiny_model_path, pairs), directory, installed(), Observer())


def results(directory) -> dict[str, bytes]:
    files = [directory / "front.json", directory / "journal.jsonl", *sorted((directory / "candidates").rglob("*"))]
    return {str(file.relative_to(directory)): file.read_bytes() for file in files if file.is_file()}


def test_what_an_observer_hears(unwatched, tiny_model_path, pairs, tmp_path):
    HEARD.clear()
    run.start(settings(tiny_model_path, pairs, "good"), tmp_path / "run", installed(), Observer())
    assert [event[0] for event in HEARD] == (
        ["on_run_start"] + ["on_step"] * 12 + ["on_candidate_end"] * 2 + ["on_run_end", "close"]
    )
    told = HEARD[0][1]
    assert told.directory == (tmp_path / "run").absolute() and told.finished == 0 and len(told.id) == 16
    assert told.objectives == ("harmless", "helpful") and told.config["train"]["steps"] == 6
    steps = [event for event in HEARD if event[0] == "on_step" and event[1] == "w-1.00-0.00"]
    assert [step for _, _, step, _ in steps] == list(range(6))
    lines = (tmp_path / "run" / "candidates" / "w-1.00-0.00" / "metrics.jsonl").read_text().splitlines()
    assert [{"step": step} | metrics for _, _, step, metrics in steps] == [json.loads(line) for line in lines]
    assert results(tmp_path / "run") == results(unwatched[0])


@pytest.mark.parametrize(
    "observer",
    [
        *({"name": "raises", "hook": hook} for hook in ("on_run_start", "on_step", "on_candidate_end", "on_run_end")),
        {"name": "raises", "hook": "close"},
        {"name": "raises", "hook": "on_step", "error": "SystemExit"},
        "forgets",
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()),
)
def test_one_that_fails_is_reported_once_and_harms_nobody(observer, unwatched, tiny_model_path, pairs, tmp_path):
    HEARD.clear()
    shown = Warned()
    chosen = settings(tiny_model_path, pairs, observer, "good")
    run.start(chosen, tmp_path / "run", installed(), shown)
    (warning,) = shown.warnings
    name, hook = ("forgets", "on_run_start") if observer == "forgets" else ("raises", observer["hook"])
    assert f"observer '{name}' of stranger 1.2 failed in {hook} and was switched off" in warning
    assert ("not a moalign.api.Watcher" if name == "forgets" else "no reason") in warning
    assert [event[0] for event in HEARD].count("on_step") == 12 and HEARD[-1] == ("close",)
    assert results(tmp_path / "run") == results(unwatched[0])


def test_one_that_meddles_changes_nothing(unwatched, tiny_model_path, pairs, tmp_path):
    chosen = settings(tiny_model_path, pairs, "meddles")
    assert run.start(chosen, tmp_path / "run", installed(), Observer()) == unwatched[1]
    assert results(tmp_path / "run") == results(unwatched[0])


def test_observers_are_closed_when_a_run_is_interrupted(tiny_model_path, pairs, tmp_path):
    class Stop(Observer):
        def on_step(self, candidate, step, metrics):
            if step == 2:
                raise KeyboardInterrupt

    HEARD.clear()
    with pytest.raises(KeyboardInterrupt):
        run.start(settings(tiny_model_path, pairs, "good"), tmp_path / "run", installed(), Stop())
    assert HEARD[-1] == ("close",) and "on_run_end" not in {event[0] for event in HEARD}
    began = HEARD[0][1]
    HEARD.clear()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["config"]["observers"] = ["good", {"name": "raises", "hook": "on_step"}]  # others may watch a resumed run
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    run.resume(tmp_path / "run", installed(), Warned())
    assert HEARD[0][1].id == began.id and HEARD[-2:] == [("on_run_end", 2), ("close",)]


def test_a_missing_library_is_named_before_a_model_is_loaded(pairs, tmp_path):
    (tmp_path / "config.json").write_text("not a model")
    with pytest.raises(ConfigError, match=r"observers\.1: observer 'needy' needs a_library.*pip install 'moalign\[nob"):
        prepare(settings(tmp_path, pairs, "good", "needy"), installed())


def test_options_are_checked_where_they_stand(tiny_model_path, pairs):
    with pytest.raises(ConfigError, match=r"observers\.0\.pth: unknown key; did you mean 'path'"):
        prepare(settings(tiny_model_path, pairs, {"name": "jsonl", "pth": "x"}), installed())


def test_numbers_and_figures():
    assert api.numbers({"loss": 1, "worst": "inf", "skipped": "a reason"}) == {"loss": 1.0, "worst": float("inf")}
    preference = api.Preference("weights", {"a": 1.0})
    outcome = api.Outcome("x", "done", preference, {"a": 2.0}, {"a": 0.1}, 0.5, 7, details={"lost to rank": 0.2})
    assert api.figures(outcome) == {
        "scores/a": 2.0,
        "stderr/a": 0.1,
        "kl": 0.5,
        "tokens": 7.0,
        "lost to rank": 0.2,
    }
