"""The authors' guide: every block of it is done, and what it shows is what comes back."""

from __future__ import annotations

import re
import sys

import pytest
from documents import ROOT, blocks_of
from guide import Reader

from moalign import registry

GUIDE = ROOT / "docs" / "plugins"
PAGES = sorted(file.name for file in GUIDE.glob("*.md"))
MOST_LINES = 20
NOT_EXECUTED = {
    "python -m venv env && . env/bin/activate": "the tests run in an environment already",
    "pip install moalign pytest": "asks a package index",
    "python -m build": "needs the package build, and makes an environment of its own from a package index",
    "twine upload dist/*": "publishes",
    "pip install moalign-my-loss": "asks a package index",
}


def word(kind: str) -> str:
    """As it stands in names of Python."""
    return kind.replace("-", "_")


def test_there_is_a_page_for_every_kind():
    others = {"index.md", "testing.md", "publishing.md", "trust.md"}
    assert set(PAGES) == {f"{kind}.md" for kind in registry.KINDS} | others


@pytest.mark.parametrize("page", PAGES)
def test_the_page_does_what_it_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    try:
        Reader(tmp_path).follow(GUIDE / page)
    finally:
        for name in set(sys.modules) - before:
            if name.startswith("moalign_") and "." not in name and name != "moalign_plugins":
                del sys.modules[name]


@pytest.mark.parametrize("kind", registry.KINDS)
def test_the_example_is_whole_short_and_checked(kind):
    """One module of at most twenty lines, blank ones not counted, which the page gives to the check of its kind."""
    blocks = [block.text for block in blocks_of(GUIDE / f"{kind}.md") if block.language == "python"]
    (example,) = [text for text in blocks if text.startswith("# moalign_")]
    assert len([line for line in example.splitlines() if line.strip()]) <= MOST_LINES
    assert registry.HOOKS[kind] in example
    (name,) = re.findall(rf"^class (\w+)\({registry.KINDS[kind].__name__}\)", example, flags=re.MULTILINE)
    assert any(f"check_{word(kind)}({name}(" in text for text in blocks)


def test_what_is_not_executed_is_listed_with_the_reason():
    blocks = [block for page in PAGES for block in blocks_of(GUIDE / page) if block.language == "console"]
    commands = [line.removeprefix("$ ") for block in blocks for line in block.text.splitlines()]
    assert set(commands) == set(NOT_EXECUTED)


def test_every_block_is_of_a_known_language():
    known = {"python", "bash", "yaml", "toml", "diff", "text", "text run", "console"}
    assert {block.language for page in PAGES for block in blocks_of(GUIDE / page)} <= known


@pytest.mark.parametrize("kind", registry.KINDS)
def test_the_kit_page_names_every_check(kind):
    """In the order in which they run."""
    import importlib

    text = (GUIDE / "testing.md").read_text()
    section = text[text.index(f"## check_{word(kind)}\n") + 3 :].partition("\n## ")[0]
    checks = importlib.import_module(f"moalign.testing.{word(kind)}").CHECKS
    assert re.findall(r"^\| `(\w+)`", section, flags=re.MULTILINE) == [check.__name__ for check in checks]


@pytest.mark.parametrize("page", [*PAGES, "README.md"])
def test_links_lead_somewhere(page):
    file = ROOT / page if page == "README.md" else GUIDE / page
    for target, anchor in re.findall(r"\]\(([^):#\s]*)(?:#([^)]*))?\)", file.read_text()):
        there = file.parent / target if target else file
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}, anchor


@pytest.mark.parametrize("page", PAGES)
def test_prose_is_not_too_wide(page):
    prose = re.sub(r"^```.*?^```$", "", (GUIDE / page).read_text(), flags=re.MULTILINE | re.DOTALL).splitlines()
    assert [line for line in prose if len(line) > 130 and not line.startswith("|")] == []
