"""docs/diagnostics.md: what it tells to type works, and its keys and options are those that there are."""

from __future__ import annotations

import re

from documents import ROOT
from guide import Reader
from typer.testing import CliRunner

from moalign.cli import app

PAGE = ROOT / "docs" / "diagnostics.md"


def test_the_page_does_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Reader(tmp_path).follow(PAGE)


def test_it_names_options_of_the_command():
    offered = CliRunner().invoke(app, ["evaluate", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    named = set(re.findall(r"`(--[a-z]+)", PAGE.read_text()))
    assert len(named) > 8 and not {option for option in named if option not in offered}
