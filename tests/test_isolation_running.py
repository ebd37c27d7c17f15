"""Plugins that misbehave in the middle of a run, in its own process: see the table in ``isolation``."""

from __future__ import annotations

import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import isolation
import numpy
import pytest
import torch
from isolation import (
    ENDS,
    FAILS,
    HARMLESS,
    HOOKS,
    IN_A_PROCESS_OF_ITS_OWN,
    REFUSED,
    TOLD,
    WITHOUT,
    cases,
    choosing,
    comparing,
    rewarded,
    sampling,
    shaping,
)
from sweeps import Warned, contents, write_pairs

from moalign import calls, config, registry
from moalign.calls import Call, Record
from moalign.errors import DataError, PluginError
from moalign.sweeps import journal, run
from moalign.sweeps.decoding import open_decoding
from moalign.sweeps.observe import Observer

IDS = ["c0.00", "c0.50", "c1.00"]
# have tests of their own
ELSEWHERE = {"transform", "sampler", "decoder", "conditioner", "reward-model", "reference", "filter"}
ASKED_BY_QUEUE = ("sampler", "reference")  # where the healthy run is another one
WHY = {
    "raises": "RuntimeError: no reason",
    "exits": "SystemExit: 3",
    "raises no Exception": "Odd: no reason",
    "raises what cannot be shown": "Unprintable: its message cannot be shown",
}


def here(*outcomes):
    """Cases that do not take the process."""
    return [case for case in cases(*outcomes) if case[1] not in IN_A_PROCESS_OF_ITS_OWN]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", prompts=12)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The registry with the distribution whose plugins misbehave, found as any other."""
    folder = isolation.install(tmp_path_factory.mktemp("site"))
    sys.path.insert(0, str(folder))
    yield registry.discover()
    sys.path.remove(str(folder))
    sys.modules.pop(isolation.NAME)


@pytest.fixture(scope="module")
def sweep(tiny_model_path, pairs, installed):
    """Start a run with changes of the configuration, or go on with the one that is there; its front."""

    def start(directory, observer=None, search_does="", **changes):
        sys.modules[isolation.NAME].CALLS.update(score=0, search=search_does)
        random.seed(0)
        numpy.random.seed(0)
        torch.manual_seed(0)
        settings = config.from_mapping(isolation.content(tiny_model_path, pairs, **changes))
        if directory.exists():
            return run.resume(directory, installed, observer or Observer())
        return run.start(settings, directory, installed, observer or Observer())

    return start


@pytest.fixture(scope="module")
def healthy(sweep, tmp_path_factory):
    """Nobody misbehaves: fronts and files without and with rewards."""
    folder = tmp_path_factory.mktemp("healthy")
    found = {}
    for with_rewards, changed in ((False, {}), (True, {"objectives": rewarded()})):
        front = sweep(folder / str(with_rewards), **changed)
        assert [point["id"] for point in front["points"]] == IDS
        found[with_rewards] = Healthy(
            front, folder / str(with_rewards), contents(folder / str(with_rewards)), generators()
        )
    return found


class Healthy(NamedTuple):
    front: dict[str, Any]
    directory: Path
    files: dict[str, bytes]
    generators: str  # afterwards


