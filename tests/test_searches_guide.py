"""docs/searches.md: what it tells to type works, and its tables are those of what is installed and measured."""

from __future__ import annotations

import re

from documents import ROOT
from guide import Reader

from moalign import registry

PAGE = ROOT / "docs" / "searches.md"


def test_the_page_does_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Reader(tmp_path).follow(PAGE)


def test_it_names_every_search_and_no_other():
    table = PAGE.read_text().partition("## Which search")[2].partition("##")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([a-z-]+)`", row.split("|")[1])}
    shipped = {entry.name for entry in registry.discover().of_kind("search") if entry.distribution == "moalign"}
    assert named == shipped - {"auto"} | {"bayesian"}
