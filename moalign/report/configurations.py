"""Hyper-parameters side by side, in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from moalign.report import wording


def configurations_table(configurations: Sequence[Mapping[str, Any]]) -> Table:
    """``configurations`` of ``front.json``, the best first: hypervolume over the seeds that chose, and over others."""
    held_out = any(one["held_out"] is not None for one in configurations)
    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title="Configurations", title_justify="left"
    )
    table.add_column("changes", overflow="fold")
    for head in ("seeds", "points", "hypervolume", *(["held-out seeds"] if held_out else [])):
        table.add_column(head, justify="right")
    for one in sorted(configurations, key=_rank):
        changes = ", ".join(f"{wording.printable(key)} {value}" for key, value in one["changes"].items())
        cells = [str(len(one["seeds"])), str(one["points"]), _deviating(one["hypervolume"], one["stddev"])]
        if held_out:
            cells.append(_deviating(one["held_out"], one["held_out_stddev"]))
        table.add_row(Text(changes or "as configured"), *cells)
    chose = "; held-out seeds chose nothing" if held_out else ""
    table.caption = f"hypervolume with KL paid for, ± its standard deviation over seeds{chose}"
    table.caption_justify = "left"
    return table


def _rank(one: Mapping[str, Any]) -> tuple[bool, float, float]:
    """Those with held-out seeds first."""
    return one["held_out"] is None, -(one["held_out"] or 0.0), -(one["hypervolume"] or 0.0)


def _deviating(mean: float | None, deviation: float | None) -> str:
    return wording.number(None) if mean is None else wording.measure(mean, deviation)
