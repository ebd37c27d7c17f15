"""Forms in which datasets are published: which reader knows them, and from every kind of file."""

from __future__ import annotations

import csv
import json
import re

import pytest
from documents import ROOT
from guide import Reader
from published import (
    FORMS,
    assistant,
    user,
)
from test_data_readers import feedback_row, read
from typer.testing import CliRunner

from moalign import registry
from moalign.cli import app
from moalign.config import PluginChoice
from moalign.data.loading import choose_reader, load_records
from moalign.sweeps.plan import readers_for
from moalign_plugins.readers.helpsteer import ATTRIBUTES
from moalign_plugins.readers.hh_rlhf import HHRLHF
from moalign_plugins.readers.pku_saferlhf import OFFERED as PKU
from moalign_plugins.readers.qa_feedback import OFFERED as QA
from moalign_plugins.readers.stepwise import OFFERED as STEPWISE
from moalign_plugins.readers.ultrafeedback import OFFERED as UF

READERS = readers_for(PluginChoice(name="auto"), registry.discover())
OTHERS = {
    "trl": ("preference", {"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 1}),
    "trl, conversations": ("preference", {"chosen": [user("Q"), assistant("a")], "rejected": [user("Q")]}),
    "trl, implicit prompt": ("preference", {"chosen": "Human: hi\n\nAssistant: a", "rejected": "Human: hi"}),
    "an objective a row": ("preference", {"prompt": "Q", "chosen": "a", "rejected": "b", "objective": "x", "id": 3}),
    "a table": ("columns", {"prompt": "Q", "response": "a", "score": 3}),
    "prompts": ("prompts", {"prompt": "Q"}),
    "qa-feedback": ("qa-feedback", feedback_row()),
}


# --- which reader ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [*FORMS, *OTHERS])
def test_each_form_is_claimed_by_its_reader_alone(form):
    """A reader of one format knows no other's rows; the general ones take what is left, and one of them at most."""
    name, row = {**FORMS, **OTHERS}[form]
    claimed = {other for other, reader in READERS.items() if reader.recognises(row)}
    general = {other for other in READERS if READERS[other].general}
    assert claimed - general == {name} - general
    assert len(claimed & general) <= 1
    assert choose_reader(("f", 1, row), READERS) == name


def test_every_published_reader_has_rows():
    specific = {name for name, reader in READERS.items() if not reader.general} - {"prompts", "qa-feedback"}
    assert {name for name in specific if registry.discover().find("reader", name).distribution == "moalign"} == {
        name for name, _ in FORMS.values()
    }


# --- from files -----------------------------------------------------------------------------------------------------


def as_text(value):
    return json.dumps(value) if isinstance(value, list | dict) else value


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows({key: as_text(value) for key, value in row.items()} for row in rows)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_records_from_every_kind_of_file(form, tmp_path):
    """Parquet keeps lists of structs; in a table numbers and lists are text."""
    name, row = FORMS[form]
    read_back = {}
    for suffix in (".jsonl", ".json", ".parquet", ".csv"):
        path = tmp_path / f"rows{suffix}"
        write(path, [row, row])
        loaded = load_records(path, READERS[name])
        assert loaded.refusals == ()
        found = [(r.prompt, r.responses, r.scores, r.pairs, r.group, r.line) for r in loaded.records]
        read_back[suffix] = [each[:-1] for each in found]
        assert found[0][-1] == (2 if suffix == ".csv" else 1)  # below the header
    assert all(found == read_back[".jsonl"] for found in read_back.values())


@pytest.mark.parametrize("form", FORMS)
def test_data_check_knows_the_form_by_itself(form, tmp_path):
    name, row = FORMS[form]
    path = tmp_path / ("helpful-base.jsonl" if name == "hh-rlhf" else "rows.jsonl")
    broken = dict.fromkeys(row)
    write(path, [row, broken])
    done = CliRunner().invoke(app, ["data", "check", str(path), "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["records"] == 1
    assert sum(report["refused"].values()) == 1 and report["first_refusals"][0]["line"] == 2
    (expected,) = read(READERS[name], [row]) if name != "hh-rlhf" else HHRLHF().read([(str(path), 1, row)], ())
    assert {each["name"] for each in report["objectives"]} == {*expected.scores, *expected.pairs}
    assert report["responses"] == len(expected.responses)


# --- what docs/data-formats.md says ---------------------------------------------------------------------------------

PAGE = ROOT / "docs" / "data-formats.md"


def test_the_page_does_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Reader(tmp_path).follow(PAGE)


def test_the_table_has_every_reader_with_what_it_offers():
    table = [line.strip("|").split("|") for line in PAGE.read_text().splitlines() if line.startswith("|")][2:]
    named: dict[str, list[str]] = {}
    for reader, _, objectives, *_ in table:
        known = reader.strip().strip("`") or list(named)[-1]
        named.setdefault(known, []).append(objectives)
    assert set(named) == {
        entry.name for entry in registry.discover().of_kind("reader") if entry.distribution == "moalign"
    }
    for name, row in FORMS.values():
        offered = {each for record in read(READERS[name], [row]) for each in (*record.scores, *record.pairs)}
        said = set(re.findall(r"`([^`]+)`", " ".join(named[name])))
        assert offered <= said or name == "hh-rlhf", (offered, said)
    offers = {"ultrafeedback": {*UF}, "helpsteer": {*ATTRIBUTES, "preference"}, "pku-saferlhf": {*PKU}}
    for name, offered in (offers | {"stepwise": {*STEPWISE}, "qa-feedback": {*QA}}).items():
        assert set(re.findall(r"`([^`]+)`", " ".join(named[name]))) == offered
