"""The self-contained page about a run: no scripts, nothing loaded from elsewhere, every text escaped."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from moalign import storage
from moalign.report import analysis, wording
from moalign.report.curves import curves
from moalign.report.picture import draw
from moalign.report.source import Source, read_source

PAGE, PICTURE = "report.html", "front.png"
EVENT_WIDTH = 600


def write_page(run_directory: str | Path, front: Mapping[str, Any] | None = None) -> Path:
    """Write ``front.png`` and ``report.html`` into a run directory, from its own files alone; returns the page's path.

    ``front``: what is shown instead of ``front.json``, of a run that is not finished and has none. The same files give
    the same bytes. Raises RunError where there is no front yet or the folder cannot be written, CorruptFileError
    where ``front.json`` is not one. Other damage is told on the page itself.
    """
    run_directory = Path(run_directory)
    source = read_source(run_directory, front)
    draw(source.front, run_directory / PICTURE)
    text = render(source, storage.read_bytes(run_directory / PICTURE), run_directory.resolve().name)
    storage.write_text(run_directory / PAGE, text)
    return run_directory / PAGE


def render(source: Source, picture: bytes, title: str) -> str:
    """The page as text. ``picture`` is a PNG."""
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"printable": wording.printable, "number": wording.number}
    style = (folder / "page.css").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(
        title=title,
        style=Markup(style),  # our own file; its hash is all that the content policy lets style the page
        style_hash=_base64(hashlib.sha256(style.encode()).digest()),
        picture=_base64(picture),
        front=source.front,
        notices=source.notices,
        summary=wording.summary(source.front),
        outlook=analysis.outlook(source.front),
        analysis=analysis.facts(source.front),
        titles=[wording.objective_title(objective) for objective in source.front["objectives"]],
        detail_names=wording.detail_names(source.front["points"]),
        points=_points(source.front),
        training=_training(source),
        sections=[(name, _as_yaml(value)) for name, value in _ordered(source.run)],
        events=[wording.printable(json.dumps(event, ensure_ascii=False), EVENT_WIDTH) for event in source.events],
    )


def _points(front: dict[str, Any]) -> list[dict[str, Any]]:
    """What the table shows of each point, in words."""
    names = wording.objective_names(front)
    details = wording.detail_names(front["points"])
    rows = [
        {
            "id": point["id"],
            "preference": wording.preference_text(point["preference"], names),
            "scores": [wording.measure(point["scores"][name], point["stderr"].get(name)) for name in names],
            "kl": wording.number(point["kl"]),
            "details": [wording.number(point["details"].get(name)) for name in details],
            "contribution": wording.number(point["contribution"]) if "contribution" in point else "",
            "standing": wording.standing(point),
            "kind": point["kind"],
        }
        for point in front["points"]
    ]
    if front["base"] is None:
        return rows
    base = front["base"]
    scores = [wording.measure(base["scores"][name], base["stderr"].get(name)) for name in names]
    first = {"id": "base", "preference": "untouched", "scores": scores, "kl": "0", "details": [""] * len(details)}
    return [{**first, "contribution": "", "standing": "", "kind": "base"}, *rows]


def _training(source: Source) -> list[tuple[str, int, list[Any]]]:
    """(candidate, number of rows, its curves) for all that have metrics."""
    found = [(name, len(metrics.rows), curves(metrics.rows)) for name, metrics in source.metrics.items()]
    return [entry for entry in found if entry[2]]


def _ordered(run: dict[str, Any]) -> list[tuple[str, Any]]:
    """The configuration first, the rest in the alphabet's order."""
    return sorted(run.items(), key=lambda item: (item[0] != "config", item[0]))


def _as_yaml(value: object) -> str:
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110)
    return "\n".join(wording.printable(line) for line in text.removesuffix("...\n").splitlines())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
