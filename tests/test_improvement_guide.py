"""docs/improvement.md: every block of it is done."""

from __future__ import annotations

from documents import ROOT
from guide import Reader


def test_the_page_does_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Reader(tmp_path).follow(ROOT / "docs" / "improvement.md")
