"""Ways to save work, each a list of changes to a recipe, and the front that a sweep with these changes reaches."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moalign import config, recipes
from moalign.config import Config
from moalign.sweeps.observe import Observer
from moalign.types import Candidate, Outcome

TRL = "TRL, K runs"


@dataclass(frozen=True)
class Part:
    """What is compared with what: ``ways`` by name, each as ``--set`` takes it; the first is what others refer to.

    ``layers``: of the base, where it is not the shipped one but another of the same world. ``timing``: short sweeps,
    for the time of a step and not for the front.
    """

    title: str
    ways: Mapping[str, tuple[str, ...]]
    common: tuple[str, ...] = ()
    recipe: str = "rebel"
    layers: int | None = None
    timing: bool = False


SOUP = ("search.name=soup", "search.trained=3")
LAYERS = {
    "all layers": (),
    "upper three quarters": ("model.lora.layers=0.75",),
    "upper half": ("model.lora.layers=upper-half",),
    "upper quarter": ("model.lora.layers=0.25",),
}
PARTS: dict[str, Part] = {
    "fill": Part(
        "11 points, filled in different ways",
        {
            "all trained": (),
            "soup, 3 trained": SOUP,
            "soup, 5 trained": ("search.name=soup", "search.trained=5"),
            "3 fresh, 8 warm starts": ("search.warm_start=neighbour",),
            "3 fresh, 8 warm starts, half the steps": ("search.warm_start=neighbour", "search.warm_steps=0.1"),
        },
        common=("search.points=11", "train.together=6"),
    ),
    "layers": Part(
        "Share of the layers with adapters, base of 4 layers, 3 trained and 4 mixed",
        LAYERS,
        common=(*SOUP, "search.points=7", "train.together=3"),
        layers=4,
    ),
    "layers-shipped": Part(
        "The same with the shipped base of 2 layers",
        {name: LAYERS[name] for name in ("all layers", "upper half")},
        common=(*SOUP, "search.points=7", "train.together=3"),
    ),
    "step": Part(
        "A training step with adapters on a share of the layers, base of 4 layers",
        {
            f"{name}, {how}": (*changes, f"train.together={together}")
            for how, together in (("7 together", 7), ("one by one", 1))
            for name, changes in LAYERS.items()
        },
        common=("search.points=7", "train.steps=16", "rollouts.rounds=1", "evaluate.samples=1"),
        layers=4,
        timing=True,
    ),
    "peers": Part(
        "5 points from the same preference pairs, moalign beside TRL's DPOTrainer",
        {
            "moalign, one pass": ("train.together=5",),
            "moalign, one by one": ("train.together=1",),
            "moalign, one pass, 32 judgements a step": ("train.together=5", "train.pairs_per_step=32"),
            "moalign, one pass, combine: modpo": ("train.together=5", "combine.name=modpo"),
            TRL: (),
        },
        common=("search.points=5", "loss.beta=1.0", "train.steps=150", "train.lr=2.0e-3"),
        recipe="dpo",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One sweep: everything that decides its front. ``base``: directory of another base model."""

    part: str
    way: str
    seed: int
    further: tuple[str, ...] = ()
    base: str | None = None
    threads: int | None = None

    @property
    def changes(self) -> tuple[str, ...]:
        part = PARTS[self.part]
        return (*part.common, *part.ways[self.way], f"seed={self.seed}", *self.further)

    @property
    def identity(self) -> dict[str, Any]:
        """What a result is known again by."""
        further = list(self.further)
        return {
            "part": self.part,
            "way": self.way,
            "seed": self.seed,
            "changes": list(self.changes),
            "further": further,
        }

    def settings(self, *more: str) -> Config:
        """The configuration. Raises ConfigError where moalign knows none of it."""
        import yaml

        base = (f"model.path={self.base}",) if self.base else ()
        return config.from_mapping(yaml.safe_load(recipes.read(PARTS[self.part].recipe)), (*self.changes, *base, *more))


@dataclass
class Steps(Observer):
    """Seconds of each training step, per candidate of the group that is trained together."""

    group: list[str] = field(default_factory=list)
    before: float | None = None
    seconds: list[float] = field(default_factory=list)

    def on_candidate_start(self, candidate: Candidate) -> None:
        if self.before is not None:
            self.group, self.before = [], None
        self.group.append(candidate.id)

    def on_step(self, candidate: Candidate, step: int, metrics: dict[str, Any]) -> None:
        if candidate.id == self.group[0]:
            now = time.perf_counter()
            if self.before is not None:
                self.seconds.append((now - self.before) / len(self.group))
            self.before = now

    def on_candidate_end(self, outcome: Outcome) -> None:
        if outcome.error is not None:
            raise RuntimeError(f"{outcome.id} failed: {outcome.error}")


def run_sweep(settings: Config, *, measured: bool = True) -> dict[str, Any]:
    """An ordinary sweep in a directory that is thrown away: what its front reaches, and what it cost."""
    from moalign import registry
    from moalign.demo import job
    from moalign.sweeps import run

    steps = Steps()
    with tempfile.TemporaryDirectory(prefix="moalign-front-share-") as directory:
        start = time.perf_counter()
        front = run.start(settings, Path(directory), registry.discover(), steps)
        seconds = time.perf_counter() - start
        if measured:
            front = job.measure(Path(directory), Observer())
    points = front["points"]
    return {
        **{name: front[name] for name in ("front_share", "front_share_worst", "hypervolume_share") if measured},
        "tokens": sum(point["tokens"] for point in points),
        "points": [{name: point[name] for name in ("id", "kind", "tokens", "scores", "kl")} for point in points],
        "seconds": seconds,
        "step_seconds": statistics.median(steps.seconds) if steps.seconds else None,
    }


def make_base(layers: int, directory: Path) -> None:
    """A base model of the demo's world with other layers than the shipped one's, trained as that was; minutes."""
    from moalign import storage
    from moalign.demo import make_checkpoint

    with storage.new_directory(directory) as unfinished:
        make_checkpoint.main(unfinished, layers)
