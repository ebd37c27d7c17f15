"""One method with one search in a world whose best front is known: what the front reaches, costs and says of itself."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from benchmarks import front_peers
from moalign import config, pareto, recipes, registry
from moalign.config import Config
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import Plan, prepare

WAYS = Path(__file__).with_name("front_quality.yaml")
WORLDS = ("two", "three", "reply")
REPLY = "reply"
FINE = {2: 200, 3: 40}  # divisions of the weights whose exact points span the volume that a stated one is held against


@dataclass(frozen=True)
class Request:
    """One sweep: everything that decides its front."""

    world: str
    method: str
    search: str
    seed: int
    further: tuple[str, ...] = ()
    threads: int | None = None

    @property
    def changes(self) -> tuple[str, ...]:
        found = ways()
        method, search = found["methods"][self.method], found["searches"][self.search]
        of_method = (*method["changes"], *method.get(self.world, ()))
        of_search = (*search["changes"], *search[self.world])
        return (*found["worlds"][self.world], *of_method, *of_search, f"seed={self.seed}", *self.further)

    @property
    def identity(self) -> dict[str, Any]:
        """What a result is known again by."""
        names = ("world", "method", "search", "seed")
        found = {name: getattr(self, name) for name in names}
        return found | {"changes": list(self.changes), "further": list(self.further)}

    @property
    def name(self) -> str:
        return f"{self.world}: {self.method}, {self.search}, seed {self.seed}"

    @property
    def from_pairs(self) -> bool:
        """Whether the method learns from labelled pairs, which have to be made first."""
        return bool(ways()["methods"][self.method].get("pairs", False))

    def settings(self, *more: str) -> Config:
        """The configuration. Raises ConfigError where moalign knows none of it."""
        content = yaml.safe_load(recipes.read(ways()["methods"][self.method]["recipe"]))
        if self.world == REPLY:
            content["preferences"] = _of_the_targets()
        return config.from_mapping(content, (*self.changes, *more))


@functools.cache
def ways() -> Mapping[str, Any]:
    """``front_quality.yaml``: worlds, methods and searches by name."""
    return yaml.safe_load(WAYS.read_text(encoding="utf-8"))


def _of_the_targets() -> dict[str, dict[str, float]]:
    from moalign.demo import utility

    wanted = [dict(zip(utility.OBJECTIVES, utility.weights_of(each), strict=True)) for each in utility.TARGETS]
    return {f"t{place}": values for place, values in enumerate(wanted)}


def belongs(world: str, method: str, search: str, named: Sequence[str] = ()) -> bool:
    """Whether the file crosses these; ``named``: methods and searches that were asked for by name."""
    how, which = ways()["methods"][method], ways()["searches"][search]
    if world not in how["worlds"] or world not in which:
        return False
    if search not in how.get("searches", [search]) or method not in which.get("methods", [method]):
        return False
    return not how.get("on_request", False) or method in named


def why_not(request: Request, known: registry.Registry) -> str | None:
    """What is missing, or does not go together; None where it can be run. No model is loaded."""
    from moalign.errors import MoalignError

    with tempfile.TemporaryDirectory(prefix="moalign-front-quality-") as directory:
        more = []
        if request.from_pairs:
            (Path(directory) / "pairs.jsonl").write_text("")
            more = [f"data.path={directory}/pairs.jsonl"]
        try:
            settings = request.settings(*more)
            if all(entry.name != settings.search.name for entry in known.of_kind("search")):
                return f"no such plugin: search `{settings.search.name}`"
            prepare(settings, known)
        except MoalignError as error:
            return str(error).replace(directory, "").splitlines()[0]
    return None


def reached(request: Request) -> dict[str, Any]:
    """The sweep, in a directory that is thrown away; its front measured exactly."""
    with tempfile.TemporaryDirectory(prefix="moalign-front-quality-") as folder:
        directory = Path(folder)
        more: tuple[str, ...] = ()
        if request.from_pairs:
            more = front_peers.write_pairs(request.settings(), directory)
        return run_sweep(request.settings(*more), directory / "run", utility=request.world == REPLY)


def run_sweep(settings: Config, directory: Path, *, utility: bool = False) -> dict[str, Any]:
    """``utility``: the front's share is that of the reply world's utility for its three targets."""
    from moalign.demo import job
    from moalign.sweeps import run
    from moalign.sweeps.archive import Archive

    start = time.perf_counter()
    with proposals() as times:
        front = run.start(settings, directory, registry.discover(), Observer())
    seconds = time.perf_counter() - start
    history = Archive.open(directory).history
    stated = stated_bounds(front)
    exact = job.measure(directory, Observer())
    shares = {name: exact[name] for name in ("front_share", "front_share_worst", "hypervolume_share")}
    found = shares | {"stated": stated} | truth(settings, front["reference_point"], exact["points"])
    found["bounds_hold"] = bounds_hold(found)
    found |= {"sampled": {"base": front["base"], "points": [_sampled(point) for point in front["points"]]}}
    if utility:
        found |= {"linear": shares} | utility_shares(directory, [point["id"] for point in exact["points"]])
    return found | {
        "tokens": sum(outcome.tokens for outcome in history),
        "points": [
            {name: point[name] for name in ("id", "kind", "tokens", "scores", "kl", "preference")}
            | {"well_formed": point["details"]["well-formed"]}
            for point in exact["points"]
        ],
        "failed": {outcome.id: outcome.error for outcome in history if outcome.status == "failed"},
        "skipped": sum(outcome.status == "skipped" for outcome in history),
        "seconds": seconds,
        "proposing_seconds": sum(times),
        "proposals": len(times),
    }


def _sampled(point: Mapping[str, Any]) -> dict[str, Any]:
    """What a run without a known world has of a point, from which its bounds are made."""
    kept = ("optimum", "optimum_stderr", "utility")
    details = {name: point["details"][name] for name in kept if name in point["details"]}
    return {name: point[name] for name in ("id", "kind", "preference", "scores", "stderr", "kl")} | {"details": details}


@contextmanager
def proposals() -> Iterator[list[float]]:
    """Seconds of every time that a search is asked, with all that the core checks of its answer."""
    times: list[float] = []
    original = Plan.propose

    @functools.wraps(original)
    def timed(self: Plan, *arguments: Any, **named: Any) -> Any:
        begin = time.perf_counter()
        try:
            return original(self, *arguments, **named)
        finally:
            times.append(time.perf_counter() - begin)

    with mock.patch.object(Plan, "propose", timed):
        yield times


def stated_bounds(front: Mapping[str, Any]) -> dict[str, Any]:
    """What a front says of itself; empty where it says nothing."""
    return dict((front.get("analysis") or front).get("bounds") or {})


def truth(settings: Config, corner: Mapping[str, float], points: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the stated bounds are held against.

    The exact front's hypervolume above a corner, from a fine grid of weights and so a little less than all of it; and
    the front share of the points, with the base as one more of them.
    """
    import torch

    from moalign import lora
    from moalign.demo import world as worlds
    from moalign.demo.enumeration import enumerate_replies, reply_logps
    from moalign.engine import model as models

    names = settings.objective_names
    world = worlds.tiny_world(objectives=names)
    model = models.load(settings.model_directory, settings.model, torch.device("cpu"))
    with torch.no_grad(), lora.active(model.policy, None):
        reference = reply_logps(model.policy, enumerate_replies(model.tokeniser.tokenizer, world.prompts))
    fine = worlds.exact_front(world, reference, worlds.even_weights(len(names), FINE[len(names)]))
    reached = [[point["scores"][name] for name in names] for point in points]
    base = worlds.evaluate(world, reference, reference).f.tolist()
    every = torch.tensor([*reached, base], dtype=torch.float64)
    return {
        "exact_hypervolume": pareto.hypervolume(fine.numpy(), [corner[name] for name in names]),
        "front_share_with_base": worlds.shares(world, reference, every).front_share,
    }


