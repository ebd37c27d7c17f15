"""Every offline loss on the same responses, in the demo's world, whose best front is known; also with wrong labels."""

from __future__ import annotations

import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
import yaml

from benchmarks import appending, measure, offline_data, tables
from benchmarks.train_setup import Assignment, make_quiet
from benchmarks.train_task import Task
from moalign import config, recipes
from moalign.config import Config
from moalign.sweeps.observe import Observer

WAYS = Path(__file__).with_name("offline_methods.yaml")
SEEDS = (0, 1, 2)
NOISES = (0.0, 0.25)
POINTS = 3  # of the grid
GUIDES = {"dpo": False, "swapped": True}  # runs of dpo on the same pairs; whether with all labels swapped
LONGER = 4  # times the steps, to see what goes on to learn and what goes wrong


@dataclass(frozen=True)
class Request:
    """One loss from one file: everything that decides its front. ``longer``: how many times the steps."""

    method: str
    noise: float
    longer: int
    seed: int
    further: tuple[str, ...] = ()
    threads: int | None = None

    @property
    def changes(self) -> tuple[str, ...]:
        return (*ways()["common"], *ways()["methods"][self.method]["changes"], f"seed={self.seed}", *self.further)

    @property
    def identity(self) -> dict[str, Any]:
        """What a result is known again by."""
        found = {name: getattr(self, name) for name in ("method", "noise", "longer", "seed")}
        return found | {"changes": list(self.changes), "further": list(self.further)}

    @property
    def name(self) -> str:
        return f"{self.method}, noise {self.noise:g}, {self.longer} times the steps, seed {self.seed}"

    @property
    def guides(self) -> list[str]:
        """Of ``GUIDES``, those whose adapters the method reads."""
        return [name for name in GUIDES if any(f"{{{name}}}" in change for change in self.changes)]

    def settings(self, *more: str, **guides: Path) -> Config:
        """The configuration; ``guides``: the runs with the adapters that the method reads.

        Raises ConfigError where moalign knows none of it.
        """
        content, changes = yaml.safe_load(recipes.read("dpo")), [*self.changes]
        for name, directory in guides.items():
            own = f"{directory}/candidates/{{candidate}}"  # each one's, of the same preference
            changes = [change.replace(f"{{{name}}}", own) for change in changes]
        once = config.from_mapping(content, (*changes, *more))
        steps = f"train.steps={once.train.steps * self.longer}"
        return config.from_mapping(content, (*changes, steps, *more))


@functools.cache
def ways() -> Mapping[str, Any]:
    """``offline_methods.yaml``: what all have in common, and the methods by name."""
    return yaml.safe_load(WAYS.read_text(encoding="utf-8"))


def main(
    method: Annotated[list[str] | None, typer.Option(help="by its name; may be repeated; default all")] = None,
    noise: Annotated[
        list[float] | None, typer.Option(min=0, max=1, help="share of wrong labels; may be repeated; default 0 0.25")
    ] = None,
    longer: Annotated[
        list[int] | None, typer.Option(min=1, help=f"times the steps; may be repeated; default 1 {LONGER}")
    ] = None,
    seed: appending.Seeds = None,
    further: appending.Further = None,
    threads: appending.Threads = None,
    at_most: appending.AtMost = None,
    output: appending.Output = None,
    append: appending.Append = False,
) -> None:
    """Sweep after sweep, each an ordinary one measured exactly; no network. The output is written after each."""
    appending.check_names(method, ways()["methods"], "--method")
    wanted = requests(method, noise, longer, seed, further or (), threads)
    appending.run("offline_methods", wanted, work, tables_of, write, output, append, at_most)


def write(output: Path, report: Mapping[str, Any]) -> None:
    tables.write(output, report, text_of(report))


def requests(
    methods: Sequence[str] | None,
    noises: Sequence[float] | None,
    longer: Sequence[int] | None,
    seeds: Sequence[int] | None,
    further: Sequence[str] = (),
    threads: int | None = None,
) -> list[Request]:
    """Seed by seed, the short ones first, so that what is there after a while compares all methods."""
    every = itertools.product(
        seeds or SEEDS, longer or (1, LONGER), noises or NOISES, methods or list(ways()["methods"])
    )
    return [Request(method, noise, times, seed, tuple(further), threads) for seed, times, noise, method in every]


def work(wanted: Sequence[Request], connection: Connection) -> None:
    """The child process. The same file serves all methods that learn from it, and so do the same guides."""
    with tempfile.TemporaryDirectory(prefix="moalign-offline-methods-") as folder:
        make_quiet(Assignment("", Task("", 0), folder, "cpu", wanted[0].threads, profile=False))
        directories = (Path(tempfile.mkdtemp(dir=folder)) for _ in itertools.count())

        @functools.cache
        def data(kind: offline_data.Kind, noise: float, seed: int, swapped: bool = False) -> tuple[str, ...]:
            return offline_data.write(judges(seed), next(directories), kind, noise, swapped=swapped)

        @functools.cache
        def guide(name: str, noise: float, longer: int, seed: int) -> tuple[Path, Spent]:
            settings = Request("dpo", noise, longer, seed).settings(*data("pairs", noise, seed, GUIDES[name]))
            directory = next(directories) / "run"
            return directory, train(settings, directory)

        for request in wanted:
            kind = ways()["methods"][request.method]["data"]
            guides = {name: guide(name, request.noise, request.longer, request.seed) for name in request.guides}
            runs = {name: directory for name, (directory, _) in guides.items()}
            settings = request.settings(*data(kind, request.noise, request.seed), **runs)
            found = reached(settings, next(directories) / "run", [spent for _, spent in guides.values()])
            connection.send(("result", found | {"hardware": measure.hardware(torch.device("cpu"))}))


