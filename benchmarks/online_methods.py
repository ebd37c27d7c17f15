"""Every loss on sampled responses, and every filter, in the demo's world: front share and reward by responses drawn."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml

from benchmarks import appending, measure, online_run, tables
from benchmarks.train_setup import Assignment, make_quiet
from benchmarks.train_task import Task
from moalign import config, recipes
from moalign.config import Config

WAYS = Path(__file__).with_name("online_methods.yaml")
SEEDS = (0, 1, 2)
OBJECTIVES = ("helpful", "harmless")  # in the order of the world's expected rewards


@dataclass(frozen=True)
class Request:
    """One method, trained once: everything that decides its figures. ``number_of_looks`` over the ``steps``."""

    method: str
    seed: int
    steps: int = 100
    number_of_looks: int = 4
    further: tuple[str, ...] = ()
    threads: int | None = None
    world: str = online_run.FIRST

    @property
    def identity(self) -> dict[str, Any]:
        """What a result is known again by."""
        found = {name: getattr(self, name) for name in ("method", "seed", "steps", "number_of_looks")}
        return found | {"changes": list(self.changes), "further": list(self.further)}

    @property
    def name(self) -> str:
        return f"{self.method}, seed {self.seed}"

    @property
    def changes(self) -> tuple[str, ...]:
        length = (f"train.steps={self.steps}", f"rollouts.rounds={self.steps}", f"seed={self.seed}")
        return (*ways()["common"], *length, *ways()["methods"][self.method], *self.further)

    @property
    def marks(self) -> list[int]:
        return online_run.marks(self.steps, self.number_of_looks)

    def guided(self, **guides: Path) -> Guided:
        """With the folders of the adapters that the method reads."""
        return Guided(self, {name: str(folder) for name, folder in guides.items()})

    @property
    def guides(self) -> list[str]:
        """Names of the adapters that the method reads."""
        return [name for name in ("policy", "judge") if any(f"{{{name}}}" in change for change in self.changes)]


@dataclass(frozen=True)
class Guided:
    """A request that can be trained: as ``online_run.train`` wants it."""

    request: Request
    folders: Mapping[str, str]

    @property
    def world(self) -> str:
        return self.request.world

    @property
    def marks(self) -> list[int]:
        return self.request.marks

    def settings(self) -> Config:
        """The configuration; a constant learning rate after the warm-up, so that a point along the way is also the end
        of a shorter run. Raises ConfigError where moalign knows none of it."""
        content = yaml.safe_load(recipes.read(online_run.RECIPE))
        content["train"]["schedule"] = "constant"
        changes = list(self.request.changes)
        for name, folder in self.folders.items():
            changes = [change.replace(f"{{{name}}}", folder) for change in changes]
        return config.from_mapping(content, changes)


@functools.cache
def ways() -> Mapping[str, Any]:
    """``online_methods.yaml``: what all have in common, and the methods by name."""
    return yaml.safe_load(WAYS.read_text(encoding="utf-8"))


def main(
    method: Annotated[list[str] | None, typer.Option(help="by its name; may be repeated; default all")] = None,
    seed: appending.Seeds = None,
    steps: Annotated[int, typer.Option(min=1, help="of every training")] = Request.steps,
    further: appending.Further = None,
    threads: appending.Threads = None,
    at_most: appending.AtMost = None,
    output: appending.Output = None,
    append: appending.Append = False,
) -> None:
    """Training after training, each measured exactly as it goes; no network. The output is written after each."""
    appending.check_names(method, ways()["methods"], "--method")
    wanted = [
        Request(name, each, steps, further=tuple(further or ()), threads=threads)
        for each, name in itertools.product(seed or SEEDS, method or list(ways()["methods"]))
    ]
    appending.run("online_methods", wanted, work, tables_of, write, output, append, at_most)


def write(output: Path, report: Mapping[str, Any]) -> None:
    tables.write(output, report, text_of(report))


def work(wanted: Sequence[Request], connection: Connection) -> None:
    """The child process. The same adapters serve all methods that read them."""
    from benchmarks import online_guides

    with tempfile.TemporaryDirectory(prefix="moalign-online-methods-") as folder:
        make_quiet(Assignment("", Task("", 0), folder, "cpu", wanted[0].threads, profile=False))

        @functools.cache
        def guide(name: str, seed: int) -> Path:
            make = {"policy": online_guides.policy, "judge": online_guides.judge}[name]
            return make(Path(folder) / f"{name}-{seed}", seed)

        for request in wanted:
            guided = request.guided(**{name: guide(name, request.seed) for name in request.guides})
            found = online_run.train(guided)
            drawn = drawn_by(guided.settings(), len(found["candidates"]))
            looks = [look | {"drawn": drawn * look["step"]} for look in found["looks"]]
            hardware = measure.hardware(torch.device("cpu"))
            connection.send(("result", found | {"looks": looks, "base": base(), "hardware": hardware}))


def drawn_by(settings: Config, candidates: int) -> int:
    """Responses that all candidates together sample in a step, greedy ones and those of the base not counted."""
    assert settings.rollouts is not None
    return candidates * settings.rollouts.prompts * settings.rollouts.samples


def base() -> list[float]:
    """Expected rewards of the untouched base, by enumeration."""
    from moalign.demo import grammar
    from moalign.demo import world as worlds

    prompts = tuple(grammar.HELD_OUT_PROMPTS)
    reference = online_run.base_logps(prompts)
    return [
        float(value) for value in worlds.evaluate(worlds.tiny_world(prompts, OBJECTIVES), reference, reference).expected
    ]


def gained(found: Mapping[str, Any], look: Mapping[str, Any]) -> float:
    """The weighted reward gained over the base, mean over the candidates, each by its own weights."""
    return statistics.mean(
        math.fsum(
            candidate["preference"][name] * (reward - before)
            for name, reward, before in zip(OBJECTIVES, rewards, found["base"], strict=True)
        )
        for candidate, rewards in zip(found["candidates"], look["expected"], strict=True)
    )


def tables_of(report: Mapping[str, Any]) -> list[tables.Table]:
    """A table for each length and each set of further changes."""
    made, results = [], report["results"]
    for steps, further in dict.fromkeys((found["steps"], tuple(found["further"])) for found in results):
        alike = [found for found in results if (found["steps"], tuple(found["further"])) == (steps, further)]
        made.append(_table(", ".join([f"{steps} steps", *further]), alike, report.get("not_run", {})))
    return made


def _table(title: str, results: Sequence[Mapping[str, Any]], not_run: Mapping[str, str]) -> tables.Table:
    drawn = [look["drawn"] for look in results[0]["looks"]]
    columns = [
        "method",
        *(f"front share after {number:,} responses" for number in drawn[:-1]),
        f"after {drawn[-1]:,}",
        "worst preference",
        "reward gained per thousand drawn",
        "responses to GRPO's share",
        "KL",
        "well-formed",
        "ms a step",
        "seeds",
    ]
    ways_run = {name: [found for found in results if found["method"] == name] for name in ways()["methods"]}
    rows = [[name, *_row(mine, ways_run["grpo"])] for name, mine in ways_run.items() if mine]
    return tables.Table(title, columns, rows, [f"Not run, {name}: {reason}" for name, reason in not_run.items()])


def _row(mine: Sequence[Mapping[str, Any]], grpo: Sequence[Mapping[str, Any]]) -> list[tables.Cell]:
    last = [found["looks"][-1] for found in mine]
    along = list(zip(*(found["looks"] for found in mine), strict=True))
    per_thousand = [1000 * gained(found, look) / look["drawn"] for found, look in zip(mine, last, strict=True)]
    return [
        *(f"{statistics.mean(look['share'] for look in looks):.3f}" for looks in along[:-1]),
        tables.mean([look["share"] for look in last]),
        tables.mean([look["worst"] for look in last]),
        f"{statistics.mean(per_thousand):.4f}",
        _reached(along, grpo),
        tables.mean([statistics.mean(look["kl"]) for look in last]),
        f"{statistics.mean(statistics.mean(look['mass']) for look in last):.3f}",
        f"{1000 * statistics.median(found['step_seconds'] for found in mine):.0f}",
        str(len(mine)),
    ]


def _reached(along: Sequence[Sequence[Mapping[str, Any]]], grpo: Sequence[Mapping[str, Any]]) -> str:
    """The first look whose mean is what GRPO has in the end, over the seeds that there are."""
    if not grpo:
        return ""
    goal = statistics.mean(found["looks"][-1]["share"] for found in grpo)
    for looks in along:
        if statistics.mean(look["share"] for look in looks) >= goal:
            return f"{looks[0]['drawn']:,}"
    return "never"


def text_of(report: Mapping[str, Any]) -> str:
    about = [
        "Front share: of what the best policy gains over the base, KL paid for, how much the best of three trained "
        "candidates gains; mean over even preferences, and the least (worst preference), by enumeration of every reply "
        "to the held-out prompts, after so many responses of all three together, with a constant learning rate. Reward "
        "gained: the weighted gold reward over the base's, by each candidate's own weights, at the end; the KL is not "
        "paid there. Responses drawn count whether a filter keeps them or not. KL and the probability of a well-formed "
        "reply: means over the candidates. ±: standard deviation over the seeds. Methods that read an adapter trained "
        "before, or a reward model, have learned from 320 judged responses of the base more, which do not count here.",
    ]
    return tables.markdown("Losses on sampled responses beside the best front", report, about, tables_of(report))


app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command()(main)

if __name__ == "__main__":
    app()
