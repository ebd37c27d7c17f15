"""The front as a table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from moalign.report import analysis, wording
from moalign.report.configurations import configurations_table

DETAILS_SHOWN = 4
# details that the terminal has no room for, like those with a "/" in their name
NARROW = {
    "kl_stderr",
    "ended",
    "optimum",
    "optimum_stderr",
    "utility",
    "utility_stderr",
    "optimum_deviation",
    "response_tokens",
}


def show_front(front: Mapping[str, Any], console: Console) -> None:
    """A front (the content of ``front.json``), and last how good it is: one line, however narrow the output is."""
    console.print(_front(front))
    outlook = analysis.outlook(front)
    if outlook is not None:
        console.print(outlook, highlight=False, markup=False, soft_wrap=True)


def _front(front: Mapping[str, Any]) -> RenderableType:
    """Its points, a summary, and the failures."""
    names = wording.detail_names(front["points"])
    details = [name for name in names if "/" not in name and name not in NARROW]
    parts: list[RenderableType] = [_table(front, details[:DETAILS_SHOWN])]
    lines = wording.summary(front)
    hidden = [name for name in names if name not in details[:DETAILS_SHOWN]]
    if hidden:
        lines.append(("In the report", ", ".join(wording.printable(name) for name in hidden)))
    parts.append(summary_table(lines))
    if front.get("configurations"):
        parts.append(configurations_table(front["configurations"]))
    if front["failed"]:
        parts.append(_failures(front["failed"]))
    return Group(*parts)


def _table(front: Mapping[str, Any], details: list[str]) -> Table:
    names = wording.objective_names(front)
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption="● on the front   ○ dominated",
        caption_justify="left",
    )
    widest_id = max((len(wording.printable(point["id"])) + 2 for point in front["points"]), default=0)
    table.add_column("candidate", overflow="fold", min_width=min(24, widest_id))
    preferences = [wording.preference_text(point["preference"], names) for point in front["points"]]
    said = [text.replace(" / ", "-") in point["id"] for text, point in zip(preferences, front["points"], strict=True)]
    if not all(said):  # ids such as w-0.30-0.70 say it already, and the terminal is narrow
        widest = max(map(len, preferences))
        table.add_column("preference", min_width=min(24, widest))  # values in the order of the columns that follow
    for objective in front["objectives"]:
        table.add_column(Text(wording.objective_title(objective, 20)), justify="right")
    table.add_column("KL", justify="right")
    for name in details:
        table.add_column(Text(wording.printable(name, 20).replace("_", "\n")), justify="right")
    if front["base"] is not None:
        untouched = [] if all(said) else ["untouched"]
        table.add_row("  base", *untouched, *_scores(front["base"], names), "0", style="dim")
    for point, preference in zip(front["points"], preferences, strict=True):
        cells: list[RenderableType] = [
            Text(("○ " if point["dominated"] else "● ") + wording.printable(point["id"])),
            *([] if all(said) else [Text(preference)]),
            *_scores(point, names),
            wording.number(point["kl"]),
            *(wording.number(point["details"].get(name)) for name in details),
        ]
        table.add_row(*cells, style="dim" if point["dominated"] else "")
    return table


def _scores(measured: Mapping[str, Any], names: list[str]) -> list[str]:
    return [wording.measure(measured["scores"][name], measured["stderr"].get(name)) for name in names]


def summary_table(lines: Sequence[tuple[str, str]]) -> Table:
    """What there is to say, as (what, value), none of it read as markup."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for what, value in lines:
        grid.add_row(what, Text(value))
    return grid


def _failures(failed: list[Mapping[str, Any]]) -> Group:
    rows = [Text(f"  {wording.printable(entry['id'])}: {wording.printable(entry['error'])}") for entry in failed]
    return Group(Text("\nFailed candidates", style="bold red"), *rows)
