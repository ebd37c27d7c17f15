"""Which plugins made a run is on record, and another one is not taken for it in silence."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from importlib import metadata

import pytest
from interruptions import StopAfterCandidates
from sweeps import small_config, write_pairs

import moalign
from moalign import cli, registry, storage
from moalign.errors import RunError
from moalign.registry import Entry, Registry
from moalign.sweeps import front, journal, provenance, run
from moalign.sweeps.observe import Observer

SOURCE = """
from moalign.api import Objective, pair_logits


class Hinge(Objective):
    needs = frozenset({"pairs", "reference"})

    def loss(self, batch, terms):
        return (1 - pair_logits(batch, terms, 0.1)).relu()
"""
KEY = "objective stranger:hinge"


def installed(version: str = "1.0") -> Registry:
    strange = Entry("objective", "hinge", "strange_hinge:Hinge", "", "", "stranger", version)
    return Registry((*registry.discover().entries, strange))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The stranger's file."""
    file = tmp_path / "strange_hinge.py"
    file.write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield file
    sys.modules.pop("strange_hinge", None)


@pytest.fixture
def started(module, tiny_model_path, tmp_path):
    """A run of two candidates, one of them done."""
    settings = small_config(
        tiny_model_path,
        write_pairs(tmp_path / "pairs.jsonl"),
        loss="hinge",
        search={"name": "grid", "points": 2},
        observers=["jsonl"],
    )
    with pytest.raises(KeyboardInterrupt):
        run.start(settings, tmp_path / "run", installed(), StopAfterCandidates())
    return tmp_path / "run"


def edit(module, text: str) -> None:
    """A new version of the stranger's file, as the next process would import it."""
    module.write_text(text)
    sys.modules.pop("strange_hinge", None)
    importlib.invalidate_caches()


def test_every_plugin_is_on_record(started, module):
    plugins = front.read_record(started)["plugins"]
    digest = hashlib.sha256(module.read_bytes()).hexdigest()
    assert plugins[KEY] == {"distribution": "stranger", "version": "1.0", "sha256": digest}
    assert set(plugins) == {
        KEY,
        "combiner moalign:linear",
        "search moalign:grid",
        "reader moalign:preference",  # chosen by `auto`
        "observer moalign:jsonl",
    }
    ours = plugins["combiner moalign:linear"]
    assert ours["version"] == metadata.version("moalign") and len(ours["sha256"]) == 64


def test_another_version_is_refused_and_can_be_accepted(started):
    record = (started / "run.json").read_bytes()
    with pytest.raises(RunError, match=r"objective stranger:hinge was version 1\.0, is 1\.1.*--accept-plugin-change"):
        run.resume(started, installed("1.1"), Observer())
    run.resume(started, installed("1.1"), Observer(), accept_plugin_change=True)
    assert (started / "run.json").read_bytes() == record
    (event,) = [event for event in journal.read(started / journal.FILE) if event["event"] == provenance.EVENT]
    assert set(event["plugins"]) == {KEY}
    assert (event["plugins"][KEY]["old"]["version"], event["plugins"][KEY]["new"]["version"]) == ("1.0", "1.1")
    run.resume(started, installed("1.1"), Observer())  # what was accepted is what it goes by now
    with pytest.raises(RunError, match=r"was version 1\.1, is 1\.0"):
        run.resume(started, installed("1.0"), Observer())


def test_another_file_under_the_same_version_is_refused(started, module):
    edit(module, SOURCE + "# edited\n")
    with pytest.raises(RunError, match=r"hinge is still version 1\.0, but its file is another: sha256 \w{12} before"):
        run.resume(started, installed(), Observer())
    edit(module, SOURCE)
    assert len(run.resume(started, installed(), Observer())["points"]) == 2
    assert provenance.EVENT not in {event["event"] for event in journal.read(started / journal.FILE)}


def test_records_of_versions_alone_are_still_read(started):
    record = storage.read_json(started / "run.json")
    del record["id"]
    record["plugins"] = {
        name: entry["version"]
        for name, entry in record["plugins"].items()
        if not name.startswith(("reader", "observer"))
    }
    storage.write_json(started / "run.json", record)
    with pytest.raises(RunError, match=r"objective stranger:hinge was version 1\.0, is 1\.1"):
        run.resume(started, installed("1.1"), Observer())
    assert len(run.resume(started, installed(), Observer())["points"]) == 2


def test_the_command_and_python_take_the_same_word(started, monkeypatch):
    changed, again = installed("1.1"), installed("1.2")
    monkeypatch.setattr(registry, "discover", lambda no_plugin=(): changed)
    with pytest.raises(RunError, match=r"is 1\.1"):
        moalign.resume(started)
    monkeypatch.setattr(sys, "argv", ["moalign", "resume", str(started), "--accept-plugin-change"])
    with pytest.raises(SystemExit) as ended:
        cli.app()
    assert ended.value.code == 0
    assert len(moalign.resume(started).front["points"]) == 2
    monkeypatch.setattr(registry, "discover", lambda no_plugin=(): again)
    assert len(moalign.resume(started, accept_plugin_change=True).front["points"]) == 2
    lines = [json.loads(line) for line in (started / "events.jsonl").read_text().splitlines()]
    assert [line["finished"] for line in lines if line["event"] == "run_start"] == [0, 1, 2, 2]


def test_what_counts_as_a_change():
    one = {"distribution": "d", "version": "1", "sha256": "a"}
    two = one | {"sha256": "b"}
    assert provenance.changes({"loss d:x": one}, [], {"loss d:x": one}) == {}
    assert provenance.changes({"loss d:x": one}, [], {"loss e:x": one}) == {
        "loss d:x": {"old": one, "new": None},
        "loss e:x": {"old": None, "new": one},
    }
    assert provenance.changes({"observer d:x": one}, [], {"observer d:x": two}) == {}
    accepted = {"event": provenance.EVENT, "plugins": {"loss d:x": {"old": one, "new": two}}}
    assert provenance.changes({"loss d:x": one}, [accepted], {"loss d:x": two}) == {}
    assert provenance.changes({"loss d:x": one}, [accepted], {"loss d:x": one}).keys() == {"loss d:x"}
    gone = {"event": provenance.EVENT, "plugins": {"loss d:x": {"old": one, "new": None}}}
    assert provenance.changes({"loss d:x": one}, [gone], {}) == {}
