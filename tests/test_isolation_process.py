"""Plugins that take the process, from the command line: see the table in ``isolation``."""

from __future__ import annotations

import json

import isolation
import pytest
from command_line import moalign
from distributions import install
from isolation import HOOKS, IN_A_PROCESS_OF_ITS_OWN, choosing, comparing, content, rewarded, sampling
from sweeps import write_pairs

from moalign import calls, registry
from moalign.calls import BACKWARD, IMPORT, Call, Death
from moalign.sweeps import journal

HOW = {
    "hangs": "did not return within 1.5 seconds, at File ",
    "dies by a signal": "died of SIGSEGV, at File ",
    "ends the process": "ended the process with exit code 0",
}
WAYS = tuple(HOW)
assert WAYS == IN_A_PROCESS_OF_ITS_OWN
DIES = "import ctypes\nctypes.string_at(0)\n"
HANGS = "import time\ntime.sleep(60)\n"
ENDS_IT = "print('a greeting')\nimport os\nos._exit(0)\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return isolation.install(tmp_path_factory.mktemp("site"))


@pytest.fixture
def begin(site, tiny_model_path, tmp_path):
    """``moalign sweep`` with changes of the configuration, in the run directory ``run``."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", prompts=12)

    def begun(*path, **changes):
        settings = content(tiny_model_path, pairs, plugin_deadline=1.5, **changes)
        (tmp_path / "sweep.yaml").write_text(json.dumps(settings))
        return moalign("sweep", tmp_path / "sweep.yaml", "--out", tmp_path / "run", path=(site, *path))

    return begun


@pytest.fixture
def check(site, tmp_path):
    """``moalign data check`` with a reader."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", prompts=2)

    def checked(reader, *path):
        settings = content(tmp_path, pairs, plugin_deadline=1.5)
        settings["data"] |= {"reader": reader}
        (tmp_path / "check.yaml").write_text(json.dumps(settings))
        arguments = ("data", "check", pairs, "--config", tmp_path / "check.yaml", "--json")
        return moalign(*arguments, path=(site, *path))

    return checked


def lines(done, what):
    """What the process that stands by said."""
    return [line for line in done.stderr.splitlines() if line.startswith(f"{what}: ")]


def test_what_takes_the_process_is_done_without(begin, site, tmp_path):
    """One of each kind, in a sweep of five; beside them a distribution that nobody needs, and that dies when imported.

    The reward is asked of the data in each of five processes, of the base in the first, then of each candidate.
    """
    (tmp_path / "queue").write_text("\n\n\n\n\n\nhangs\n")
    install(tmp_path / "deadly", "deadly", DIES, "0.1")
    done = begin(
        tmp_path / "deadly",
        search={"name": "bad", "points": 5},
        train={"steps": 3, "pairs_per_step": 4, "lr": 1e-2, "together": 5},
        loss={"name": "bad", "hows": {"0.25": "dies by a signal"}},
        combine={"name": "bad", "hows": {"0.50": "ends the process"}},
        observers=["jsonl", {"name": "bad", "how": "ends the process"}],
        objectives=rewarded(queue=str(tmp_path / "queue")),
    )
    assert done.returncode == 0, done.stderr
    importing, objective, combiner, observer, reward = lines(done, "warning")
    assert importing.startswith("warning: importing entry point 'deadly' of deadly 0.1, died of SIGSEGV, at File ")
    assert importing.endswith("going on without deadly")
    assert f"observer 'bad' of misbehaving 2.5, in on_step, {HOW['ends the process']}" in observer
    assert observer.endswith("going on without this observer")
    front = json.loads((tmp_path / "run" / "front.json").read_text())
    assert [point["id"] for point in front["points"]] == ["c0.00", "c1.00"]
    failed = {each["id"]: each["error"] for each in front["failed"]}
    for identity, warning, kind, way in (
        ("c0.25", objective, "objective", "dies by a signal"),
        ("c0.50", combiner, "combiner", "ends the process"),
        ("c0.75", reward, "reward", "hangs"),
    ):
        who = f"{kind} 'bad' of misbehaving 2.5, in {HOOKS[kind]} for candidate {identity}, "
        assert failed[identity].startswith(who + HOW[way])
        assert warning == f"warning: {failed[identity]}; going on without this candidate"
    before = (tmp_path / "run" / "journal.jsonl").read_bytes()
    events = [event for event in journal.read(tmp_path / "run" / "journal.jsonl") if event["event"] == "outcome"]
    assert {event["id"] for event in events if event.get("given_up")} == failed.keys()
    again = moalign("resume", tmp_path / "run", path=(site,))
    assert again.returncode == 0 and not lines(again, "warning")
    assert (tmp_path / "run" / "journal.jsonl").read_bytes() == before