def generators():
    return str((random.getstate(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist()))


def scores(front):
    return {point["id"]: point["scores"] for point in front["points"]}


def names(kind):
    return f"{kind} 'bad' of misbehaving 2.5, in {HOOKS[kind]}"


def check_failures(kind, front, directory, healthy):
    """Each candidate but the first and the last has failed in its own way; these two are as if they were alone."""
    failed = [event for event in journal.read(directory / "journal.jsonl") if event.get("status") == "failed"]
    assert [each["error"] for each in failed] == [each["error"] for each in front["failed"]]
    for how, each in zip(WAYS[kind], failed, strict=True):
        assert names(kind) in each["error"] and WHY.get(how, "") in each["error"], how
    others = scores(front)
    assert list(others) == ["c0.00", "c1.00"]
    for identity, found in others.items():
        assert found == pytest.approx(scores(healthy.front)[identity], abs=1e-6)


WAYS = {kind: [how for other, how in here(FAILS) if other == kind] for kind in ("objective", "combiner", "reward")}


@pytest.mark.parametrize(("kind", "key"), [("objective", "loss"), ("combiner", "combine")])
def test_a_candidate_fails_and_the_others_finish(kind, key, sweep, healthy, tmp_path):
    ways = WAYS[kind]
    hows = {f"{number / (len(ways) + 1):.2f}": how for number, how in enumerate(ways, start=1)}
    front = sweep(
        tmp_path / "run",
        search={"name": "bad", "points": len(ways) + 2},
        **{key: {"name": "bad", "hows": hows}},
    )
    check_failures(kind, front, tmp_path / "run", healthy[False])


def test_a_reward_fails_one_candidate_and_the_others_finish(sweep, healthy, tmp_path):
    ways = WAYS["reward"]
    (tmp_path / "queue").write_text("\n\n\n" + "\n".join(ways))  # good for data, base and first candidate
    front = sweep(
        tmp_path / "run",
        search={"name": "bad", "points": len(ways) + 2},
        objectives=rewarded(queue=str(tmp_path / "queue")),
    )
    check_failures("reward", front, tmp_path / "run", healthy[True])


BY_ROUND = {"transform": shaping, "filter": choosing}


@pytest.mark.parametrize("asked", BY_ROUND)
def test_what_is_asked_about_rounds_fails_one_candidate_and_the_others_finish(asked, sweep, tmp_path):
    ways = [how for kind, how in here(FAILS) if kind == asked]
    queue = tmp_path / "queue"
    queue.write_text("\n" + "\n".join(ways))  # good for the first candidate, and again for the last
    front = sweep(tmp_path / "run", search={"name": "bad", "points": len(ways) + 2}, **BY_ROUND[asked](queue))
    for how, each in zip(ways, front["failed"], strict=True):
        assert names(asked) in each["error"] and WHY.get(how, "") in each["error"], how
    assert list(scores(front)) == ["c0.00", "c1.00"]


def test_a_sampler_fails_one_candidate_and_the_others_finish(sweep, tmp_path):
    """Each of the first candidates asks in vain; what the one after them gets serves all others."""
    ways = [how for kind, how in here(FAILS) if kind == "sampler"]
    queue = tmp_path / "queue"
    queue.write_text("\n".join(ways))
    front = sweep(tmp_path / "run", search={"name": "bad", "points": len(ways) + 2}, **sampling(queue))
    assert len(front["failed"]) == len(ways) == 8
    for how, each in zip(ways, front["failed"], strict=True):
        assert names("sampler") in each["error"] and WHY.get(how, "") in each["error"], how
    assert len(scores(front)) == 2


def test_a_sampler_that_fails_for_all_is_asked_for_each(sweep, tmp_path):
    """In the second round the three are sampled together; then alone, and one of them in vain."""
    (tmp_path / "queue").write_text("\nraises\n\nraises\n\n")
    front = sweep(tmp_path / "run", **sampling(tmp_path / "queue", rounds=2))
    (failed,) = front["failed"]
    assert failed["id"] == "c0.50" and names("sampler") in failed["error"]
    assert list(scores(front)) == ["c0.00", "c1.00"]


def test_a_reference_fails_one_candidate_and_the_others_finish(sweep, tmp_path):
    """The others are as if they were alone."""
    ways = [how for kind, how in here(FAILS) if kind == "reference"]
    fronts = []
    for name, hows in (("run", ways), ("healthy", [])):
        (tmp_path / "queue").write_text("\n" + "\n".join(hows))  # good for the first candidate, and again for the last
        changes = {"search": {"name": "bad", "points": len(hows) + 2}} | comparing(tmp_path / "queue")
        fronts.append(sweep(tmp_path / name, **changes))
    front, healthy = fronts
    assert len(front["failed"]) == len(ways) == 8 and not healthy["failed"]
    for how, each in zip(ways, front["failed"], strict=True):
        assert names("reference") in each["error"] and WHY.get(how, "") in each["error"], how
    others = scores(front)
    assert list(others) == ["c0.00", "c1.00"]
    for identity, found in others.items():
        assert found == pytest.approx(scores(healthy)[identity], abs=1e-6)


@pytest.mark.parametrize("how", ["fails in the backward pass", "blames the input"])
def test_a_loss_fails_alone_whatever_else_it_does(how, sweep, tmp_path):
    """Nobody can tell whose backward pass failed in a pass of several, so they are trained one by one."""
    front = sweep(tmp_path / "run", loss={"name": "bad", "hows": {"0.50": how}})
    (failed,) = front["failed"]
    hook = "loss" if how == "blames the input" else "the backward pass of loss"
    assert failed["id"] == "c0.50" and list(scores(front)) == ["c0.00", "c1.00"]
    assert f"objective 'bad' of misbehaving 2.5, in {hook}: " in failed["error"]


@pytest.mark.parametrize("how", ["NaN", "wrong shape", "wrong dtype", "wrong device"])
def test_a_wrong_difference_is_the_rules_fault(how, sweep, tmp_path):
    front = sweep(
        tmp_path / "run",
        objectives=rewarded(),
        loss="bad-regression",
        combine={"name": "bad-difference", "hows": {"0.50": how}},
    )
    (failed,) = front["failed"]
    expected = "combiner 'bad-difference' of misbehaving 2.5, in pair_terms: difference must be finite, float32"
    assert failed["id"] == "c0.50" and expected in failed["error"]


@pytest.mark.parametrize(("kind", "how"), here(ENDS))
def test_the_run_ends_and_keeps_what_was_finished(kind, how, sweep, healthy, tmp_path):
    """A search is asked again when its first candidates are done."""
    directory = tmp_path / "run"
    shutil.copytree(healthy[False].directory, directory)
    with pytest.raises(PluginError) as error:
        sweep(directory, search_does=how)
    assert names(kind) in str(error.value) and WHY.get(how, "") in str(error.value)
    assert contents(directory) == healthy[False].files


@pytest.mark.parametrize(("kind", "how"), here(REFUSED))
def test_the_run_is_refused(kind, how, sweep, pairs, tmp_path):
    with pytest.raises((PluginError, DataError)) as error:
        sweep(tmp_path / "run", **reading(how, pairs))
    assert names(kind) in str(error.value) and "pairs.jsonl:3" in str(error.value)
    assert WHY.get(how, "") in str(error.value)
    assert not (tmp_path / "run" / "run.json").exists()


def reading(how, pairs):
    return {"data": {"path": str(pairs), "held_out": 0.2, "reader": {"name": "bad", "how": how}}}


def test_the_run_goes_on_without_it_or_unharmed(sweep, healthy, tmp_path):
    told = Warned()
    ways = [how for kind, how in here(WITHOUT, HARMLESS) if kind == "observer"]
    sweep(tmp_path / "run", told, observers=[{"name": "bad", "how": how} for how in ways])
    without = [how for _, how in here(WITHOUT)]
    assert len(told.warnings) == len(without) == 5 and len(ways) == 7
    hooks = {how: "on_run_start" if how == "wrong dtype" else HOOKS["observer"] for how in without}
    for how in without:
        (warning,) = (each for each in told.warnings if WHY.get(how, "not a moalign.api.Watcher") in each)
        assert f"observer 'bad' of misbehaving 2.5 failed in {hooks[how]} and was switched off" in warning
    assert contents(tmp_path / "run") == healthy[False].files
    assert generators() == healthy[False].generators


@pytest.mark.parametrize(("kind", "how"), [case for case in here(HARMLESS) if case[0] in ASKED_BY_QUEUE])
def test_what_is_done_beside_the_work_changes_nothing(kind, how, sweep, tmp_path):
    found = []
    for way in ("", how):
        (tmp_path / "queue").write_text(way)
        queue = tmp_path / "queue"
        sweep(tmp_path / f"run {way}", **(comparing(queue) if kind == "reference" else sampling(queue, rounds=2)))
        found.append((contents(tmp_path / f"run {way}"), generators()))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("kind", "how"), [case for case in here(HARMLESS) if case[0] not in ("observer", *ASKED_BY_QUEUE)]
)
def test_nothing_is_changed(kind, how, sweep, healthy, pairs, tmp_path):
    changes = {
        "reward": {"objectives": rewarded(how=how, at=3)},
        "search": {"search_does": how},
        "reader": reading(how, pairs),
    }[kind]
    sweep(tmp_path / "run", **changes)
    assert contents(tmp_path / "run") == healthy[kind == "reward"].files
    assert generators() == healthy[kind == "reward"].generators


