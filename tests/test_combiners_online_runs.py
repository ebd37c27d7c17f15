"""Adaptive rules in real runs: their numbers are among the metrics, and a resumed run is the unbroken one."""

from __future__ import annotations

import json
from itertools import pairwise
from math import exp, tanh
from pathlib import Path
from typing import Any

import pytest
from interruptions import StopAfterSteps, break_off_and_resume, kill_and_resume
from sweeps import contents, small_config

from moalign import registry
from moalign.config import Config
from moalign.errors import PreferenceError
from moalign.sweeps import run
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare

ROUNDS = 3
WEIGHTS = {"alone": {"brief": 1.0, "wordy": 0.0}, "even": {"brief": 0.5, "wordy": 0.5}}
LEANING = {"alone": {"brief": 1.0, "wordy": 0.0}, "leaning": {"brief": 0.8, "wordy": 0.2}}
BOUNDS = {"short": "brief>=-0.5", "long": {"thresholds": {"wordy": 2.0}}}
COMBINERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dynamic-hypervolume": ({"name": "dynamic-hypervolume", "scale": 0.5}, WEIGHTS),
    "lagrangian": ({"name": "lagrangian", "rate": 0.25}, BOUNDS),
    "schedule": ({"name": "schedule", "rounds": 2}, WEIGHTS),
    "dynamic-gradient": ({"name": "dynamic-gradient", "step": 1.0, "max_norm": None}, LEANING),
    "learned-weights": ({"name": "learned-weights", "outer": "brief", "beta": 0.05, "rate": 0.2}, LEANING),
    "mgda": ({"name": "mgda"}, LEANING),
    "upgrad": ({"name": "upgrad"}, LEANING),
    "cagrad": ({"name": "cagrad", "sum_to_one": False}, LEANING),
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q{number}: "}) + "\n" for number in range(10)))
    return file


def settings(
    tiny_model_path: Path, prompts: Path, combine: object, preferences: dict[str, Any], *, others: tuple[str, ...] = ()
) -> Config:
    """Two opposite objectives; the ``others`` are the first once more."""
    return small_config(
        tiny_model_path,
        prompts,
        objectives={
            **{name: {"reward": "length"} for name in ("brief", *others)},
            "wordy": {"reward": "length", "direction": "min"},
        },
        preferences=preferences,
        search="listed",
        train={"steps": 6, "lr": 1e-2, "together": 1},
        rollouts={"rounds": ROUNDS, "samples": 3, "prompts": 4, "prompts_per_step": 2, "max_new_tokens": 5},
        loss={"name": "rloo"},
        combine=combine,
    )


def metrics_of(directory: Path, candidate: str) -> list[dict]:
    file = directory / "candidates" / candidate / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module", params=list(COMBINERS))
def unbroken(request, tiny_model_path, prompts, tmp_path_factory) -> tuple[Config, Path]:
    known = registry.discover()
    for module in known.load(known.find("combiner", request.param)).requires:
        pytest.importorskip(module)
    config = settings(tiny_model_path, prompts, *COMBINERS[request.param])
    directory = tmp_path_factory.mktemp("runs") / request.param
    run.start(config, directory, registry.discover(), Observer())
    return config, directory


def test_the_state_is_among_the_metrics_and_follows_the_rounds(unbroken):
    config, directory = unbroken
    for candidate in config.preferences:
        rows = metrics_of(directory, candidate)
        rounds = rows[::2]
        for first, second in zip(rounds, rows[1::2], strict=True):  # two steps each: it is the round's, not the step's
            state = {name: value for name, value in first.items() if name.startswith("combine/")}
            assert state and state == {name: value for name, value in second.items() if name in state}
        name, expected = EXPECTED[config.combine.name](rounds, config.preferences[candidate])
        assert [row[f"combine/{name}"] for row in rounds] == pytest.approx(expected, rel=1e-12)


def weight_of_brief(rounds: list[dict], preference: dict) -> tuple[str, list[float]]:
    return "weights/brief", [0.5, (0.5 + preference["brief"]) / 2, preference["brief"]]


def multiplier(rounds: list[dict], preference: dict) -> tuple[str, list[float]]:
    name, bound = ("brief", -0.5) if preference == BOUNDS["short"] else ("wordy", 2.0)
    found = [0.0]
    for row in rounds:
        found.append(max(0.0, found[-1] + 0.25 * (bound - row[f"{name}/reward"])))
    return f"multipliers/{name}", found[1:]


def factor(rounds: list[dict], preference: dict) -> tuple[str, list[float]]:
    """Brief and wordy are opposites, so that together they never gain; brief alone gains what it beats its best by."""
    means = [row["brief/reward"] for row in rounds]
    gains = [(mean - max(means[: number + 1])) / 0.5 for number, mean in enumerate(means[1:])]
    alone = preference["brief"] == 1
    return "multiplier", [1.0, *(0.5 + 1.5 * tanh(max(gain, 0.0) * alone) for gain in gains)]


