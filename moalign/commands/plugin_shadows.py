"""Distributions with plugins that Python does not reach, because another installation of them comes first."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from moalign.api import ENTRY_POINT_GROUP


@dataclass(frozen=True)
class Shadow:
    """An installation that is behind another one on ``sys.path``."""

    name: str
    version: str
    reason: str


def shadowed_distributions() -> list[Shadow]:
    """In the order of ``sys.path``; the same folder found twice is no shadow."""
    first: dict[str, metadata.Distribution] = {}
    shadows = []
    for distribution in metadata.distributions():
        if not distribution.name or not distribution.entry_points.select(group=ENTRY_POINT_GROUP):
            continue
        front = first.setdefault(re.sub(r"[-_.]+", "-", distribution.name).lower(), distribution)
        here, there = (Path(str(found.locate_file(""))).resolve() for found in (distribution, front))
        if here != there:
            reason = f"{here} is behind {front.version} in {there} on the path; uninstall one of them"
            shadows.append(Shadow(distribution.name, distribution.version, reason))
    return shadows