def test_whoever_is_at_work_is_announced(sweep, pairs, tmp_path):
    """In a call of each kind the process that stands by can read who it is, for whom, and how long it may take."""
    record, seen = Record(), []
    sys.modules[isolation.NAME].CALLS["seen"] = lambda: seen.append(record.read()[1])
    how = "is seen"
    calls.watched_by(record)
    try:
        sweep(
            tmp_path / "run",
            search_does=how,
            loss={"name": "bad", "hows": {"0.50": how}},
            combine={"name": "bad", "hows": {"0.50": how}},
            objectives=rewarded(how=how, at=4),  # after the data, the base and the first candidate
            observers=[{"name": "bad", "how": how}],
            plugin_deadline=42,
            **reading(how, pairs),
        )
    finally:
        calls.watched_by(None)
    assert {call.kind for call in seen} == set(HOOKS) - ELSEWHERE and record.read()[1] is None
    for call in seen:
        candidate = "c0.50" if call.kind in WAYS else ""
        expected = Call(names(call.kind).partition(",")[0], "misbehaving", HOOKS[call.kind], candidate, 42, call.kind)
        assert call == expected
        done_without = {"observer": ("observer", call.who)} | dict.fromkeys(WAYS, ("candidate", "c0.50"))
        assert call.dispensable == done_without.get(call.kind)


