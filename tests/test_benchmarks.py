"""The benchmarks measure something right: every variant against float64, both training engines on one loss."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import core_run, fused_core, measure, peers, processes, sweep_cost, sweep_engines, tables, train_step
from benchmarks.core_run import Request
from benchmarks.modes import MODES
from benchmarks.peers import MOALIGN, RECOMPUTING, VARIANTS, Unavailable
from benchmarks.problem import SURE, Problem, Shape, errors, make, truth
from benchmarks.train_engines import ENGINES, Assignment, Stepper, _grouped, same_loss
from benchmarks.train_task import Task, write_model, write_pairs

CPU = torch.device("cpu")
SMALL = Shape(37, 64, 301, "float32")


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make(SMALL, CPU)


def load(variant: peers.Variant) -> peers.LogpsFunction:
    try:
        return variant.load(CPU)
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_variant_agrees_with_float64(variant, mode, problem):
    checked = problem.only_checked_rows()
    found = errors(mode, checked, truth(problem), MODES[mode](load(variant), checked))
    assert found.too_large("float32") is None
    assert found.logps < 2e-5
    assert (found.gradient is None) == (mode == "forward") and (found.weight is None) == (mode != "trainable")
    assert found.gradient is None or found.gradient < 1e-5
    assert found.weight is None or found.weight < 1e-5


@pytest.mark.parametrize("name", [MOALIGN, RECOMPUTING])
@pytest.mark.parametrize("mode", ["frozen", "trainable"])
def test_our_own_agree_in_bfloat16(name, mode):
    shape = Shape(37, 64, 301, "bfloat16")
    problem = make(shape, CPU).only_checked_rows()
    variant = next(variant for variant in VARIANTS if variant.name == name)
    assert errors(mode, problem, truth(problem), MODES[mode](load(variant), problem)).too_large("bfloat16") is None


def test_a_chunk_boundary_changes_nothing(problem, monkeypatch):
    whole = MODES["trainable"](peers.recomputing.token_logps, problem)
    monkeypatch.setitem(peers.recomputing.CHUNK_BYTES, "cpu", 4 * SMALL.vocabulary * 5)
    assert peers.recomputing.chunk_tokens(problem.lm_head) == 5
    for one, other in zip(whole, MODES["trainable"](peers.recomputing.token_logps, problem), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_truth_is_the_gradient_of_the_log_probability(problem):
    rows = problem.checked_rows
    hidden = problem.hidden[rows].double().requires_grad_()
    logps = torch.log_softmax(hidden @ problem.lm_head.double().t(), -1).gather(1, problem.labels[rows, None])
    logps.sum().backward()
    right = truth(problem)
    torch.testing.assert_close(right.logps, logps.detach().squeeze(1))
    torch.testing.assert_close(right.unit, hidden.grad, rtol=1e-7, atol=1e-12)
    assert bool((right.logps[:SURE].exp() > 0.999).all()) and bool((right.logps[SURE:].exp() < 0.999).all())


def test_a_wrong_variant_is_not_timed(problem):
    request = Request(SMALL, ("frozen",), "cpu", rounds=2, memory=False)
    right = peers._recomputing(CPU)
    available = {MOALIGN: right, RECOMPUTING: lambda hidden, head, labels: right(hidden, head, labels) * 1.5}
    found = core_run.measure_mode(request, "frozen", problem, available, {}, {}, lambda text: None)
    rows = {row["name"]: row for row in found["rows"]}
    assert "wrong" in rows[RECOMPUTING]["skipped"]
    assert len(rows[MOALIGN]["seconds"]) == len(rows[found["floor"]]["seconds"]) == 2


def test_a_run_in_a_process_of_its_own_gives_a_report(tmp_path):
    """Memory and times with the tuned allocator, down to the Markdown."""
    request = Request(SMALL, ("frozen",), "cpu", rounds=2, threads=1, only=(RECOMPUTING,))
    child = processes.Child(fused_core._measure, request, "tuned")
    found = {"allocator": "tuned", **child.result(lambda text: None)}
    child.close()
    rows = {row["name"]: row for row in found["modes"][0]["rows"]}
    assert {name for name in rows if not name.startswith("bare GEMMs")} == {MOALIGN, RECOMPUTING}
    assert (
        min(row["floor"]["median"] for row in rows.values()) <= rows[found["modes"][0]["floor"]]["floor"]["median"] == 1
    )
    assert rows[MOALIGN]["ratio"]["median"] == 1.0
    assert rows[MOALIGN]["peak_bytes"] is None or rows[MOALIGN]["peak_bytes"] < 64 * measure.MIB
    report = tables.begin("fused_core", "command", None)
    report["results"].append(found)
    beside = tables.write(tmp_path / "results" / "small.json", report, fused_core.text_of(report))
    assert "| **moalign** |" in beside.read_text() and "allocator: tuned" in beside.read_text()
    again = tables.begin("fused_core", "another", tmp_path / "results" / "small.json")
    assert again["commands"] == ["command", "another"] and again["results"] == json.loads(json.dumps([found]))
    with pytest.raises(ValueError, match="not a report of train_step"):
        tables.begin("train_step", "command", tmp_path / "results" / "small.json")


def test_a_childs_failure_is_told():
    ours, theirs = multiprocessing.Pipe()
    processes._enter(_refuse, None, theirs)
    kind, content = ours.recv()
    assert kind == "failed" and "ValueError: it must be something else" in content


def _refuse(argument, connection):
    raise ValueError("it must be something else")


def test_peak_memory_sees_what_is_freed_again():
    size = 64 * measure.MIB
    peak = processes.in_fork(lambda: measure.peak_extra_bytes(lambda: torch.zeros(size // 4).add_(1).sum(), CPU))
    if peak is None:
        pytest.skip("the kernel has no high-water mark that can be set back")
    assert 0.9 * size < peak < 1.5 * size


def test_alternation_takes_every_call_once_a_round():
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = measure.alternate(calls, 3, CPU, lambda number: None)
    assert order == [*"abc", *"bca", *"cab", *"abc"]
    assert all(len(values) == 3 for values in times.values())


def test_ratio_compares_within_rounds():
    ratio = measure.Ratio.of([2.0, 20.0, 3.0], [1.0, 10.0, 1.0])
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 2.5)
    assert str(ratio) == "2.00 (2.00-2.50)"


class Voice:
    """Stands in for the connection to the process that alternates: always says go, and keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def recv(self) -> str:
        return "go"

    def send(self, message: tuple[str, Any]) -> None:
        self.told.append(message)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_both_engines_optimise_the_same_loss(tmp_path, monkeypatch):
    """On dialogue-like lengths; the second and third loss depend on every gradient before."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    task = Task("dialogue", longest=48, hidden=64, layers=1, vocabulary=131, pairs_per_step=3, steps=1, rank=4, lr=1e-2)
    write_model(task, tmp_path / "model")
    write_pairs(task, tmp_path / "training.jsonl", tmp_path / "held_out.jsonl")
    engines = {}
    for name in ("moalign", "TRL"):
        assignment, voice = Assignment(name, task, str(tmp_path), "cpu", None, False), Voice()
        ENGINES[name](assignment, Stepper(voice, assignment))
        assert [kind for kind, _ in voice.told] == ["ready", *["step"] * task.all_steps, "result"]
        engines[name] = voice.told[-1][1]
    assert same_loss(engines["moalign"], engines["TRL"]) is None
    assert engines["moalign"]["tokens"] == engines["TRL"]["tokens"]
    losses = engines["TRL"]["losses"]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert len(losses) == task.warmup and abs(losses[2] - math.log(2)) > 1e-3  # or the comparison would see nothing


def test_engines_step_in_turn_in_processes_of_their_own():
    task = Task("uniform", longest=16, hidden=64, layers=1, vocabulary=64, pairs_per_step=1, warmup=1, steps=3)
    found = train_step.run(task, ["moalign", "TRL"], "tuned", "cpu", 1, False, lambda text: None, _stand_in)
    engines = found["engines"]
    assert found["same_loss"] is None
    assert engines["moalign"]["seconds"] == [0.0, 1.0, 2.0, 3.0] == engines["TRL"]["seconds"]
    assert engines["TRL"]["settings"]["MALLOC_TOP_PAD_"] is not None
    assert [row[0] for row in train_step.table_of({**found, "engines": _slower(engines)}).rows] == [
        "**moalign**",
        "TRL",
    ]


def _stand_in(assignment, connection):
    """Speaks as an engine does, and trains nothing."""
    connection.send(("ready", None))
    for step in range(assignment.task.all_steps):
        assert connection.recv() == "go"
        connection.send(("step", float(step)))
    result = {"losses": [0.7], "norms": [1.0], "tokens": [5] * 4, "peak_resident_bytes": 1, "profile": None}
    connection.send(("result", result | {"settings": {"MALLOC_TOP_PAD_": os.environ.get("MALLOC_TOP_PAD_")}}))


def _slower(engines):
    return {name: engine | {"seconds": [1.0, 2.0, 3.0, 4.0]} for name, engine in engines.items()}


def test_grouped_batches_hold_the_same_pairs_at_similar_lengths():
    task = Task("dialogue", 640, pairs_per_step=2, warmup=1, steps=3)
    lengths = [50, 7, 9, 400, 300, 10, 8, 60]
    pairs = [(SimpleNamespace(ids=range(length)), SimpleNamespace(ids=range(length - 1))) for length in lengths]
    steps = [pairs[at : at + 2] for at in range(0, 8, 2)]
    grouped = _grouped(steps, task)
    assert grouped[0] == steps[0]
    assert sorted(sorted(len(first.ids) for first, _ in batch) for batch in grouped[1:]) == [
        [8, 9],
        [10, 60],
        [300, 400],
    ]


def test_different_losses_are_noticed():
    one, other = {"losses": [0.69, 0.68], "norms": [1.0, 1.0]}, {"losses": [0.69, 0.679], "norms": [1.0, 1.0]}
    assert same_loss(one, one) is None
    assert "step 1" in (same_loss(one, other) or "")
    assert same_loss({"losses": [], "norms": []}, one) is not None


TINY_SWEEP = Task("uniform", 24, hidden=64, layers=1, vocabulary=64, pairs_per_step=1, warmup=0, steps=3, lr=1e-2)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_way_trains_the_same_sweep(tmp_path, monkeypatch):
    """The candidate with equal weights, in a pass of three, alone, and as TRL trains it."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    sweep_engines.write(TINY_SWEEP, tmp_path)
    trained = {}
    for way in (sweep_engines.ONE_PASS, sweep_engines.ONE_BY_ONE, sweep_engines.TRL):
        engine = sweep_engines.WAYS[way](Assignment(way, TINY_SWEEP, str(tmp_path), "cpu", None, False))
        trained[way] = engine.train(1 if way == sweep_engines.TRL else 3)
        assert engine.ready["tokens"] == TINY_SWEEP.steps * 2 * TINY_SWEEP.longest
        assert 0 < trained[way]["seconds"] <= trained[way]["total"]
        assert len(trained[way]["losses"]) == sweep_engines.CHECKED_STEPS
    assert trained[sweep_engines.ONE_PASS]["size"] == 3 and trained[sweep_engines.ONE_BY_ONE]["size"] == 1
    together = {"3": {way: [trained[way]] for way in (sweep_engines.ONE_PASS, sweep_engines.ONE_BY_ONE)}}
    assert sweep_cost.same_loss(together, [trained[sweep_engines.TRL]]) is None
    losses = trained[sweep_engines.TRL]["losses"]
    assert abs(losses[2] - math.log(2)) > 1e-3  # or the comparison would see nothing
    wrong = trained[sweep_engines.TRL] | {"losses": [*losses[:2], losses[2] + 1e-3]}
    assert "loss of step 2" in (sweep_cost.same_loss(together, [wrong]) or "")