def test_a_sampler_that_takes_the_process_is_done_without(begin, tmp_path):
    """First in a call for all three, which are then sampled one by one; then for the first of them, which fails."""
    queue = tmp_path / "queue"
    queue.write_text("\ndies by a signal\n\nends the process\n")
    done = begin(**sampling(queue, rounds=2))
    assert done.returncode == 0, done.stderr
    together, alone = lines(done, "warning")
    assert f"sampler 'bad' of misbehaving 2.5, in sample, {HOW['dies by a signal']}" in together
    assert f"sampler 'bad' of misbehaving 2.5, in sample for candidate c0.00, {HOW['ends the process']}" in alone
    front = json.loads((tmp_path / "run" / "front.json").read_text())
    assert [point["id"] for point in front["points"]] == ["c0.50", "c1.00"]
    assert [each["id"] for each in front["failed"]] == ["c0.00"]


@pytest.mark.parametrize(("kind", "changes"), [("reference", comparing), ("filter", choosing)])
def test_what_is_asked_with_a_candidate_and_takes_the_process_is_done_without(kind, changes, begin, tmp_path):
    """For the second of three candidates; the second process trains the other two."""
    (tmp_path / "queue").write_text("\nhangs\n")
    done = begin(**changes(tmp_path / "queue"))
    assert done.returncode == 0, done.stderr
    front = json.loads((tmp_path / "run" / "front.json").read_text())
    assert [point["id"] for point in front["points"]] == ["c0.00", "c1.00"]
    (failed,) = front["failed"]
    who = f"{kind} 'bad' of misbehaving 2.5, in {HOOKS[kind]} for candidate c0.50, "
    assert failed["id"] == "c0.50" and failed["error"].startswith(who + HOW["hangs"])
    assert lines(done, "warning") == [f"warning: {failed['error']}; going on without this candidate"]


@pytest.mark.parametrize("how", WAYS)
def test_a_search_that_takes_the_process_ends_the_run(how, begin, tmp_path):
    done = begin(search={"name": "bad", "how": how, "at_once": True})
    assert done.returncode == 1 and not lines(done, "warning")
    (error,) = lines(done, "error")
    assert error.startswith(f"error: search 'bad' of misbehaving 2.5, in propose, {HOW[how]}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", WAYS)
def test_a_reader_that_takes_the_process_ends_the_command(how, check):
    done = check({"name": "bad", "how": how})
    assert done.returncode == 1 and not lines(done, "warning") and not done.stdout
    (error,) = lines(done, "error")
    assert error.startswith(f"error: reader 'bad' of misbehaving 2.5, in read, {HOW[how]}")


@pytest.fixture(scope="module")
def decoded(site, tiny_model_path, tmp_path_factory):
    """A run of four candidates, for decoders to speak with."""
    folder = tmp_path_factory.mktemp("decoded")
    pairs = write_pairs(folder / "pairs.jsonl", prompts=12)
    train = {"steps": 1, "pairs_per_step": 2, "lr": 1e-2, "together": 4}
    (folder / "sweep.yaml").write_text(json.dumps(content(tiny_model_path, pairs, plugin_deadline=1.5, train=train)))
    assert moalign("sweep", folder / "sweep.yaml", "--out", folder / "run", path=(site,)).returncode == 0
    return folder / "run"


@pytest.mark.parametrize("how", WAYS)
def test_a_decoder_that_takes_the_process_is_named(how, decoded, site):
    """As a command has it: the work in a process of its own."""
    program = f"""
import sys
from moalign import open_run, supervisor
code = supervisor.stand_by()
if code is not None:
    sys.exit(code)
decoding = open_run({str(decoded)!r}).decoder("misbehaving:bad", prefer="helpful", how={how!r})
decoding.generate(["q1: "], max_new_tokens=2)
"""
    done = moalign("-c", program, path=(site,))
    assert done.returncode == 1 and not lines(done, "warning")
    (error,) = lines(done, "error")
    assert error.startswith(f"error: decoder 'bad' of misbehaving 2.5, in scores, {HOW[how]}")