def test_a_sampler_at_work_is_announced(sweep, tmp_path):
    """For the candidate that is sampled; for none where several are, which are then trained one by one."""
    record, seen = Record(), []
    sys.modules[isolation.NAME].CALLS["seen"] = lambda: seen.append(record.read()[1])
    (tmp_path / "queue").write_text("is seen\nis seen")
    calls.watched_by(record)
    try:
        sweep(tmp_path / "run", plugin_deadline=42, **sampling(tmp_path / "queue", rounds=2))
    finally:
        calls.watched_by(None)
    first = Call("sampler 'bad' of misbehaving 2.5", "misbehaving", "sample", "c0.00", 42, "sampler")
    assert seen == [first, replace(first, candidate="")]
    assert [each.dispensable for each in seen] == [("candidate", "c0.00"), (calls.TOGETHER, "")]


@pytest.mark.parametrize(
    ("kind", "hook"), [("transform", "apply"), ("reference", "moves"), ("filter", "keep_responses")]
)
def test_what_is_asked_with_each_candidate_is_announced_at_work(kind, hook, sweep, tmp_path):
    record, seen = Record(), []
    sys.modules[isolation.NAME].CALLS["seen"] = lambda: seen.append(record.read()[1])
    (tmp_path / "queue").write_text("\nis seen")
    changes = (BY_ROUND | {"reference": comparing})[kind](tmp_path / "queue")
    calls.watched_by(record)
    try:
        sweep(tmp_path / "run", plugin_deadline=42, **changes)
    finally:
        calls.watched_by(None)
    expected = Call(f"{kind} 'bad' of misbehaving 2.5", "misbehaving", hook, "c0.50", 42, kind)
    assert seen == [expected] and expected.dispensable == ("candidate", "c0.50")


@pytest.fixture(scope="module")
def said(installed, healthy):
    """What a decoder says, on a finished run."""

    def say(how):
        directory = healthy[False].directory
        decoding = open_decoding(directory, installed, "misbehaving:bad", {"how": how}, {"helpful": 1})
        return decoding.generate(["q1: "], max_new_tokens=2)

    return say


@pytest.mark.parametrize("how", [how for _, how in here(TOLD)])
def test_whoever_asked_a_decoder_is_told(how, said):
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    before, healthy = generators(), said("")
    assert generators() == before
    with pytest.raises(PluginError) as error:
        said(how)
    assert names("decoder") in str(error.value) and WHY.get(how, "") in str(error.value)
    assert generators() == before
    assert said("") == healthy


def test_a_decoder_at_work_is_announced(said):
    record, seen = Record(), []
    sys.modules[isolation.NAME].CALLS["seen"] = lambda: seen.append(record.read()[1])
    calls.watched_by(record)
    try:
        said("is seen")
    finally:
        calls.watched_by(None)
    expected = Call("decoder 'bad' of misbehaving 2.5", "misbehaving", "scores", "", 600, "decoder")
    assert set(seen) == {expected} and expected.dispensable is None and record.read()[1] is None
