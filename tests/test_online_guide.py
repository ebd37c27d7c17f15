"""docs/online.md: what it tells to type works, and it names every loss that only sampled responses can train."""

from __future__ import annotations

import re

from documents import ROOT
from guide import Reader
from test_losses_guide import SAMPLES

PAGE = ROOT / "docs" / "online.md"


def test_the_page_does_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Reader(tmp_path).follow(PAGE)


def test_it_names_every_loss_of_samples():
    table = PAGE.read_text().partition("## Which loss")[2].partition("\n\nFilters")[0]
    named = set(re.findall(r"`([a-z0-9-]+)`", table))
    assert SAMPLES - named == set()
