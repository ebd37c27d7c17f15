"""Markdown whose code blocks are tested: the blocks of a file, and a shell in which its commands are typed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import command_line

ROOT = Path(__file__).parents[1]
FENCED = re.compile(r"^```([^\n]*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: what stands behind the fence, its text, and the line of the file that it begins in."""

    language: str
    text: str
    line: int


def blocks_of(file: Path) -> list[Block]:
    text = file.read_text(encoding="utf-8")
    return [Block(m[1].strip(), m[2], text.count("\n", 0, m.start()) + 1) for m in FENCED.finditer(text)]


def shell(command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """With the scripts of the Python that runs the tests in front of the path, and ``moalign`` without its imports."""
    path = f"{command_line.folder()}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        command, shell=True, capture_output=True, text=True, cwd=cwd, env=os.environ | {"PATH": path} | environment
    )


def folders(*first: Path) -> str:
    """A PYTHONPATH that begins with these."""
    return os.pathsep.join(filter(None, [*map(str, first), os.environ.get("PYTHONPATH", "")]))
