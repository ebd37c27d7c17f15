"""A candidate whose held-out loss has stopped falling ends with its best weights, and the others never notice."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from interruptions import StopAfterSteps, break_off_and_resume
from rich.console import Console
from sweeps import contents, small_config, write_pairs
from torch.nn.functional import logsigmoid

from moalign import lora, registry, storage
from moalign.api import Objective
from moalign.config import EarlyStopSettings
from moalign.engine import model as models
from moalign.engine import train as engine
from moalign.engine.early_stop import Looks
from moalign.engine.layout import one_by_one
from moalign.engine.scoring import LogpCache
from moalign.engine.train import train_together
from moalign.engine.trainee import Job, Trainee
from moalign.errors import ConfigError, PluginError, TrainingError
from moalign.progress import ConsoleObserver
from moalign.sweeps import run
from moalign.sweeps.candidate import batch_source, job_of, slots
from moalign.sweeps.estimate import estimate
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import Workshop, open_workshop
from moalign.types import Candidate, Preference

BETA = 0.3
CANDIDATES = [
    Candidate(f"c{number}", Preference("weights", {"harmless": share, "helpful": 1 - share}))
    for number, share in enumerate((0.0, 0.3, 0.8))
]
TRAIN = {"steps": 20, "pairs_per_step": 6, "lr": 5e-3, "warmup": 0.0, "schedule": "constant", "together": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    """Each held-out pair contradicts what the training pairs teach: the better it is learned, the higher the loss."""
    folder = tmp_path_factory.mktemp("data")
    rows = [json.loads(row) for row in write_pairs(folder / "other.jsonl", 4, seed=1).read_text().splitlines()]
    against = [r | {"prompt": "x" + r["prompt"], "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in against))
    return {"path": str(write_pairs(folder / "pairs.jsonl")), "held_out_path": str(folder / "held_out.jsonl")}


def workshop_of(path: Path, data: dict[str, Any], early_stop: dict[str, int] | None, **changes: Any) -> Workshop:
    content = {"data": data, "train": TRAIN | {"early_stop": early_stop}, "loss": {"name": "dpo", "beta": BETA}}
    settings = small_config(path, Path(data["path"]), **content | changes)
    return open_workshop(prepare(settings, registry.discover()), Path(), Observer(), keep_cache=False)


@pytest.fixture(scope="module")
def workshop(tiny_model_path, data) -> Workshop:
    return workshop_of(tiny_model_path, data, {"every": 2, "patience": 2})


def job(workshop: Workshop, number: int, every: int | None, patience: int = 1, **settings: Any) -> Job:
    made = job_of(CANDIDATES[number], workshop, ())
    stop = None if every is None else EarlyStopSettings(every=every, patience=patience)
    return replace(made, settings=made.settings.model_copy(update={"early_stop": stop} | settings))


Lines = list[dict[str, Any]]


def trained(workshop: Workshop, *jobs: Job) -> tuple[list[Trainee], list[Lines], list[dict[str, torch.Tensor]]]:
    """Together: the candidates, the metrics of their steps, their adapters."""
    lines: list[Lines] = [[] for _ in jobs]
    trainees = []
    for each, slot, mine in zip(jobs, slots(len(jobs)), lines, strict=True):
        candidate = next(candidate for candidate in CANDIDATES if candidate.id == each.candidate)
        trainees.append(Trainee(each, batch_source(candidate, workshop, slot), slot, noting(mine)))
    train_together(workshop.model, trainees, LogpCache(workshop.model), Accelerator())
    return trainees, lines, [lora.weights(workshop.model.policy, trainee.slot) for trainee in trainees]


def noting(lines: Lines) -> Callable[[int, dict[str, Any]], None]:
    return lambda step, values: lines.append({"step": step} | values)


def largest(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def looks_of(lines: Lines) -> dict[int, float]:
    return {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}


def scripted(found: Job, losses: list[float]) -> Job:
    """Trains as before; look number n finds the loss ``losses[n]`` for every pair (the data fits in one pass)."""
    left = iter(losses)
    inner = found.objective

    class Scripted(Objective):
        needs = frozenset({"pairs", "reference"})

        def loss(self, batch, terms):
            if torch.is_grad_enabled():
                return inner.loss(batch, terms)
            return torch.full((len(batch.pairs),), float(next(left)))

    return replace(found, objective=Scripted())


# --- the rule -------------------------------------------------------------------------------------------------------


def test_only_a_strictly_lower_finite_loss_is_an_improvement():
    looks = Looks()
    seen = []
    for step, loss in enumerate([math.nan, 3.0, 3.0, math.inf, 2.5, math.nan, -math.inf, 2.4999, 9.0]):
        looks = looks.after(step, loss)
        seen.append((looks.best_step, looks.in_vain))
    assert seen == [(None, 1), (1, 0), (1, 1), (1, 2), (4, 0), (4, 1), (4, 2), (7, 0), (7, 1)]
    assert looks.lowest == 2.4999


@pytest.mark.parametrize(
    ("losses", "every", "patience", "steps", "best", "stopped"),
    [
        ([5, 4, 3, 4, 5], 2, 2, 20, 5, 9),
        ([5, 6, 4, 6, 3, 4, 4], 2, 2, 20, 9, 13),  # a look without improvement is forgiven after the next one
        ([5, 5, 5], 3, 2, 20, 2, 8),  # equal is not lower
        ([5, math.nan, math.nan], 1, 2, 20, 0, 2),
        ([math.nan, 5, 6, 7], 1, 2, 20, 1, 3),
        ([5, 4, 3], 3, 5, 7, 6, None),  # steps 2, 5 and the last
        ([5, 4, 6], 3, 1, 7, 5, None),  # out of patience where the steps end as well
        ([5], 50, 1, 4, 3, None),
    ],
)
def test_it_ends_when_it_should_with_the_best_weights_to_the_bit(
    workshop, losses, every, patience, steps, best, stopped
):
    stopping = scripted(job(workshop, 1, every, patience, steps=steps), losses)
    [trainee], [lines], [tensors] = trained(workshop, stopping)
    result = trainee.result
    assert (result.best_step, result.stopped_at_step) == (best, stopped)
    assert result.steps == len(lines) == (steps if stopped is None else stopped + 1)
    assert [line["step"] for line in lines] == list(range(result.steps))
    assert result.tokens == sum(line["tokens"] for line in lines)
    due = [step for step in range(result.steps) if (step + 1) % every == 0 or step + 1 == steps]
    expected = [loss / 2 if math.isfinite(loss) else "nan" for loss in losses]  # w and 1 - w in equal parts
    assert list(looks_of(lines)) == due and list(looks_of(lines).values()) == pytest.approx(expected)
    _, [shorter], [truth] = trained(workshop, job(workshop, 1, None, steps=best + 1))
    assert largest(tensors, truth) == 0.0
    assert [line["loss"] for line in lines[: best + 1]] == [line["loss"] for line in shorter]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_look_changes_nothing_in_the_training(workshop, checkpointing):
    """All the same numbers, with looks after every step and without."""
    _, [with_looks], _ = trained(workshop, job(workshop, 1, 1, 100, steps=8, gradient_checkpointing=checkpointing))
    _, [without], _ = trained(workshop, job(workshop, 1, None, steps=8, gradient_checkpointing=checkpointing))
    assert len(looks_of(with_looks)) == 8
    assert [{k: v for k, v in line.items() if k != "held_out_loss"} for line in with_looks] == without


# --- the measure ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens_per_pass", [None, 40])
@pytest.mark.parametrize("changes", [{}, {"dropout": 0.5}, {"dropout": 0.5, "layers": "upper-half"}])
def test_it_is_the_mean_of_the_weighted_training_loss_over_the_held_out_pairs(
    tiny_model_path, data, changes, tokens_per_pass
):
    """Without dropout and however the pairs are cut into passes, in a pass of three."""
    model = {"path": str(tiny_model_path), "lora": {"r": 4, "alpha": 8} | changes}
    workshop = workshop_of(tiny_model_path, data, {"every": 5}, model=model)
    jobs = [job(workshop, number, 5, steps=5, tokens_per_pass=tokens_per_pass) for number in range(3)]
    trainees, lines, _ = trained(workshop, *jobs)
    pairs = workshop.material.held_out.pairs
    assert pairs is not None and workshop.material.looked_at is not None
    layout = one_by_one(pairs.sequences, 0)
    chosen, rejected = torch.from_numpy(pairs.pairs.copy()).T
    with lora.active(workshop.model.policy, None):
        reference = workshop.model.response_logps(layout).sum(-1)
    for trainee, mine in zip(trainees, lines, strict=True):
        with lora.active(workshop.model.policy, trainee.slot):
            ratios = workshop.model.response_logps(layout).sum(-1) - reference
        weights = torch.tensor(trainee.job.preference)[torch.from_numpy(pairs.pair_objective.copy())]
        expected = (weights * -logsigmoid(BETA * (ratios[chosen] - ratios[rejected]))).mean()
        assert expected > 0.36  # ln 2 / 2 is where it began
        assert looks_of(mine) == {4: pytest.approx(float(expected), abs=1e-5)}


# --- the others -----------------------------------------------------------------------------------------------------


def test_three_in_a_pass_that_end_at_different_steps_are_as_each_alone(workshop):
    """The held-out loss of all of them rises, by their own losses."""
    jobs = [job(workshop, 0, 2, 1), job(workshop, 1, 3, 2), job(workshop, 2, None, steps=15)]
    trainees, lines, tensors = trained(workshop, *jobs)
    assert [trainee.result.steps for trainee in trainees] == [4, 9, 15]
    assert [trainee.result.best_step for trainee in trainees] == [1, 2, None]
    for found, mine, each in zip(tensors, lines, jobs, strict=True):
        [single], [truth], [expected] = trained(workshop, each)
        assert largest(found, expected) < 1e-5
        assert [line["loss"] for line in mine] == pytest.approx([line["loss"] for line in truth], abs=1e-5)
        assert looks_of(mine) == pytest.approx(looks_of(truth), abs=1e-5)
        assert single.result.steps == len(mine)


def test_looks_of_one_are_nothing_to_the_others(workshop):
    plain = [job(workshop, number, None, steps=8) for number in range(3)]
    _, lines, tensors = trained(workshop, *plain)
    _, found, after = trained(workshop, plain[0], job(workshop, 1, 2, 100, steps=8), plain[2])
    for number in (0, 2):
        assert found[number] == lines[number]
        assert largest(after[number], tensors[number]) == 0.0


class Breaks(Objective):
    """Trains, and fails in the look."""

    needs = frozenset({"pairs", "reference"})

    def loss(self, batch, terms):
        if torch.is_grad_enabled():
            return -logsigmoid((batch.logps * batch.mask).sum(-1)[batch.pairs[:, 0]])
        raise RuntimeError("no held-out pairs for me")


@pytest.mark.parametrize("tokens_per_pass", [None, 40])
def test_a_look_that_fails_ends_its_own_candidate_only(workshop, tokens_per_pass):
    jobs = [job(workshop, number, 3, 100, steps=8, tokens_per_pass=tokens_per_pass) for number in range(3)]
    jobs[1] = replace(jobs[1], objective=Breaks())
    trainees, lines, tensors = trained(workshop, *jobs)
    assert [len(mine) for mine in lines] == [8, 3, 8]
    assert "skipped" not in lines[1][-1] and "held_out_loss" not in lines[1][-1]
    with pytest.raises(PluginError, match=r"'Breaks' of .*, in loss: RuntimeError: no held-out pairs for me"):
        _ = trainees[1].result
    for number in (0, 2):
        _, _, [expected] = trained(workshop, jobs[number])
        assert largest(tensors[number], expected) < 1e-5
        assert list(looks_of(lines[number])) == [2, 5, 7]


def test_a_candidate_without_any_finite_look_has_no_best_weights(workshop):
    broken = scripted(job(workshop, 0, 2, 2), [math.nan, math.inf])
    [trainee, other], lines, _ = trained(workshop, broken, job(workshop, 1, 2, 2))
    with pytest.raises(TrainingError, match=r"step 3: no look at the held-out pairs found a finite loss, .* inf"):
        _ = trainee.result
    assert looks_of(lines[0]) == {1: "nan", 3: "inf"}
    assert other.result.best_step == 1


# --- whole sweeps ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings(tiny_model_path, data):
    train = TRAIN | {"steps": 9, "early_stop": {"every": 2, "patience": 1}, "together": 2}
    return small_config(tiny_model_path, Path(data["path"]), data=data, train=train, combine="modpo")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, settings) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "unbroken"
    run.start(settings, directory, registry.discover(), Observer())
    return directory


def test_the_front_says_where_each_candidate_ended(unbroken):
    front = storage.read_json(unbroken / "front.json")
    assert len(front["points"]) == 3
    for point in front["points"]:
        text = (unbroken / "candidates" / point["id"] / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        looks = looks_of(lines)
        best = min(looks, key=looks.__getitem__)
        assert point["details"]["best_step"] == best
        assert point["details"]["stopped_at_step"] == best + 2 == lines[-1]["step"] == len(lines) - 1
        assert point["tokens"] == sum(line["tokens"] for line in lines)


@pytest.mark.parametrize("after", [2, 7, 9])
def test_interrupted_and_resumed_equals_unbroken_byte_for_byte(settings, unbroken, tmp_path, after):
    resumed = break_off_and_resume(settings, tmp_path / "run", StopAfterSteps(after))
    assert contents(resumed) == contents(unbroken)


def test_the_bar_reaches_its_end(settings, tmp_path):
    bars = []

    class Kept(ConsoleObserver):
        def close(self):
            bars.extend(self._bar.tasks)
            super().close()

    result = run.start(
        settings, tmp_path / "run", registry.discover(), Kept(Console(file=io.StringIO(), force_terminal=True))
    )
    assert all(point["details"]["stopped_at_step"] < 8 for point in result["points"])
    assert [(bar.completed, bar.total) for bar in bars] == [(27, 27)]


def test_the_dry_run_counts_the_looks(tiny_model_path, data, monkeypatch):
    look, costs = engine._look, []

    def at_leisure(*arguments):
        if arguments[1]:
            time.sleep(0.2)  # longer than steps of this model vary by
        look(*arguments)

    monkeypatch.setattr(engine, "_look", at_leisure)
    for stop in (None, {"every": 1}, {"every": 7}):
        settings = small_config(tiny_model_path, Path(data["path"]), data=data, train=TRAIN | {"early_stop": stop})
        costs.append(estimate(prepare(settings, registry.discover()), Observer()))
    assert costs[0].seconds_of_looks == 0.0 < costs[1].seconds_of_looks
    for cost in costs:
        training = 20 * cost.seconds_per_step + cost.seconds_of_looks
        assert cost.steps == (20, 20, 20)
        assert cost.seconds == pytest.approx(3 * (training + cost.seconds_per_evaluation))


# --- what it needs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollouts": {"rounds": 1}, "loss": "rebel"}, r"train\.early_stop: rollouts trains on fresh samples"),
        ({"loss": "rebel"}, r"train\.early_stop: loss 'rebel' learns from reward differences"),
    ],
)
def test_what_has_no_held_out_loss_is_refused_before_the_model_is_loaded(
    tiny_model_path, data, tmp_path, monkeypatch, changes, message
):
    def load(*arguments):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(models, "load", load)
    objectives = {"helpful": {"reward": "length"}, "harmless": {"reward": "length"}}
    changes = changes | {"objectives": objectives, "train": TRAIN | {"early_stop": {}}}
    settings = small_config(tiny_model_path, Path(data["path"]), **changes)
    with pytest.raises(ConfigError, match=message):
        run.start(settings, tmp_path / "run", registry.discover(), Observer())
    assert not (tmp_path / "run").exists()