def test_readers_that_nobody_named_are_done_without(check, tmp_path):
    """Each is asked whether it recognises the file; one dies when it is asked, one when it is built."""
    source = """
import os, time
from moalign.api import Reader, hookimpl
class Asked(Reader):
    def recognises(self, row):
        time.sleep(60)
class Built(Reader):
    def model_post_init(self, context):
        os._exit(3)
@hookimpl
def register_readers(register):
    register("asked", Asked, summary="bad")
    register("built", Built, summary="bad")
"""
    install(tmp_path / "unnamed", "unnamed", source)
    done = check("auto", tmp_path / "unnamed")
    assert done.returncode == 0 and json.loads(done.stdout)["records"] > 0
    built, asked = lines(done, "warning")
    assert "reader 'built' of unnamed 1.0, in its constructor, ended the process with exit code 3" in built
    assert f"reader 'asked' of unnamed 1.0, in recognises, {HOW['hangs']}" in asked
    assert asked.endswith("going on without this reader")


def test_modules_that_take_the_process_are_listed_as_broken(site, tmp_path):
    for name, source in (("dies", DIES), ("hangs", HANGS), ("leaves", ENDS_IT)):
        install(tmp_path, name, source, "0.3")
    arguments = ("plugins", "list", "--all", "--json")
    done = moalign(*arguments, path=(site, tmp_path), MOALIGN_IMPORT_DEADLINE="1.5")
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)  # once, whatever was begun before
    broken = {row["name"]: row["reason"] for row in listed if row["status"] == "broken"}
    for name, way in (("dies", "dies by a signal"), ("hangs", "hangs"), ("leaves", "ends the process")):
        assert broken.pop(name).startswith(f"importing entry point '{name}' of {name} 0.3, {HOW[way]}")
    assert not broken
    assert {row["kind"] for row in listed if row["distribution"] == isolation.NAME} == set(isolation.ORDER)
    assert {row["name"] for row in listed if row["distribution"] == "moalign"} >= {"dpo", "linear", "grid"}


@pytest.mark.parametrize("kind", isolation.ORDER)
def test_a_target_that_takes_the_process_is_named(kind, tmp_path):
    """The entry point is sound, and the module that it points to is not."""
    hook = registry.HOOKS[kind]
    source = f"""
from moalign.api import hookimpl
@hookimpl
def {hook}(register):
    register("deadly", "deadly_target:Target", summary="bad")
"""
    install(tmp_path, "deadly", source, "0.2")
    (tmp_path / "deadly_target.py").write_text(HANGS if kind == "reward" else DIES)
    done = moalign("plugins", "show", "deadly", path=(tmp_path,), MOALIGN_IMPORT_DEADLINE="1.5")
    how = HOW["hangs" if kind == "reward" else "dies by a signal"]
    assert done.returncode == 2 and not done.stdout
    assert f"importing {kind} 'deadly' of deadly 0.2, {how}" in done.stderr
    assert "deadly 0.2 could not be loaded" in done.stderr


def test_only_what_comes_after_its_beginning_shows_that_a_run_was_begun():
    """Else the second process of `moalign sweep` would go on with a run that somebody else left in the directory."""
    begun = {}
    for call in (
        Call("entry point 'x' of x 1", "x", IMPORT),
        Call("reader 'x' of x 1", "x", "recognises", kind="reader"),
        Call("objective 'x' of x 1", "x", "loss", "c0.00", kind="objective"),
        Call("observer 'x' of x 1", "x", "close", kind="observer"),
        Call("objective 'x' of x 1", "x", BACKWARD, kind="objective"),
    ):
        calls.watched_by(None, (Death(call, "died"),))
        begun[call.hook] = calls.begun()
    calls.watched_by(None)
    assert begun == {IMPORT: False, "recognises": False, "loss": True, "close": True, BACKWARD: True}


def test_an_import_deadline_that_is_none(tmp_path):
    done = moalign("plugins", "list", MOALIGN_IMPORT_DEADLINE="soon")
    assert done.returncode == 2 and "MOALIGN_IMPORT_DEADLINE is 'soon'" in done.stderr
