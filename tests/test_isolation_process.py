"""Plugins that take the process, from the command line: see the table in ``isolation``."""

from __future__ import annotations

import json

import isolation
import pytest
from distributions import install, moalign
from isolation import ENDS, HOOKS, IN_A_PROCESS_OF_ITS_OWN, cases, content, rewarded
from sweeps import contents, write_pairs

from moalign.sweeps import journal

HOW = {
    "hangs": "did not return within 1.5 seconds, at File ",
    "dies by a signal": "died of SIGSEGV, at File ",
    "ends the process": "ended the process with exit code 0",
}
WAYS = tuple(HOW)
CANDIDATES = {"0.25": WAYS[0], "0.50": WAYS[1], "0.75": WAYS[2]}
assert WAYS == IN_A_PROCESS_OF_ITS_OWN

DEADLY_AT_IMPORT = """
import ctypes
ctypes.string_at(0)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return isolation.install(tmp_path_factory.mktemp("site"))


@pytest.fixture
def begin(site, tiny_model_path, tmp_path):
    """``moalign sweep`` with changes of the configuration, in the run directory ``run``."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", prompts=12)

    def begun(*path, **changes):
        settings = content(tiny_model_path, pairs, plugin_deadline=1.5, **changes)
        if "reader" in changes:
            settings["data"] |= {"reader": settings.pop("reader")}
        (tmp_path / "sweep.yaml").write_text(json.dumps(settings))
        return moalign("sweep", tmp_path / "sweep.yaml", "--out", tmp_path / "run", path=(site, *path))

    return begun


def lines(done, what):
    """What the process that stands by said."""
    return [line for line in done.stderr.splitlines() if line.startswith(f"{what}: ")]


@pytest.mark.parametrize("kind", ["objective", "combiner", "reward"])
def test_candidates_that_take_the_process_fail_and_the_others_finish(kind, begin, site, tmp_path):
    """Each in its own way; beside them a distribution that nobody needs, and that dies when it is imported."""
    (tmp_path / "queue").write_text("\n\n\nhangs\n\ndies by a signal\n\nends the process\n")
    changes = {
        "objective": {"loss": {"name": "bad", "hows": CANDIDATES}},
        "combiner": {"combine": {"name": "bad", "hows": CANDIDATES}},
        "reward": {"objectives": rewarded(queue=str(tmp_path / "queue"))},
    }[kind]
    install(tmp_path / "deadly", "deadly", DEADLY_AT_IMPORT, "0.1")
    done = begin(tmp_path / "deadly", search={"name": "bad", "points": 5}, **changes)
    assert done.returncode == 0, done.stderr
    first, *others = lines(done, "warning")
    assert first.startswith("warning: importing entry point 'deadly' of deadly 0.1, died of SIGSEGV, at File ")
    assert first.endswith("going on without deadly")
    front = json.loads((tmp_path / "run" / "front.json").read_text())
    assert [point["id"] for point in front["points"]] == ["c0.00", "c1.00"]
    assert [failed["id"] for failed in front["failed"]] == [f"c{weight}" for weight in CANDIDATES]
    for way, failed, warning in zip(WAYS, front["failed"], others, strict=True):
        who = f"{kind} 'bad' of misbehaving 2.5, in {HOOKS[kind]} for candidate {failed['id']}, "
        assert failed["error"].startswith(who + HOW[way])
        assert warning == f"warning: {failed['error']}; going on without this candidate"
    before = (tmp_path / "run" / "journal.jsonl").read_bytes()
    events = [event for event in journal.read(tmp_path / "run" / "journal.jsonl") if event["event"] == "outcome"]
    assert [event["id"] for event in events if event.get("given_up")] == [failed["id"] for failed in front["failed"]]
    if kind == "objective":
        again = moalign("resume", tmp_path / "run", path=(site,))
        assert again.returncode == 0 and not lines(again, "warning")
        assert (tmp_path / "run" / "journal.jsonl").read_bytes() == before


def test_a_backward_pass_that_takes_the_process_fails_its_own_candidate(begin, tmp_path):
    """Of several together nobody can tell whose it was, so that they are trained one by one."""
    done = begin(loss={"name": "bad", "hows": {"0.50": "dies in the backward pass"}})
    assert done.returncode == 0, done.stderr
    front = json.loads((tmp_path / "run" / "front.json").read_text())
    assert [failed["id"] for failed in front["failed"]] == ["c0.50"] and len(front["points"]) == 2
    together, alone = lines(done, "warning")
    who = "objective 'bad' of misbehaving 2.5, in the backward pass of loss"
    assert who in together and who in front["failed"][0]["error"] and who in alone


def test_observers_that_take_the_process_are_done_without(begin, tmp_path):
    watching = [{"name": name, "how": way} for name, way in zip(("bad", "other", "third"), WAYS, strict=True)]
    done = begin(observers=[*watching, "jsonl"])
    assert done.returncode == 0, done.stderr
    for observer, warning in zip(watching, lines(done, "warning"), strict=True):
        who = f"observer '{observer['name']}' of misbehaving 2.5, in on_step, {HOW[observer['how']]}"
        assert who in warning and warning.endswith("going on without this observer")
    front = json.loads((tmp_path / "run" / "front.json").read_text())
    assert len(front["points"]) == 3 and not front["failed"]
    assert (tmp_path / "run" / "events.jsonl").read_text().count('"run_end"') == 1


@pytest.mark.parametrize("how", WAYS)
def test_a_search_that_takes_the_process_ends_the_run(how, begin, site, tmp_path):
    """At its first call, or (once, because it takes longer) when its first candidates are done."""
    later = how == "ends the process"
    done = begin(search={"name": "bad", "how": how, "at_once": not later})
    assert ("search", how) in cases(ENDS)
    assert done.returncode == 1 and not lines(done, "warning")
    (error,) = lines(done, "error")
    assert error.startswith(f"error: search 'bad' of misbehaving 2.5, in propose, {HOW[how]}")
    assert (tmp_path / "run").exists() == later
    if later:
        assert len({name.split("/")[1] for name in contents_so_far(tmp_path / "run")}) == 3


def contents_so_far(directory):
    (directory / "front.json").write_text("")
    return [name for name in contents(directory) if name.endswith("outcome.json")]


@pytest.mark.parametrize("how", WAYS)
def test_a_reader_that_takes_the_process_ends_the_command(how, begin, tmp_path):
    done = begin(reader={"name": "bad", "how": how})
    assert done.returncode == 1 and not lines(done, "warning")
    (error,) = lines(done, "error")
    assert error.startswith(f"error: reader 'bad' of misbehaving 2.5, in read, {HOW[how]}")
    assert not (tmp_path / "run" / "run.json").exists()
