"""A run that somebody comes back to: what was changed in between is found, what is missing is made again."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
from interruptions import StopAfterCandidates
from sweeps import contents, short_rebel, small_config, write_pairs
from typer.testing import CliRunner

from moalign import cli, registry, storage
from moalign.errors import CorruptFileError, RunError
from moalign.sweeps import front, journal, run, samples
from moalign.sweeps.archive import Archive
from moalign.sweeps.observe import Observer


@pytest.fixture(scope="module")
def unfinished(tiny_model_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = small_config(tiny_model_path, write_pairs(folder / "pairs.jsonl"), train={"steps": 2, "together": 1})
    with pytest.raises(KeyboardInterrupt):
        run.start(config, folder / "run", registry.discover(), StopAfterCandidates())
    return folder / "run"


@pytest.fixture
def copy(unfinished, tmp_path):
    return shutil.copytree(unfinished, tmp_path / "a [red]run")


@pytest.mark.parametrize(
    ("before", "after"),
    [('"steps": 2', '"steps": 1'), ('"lr": ', '"lr": 1'), ('"weight_decay": ', '"weight_decay": 1')],
)
def test_a_configuration_that_was_edited_in_the_record_is_not_gone_on_with(copy, before, after):
    record = copy / "run.json"
    text = record.read_text()
    assert before in text
    record.write_text(text.replace(before, after, 1))
    with pytest.raises(RunError, match=r"run\.json: not what was written when this run was started; restore it"):
        run.resume(copy, registry.discover(), Observer())
    record.write_text(text)
    run.resume(copy, registry.discover(), Observer())


def test_who_watches_may_change(copy):
    record = json.loads((copy / "run.json").read_text())
    record["config"]["plugin_deadline"] = 77.0
    (copy / "run.json").write_text(json.dumps(record))
    run.resume(copy, registry.discover(), Observer())


def test_a_report_of_an_unfinished_run_does_not_pass_for_its_front(copy):
    said = CliRunner().invoke(cli.app, ["report", str(copy)])
    assert said.exit_code == 0 and (copy / "report.html").exists() and not (copy / front.FRONT).exists()
    assert said.stdout.endswith(f"unfinished; moalign resume '{copy}' goes on\n"), "the path as it is, brackets and all"
    assert not journal.ended(copy / journal.FILE)
    run.resume(copy, registry.discover(), Observer())
    whole, events = (copy / front.FRONT).read_bytes(), journal.read(copy / journal.FILE)
    assert journal.ended(copy / journal.FILE)
    (copy / front.FRONT).unlink()
    assert "goes on" not in CliRunner().invoke(cli.app, ["report", str(copy)]).stdout
    assert (copy / front.FRONT).read_bytes() == whole
    run.resume(copy, registry.discover(), Observer())
    assert journal.read(copy / journal.FILE) == events, "a run ends once"


@pytest.mark.parametrize(
    "asked", [["generate", "--candidate", "none", "--prompt", "x"], ["export", "--candidate", "none", "--to", "there"]]
)
def test_who_asks_an_unfinished_run_is_told_how_to_go_on(copy, asked):
    command, *rest = asked
    done = CliRunner().invoke(cli.app, [command, str(copy), *rest])
    assert isinstance(done.exception, RunError) and "no candidate 'none'" in str(done.exception)
    assert f"unfinished; moalign resume '{copy}' goes on\n" in done.stderr and done.stdout == ""


def test_samples_of_the_base_are_made_again_where_they_are_gone_or_altered(copy, tmp_path):
    unbroken = shutil.copytree(copy, tmp_path / "unbroken")
    run.resume(unbroken, registry.discover(), Observer())
    file = copy / samples.BASE / samples.FILE
    for change in (file.unlink, lambda: file.write_text("")):
        change()
        again = shutil.copytree(copy, tmp_path / "again", dirs_exist_ok=True)
        run.resume(again, registry.discover(), Observer())
        assert contents(again) == contents(unbroken)
        assert (again / samples.BASE / samples.FILE).read_bytes() == (
            unbroken / samples.BASE / samples.FILE
        ).read_bytes()
        shutil.rmtree(again)


def test_where_another_machine_makes_other_samples_of_the_base_the_run_goes_on(copy, monkeypatch):
    made = samples.text_of
    (copy / samples.BASE / samples.FILE).unlink()
    monkeypatch.setattr(samples, "text_of", lambda *asked: made(*asked) + "\n")
    run.resume(copy, registry.discover(), Observer())
    events = journal.read(copy / journal.FILE)
    again = (copy / samples.BASE / samples.FILE).read_bytes()
    assert samples.of_base(events) == hashlib.sha256(again).hexdigest() != events[1]["samples"]
    run.resume(copy, registry.discover(), Observer())
    assert journal.read(copy / journal.FILE) == events and again.endswith(b"\n\n")


def test_a_candidate_that_is_gone_is_named(copy):
    (done,) = (copy / "candidates").iterdir()
    shutil.rmtree(done)
    with pytest.raises(RunError, match=rf"{done.name} is gone, though it was finished; restore it from a copy"):
        run.resume(copy, registry.discover(), Observer())


def test_a_journal_that_is_gone_is_named_rather_than_written_anew(copy):
    (copy / journal.FILE).unlink()
    said = r"journal\.jsonl is gone, though candidates were finished; restore it from a copy"
    with pytest.raises(RunError, match=said):
        run.resume(copy, registry.discover(), Observer())
    with pytest.raises(RunError, match=said):
        front.read(copy)
    with pytest.raises(RunError, match=said):
        Archive.open(copy)
    assert not (copy / journal.FILE).exists()


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory):
    return short_rebel(
        tmp_path_factory.mktemp("rebel") / "run", "train.steps=1", "rollouts.rounds=1", "search.points=2"
    )


@pytest.mark.parametrize("folder", ["base", "candidates/w-1.00-0.00"])
def test_samples_that_are_gone_bound_nothing_and_those_that_were_altered_are_named(rewarded, tmp_path, folder):
    again = shutil.copytree(rewarded, tmp_path / "run")
    file = again / folder / samples.FILE
    text = file.read_text()
    for altered in ("", text.replace('"log_ratio": ', '"log_ratio": 1', 1)):
        file.write_text(altered)
        with pytest.raises(CorruptFileError, match=r"samples\.jsonl: its content is not what was written"):
            front.read(again)
    file.unlink()
    front.read(again)


def test_samples_that_can_be_of_nothing_are_named(rewarded, tmp_path):
    again = shutil.copytree(rewarded, tmp_path / "run")
    folder = again / "candidates/w-1.00-0.00"
    file = folder / samples.FILE
    text = file.read_text()
    file.write_text("")
    storage.write_manifest(folder)
    emptied = front.read(again)
    file.unlink()
    assert front.read(again) == emptied, "as if they had not been kept"
    for bad in ("1e308", '"much"', "[1]"):
        file.write_text(text.replace('"log_ratio": ', f'"log_ratio": {bad}, "x": ', 1))
        storage.write_manifest(folder)
        with pytest.raises(CorruptFileError, match=r"samples\.jsonl: a line is not the sample that was written here"):
            front.read(again)
