"""What a search may spend: the limit holds, the rest of the run goes on, and a resumed run ends as an unbroken one."""

from __future__ import annotations

import io
import itertools
import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from sweeps import contents, small_config, write_pairs

from moalign import config, registry, storage
from moalign.commands import dry_run
from moalign.engine.trainee import SKIPS_IN_A_ROW, Trainee
from moalign.errors import ConfigError, PluginError
from moalign.sweeps import budget, front, journal, outcomes, run
from moalign.sweeps.budget import Purse
from moalign.sweeps.estimate import Estimate
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.proposals import first_trained
from moalign.types import Candidate, Outcome, Preference
from moalign_plugins.searches.grid import Grid

REGISTRY = registry.discover()
STEPS = 3


class Told(Observer):
    """Keeps what a user would be told."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.skipped: list[str] = []

    def on_phase(self, what):
        self.phases.append(what)

    def on_skipped(self, outcomes):
        self.skipped += [outcome.id for outcome in outcomes]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", prompts=12)


@pytest.fixture(scope="module")
def settings(tiny_model_path, pairs):
    def made(search: dict[str, Any], **changes: Any) -> config.Config:
        train = {"steps": STEPS, "pairs_per_step": 4, "lr": 1e-2, "together": 2}
        return small_config(tiny_model_path, pairs, search=search, train=train, **changes)

    return made


def events_of(directory: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in journal.read(directory / journal.FILE) if event["event"] == kind]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, settings) -> Path:
    """A soup of three trained candidates and two mixes, without limits to speak of."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    search = {"name": "soup", "trained": 3, "points": 5, "budget": {"tokens": 10**9}}
    run.start(settings(search), directory, REGISTRY, Observer())
    return directory


@pytest.fixture(scope="module")
def limit(whole) -> int:
    """What two of them cost."""
    return 2 * max(event["tokens"] for event in events_of(whole, "outcome"))


@pytest.fixture(scope="module")
def cut(tmp_path_factory, settings, limit) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "cut"
    search = {"name": "soup", "trained": 3, "points": 5, "budget": {"tokens": limit}}
    run.start(settings(search), directory, REGISTRY, Observer())
    return directory


def test_with_enough_everything_is_trained_and_the_estimate_is_exact(whole):
    found = [event for event in events_of(whole, "outcome") if event["kind"] == "trained"]
    assert len(found) == 3 and len(events_of(whole, "outcome")) == 5
    (cost,) = events_of(whole, budget.COST)
    assert cost["cost"] == found[0]["tokens"] > 0  # counted on the very pairs of its steps
    assert not any("skipped" in event for event in events_of(whole, "proposed"))


def test_the_limit_holds_and_the_soup_is_mixed_from_what_was_trained(cut, limit, whole):
    done = events_of(cut, "outcome")
    trained = [event for event in done if event["kind"] == "trained"]
    (estimate,) = (event["cost"] for event in events_of(cut, budget.COST))
    most = max(event["tokens"] for event in events_of(whole, "outcome"))
    assert sum(event["tokens"] for event in done) <= limit * max(1.0, most / estimate)
    assert [event["id"] for event in trained] == ["w-1.00-0.00", "w-0.00-1.00"]
    (skipped,) = [event["skipped"] for event in events_of(cut, "proposed") if "skipped" in event]
    assert [each["id"] for each in skipped] == ["w-0.50-0.50"]
    mixed = [event for event in done if event["kind"] == "mixed"]
    assert len(mixed) == 2 and all(event["status"] == "done" for event in mixed)
    assert {parent for event in mixed for parent in event["parents"]} == {"w-1.00-0.00", "w-0.00-1.00"}
    result = storage.read_json(cut / "front.json")
    assert len(result["points"]) == 4 and result["failed"] == []


def test_killed_between_any_two_lines_of_the_journal_it_ends_with_the_same_front(cut, tmp_path):
    lines = (cut / journal.FILE).read_bytes().splitlines(keepends=True)
    expected = contents(cut)
    for kept in range(1, len(lines)):
        directory = tmp_path / str(kept)
        shutil.copytree(cut, directory)
        (directory / "front.json").unlink()
        (directory / journal.FILE).write_bytes(b"".join(lines[:kept]))
        known = {event["id"] for event in events_of(directory, "outcome")}
        for folder in (directory / "candidates").iterdir():
            if folder.name not in known:
                shutil.rmtree(folder)
        told = Told()
        run.resume(directory, REGISTRY, told)
        assert contents(directory) == expected
        assert (directory / journal.FILE).read_bytes() == b"".join(lines)
        assert told.skipped == ["w-0.50-0.50"]
        shutil.rmtree(directory)


