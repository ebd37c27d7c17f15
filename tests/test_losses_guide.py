"""docs/losses.md: what it tells to type works, and it names every loss that a file suffices for."""

from __future__ import annotations

import re
from typing import Any

from documents import ROOT
from guide import Reader

from moalign import registry

PAGE = ROOT / "docs" / "losses.md"
REGISTRY = registry.discover()


def only_of_samples(loss: Any) -> bool:
    """Whether only responses that the policy samples can train it."""
    return bool(loss.needs & {"old_logps", "greedy", "token_advantages"})


SHIPPED = [entry for entry in REGISTRY.of_kind("objective") if entry.distribution == "moalign"]
SAMPLES = {entry.name for entry in SHIPPED if only_of_samples(REGISTRY.load(entry))}


def test_the_page_does_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Reader(tmp_path).follow(PAGE)


def test_it_names_every_loss_and_no_other():
    table = PAGE.read_text().partition("## Which loss")[2].partition("\n\nLosses on")[0]
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ")][2:]
    named = {name for row in rows for name in re.findall(r"`([a-z-]+)`", row)}
    assert named - {"optimistic"} == {entry.name for entry in SHIPPED} - SAMPLES