def followed(rounds: list[dict], preference: dict) -> tuple[str, list[float]]:
    """Brief and wordy are opposites: their gradients cancel in the first round, before there is any KL to pay for."""
    first, *others = [row["combine/weights/brief"] for row in rounds]
    assert first == pytest.approx(preference["brief"], abs=1e-6)
    moved = {abs(weight - preference["brief"]) > 1e-6 for weight in others}
    assert moved == {preference["brief"] != 1}  # the leaning one has moved, and both share the price of that
    assert all(row["combine/weights/brief"] + row["combine/weights/wordy"] == pytest.approx(1) for row in rounds)
    return "weights/brief", [first, *others]


def learned(rounds: list[dict], preference: dict) -> tuple[str, list[float]]:
    """Brief judges, and wordy is its opposite: brief gains wherever responses differ, until wordy is at its floor."""
    weights = [preference["brief"], *(row["combine/weights/brief"] for row in rounds)]
    assert all(after >= before * (1 - 1e-12) for before, after in pairwise(weights))
    assert weights[-1] <= (1 - 0.1 * preference["wordy"]) * (1 + 1e-12)
    assert (weights[-1] > weights[0] + 0.01) == (preference["brief"] != 1)
    assert all(row["combine/weights/brief"] + row["combine/weights/wordy"] == pytest.approx(1) for row in rounds)
    return "outer_loss", [-row["brief/reward"] for row in rounds]


def balanced(rounds: list[dict], preference: dict) -> tuple[str, list[float]]:
    """In the first round the gradients are opposite, and cancel for equal weights whatever is preferred."""
    first, *others = [row["combine/weights/brief"] for row in rounds]
    assert first == pytest.approx(0.5 if preference["brief"] != 1 else 1, abs=1e-6)
    assert all(row["combine/weights/brief"] + row["combine/weights/wordy"] == pytest.approx(1) for row in rounds)
    assert (others[-1] != first) == (preference["brief"] != 1)  # then there is a KL, whose gradient both share
    return "weights/brief", [first, *others]


def worst_served(rounds: list[dict], preference: dict) -> tuple[str, list[float]]:
    """With (0.8 - 0.2) g as the sum, wordy is served worst, and gets half of its length."""
    first = {name: rounds[0][f"combine/weights/{name}"] for name in ("brief", "wordy")}
    leaning = {"brief": 0.8, "wordy": 0.2 + 0.5 * 0.6}
    assert first == pytest.approx(leaning if preference["brief"] != 1 else {"brief": 1.5, "wordy": 0}, abs=1e-5)
    return "weights/brief", [row["combine/weights/brief"] for row in rounds]


EXPECTED = {
    "dynamic-gradient": followed,
    "learned-weights": learned,
    "mgda": balanced,
    "upgrad": balanced,
    "cagrad": worst_served,
    "schedule": weight_of_brief,
    "lagrangian": multiplier,
    "dynamic-hypervolume": factor,
}


def test_interrupted_and_resumed_equals_unbroken_byte_for_byte(unbroken, tmp_path):
    """One candidate is finished, the other in its second round."""
    config, directory = unbroken
    resumed = break_off_and_resume(config, tmp_path / "run", StopAfterSteps(9))
    assert contents(resumed) == contents(directory)


@pytest.mark.parametrize("unbroken", ["lagrangian"], indirect=True)
def test_killed_and_resumed_equals_unbroken_byte_for_byte(unbroken, tmp_path):
    config, directory = unbroken
    assert contents(kill_and_resume(config, tmp_path)) == contents(directory)


def test_weights_follow_the_gradients_that_the_engine_measures(tiny_model_path, prompts, tmp_path):
    """Two objectives share a gradient g and a third has -g, so that their influences are g.g, g.g and -g.g."""
    preferences = {"even": {"brief": 0.25, "short": 0.25, "wordy": 0.5}}
    combine = {"name": "dynamic-gradient", "step": 0.3, "max_norm": 0.5}
    config = settings(tiny_model_path, prompts, combine, preferences, others=("short",))
    run.start(config, tmp_path / "unbroken", registry.discover(), Observer())
    names = ("brief", "short", "wordy")
    found = [[row[f"combine/weights/{name}"] for name in names] for row in metrics_of(tmp_path / "unbroken", "even")]
    assert all(sum(weights) == pytest.approx(1, rel=1e-12) for weights in found)
    first = found[0]  # no KL has a gradient yet, and the longest gradients count as 0.5 long
    assert first[0] == pytest.approx(first[1], rel=1e-6) and first[0] > 0.25
    assert first[0] / first[2] <= 0.5 * exp(2 * 0.3 * 0.25) * (1 + 1e-9)
    assert found[0] == found[1] and found[4][2] <= found[2][2] < first[2] < 0.5
    resumed = break_off_and_resume(config, tmp_path / "run", StopAfterSteps(5))
    assert contents(resumed) == contents(tmp_path / "unbroken")


def test_directions_work_with_losses_on_sampled_responses(tiny_model_path, prompts):
    down = {"direction": {"brief": 0.6, "wordy": -0.8}}
    plan = prepare(settings(tiny_model_path, prompts, "linear", {"down": down}), registry.discover())
    assert plan.propose(())[0].preference.vector(plan.objectives) == (0.6, -0.8)
    with pytest.raises(PreferenceError, match="down: combiner 'schedule' has no meaning for direction"):
        prepare(settings(tiny_model_path, prompts, "schedule", {"down": down}), registry.discover())
