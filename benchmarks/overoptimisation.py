"""Gold reward against the distance from the base, where what is trained on is a proxy: which remedies help how far."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from torch import Tensor

from benchmarks import appending, measure, online_run, overoptimisation_tables
from benchmarks.proxies import MEMBERS, Proxies, proxies
from benchmarks.train_setup import Assignment, make_quiet
from benchmarks.train_task import Task
from moalign import config, recipes
from moalign.api import Combining
from moalign.config import Config
from moalign.sweeps import callables
from moalign.types import Sample

WAYS = Path(__file__).with_name("overoptimisation.yaml")
SEEDS = (0, 1, 2)
RHO = 0.7
OBJECTIVES = {"two": ("quality", "second")}  # else one

Scorer = Callable[[Sequence[Sample]], list[float]]


@dataclass(frozen=True)
class Request:
    """One training on proxies: everything that decides its figures. ``number_of_looks`` over the ``steps``."""

    way: str
    seed: int
    rho: float = RHO
    steps: int = 90
    number_of_looks: int = 15
    further: tuple[str, ...] = ()
    threads: int | None = None
    world: str = online_run.FIRST

    @property
    def identity(self) -> dict[str, Any]:
        """What a result is known again by."""
        found = {name: getattr(self, name) for name in ("way", "seed", "rho", "steps", "number_of_looks")}
        way = ways()["ways"][self.way]
        return found | {key: way[key] for key in ("rewards", "lam") if key in way} | {"changes": list(self.changes)}

    @property
    def name(self) -> str:
        return f"{self.way}, seed {self.seed}"

    @property
    def changes(self) -> tuple[str, ...]:
        length = (f"train.steps={self.steps}", f"rollouts.rounds={self.steps}", f"seed={self.seed}")
        return (*ways()["common"], *length, *ways()["ways"][self.way]["changes"], *self.further)

    @property
    def marks(self) -> list[int]:
        return online_run.marks(self.steps, self.number_of_looks)

    def rewards(self, made: Proxies) -> dict[str, Scorer]:
        """What each objective is trained on."""
        way = ways()["ways"][self.way]
        if way["rewards"] == "two":
            return {name: functools.partial(made.score, member) for member, name in enumerate(OBJECTIVES["two"])}
        if way["rewards"] == "single":
            return {"quality": functools.partial(made.score, 0)}
        together = Combining(combine=way["rewards"], lam=way.get("lam"))

        def score(samples: Sequence[Sample]) -> list[float]:
            each = [made.score(member, samples) for member in range(MEMBERS)]
            return [together.combined(scores) for scores in zip(*each, strict=True)]

        return {"quality": score}

    def settings(self) -> Config:
        """The configuration; a constant learning rate after the warm-up. Raises ConfigError where moalign knows none
        of it."""
        content = yaml.safe_load(recipes.read(online_run.RECIPE))
        names = OBJECTIVES.get(ways()["ways"][self.way]["rewards"], ("quality",))
        content |= {"objectives": {name: {} for name in names}, "evaluate": {"kind": "generate", "samples": 1}}
        content["train"]["schedule"] = "constant"
        return callables.replaced(config.from_mapping(content, self.changes), dict.fromkeys(names, _nothing))


def _nothing(samples: Sequence[Sample]) -> list[float]:
    raise NotImplementedError("a name alone; the reward itself is in the registry")


@functools.cache
def ways() -> Mapping[str, Any]:
    """``overoptimisation.yaml``: what all have in common, and the ways by name."""
    return yaml.safe_load(WAYS.read_text(encoding="utf-8"))


def main(
    way: Annotated[list[str] | None, typer.Option(help="by its name; may be repeated; default all")] = None,
    seed: appending.Seeds = None,
    rho: Annotated[float, typer.Option(min=0, max=1, help="correlation of proxy and gold reward")] = RHO,
    steps: Annotated[int, typer.Option(min=1, help="of every training")] = Request.steps,
    further: appending.Further = None,
    threads: appending.Threads = None,
    at_most: appending.AtMost = None,
    output: appending.Output = None,
    append: appending.Append = False,
) -> None:
    """Training after training, each measured exactly as it goes; no network. The output is written after each."""
    appending.check_names(way, ways()["ways"], "--way")
    wanted = [
        Request(name, each, rho, steps, further=tuple(further or ()), threads=threads)
        for each, name in itertools.product(seed or SEEDS, way or list(ways()["ways"]))
    ]
    show = overoptimisation_tables.tables_of
    appending.run("overoptimisation", wanted, work, show, overoptimisation_tables.write, output, append, at_most)


def work(wanted: Sequence[Request], connection: Connection) -> None:
    """The child process."""
    with tempfile.TemporaryDirectory(prefix="moalign-overoptimisation-") as folder:
        make_quiet(Assignment("", Task("", 0), folder, "cpu", wanted[0].threads, profile=False))
        for request in wanted:
            found = reached(request)
            connection.send(("result", found | {"hardware": measure.hardware(torch.device("cpu"))}))


def reached(request: Request) -> dict[str, Any]:
    """What one training finds on its way, and beside it the exact optima for the proxy and for the gold reward."""
    from moalign import registry

    made = proxies(request.rho, request.seed)
    installed = callables.installed(registry.discover(), request.rewards(made))
    found = online_run.train(request, installed, lambda model: functools.partial(look, Probe(model, made)))
    return {name: found[name] for name in ("looks", "step_seconds")} | {
        "overrated": [list(pair) for pair in made.overrated],
        "deviation": made.deviation(made.gold),
        "optima": {name: optima(made, reward) for name, reward in (("proxy", made.members[0]), ("gold", made.gold))},
    }


class Probe:
    """Log-probabilities of all outcomes under the policy in a slot, [P,R+1]."""

    def __init__(self, model: Any, made: Proxies) -> None:
        from moalign.demo.enumeration import enumerate_replies

        self.model, self.made = model, made
        self.replies = enumerate_replies(model.tokeniser.tokenizer, made.prompts)

    @torch.no_grad()
    def __call__(self, slot: str) -> Tensor:
        from moalign import lora
        from moalign.demo import world as worlds
        from moalign.demo.enumeration import reply_logps

        with lora.active(self.model.policy, slot):
            return worlds.outcomes(reply_logps(self.model.policy, self.replies))


def look(probe: Probe, slots: Sequence[str]) -> dict[str, Any]:
    """Of the one policy that is trained."""
    (slot,) = slots
    return figures(probe.made, probe(slot))


def figures(made: Proxies, policy: Tensor) -> dict[str, float]:
    """Gained rewards, KL and chi2 from the base of a policy [P,R+1], means over prompts; ``mass``: of well-formed."""
    away = policy - made.base
    return {
        "gold": made.gained(policy, made.gold),
        "proxy": made.gained(policy, made.members[0]),
        "kl": float((policy.exp() * away).sum(-1).mean()),
        "chi2": float((policy.exp() * away.expm1()).sum(-1).mean()),
        "mass": float((1 - policy[:, -1].exp()).mean()),
    }


def optima(made: Proxies, rewards: Tensor) -> list[dict[str, float]]:
    """The best policies for the rewards at prices of KL from 1 down to 0.01: base times exp(r / price), exactly."""
    prices = [10 ** (-step / 10) for step in range(21)]
    return [figures(made, (made.base + rewards / price).log_softmax(-1)) for price in prices]


app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command()(main)

if __name__ == "__main__":
    app()
