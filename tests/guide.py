"""A page of the authors' guide, done block by block as a reader would do it.

``python``   is executed, all blocks of a page in one namespace; one that begins with ``# NAME.py`` is saved under that
             name as well, and a plugin's module (``moalign_*.py``) is installed and imported.
``bash``     is typed into a shell; a ``cd`` holds for the next block.
``yaml``     is a part of a configuration, and with small other parts a whole one.
``toml``     is parsed.
``diff``     is a change of the file in its first line: each run of ``-`` and ``+`` lines is replaced once.
``text``     is what the block before prints, or the message of what it raises: these lines among its lines, in this
             order. ``...`` stands for anything, and a number with a decimal point for any such number.
``text run`` is a message of a run; see test_guide_messages.py.
``console``  is shown, never executed; see test_guide.py for the reasons.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import yaml
from distributions import register
from documents import Block, blocks_of, folders, shell

SILENT = ("text run", "console")
OFFLINE = {"PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "COLUMNS": "120"}


@dataclass
class Reader:
    """Somebody in an empty folder, which must be the current one and on ``sys.path``, with a page of the guide."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    namespace: dict[str, Any] = field(default_factory=lambda: {"__name__": "guide"})
    seconds: list[tuple[Block, float]] = field(default_factory=list)

    def follow(self, page: Path) -> None:
        """Raises AssertionError, with page and line, where something is not as the page says."""
        said: tuple[str, Exception | None] | None = None
        for block in blocks_of(page):
            where = f"{page.name}:{block.line}"
            if block.language in SILENT:
                continue
            if block.language == "text":
                assert said is not None, f"{where}: nothing stands before it that could print this"
                assert_said(said[0], block.text, where, whole=said[1] is not None)
                said = None
                continue
            assert said is None or said[1] is None, f"{where}: the block before it raised {said[1]!r}"
            start = perf_counter()
            said = getattr(self, f"_{block.language}")(block.text, where)
            self.seconds.append((block, perf_counter() - start))
        assert said is None or said[1] is None, f"{page.name}: the last block raised {said[1]!r}"

    def _python(self, text: str, where: str) -> tuple[str, Exception | None]:
        named = re.match(r"# (\w+)\.py\n", text)
        if named:
            (self.folder / f"{named[1]}.py").write_text(text)
            if named[1].startswith("moalign_"):
                self._install(named[1])
                return "", None
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(text, where, "exec"), self.namespace)
        except Exception as error:
            return str(error), error
        return printed.getvalue(), None

    def _install(self, module: str) -> None:
        name = module.replace("_", "-")
        register(self.folder, name, module, "0.1.0")
        importlib.invalidate_caches()
        self.namespace |= vars(importlib.import_module(module)) | {"__name__": "guide"}

    def _bash(self, text: str, where: str) -> tuple[str, None]:
        if awaited("bash", text):
            return "", None
        here = self.folder / ".here"
        place = here.read_text().strip() if here.exists() else str(self.folder)
        search = folders(self.folder / "site", self.folder)
        environment = {"PYTHONPATH": search} | OFFLINE | {"PIP_TARGET": str(self.folder / "site")} | self.environment
        done = shell(f"set -e\n{text}pwd > '{here}'", Path(place), **environment)
        assert done.returncode == 0, f"{where}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr, None

    def _yaml(self, text: str, where: str) -> None:
        from moalign import config, registry
        from moalign.sweeps.plan import prepare

        for name in ("pairs.jsonl", "ranked.jsonl"):
            (self.folder / name).touch()
        small: dict[str, Any] = {"objectives": {"helpful": None, "harmless": None}, "data": {"path": "pairs.jsonl"}}
        content = yaml.safe_load(text)
        if awaited("yaml", text):
            return
        prepare(config.from_mapping(small | content, where=where), registry.discover())

    def _toml(self, text: str, where: str) -> None:
        assert tomllib.loads(text)["project"]["entry-points"]["moalign"], where

    def _diff(self, text: str, where: str) -> None:
        head, _, changes = text.partition("\n")
        file = self.folder / head.removeprefix("--- ")
        content = file.read_text()
        for old, new in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", changes, flags=re.MULTILINE):
            before, after = (re.sub(r"^.", "", lines, flags=re.MULTILINE) for lines in (old, new))
            assert content.count(before) == 1, f"{where}: {file.name} has this {content.count(before)} times:\n{before}"
            content = content.replace(before, after)
        file.write_text(content)


def awaited(language: str, text: str) -> bool:
    """Whether a block shows what is not there yet: the keys and the command of conditioners and reward models."""
    from moalign import cli, config

    if language == "bash":
        return "moalign reward-model" in text and not {"reward-model"} & {
            each.name for each in cli.app.registered_groups
        }
    return bool({"condition", "reward_model"} & set(yaml.safe_load(text)) - set(config.Config.model_fields))


def assert_said(said: str, quoted: str, where: str, *, whole: bool = False) -> None:
    """The quoted lines are among the lines said, in this order; ``whole``: and no line is left out without ``...``."""
    rest = [" ".join(line.split()) for line in said.splitlines()]
    assert quoted.strip(), f"{where}: quote this:\n{said}"
    gap = not whole
    for line in quoted.splitlines():
        if line.strip() == "...":
            gap = True
            continue
        pattern = pattern_of(line)
        found = next((number for number, each in enumerate(rest) if re.fullmatch(pattern, each)), None)
        assert found is not None, f"{where}: {line!r} is not, or not here, in what was said:\n{said}"
        assert gap or found == 0, f"{where}: {rest[0]!r} is left out without ..."
        rest, gap = rest[found + 1 :], not whole
    assert gap or not rest, f"{where}: {rest[0]!r} is left out without ..."


def pattern_of(line: str) -> str:
    """``...`` stands for anything, a number with a decimal point for any number, white space for white space."""
    plain = re.escape(" ".join(line.split())).replace(r"\ ", " ").replace(r"\.\.\.", ".*")
    return re.sub(r"(?<![\w.])(?:\\-)?\d+\\\.\d+(?:e(?:\\[-+])?\d+)?(?![\w]|\\\.\d)", r"[\\d.e+-]+", plain)
