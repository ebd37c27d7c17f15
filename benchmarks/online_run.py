"""One way of turning rewards into one signal, trained online in a world whose optimum is known, measured as it goes."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch

RECIPE = "dynamic"
FIRST, SECOND = "first", "second"


@dataclass(frozen=True)
class Rule:
    """A combiner and what goes with it, as ``--set`` takes it; ``second`` in the second world besides.

    ``loss.beta`` is in units of the signal, so a rule that changes these needs another one for the same price of KL.
    """

    combine: Mapping[str, Any]
    common: tuple[str, ...] = ()
    second: tuple[str, ...] = ()


BETA = 0.08  # the worlds' own
SIXTH = BETA / 6  # min_j w_j r_j is a sixth of the second world's utility
RULES: dict[str, Rule] = {
    "fixed weights": Rule({"name": "linear"}),
    "GDPO": Rule({"name": "gdpo"}, ("loss.beta=0.6",)),  # weighted rewards have a deviation of 0.09 to 0.19
    "Chebyshev": Rule({"name": "chebyshev"}, (), ("combine.ideal=0", f"loss.beta={SIXTH:.6g}")),
    "smooth Chebyshev": Rule(
        {"name": "smooth-chebyshev"}, (), ("combine.ideal=0", "combine.temperature=0.02", f"loss.beta={SIXTH:.6g}")
    ),
    "log-sigmoid AND": Rule(
        {"name": "log-sigmoid"},
        ("combine.slope=5", "loss.beta=0.2"),  # a slope of 5 s(-x), 2.5 at the reference
        ("combine.slope=12", "loss.beta=0.16"),
    ),
    "dynamic, hypervolume": Rule({"name": "dynamic-hypervolume"}),
    "dynamic, gradient": Rule({"name": "dynamic-gradient"}),
}
# GRPO with the KL where the others have it: then p* is where it rests, too
LOSSES: dict[str, tuple[str, ...]] = {"reinforce": (), "rloo": (), "grpo": ("loss.kl=reward",)}


@dataclass(frozen=True)
class Request:
    """One training: everything that decides its figures. ``number_of_looks`` at even distances over the ``steps``."""

    world: str
    rule: str
    loss: str
    seed: int
    steps: int
    number_of_looks: int
    further: tuple[str, ...] = ()
    threads: int | None = None

    @property
    def own_changes(self) -> tuple[str, ...]:
        rule = RULES[self.rule]
        return LOSSES.get(self.loss, ()) + rule.common + (rule.second if self.world == SECOND else ())

    @property
    def changes(self) -> tuple[str, ...]:
        length = (f"train.steps={self.steps}", f"rollouts.rounds={self.steps}")
        return (*length, *self.own_changes, f"seed={self.seed}", *self.further)

    @property
    def identity(self) -> dict[str, Any]:
        """What a result is known again by."""
        names = ("world", "rule", "loss", "seed", "steps", "number_of_looks")
        found = {name: getattr(self, name) for name in names}
        found |= {"combine": dict(RULES[self.rule].combine), "own_changes": list(self.own_changes)}
        return found | {"further": list(self.further)}

    @property
    def marks(self) -> list[int]:
        """The steps after which the policies are measured; the last one is the end."""
        return marks(self.steps, self.number_of_looks)

    def settings(self, *more: str) -> Any:
        """The configuration: the recipe's, with this rule and loss, in this world; a constant learning rate after the
        warm-up, so that a point along the way is also the end of a shorter run."""
        import yaml

        from moalign import config, recipes

        content = yaml.safe_load(recipes.read(RECIPE))
        content["combine"] = dict(RULES[self.rule].combine)
        content["loss"] = {"name": self.loss, "beta": BETA}
        content["train"]["schedule"] = "constant"
        if self.world == SECOND:
            content |= _second()
        return config.from_mapping(content, (*self.changes, *more))


def _second() -> dict[str, Any]:
    """The second world's objectives, and the preferences that its targets mean."""
    from moalign.demo import utility

    names = utility.OBJECTIVES
    wanted = {f"t{place}": utility.weights_of(targets) for place, targets in enumerate(utility.TARGETS)}
    return {
        "objectives": {name: {"reward": {"name": "tiny-assistant", "objective": name}} for name in names},
        "preferences": {place: dict(zip(names, weights, strict=True)) for place, weights in wanted.items()},
        "search": {"name": "listed"},
        "evaluate": {"kind": "generate", "samples": 1, "max_new_tokens": 20},
    }