def bounds_hold(found: Mapping[str, Any]) -> dict[str, bool]:
    """Of what the front states of itself, what is true: the share is at least so much, the volume at most so much."""
    stated, holds = found["stated"], {}
    if (least := stated.get("front_share_at_least")) is not None:
        holds["front_share_at_least"] = least <= found["front_share_with_base"]
    if (most := stated.get("hypervolume_at_most")) is not None:
        holds["hypervolume_at_most"] = found["exact_hypervolume"] <= most
    return holds


def utility_shares(directory: Path, ids: Sequence[str]) -> dict[str, Any]:
    """For each target the best candidate's share of what the best policy of all gains in E[min_j r_j / t_j] - KL."""
    import torch

    from moalign import lora
    from moalign.demo import utility
    from moalign.demo.enumeration import enumerate_replies, reply_logps
    from moalign.engine import model as models
    from moalign.engine.model import TRAINED
    from moalign.sweeps import front

    settings, world = front.read_config(directory), utility.second_world()
    model = models.load(settings.model_directory, settings.model, torch.device("cpu"))
    replies = enumerate_replies(model.tokeniser.tokenizer, world.prompts)
    with torch.no_grad():
        with lora.active(model.policy, None):
            reference = reply_logps(model.policy, replies)
        policies = []
        for name in ids:
            lora.read(model.policy, TRAINED, directory / "candidates" / name, model.fingerprint)
            with lora.active(model.policy, TRAINED):
                policies.append(reply_logps(model.policy, replies))
    each = [max(utility.share(world, targets, policy, reference) for policy in policies) for targets in utility.TARGETS]
    return {"front_share": sum(each) / len(each), "front_share_worst": min(each), "each": each} | {
        "hypervolume_share": None
    }