def test_a_finished_run_that_is_resumed_says_what_is_left_and_changes_nothing(cut, tmp_path, limit):
    directory = tmp_path / "run"
    shutil.copytree(cut, directory)
    before, told = contents(directory), Told()
    run.resume(directory, REGISTRY, told)
    spent = sum(event["tokens"] for event in events_of(cut, "outcome"))
    assert any(f"{limit - spent:,} of {limit:,} tokens left" in phase for phase in told.phases)
    assert contents(directory) == before


def test_a_search_that_only_wants_what_does_not_fit_is_over_also_when_it_is_resumed(
    settings, limit, tmp_path, monkeypatch
):
    def propose(self, space, history, rng):
        share = len(history) / 1000
        weights = dict(zip(space.objectives, (share, 1 - share), strict=True))
        return [Candidate(f"n{len(history)}", Preference("weights", weights))]

    monkeypatch.setattr(Grid, "propose", propose)
    directory = tmp_path / "run"
    run.start(settings({"name": "grid", "budget": {"tokens": limit}}), directory, REGISTRY, Observer())
    proposed = events_of(directory, "proposed")
    assert [bool(event["candidates"]) for event in proposed[-3:]] == [False] * run.ASKED_IN_VAIN
    assert proposed[-4]["candidates"] and len(storage.read_json(directory / "front.json")["points"]) >= 2
    lines = (directory / journal.FILE).read_bytes()
    for ended in (0, 1, 2):
        some = b"".join(lines.splitlines(keepends=True)[: -ended or None])
        (directory / journal.FILE).write_bytes(some)
        run.resume(directory, REGISTRY, Observer())
        assert (directory / journal.FILE).read_bytes() == lines


def test_a_budget_too_small_for_one_candidate_is_refused_before_training(settings, tmp_path):
    told = Told()
    with pytest.raises(ConfigError, match=r"search\.budget\.tokens: 1 tokens do not pay a single candidate .* about "):
        run.start(settings({"name": "grid", "budget": {"tokens": 1}}), tmp_path / "run", REGISTRY, told)
    assert not events_of(tmp_path / "run", "outcome")
    with pytest.raises(ConfigError, match=r"search\.budget\.tokens: 1 tokens"):  # and so when it is resumed
        run.resume(tmp_path / "run", REGISTRY, told)


def test_minutes_by_the_clock(settings, tmp_path, monkeypatch):
    """Each look at the clock is a minute after the one before; a step takes a tenth of one."""
    minutes = itertools.count()
    monkeypatch.setattr(budget, "now", lambda: 60.0 * next(minutes))
    monkeypatch.setattr(budget.together, "seconds_per_candidate", lambda candidates, workshop: 6.0)
    directory, told = tmp_path / "run", Told()
    run.start(settings({"name": "grid", "points": 3, "budget": {"minutes": 2.7}}), directory, REGISTRY, told)
    (cost,) = events_of(directory, budget.COST)
    assert cost["beside"] == pytest.approx(1.0) and cost["cost"] == pytest.approx(1.0 + 0.1 * STEPS)
    assert len(events_of(directory, "outcome")) == 2 and told.skipped == ["w-0.50-0.50"]
    spent = [event["seconds"] for event in events_of(directory, budget.SPENT)]
    assert len(spent) == 2 and spent[1] == 60.0
    assert any("of 2.7 minutes left; a training takes about 1.3" in phase for phase in told.phases)


def test_what_is_left_is_found_again_in_a_journal_also_of_the_first_kind(settings, tmp_path):
    plan = prepare(settings({"name": "grid", "budget": {"minutes": 10}}), REGISTRY)
    journal.append(tmp_path / journal.FILE, {"event": budget.COST, "cost": 2.0})
    none: Any = None
    assert budget.purse(plan, tmp_path, none, ()) == Purse(10, 0, 2.0, "minutes", 5.0)
    journal.append(tmp_path / journal.FILE, {"event": budget.SPENT, "seconds": 180.0})
    equal = Preference("weights", {"harmless": 0.5, "helpful": 0.5})
    one = Outcome("a", "done", equal, tokens=5)
    third = replace(one, id="b", changes={"train.steps": 1})
    assert budget.purse(plan, tmp_path, none, (one, third)) == Purse(10, 3.0, 3.0 / (1 + 1 / STEPS), "minutes", 5.0)
    candidate = {"id": "a", "preference": outcomes.to_event(one)["preference"], "parents": []}
    event = {"event": "proposed", "candidates": [candidate]}
    assert outcomes.history([event], plan.objectives) == []