def why_not(rule: str, loss: str, registry: Any) -> str | None:
    """What is not installed for this; None where everything is."""
    for kind, name in (("combiner", RULES[rule].combine["name"]), ("objective", loss)):
        if all(entry.name != name for entry in registry.of_kind(kind)):
            return f"no {kind} `{name}` is installed"
    return None


@dataclass
class Watch:
    """What the looks along the way have found."""

    looks: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # after each step, the looks' own taken out
    looking: float = 0.0


class Training(Protocol):
    """What can be trained: a configuration, the steps after which it is measured, and in which world."""

    @property
    def world(self) -> str: ...

    @property
    def marks(self) -> list[int]: ...

    def settings(self) -> Any: ...


def marks(steps: int, looks: int) -> list[int]:
    """At even distances over the steps; the last one is the end."""
    return sorted({-(-steps * (look + 1) // looks) for look in range(looks)})


def train(
    request: Training,
    registry: Any = None,
    probe_of: Callable[[Any], Callable[[Sequence[str]], dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """All candidates in one pass, from a fresh adapter; after each of the marks what the probe finds, by default the
    shares of ``Probe``. ``registry``: of the plugins; default: those installed."""
    plan = plan_of(request.settings(), registry)
    with tempfile.TemporaryDirectory(prefix="moalign-online-") as directory:
        workshop = open_workshop(plan, Path(directory))
        candidates = plan.propose([])
        watch = Watch()
        probe = probe_of(workshop.model) if probe_of else Probe(request.world, workshop.model)
        start = time.perf_counter()

        def on_step(step: int, trainees: Sequence[Any]) -> None:
            now = time.perf_counter()
            watch.times.append(now - start - watch.looking)
            if step + 1 in request.marks:
                tokens = sum(trainee.tokens for trainee in trainees)
                watch.looks.append({"step": step + 1, "tokens": tokens} | probe([trainee.slot for trainee in trainees]))
                watch.looking += time.perf_counter() - now

        run_group(workshop, candidates, on_step)
    return {
        "candidates": [{"id": each.id, "preference": dict(each.preference.values)} for each in candidates],
        "looks": watch.looks,
        "step_seconds": watch.times[-1] / len(watch.times),
    }


def run_group(workshop: Any, candidates: Sequence[Any], on_step: Any, steps: int | None = None) -> None:
    """Train these together. ``on_step(step, trainees)`` after each step of all. Raises what ended one of them."""
    from dataclasses import replace

    from moalign.engine.train import train_together
    from moalign.engine.trainee import Trainee
    from moalign.sweeps.candidate import batch_source, job_of, slots

    workshop.first_round.clear()
    names = slots(len(candidates))
    trainees: list[Any] = []

    def last(step: int, metrics: Mapping[str, Any]) -> None:
        on_step(step, trainees)

    def ignore(step: int, metrics: Mapping[str, Any]) -> None: ...

    for candidate, slot in zip(candidates, names, strict=True):
        job = job_of(candidate, workshop, ())
        if steps is not None:
            job = replace(job, settings=job.settings.model_copy(update={"steps": steps}))
        watch = last if slot == names[-1] else ignore
        trainees.append(Trainee(job, batch_source(candidate, workshop, slot), slot, watch))
    train_together(workshop.model, trainees, workshop.cache, workshop.accelerator)
    for trainee in trainees:
        _ = trainee.result  # raises where a candidate has failed


class Probe:
    """Exact figures of the policies in some slots, by enumeration of every reply to the held-out prompts."""

    def __init__(self, world: str, model: Any) -> None:
        from moalign import lora
        from moalign.demo import grammar, utility
        from moalign.demo import world as worlds
        from moalign.demo.enumeration import enumerate_replies, reply_logps

        self.model = model
        self.world = (utility.second_world if world == SECOND else worlds.tiny_world)(grammar.HELD_OUT_PROMPTS)
        self.replies = enumerate_replies(model.tokeniser.tokenizer, self.world.prompts)
        with torch.no_grad(), lora.active(model.policy, None):
            self.reference = reply_logps(model.policy, self.replies)

    @torch.no_grad()
    def __call__(self, slots: Sequence[str]) -> dict[str, Any]:
        from moalign import lora
        from moalign.demo import utility
        from moalign.demo import world as worlds
        from moalign.demo.enumeration import reply_logps

        policies = []
        for slot in slots:
            with lora.active(self.model.policy, slot):
                policies.append(reply_logps(self.model.policy, self.replies))
        values = [worlds.evaluate(self.world, policy, self.reference) for policy in policies]
        found = {
            "expected": [value.expected.tolist() for value in values],
            "kl": [value.kl for value in values],
            "mass": [value.mass for value in values],
        }
        if self.world.objectives != utility.OBJECTIVES:
            shares = worlds.shares(self.world, self.reference, torch.stack([value.f for value in values]))
            return found | {"share": shares.front_share, "worst": shares.front_share_worst}
        best = [
            max(utility.share(self.world, targets, policy, self.reference) for policy in policies)
            for targets in utility.TARGETS
        ]
        return found | {"share": sum(best) / len(best), "worst": min(best), "each": best}


@functools.cache
def base_logps(prompts: tuple[str, ...]) -> torch.Tensor:
    """Log-probabilities of every reply to the prompts under the untouched base, [P,R]."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moalign.demo import ceiling
    from moalign.demo.enumeration import enumerate_replies, reply_logps

    model = AutoModelForCausalLM.from_pretrained(ceiling.MODEL_DIRECTORY, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(ceiling.MODEL_DIRECTORY)
    with torch.no_grad():
        return reply_logps(model, enumerate_replies(tokenizer, prompts))


def most_of_linear() -> list[float]:
    """For each of the second world's targets, the share that the best linear weights and price of KL could reach."""
    from moalign.demo import grammar, utility

    reference = base_logps(tuple(grammar.HELD_OUT_PROMPTS))
    world = utility.second_world(grammar.HELD_OUT_PROMPTS)
    return [utility.most_of_linear(world, targets, reference).share for targets in utility.TARGETS]


def step_seconds(request: Request, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of all candidates, sampling among it: in one pass, and one after the other; in alternation.

    The first step, in which round 0 is the base's and shared, does not count.
    """
    plan = plan_of(request.settings())
    times: dict[str, list[float]] = {"one pass": [], "one by one": []}
    with tempfile.TemporaryDirectory(prefix="moalign-online-") as directory:
        workshop = open_workshop(plan, Path(directory))
        candidates = plan.propose([])
        for turn in range(rounds + 1):
            for way in list(times)[:: 1 if turn % 2 else -1]:
                groups = [candidates] if way == "one pass" else [[candidate] for candidate in candidates]
                taken = sum(_seconds(workshop, group) for group in groups)
                if turn:  # the first one warms up
                    times[way].append(taken)
    return times


def _seconds(workshop: Any, group: Sequence[Any]) -> float:
    times: list[float] = []
    run_group(workshop, group, lambda step, trainees: times.append(time.perf_counter()))
    steps = [after - before for before, after in pairwise(times)]
    return sum(steps) / len(steps)


def plan_of(settings: Any, registry: Any = None) -> Any:
    from moalign import registry as installed
    from moalign.sweeps.plan import prepare

    return prepare(settings, registry or installed.discover())


def open_workshop(plan: Any, directory: Path) -> Any:
    from moalign import lora
    from moalign.sweeps import workshop
    from moalign.sweeps.candidate import slots
    from moalign.sweeps.observe import Observer

    opened = workshop.open_workshop(plan, directory, Observer(), keep_cache=False)
    lora.add_slots(opened.model.policy, slots(len(plan.propose([]))))
    return opened