def judges(seed: int) -> Config:
    """Of judges for whom ``beta`` 1 of the logistic loss on pairs has the world's own optimum."""
    content = yaml.safe_load(recipes.read("dpo"))
    return config.from_mapping(content, (*ways()["common"], "loss.beta=1.0", f"seed={seed}"))


class Spent(NamedTuple):
    """On a run: what its candidates were trained on, and how long it took with their evaluation."""

    tokens: int
    seconds: float


def train(settings: Config, directory: Path) -> Spent:
    from moalign import registry
    from moalign.sweeps import run
    from moalign.sweeps.archive import Archive

    start = time.perf_counter()
    run.start(settings, directory, registry.discover(), Observer())
    return Spent(sum(outcome.tokens for outcome in Archive.open(directory).history), time.perf_counter() - start)


def reached(settings: Config, directory: Path, before: Sequence[Spent] = ()) -> dict[str, Any]:
    """The front of one loss, measured exactly; with what its guides cost ``before``."""
    from moalign.demo import job
    from moalign.sweeps.archive import Archive

    spent = [*before, train(settings, directory)]
    exact, history = job.measure(directory, Observer()), Archive.open(directory).history
    kept = ("id", "kind", "tokens", "scores", "kl", "preference")
    return {name: exact[name] for name in ("front_share", "front_share_worst", "hypervolume_share")} | {
        "tokens": sum(each.tokens for each in spent),
        "points": [
            {name: point[name] for name in kept} | {"well_formed": point["details"]["well-formed"]}
            for point in exact["points"]
        ],
        "failed": {outcome.id: outcome.error for outcome in history if outcome.status == "failed"},
        "seconds": sum(each.seconds for each in spent),
    }


def tables_of(report: Mapping[str, Any]) -> list[tables.Table]:
    """A table for each share of wrong labels and each set of further changes."""
    made = []
    results = report["results"]
    for noise in sorted({found["noise"] for found in results}):
        for further in dict.fromkeys(tuple(found["further"]) for found in results):
            founds = [each for each in results if each["noise"] == noise and tuple(each["further"]) == further]
            title = f"{noise:.0%} of the labels wrong" if noise else "Labels as the judges gave them"
            reasons = [f"Not run, {name}: {reason}" for name, reason in report.get("not_run", {}).items()]
            reasons = [reason for reason in reasons if f"noise {noise:g}," in reason]
            made.append(_table(title + "".join(f", {change}" for change in further), founds, reasons))
    return made


def _table(title: str, results: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> tables.Table:
    columns = [
        "loss",
        "learns from",
        "front share",
        "worst preference",
        "well-formed",
        "KL",
        "thousand tokens",
        f"front share after {LONGER} times the steps",
        "seconds",
        "seeds",
    ]
    rows = []
    for method, how in ways()["methods"].items():
        of_method = [found for found in results if found["method"] == method]
        short, long = ([each for each in of_method if each["longer"] == times] for times in (1, LONGER))
        if short:
            rows.append([method, how["data"], *_row(short, long)])
    failed = {f"{each['method']}, {name}": error for each in results for name, error in each["failed"].items()}
    return tables.Table(title, columns, rows, [*(f"{name} failed: {error}" for name, error in failed.items()), *notes])


def _row(founds: Sequence[Mapping[str, Any]], longer: Sequence[Mapping[str, Any]]) -> list[tables.Cell]:
    def over_points(name: str) -> list[float]:
        return [statistics.mean(point[name] for point in found["points"]) for found in founds]

    return [
        tables.mean([found["front_share"] for found in founds]),
        tables.mean([found["front_share_worst"] for found in founds]),
        tables.mean(over_points("well_formed")),
        tables.mean(over_points("kl")),
        f"{statistics.mean(found['tokens'] for found in founds) / 1000:,.0f}",
        tables.mean([found["front_share"] for found in longer]) if longer else "",
        f"{statistics.median(found['seconds'] for found in founds):.0f}",
        str(len(founds)),
    ]


def text_of(report: Mapping[str, Any]) -> str:
    about = [
        "Front share: of what the best policy gains over the base, KL paid for, how much the best point of the front "
        "gains; mean over even preferences, and the least (worst preference), by enumeration of every reply to the "
        "held-out prompts. Well-formed: the probability of a reply of the grammar, and KL from the base, means over "
        f"the {POINTS} trained points. Front share after {LONGER} times the steps, on the same data: where it is less, "
        "the loss went on to fit its labels while the true rewards fell (over-optimisation). ±: standard deviation "
        "over the seeds.",
    ]
    return tables.markdown("Offline losses beside the best front", report, about, tables_of(report))


app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command()(main)

if __name__ == "__main__":
    app()