def test_what_failed_is_spent_but_does_not_make_a_training_cheaper_or_dearer(settings, tmp_path):
    none: Any = None
    equal = Preference("weights", {"harmless": 0.5, "helpful": 0.5})
    one = Outcome("a", "done", equal, tokens=30)
    late, early = Outcome("b", "failed", equal, tokens=20), Outcome("c", "failed", equal)
    skipped = Outcome("d", "skipped", equal)
    for unit, cost in (("tokens", 40.0), ("minutes", 4.0)):
        plan = prepare(settings({"name": "grid", "budget": {unit: 200}}), REGISTRY)
        directory = tmp_path / unit
        journal.append(directory / journal.FILE, {"event": budget.COST, "cost": cost, "beside": 0.0})
        if unit == "minutes":
            journal.append(directory / journal.FILE, {"event": budget.SPENT, "seconds": 60.0 * 9})
        found = budget.purse(plan, directory, none, (one, late, early, skipped))
        only_failed = budget.purse(plan, directory, none, (late, early, skipped))
        assert found is not None and only_failed is not None
        if unit == "tokens":
            assert (found.spent, found.cost) == (50, 30)
            assert (only_failed.spent, only_failed.cost) == (20, 40)
        else:  # nine minutes, of three that were begun
            assert (found.spent, found.cost) == (9, 3)
            assert (only_failed.spent, only_failed.cost) == (9, 4)


def test_a_candidate_that_fails_says_the_tokens_it_was_trained_on(settings, tmp_path, monkeypatch):
    """Its numbers are never finite, so that it is given up in its third and last step; the other is trained whole."""
    end = Trainee.end

    def failing(self, step):
        if self.job.candidate == "w-1.00-0.00":
            self.problem = "loss is nan"
        end(self, step)

    monkeypatch.setattr(Trainee, "end", failing)
    limit = {"tokens": 10**6}
    run.start(settings({"name": "grid", "points": 2, "budget": limit}), tmp_path / "run", REGISTRY, Observer())
    failed, done = sorted(events_of(tmp_path / "run", "outcome"), key=lambda event: event["status"] == "done")
    assert (failed["id"], failed["status"], done["status"]) == ("w-1.00-0.00", "failed", "done")
    assert SKIPS_IN_A_ROW == STEPS and failed["tokens"] == done["tokens"] > 0


def test_a_price_grows_with_the_steps_and_the_pairs_but_not_what_is_beside_them(settings):
    plan = prepare(settings({"name": "grid", "budget": {"tokens": 100}}), REGISTRY)
    purse = Purse(100, 20, 30, "minutes", 100 / 30, beside=3)
    candidate = Candidate("a", Preference("weights", {"harmless": 0.5, "helpful": 0.5}))
    assert purse.price(candidate, plan) == 30 and purse.affordable == pytest.approx(80 / 30)
    assert purse.price(replace(candidate, changes={"train.steps": 2 * STEPS}), plan) == pytest.approx(57)
    assert purse.price(replace(candidate, changes={"train.pairs_per_step": 2}), plan) == pytest.approx(16.5)
    assert purse.price(replace(candidate, mixed=True), plan) == 3
    kept, left_out = budget.split([candidate] * 4, purse, plan)
    assert (len(kept), len(left_out)) == (2, 2)
    cheap = replace(candidate, changes={"train.steps": 1})
    assert budget.split([candidate, candidate, candidate, cheap], purse, plan)[0] == [candidate, candidate, cheap]
    assert Purse(10, 12, 5, "tokens", 2).left == 0
    assert Purse(1234, 12, 500, "tokens", 2).said() == "budget: 1,222 of 1,234 tokens left; a training takes about 500"
    seconds = Purse(0.001, 0.0002, 0.02, "minutes", 0.05)
    assert seconds.said() == "budget: 0.0008 of 0.001 minutes left; a training takes about 0.02"
    assert "search.budget.minutes: 0.001 minutes do not pay" in str(budget.refuse(seconds))