def test_the_runs_that_were_not_made_are_marked(monkeypatch):
    monkeypatch.setattr(sweep_cost, "Child", _Way)
    found = sweep_cost.run(TINY_SWEEP, [4, 2], "tuned", 2, 3, "cpu", 1, lambda text: None)
    assert found["same_loss"] is None and len(found["trl"]) == 3
    rows = {row[0]: row[1:] for row in sweep_cost.table_of(found | {"model": "tiny"}).rows}
    assert list(rows)[:4] == ["**K = 2, one pass**", "K = 2, auto (2 together)", "K = 2, one by one", "K = 2, TRL"]
    assert rows["**K = 2, one pass**"][:3] == ["2.00", "3.00", "10"]
    assert rows["**K = 2, one pass**"][4:] == ["0.50 (0.50-0.50)", "0.667", "0.333"]
    assert rows["K = 2, one by one"][0] == "4.00"
    assert rows["K = 2, TRL"][:2] == ["3.00", "9.00"]
    assert rows["K = 4, TRL, extrapolated from 3 runs"][:2] == ["8.00", "24.00"]


class _Way:
    """Stands in for a process: a second for a candidate in a pass, two alone; TRL's runs take 1, 2 and 3 seconds."""

    def __init__(self, target: Any, assignment: Assignment, allocator: str, **variables: str) -> None:
        self.way, self.runs, self.number = assignment.engine, 0, 0

    def send(self, number: int) -> None:
        self.runs, self.number = self.runs + 1, number

    def receive(self) -> tuple[str, Any]:
        if not self.runs:
            return "ready", {"tokens": 10, "loading": 0.75, "reference": 0.25}
        seconds = self.number * (2.0 if self.way == sweep_engines.ONE_BY_ONE else 1.0)
        told = {"losses": [0.7], "settings": {}, "peak_bytes": 1, "size": 2}
        if self.way == sweep_engines.TRL:
            return "trained", told | {"seconds": float(self.runs), "total": 3.0 * self.runs}
        return "trained", told | {"seconds": seconds, "total": seconds}

    def close(self) -> None: ...
