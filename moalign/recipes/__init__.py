"""Commented starter configurations for ``moalign init``; each is a file in this folder."""

from __future__ import annotations

from pathlib import Path

from moalign.errors import ConfigError
from moalign.validation import nearest

FOLDER = Path(__file__).parent


def names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def read(name: str) -> str:
    """The text of a recipe. Raises ConfigError with the nearest name."""
    if name not in names():
        raise ConfigError(f"there is no recipe '{name}'{nearest(name, names())}")
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