def test_a_budget_of_both_kinds_or_none_is_an_error_that_names_the_key(settings, tmp_path):
    for given in ({"tokens": 5, "minutes": 5}, {}):
        with pytest.raises(ConfigError, match=r"search\.budget.*give either tokens or minutes"):
            settings({"name": "grid", "budget": given})
    for key, value in (("tokens", 0), ("minutes", 0), ("hours", 3)):
        with pytest.raises(ConfigError, match=rf"search\.budget\.{key}"):
            settings({"name": "grid", "budget": {key: value}})


def test_the_command_line_sets_a_budget_without_naming_a_search(settings, tmp_path):
    content = settings({"name": "grid"}).model_dump(mode="json")
    del content["search"]
    (tmp_path / "sweep.yaml").write_text(json.dumps(content))
    loaded = config.load(tmp_path / "sweep.yaml", ["search.budget.tokens=1234"])
    assert loaded.search.budget is not None and loaded.search.budget.tokens == 1234
    assert loaded.search.name == "auto" and loaded.search.options == {}
    both = config.load(tmp_path / "sweep.yaml", ["search.budget.minutes=1.5", "search.points=4"])
    assert both.search.budget.minutes == 1.5 and both.search.options == {"points": 4}


@pytest.mark.parametrize(("tokens", "fitting"), [(1, 0), (None, 2)])
def test_the_dry_run_says_what_the_budget_pays(settings, limit, tokens, fitting):
    output = io.StringIO()
    plan = prepare(settings({"name": "grid", "points": 3, "budget": {"tokens": tokens or limit}}), REGISTRY)
    nothing = pytest.raises(ConfigError, match="do not pay a single candidate") if fitting == 0 else nullcontext()
    with nothing:
        dry_run.show(plan, Observer(), Console(file=output, width=200))
    text = output.getvalue()
    assert f"{tokens or limit:,} of {tokens or limit:,} tokens left" in text
    assert f"it pays {fitting} of these 3 candidates" in text
    whole = int(text.split("tokens")[1].split()[1].replace(",", ""))
    assert "response tokens for all of these candidates" in text
    assert (f"of these 3 candidates: about {round(whole * 2 / 3):,} response tokens and" in text) == (fitting == 2)


def test_a_dry_run_whose_budget_pays_only_what_is_not_trained_says_that_the_run_is_refused(monkeypatch):
    equal = Preference("weights", {"a": 0.5, "b": 0.5})
    asked = tuple(Candidate(name, equal, parents=("model",), conditioned=True) for name in ("p", "q"))
    cost = Estimate(
        candidates=(Candidate("model", equal), *asked),
        steps=(10,),
        tokens=1000,
        seconds_per_step=1.0,
        seconds_per_step_alone=1.0,
        seconds_per_evaluation=1.0,
        seconds_of_sampling=0.0,
        seconds_of_looks=0.0,
        counts={},
        together=1,
        memory=1,
        purse=Purse(1, 0, 1000, "tokens", 0.001),
        fitting=asked,
    )
    monkeypatch.setattr(dry_run, "estimate", lambda plan, observer: cost)
    chosen = SimpleNamespace(name="some")
    settings = dict.fromkeys(("loss", "combine", "search", "condition", "reference"), chosen)
    model, data = SimpleNamespace(path="model"), ("pairs.jsonl",)
    plan: Any = SimpleNamespace(
        config=SimpleNamespace(model=model, data_paths=data, **settings), evaluation_kind="generate"
    )
    output = io.StringIO()
    with pytest.raises(ConfigError, match="do not pay a single candidate"):
        dry_run.show(plan, Observer(), Console(file=output, width=200))
    assert "it pays 0 of these 3 candidates" in output.getvalue()


def test_a_first_proposal_without_anything_to_train_is_refused_by_name():
    equal = Preference("weights", {"a": 1.0})
    plan: Any = SimpleNamespace(config=SimpleNamespace(search=SimpleNamespace(name="mixes")))
    trained = Candidate("p", equal)
    mixed = Candidate("m", equal, mixed=True)
    assert first_trained([mixed, trained], plan) is trained
    with pytest.raises(PluginError, match=r"search 'mixes'.*first proposal \(m\)"):
        first_trained([mixed], plan)


def test_fronts_of_runs_without_a_budget_are_as_they_were(settings, tmp_path, cut):
    """No key of a budget or of configurations stands in a front that has none."""
    assert set(front.read(cut)) == set(storage.read_json(cut / "front.json"))
    assert "configurations" not in front.read(cut)
