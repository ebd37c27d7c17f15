"""The report of a reward model as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

Report = Mapping[str, Any]
CHOSE = "train.early_stop looked at these held-out judgements and they chose the weights: figures are a little too good"


def tables(report: Report) -> list[Table]:
    """Of objectives; of members, where there are several; how often heads agree with judges, and heads with heads."""
    if not report["per_objective"]:
        return []
    shown = [_objectives(report)]
    if report["members"] > 1:
        shown.append(_members(report))
    if len(report["objectives"]) > 1:
        agreement = "how often the head of a column orders the pairs as the judges of the row did"
        shown.append(_matrix(agreement, report, report["agreement"]))
        shown.append(_matrix("correlation of ranks between heads, held-out responses", report, report["spearman"]))
    return shown


def notes(report: Report) -> list[str]:
    """What the figures mean."""
    if not report["per_objective"]:
        return ["no held-out pair is judged, so there is nothing to compare with; raise data.held_out"]
    counted = (
        f"{report['pairs']} held-out pairs of {report['groups']} groups; {sum(report['ties'].values())} ties left out"
    )
    return [
        f"{counted}. ±: standard error, clustered by group (-: fewer than 5 groups). longer, shorter: what is right if "
        "the response of more, or fewer, tokens always is. gain: accuracy minus that of the better of these two on the "
        "same pairs",
        f"ECE: {report['calibration_error']}; {report['probability']}",
        *[CHOSE for early_stop in [report.get("early_stop", False)] if early_stop],
    ]


def _objectives(report: Report) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("objective", "pairs", "accuracy", "longer", "shorter", "gain", "ECE"):
        table.add_column(column, justify="left" if column == "objective" else "right")
    for name in report["objectives"]:
        found = report["per_objective"].get(name)
        if found is None:
            table.add_row(name, "0", *["-"] * 5)
            continue
        rules = found["baselines"]
        figures = [found["accuracy"], rules["always longer"], rules["always shorter"], found["gain"]]
        table.add_row(
            name, str(found["pairs"]), *[with_error(each) for each in figures], number(found["calibration_error"])
        )
    return table


def _members(report: Report) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("accuracy of members", "mean", "deviation", "of the mean of their scores"):
        table.add_column(column, justify="left" if column == "accuracy of members" else "right")
    for name, found in report["per_objective"].items():
        own = found["member_accuracy"]
        table.add_row(name, number(own["mean"]), number(own["spread"]), number(found["accuracy"]["value"]))
    return table


def _matrix(title: str, report: Report, values: Sequence[Sequence[float | None]]) -> Table:
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="dim")
    table.add_column("")
    for name in report["objectives"]:
        table.add_column(name, justify="right")
    for name, row in zip(report["objectives"], values, strict=True):
        table.add_row(name, *[number(value) for value in row])
    return table


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def with_error(figure: Mapping[str, float | None]) -> str:
    return f"{number(figure['value'])}±{number(figure['stderr'])}"
