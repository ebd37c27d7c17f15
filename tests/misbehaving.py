"""A distribution with a plugin of every kind, each of which misbehaves as its options say. The tests install it."""

from __future__ import annotations

import ctypes
import os
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pydantic import Field

from moalign import api

CALLS: dict[str, Any] = {"score": 0, "search": ""}  # how often, and how the search shall misbehave


class Odd(BaseException):
    """What no ``except Exception`` sees."""


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no message either")


def fail(error):
    raise error


def hang():
    time.sleep(60)


def reseed():
    import numpy
    import torch

    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)


DEEDS = {
    "raises": lambda: fail(RuntimeError("no reason")),
    "exits": lambda: fail(SystemExit(3)),
    "raises no Exception": lambda: fail(Odd("no reason")),
    "raises what cannot be shown": lambda: fail(Unprintable()),
    "blames the input": lambda: fail(api.DataError("the data is wrong")),
    "hangs": hang,
    "dies by a signal": lambda: ctypes.string_at(0),
    "ends the process": lambda: os._exit(0),
    "reseeds generators": reseed,
    "is seen": lambda: CALLS["seen"](),
}


def do(how):
    """What does not depend on the kind; nothing for what the kinds do themselves."""
    DEEDS.get(how, lambda: None)()


def spoilt(tensor, how):
    """A tensor as it must not be."""
    import torch

    if how == "NaN":
        return tensor * float("nan")
    if how == "wrong shape":
        return tensor.mean()
    if how == "wrong dtype":
        return tensor.double()
    if how == "wrong device":
        return torch.empty_like(tensor, device="meta")
    return tensor.detach() if how == "detached graph" else tensor


class ByWeight(api.Plugin):
    """Misbehaves for candidates by the weight of the first objective: {"1.00": "hangs"}."""

    hows: dict[str, str] = Field(default_factory=dict)

    def how(self, batch):
        return self.hows.get(f"{float(batch.preference[0, 0]):.2f}")


class Loss(ByWeight, api.Objective):
    needs = frozenset({"pairs", "reference"})
    beta: float = 0.1

    def loss(self, batch, terms):
        how = self.how(batch)
        do(how)
        if how == "mutates inputs":
            batch.logps.zero_()
        losses = (1 - api.pair_logits(batch, terms, self.beta)) ** 2
        if how == "fails in the backward pass":
            losses.register_hook(lambda gradient: fail(RuntimeError("no reason")))
        if how == "dies in the backward pass":
            losses.register_hook(lambda gradient: os._exit(0))
        return spoilt(losses, how)


class Rule(ByWeight, api.Combiner):
    def pair_terms(self, batch):
        import torch

        how = self.how(batch)
        do(how)
        if how == "mutates inputs":
            batch.strength.zero_()
        weight = api.pair_preference(batch).gather(1, batch.pair_objective[:, None]).squeeze(1)
        spoiled = spoilt(torch.ones_like(weight), how)
        return api.PairTerms(spoiled, torch.zeros_like(weight), weight)


class Regression(Loss):
    """Reads what the rule says of reward differences."""

    needs = frozenset({"margins", "reference"})

    def loss(self, batch, terms):
        return (terms.difference - api.pair_log_ratios(batch)) ** 2


class Difference(ByWeight, api.Combiner):
    def pair_terms(self, batch):
        import torch

        own = batch.margins[:, 0]
        return api.PairTerms(
            torch.ones_like(own), torch.zeros_like(own), torch.ones_like(own), spoilt(own, self.how(batch))
        )


class Score(api.Reward):
    """The length; misbehaves in the call of number ``at``, or as the lines of the file ``queue`` say, call by call."""

    deterministic = False  # so that it is asked anew each time

    how: str = ""
    at: int = 0
    queue: Path | None = None

    def score(self, samples):
        import torch

        CALLS["score"] += 1
        how = self.how if CALLS["score"] == self.at else ""
        if self.queue is not None:
            how, _, rest = self.queue.read_text().partition("\n")
            self.queue.write_text(rest)
        do(how)
        scores = [float(len(sample.response)) for sample in samples]
        if how == "mutates inputs":
            for sample in samples:
                object.__setattr__(sample, "response", "")
        if how == "wrong dtype":
            return ["long"] * len(samples)
        if how == "wrong device":
            return torch.empty(len(samples), device="meta")
        if how == "wrong shape":
            return torch.ones(len(samples), 2)
        return [float("nan")] * len(samples) if how == "NaN" else scores


class Shape(api.Transform):
    """Changes nothing; misbehaves as the lines of the file ``queue`` say, call by call."""

    queue: Path

    def apply(self, rewards, about, state):
        how, _, rest = self.queue.read_text().partition("\n")
        self.queue.write_text(rest)
        do(how)
        if how == "mutates inputs":
            rewards.zero_()
        return (rewards.float() if how == "wrong dtype" else spoilt(rewards, how)), state


class Three(api.Search):
    """Three or more candidates, evenly; misbehaves when they are done."""

    how: str = ""
    points: int = 3
    at_once: bool = False

    def propose(self, space, history, rng):
        if self.at_once:
            do(self.how)
        if not history:
            shares = [n / (self.points - 1) for n in range(self.points)]
            return [self.candidate(space, f"c{share:.2f}", [share, 1 - share]) for share in shares]
        how = CALLS["search"] or self.how
        do(how)
        if how == "mutates inputs":
            for outcome in history:
                outcome.scores.clear()
            space.preferences.clear()
        match how:
            case "NaN":
                return [self.candidate(space, "next", [float("nan"), 1.0])]
            case "wrong shape":
                return [self.candidate(space, "next", [1.0])]
            case "wrong dtype":
                return [SimpleNamespace(id="next")]
        return []

    def candidate(self, space, identity, weights):
        values = dict(zip(space.objectives, weights, strict=False))
        return api.Candidate(identity, api.Preference("weights", values))


