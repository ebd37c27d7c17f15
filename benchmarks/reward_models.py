"""How well reward models order people's judgements of answers, beside two rules that look at length alone.

The data is QA-FEEDBACK, the base what ``benchmarks/qa_feedback/make_base.py`` makes of its text (benchmarks/README.md).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console

import moalign
from benchmarks import measure, tables
from moalign.progress import ConsoleObserver

ASPECTS = ("overall", "relevance", "factuality", "completeness", "conciseness")
RULES = ("always longer", "always shorter")


def main(
    data: Annotated[Path, typer.Option(help="the folder with feedback.json")],
    base: Annotated[Path, typer.Option(help="of make_base.py --held-out 0.2")],
    form: Annotated[
        list[str] | None,
        typer.Option(help="of the reward model, with options as in YAML; may be repeated; default bradley-terry"),
    ] = None,
    members: Annotated[int, typer.Option(min=1, help="seeds, trained side by side")] = 3,
    further: Annotated[list[str] | None, typer.Option("--set", help="key.path=value; may be repeated")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="of torch; default: torch's own choice")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON; a Markdown table is written beside it")] = None,
) -> None:
    """One reward model for all aspects for each form; the held-out questions are those that the base has not seen."""
    if threads:
        torch.set_num_threads(threads)
    console = Console()
    report = tables.begin("reward_models", measure.command_line("benchmarks.reward_models"), None)
    for each in form or ["bradley-terry"]:
        settings = settings_of(data, base, each, members)
        report["results"].append(trained(each, settings, further or (), ConsoleObserver(console)))
        if output is not None:
            tables.write(output, report, text_of(report))
    tables.show(tables_of(report["results"]), console)


def settings_of(data: Path, base: Path, form: str, members: int) -> dict[str, Any]:
    """Settled before the first run, and not tuned: the held-out questions have chosen nothing."""
    return {
        "model": {"path": str(base), "lora": {"r": 8}},
        "objectives": dict.fromkeys(ASPECTS),
        "data": {
            "path": str(data / "feedback.json"),
            "reader": {"name": "qa-feedback", "passages": 0},
            "held_out": 0.2,
            "max_length": 384,
        },
        "reward_model": yaml.safe_load(form),
        "members": members,
        "train": {"steps": 100, "pairs_per_step": 16, "lr": 0.001},
        "seed": 0,
    }


def trained(
    form: str, settings: Mapping[str, Any], changes: Sequence[str], observer: ConsoleObserver
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="moalign-reward-models-") as folder:
        start = time.perf_counter()
        try:
            found = moalign.train_reward_model(settings, Path(folder) / "reward-model", changes, observer)
        finally:
            observer.close()
        seconds = time.perf_counter() - start
    about = {"form": form, "settings": without_folders(settings), "changes": list(changes)}
    return about | {"seconds": seconds, "report": found, "hardware": measure.hardware(torch.device("cpu"))}


def without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings; of base and data the name alone, since they lie elsewhere on other machines."""
    named = {key: dict(settings[key], path=Path(settings[key]["path"]).name) for key in ("model", "data")}
    return dict(settings) | named


def tables_of(results: Sequence[Mapping[str, Any]]) -> list[tables.Table]:
    return [table for result in results for table in (_accuracies(result), _agreement(result))]


def _accuracies(result: Mapping[str, Any]) -> tables.Table:
    report = result["report"]
    rows = []
    for name in ASPECTS:
        found = report["per_objective"].get(name)
        if found is None:
            continue
        own = found["member_accuracy"]
        spread = "" if own["spread"] is None else f" ± {own['spread']:.3f}"
        rules = [_figure(found["baselines"][rule]) for rule in RULES]
        error = "-" if found["calibration_error"] is None else f"{found['calibration_error']:.3f}"
        single = f"{own['mean']:.3f}{spread}"
        row = [name, str(found["pairs"]), str(report["ties"].get(name, 0)), single, _figure(found["accuracy"])]
        rows.append([*row, *rules, _figure(found["gain"]), error])
    columns = [
        "aspect",
        "pairs",
        "ties",
        "one member",
        "mean of members' scores",
        *RULES,
        "gain over the better",
        "ECE",
    ]
    note = (
        f"{report['members']} members, {report['pairs']} held-out pairs of {report['groups']} questions, "
        f"{result['seconds']:.0f} s for all members. One member: mean accuracy ± deviation over members; all other ±: "
        "standard errors, clustered by question."
    )
    return tables.Table(result["form"], columns, rows, [note])


def _agreement(result: Mapping[str, Any]) -> tables.Table:
    """How often the head of a column orders the pairs as the judges of the row did."""
    report = result["report"]
    at = {name: place for place, name in enumerate(report["objectives"])}
    rows = [
        [name, *["-" if value is None else f"{value:.3f}" for value in (table[at[other]] for other in ASPECTS)]]
        for name in ASPECTS
        for table in [report["agreement"][at[name]]]
    ]
    title = f"{result['form']}: heads (columns) on the pairs of each aspect (rows)"
    return tables.Table(title, ["judged by", *ASPECTS], rows)


def _figure(figure: Mapping[str, float | None]) -> str:
    error = figure["stderr"]
    return f"{figure['value']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def text_of(report: Mapping[str, Any]) -> str:
    return tables.markdown("Reward models on human judgements", report, [ABOUT], tables_of(report["results"]))


ABOUT = (
    "One model with a head for each aspect, learned from pairs; QA-FEEDBACK has no scores, so there is nothing for "
    "forms that learn from scores. `conciseness` is the shorter answer by characters, so the rule `always shorter` "
    "(in tokens) is nearly its definition. `gain` is accuracy minus that of the better of the two rules, pair by pair."
)


if __name__ == "__main__":
    typer.run(main)