class Rows(api.Reader):
    """The rows of ``sweeps.write_pairs``; misbehaves at the third, or where its methods are called."""

    how: str = ""
    where: str = "read"

    def recognises(self, row):
        if self.where == "recognises":
            do(self.how)
            if self.how == "mutates inputs":
                row.clear()
        return False

    def read(self, rows, objectives):
        for number, (file, line, row) in enumerate(rows):
            responses = (row["chosen"], row["rejected"])
            scores = {}
            if number == 2:
                do(self.how)
                bad = {"NaN": (float("nan"), 0.0), "wrong shape": (0.0,), "wrong dtype": ("best", "worst")}
                scores = {row["objective"]: bad[self.how]} if self.how in bad else {}
            pairs = {row["objective"]: (api.Pair(0, 1),)}
            yield api.Record(row["prompt"], responses, scores, pairs, row["prompt"], file, line)
            if self.how == "mutates inputs":
                row.clear()


class Tale(api.Observer):
    how: str = ""
    hook: str = "on_step"

    def on_run_start(self, run):
        if self.hook == "on_run_start":
            do(self.how)
        if self.how == "wrong dtype":
            return "a watcher"
        if self.how == "mutates inputs":
            run.config.clear()
        watcher = api.Watcher()
        setattr(watcher, self.hook, self.told)
        return watcher

    def told(self, *arguments):
        do(self.how)
        if self.how == "mutates inputs":
            for argument in arguments:
                if isinstance(argument, dict):
                    argument.clear()


class Source(api.Sampler):
    """The same short responses to every prompt; misbehaves as the lines of the file ``queue`` say, call by call."""

    queue: Path

    def start(self, info):
        return Answers(self.queue)


class Answers(api.SamplingSession):
    def __init__(self, queue):
        self.queue = queue

    def sample(self, adapters, prompts, how):
        import torch

        what, _, rest = self.queue.read_text().partition("\n")
        self.queue.write_text(rest)
        do(what)
        responses = [[5 + number, how.stop_token_ids[0]] for number in range(how.samples)]
        match what:
            case "mutates inputs":
                for folder in adapters:
                    for file in folder.iterdir():
                        file.unlink()
                object.__setattr__(how, "seed", 0)
            case "NaN":
                responses[0][0] = float("nan")
            case "wrong shape":
                responses = responses[1:]
            case "wrong dtype":
                responses[0] = "five"
            case "wrong device":
                responses = torch.empty(how.samples, 2, device="meta", dtype=torch.long)
        return [[responses for _ in prompts] for _ in adapters]


class Speech(api.Decoder):
    """Says what the base says; misbehaves at each token."""

    how: str = ""

    def speakers(self, request):
        return [None]

    def scores(self, request, at):
        do(self.how)
        if self.how == "mutates inputs":
            at.logits.zero_()
        return at.logits[0].long() if self.how == "wrong dtype" else spoilt(at.logits[0], self.how)


class Policy(api.Reference):
    """A copy of the policy before each step. A candidate's training takes the next line of the file ``queue``, and
    misbehaves so at its second step."""

    queue: Path

    def init(self):
        how, _, rest = self.queue.read_text().partition("\n")
        self.queue.write_text(rest)
        return {"how": how}

    def moves(self, at, state):
        how = state["how"] if at.step == 1 else ""
        do(how)
        if how == "mutates inputs":
            state.clear()
            object.__setattr__(at, "step", 0)
            return api.Move(), {"how": how}
        move = api.Move({"NaN": float("nan"), "wrong dtype": "all"}.get(how, 1.0))
        return move if how == "wrong shape" else (move, state)


class Choice(api.Filter):
    """Keeps all responses; misbehaves as the lines of the file ``queue`` say, call by call."""

    queue: Path

    def keep_responses(self, about, generator):
        how, _, rest = self.queue.read_text().partition("\n")
        self.queue.write_text(rest)
        do(how)
        if how == "mutates inputs":
            about.rewards.zero_()
        ones = about.signal * 0 + 1
        return api.Kept(ones.float() if how == "wrong dtype" else spoilt(ones, how), ("",) * len(ones))


PLUGINS = {
    "objectives": {"bad": Loss, "bad-regression": Regression},
    "combiners": {"bad": Rule, "bad-difference": Difference},
    "rewards": {"bad": Score},
    "transforms": {"bad": Shape},
    "searches": {"bad": Three},
    "readers": {"bad": Rows},
    "observers": {"bad": Tale, "other": Tale, "third": Tale},
    "samplers": {"bad": Source},
    "decoders": {"bad": Speech},
    "conditioners": {"bad": "misbehaving_one_model:Wish"},
    "reward_models": {"bad": "misbehaving_one_model:Judge"},
    "references": {"bad": Policy},
    "filters": {"bad": Choice},
}


def hook(kinds):
    @api.hookimpl
    def registers(register):
        for name, plugin in PLUGINS[kinds].items():
            register(name, plugin, summary="bad")

    return registers


globals().update({f"register_{kinds}": hook(kinds) for kinds in PLUGINS})
