"""Losses on single responses without rollouts: what is trained on, in which steps, side by side, resumed, refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interruptions import StopAfterSteps, break_off_and_resume
from scored_runs import CANDIDATES, READER, scored_config, write_scored
from sweeps import contents
from value_heads import settings_of, write_prompts

from moalign import lora, registry
from moalign.data.across import across_prompts
from moalign.data.batching import groups_of
from moalign.data.pairing import rated
from moalign.data.tokenise import Sequence
from moalign.demo import grammar
from moalign.engine import train as engine
from moalign.engine.mismatched import crossed, mean_log_ratio
from moalign.engine.scored_responses import ScoredResponses
from moalign.engine.scoring import LogpCache, logps_under
from moalign.engine.train import train_together
from moalign.engine.trainee import Trainee
from moalign.errors import DataError, TrainingError
from moalign.sweeps import run
from moalign.sweeps.candidate import batch_source, job_of, slots
from moalign.sweeps.estimate import estimate
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import Workshop, open_workshop
from moalign.types import Record

NAMES = slots(3)
TINY = {"steps": 3, "pairs_per_step": 6, "lr": 1e-3}
LOSSES: list[Any] = [
    "kto",
    {"name": "kto", "reference_point": False, "threshold": "mean"},
    "filtered",
    "unlikelihood",
    "reward-weighted",
    "advantage-weighted",
    {"name": "advantage-weighted", "learned": True},
    "adpo",
    "brain",
    "order-preserving",
    {"name": "order-preserving", "relative": True},
    "trajectory-balance",
    "rejection-sampling",
    "superhf",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_scored(tmp_path_factory.mktemp("data") / "scored.jsonl")


def workshop_of(path: Path, file: Path, loss: Any, /, **changes: Any) -> Workshop:
    plan = prepare(scored_config(path, file, loss, **changes), registry.discover())
    return open_workshop(plan, Path(), Observer(), keep_cache=False)


@pytest.fixture(scope="module")
def workshop(tiny_model_path, data) -> Workshop:
    return workshop_of(tiny_model_path, data, "trajectory-balance")


def other(workshop: Workshop, path: Path, file: Path, loss: Any, /, **changes: Any) -> Workshop:
    """The same model and data with another loss."""
    return replace(workshop, plan=prepare(scored_config(path, file, loss, **changes), registry.discover()))


def trained(workshop: Workshop, numbers: list[int]) -> tuple[list[list[dict[str, Any]]], list[dict[str, torch.Tensor]]]:
    """The metrics of each candidate's steps, and their adapters."""
    told: list[list[dict[str, Any]]] = [[] for _ in numbers]
    trainees = []
    for number, slot, mine in zip(numbers, NAMES, told, strict=False):
        source = batch_source(CANDIDATES[number], workshop, slot)
        note = lambda step, metrics, mine=mine: mine.append(metrics)  # noqa: E731
        trainees.append(Trainee(job_of(CANDIDATES[number], workshop, ()), source, slot, note))
    train_together(workshop.model, trainees, LogpCache(workshop.model), workshop.accelerator)
    assert [trainee.error for trainee in trainees] == [None] * len(numbers)
    return told, [lora.weights(workshop.model.policy, slot) for slot in NAMES[: len(numbers)]]


# --- what is trained on ---------------------------------------------------------------------------------------------


def test_a_response_without_a_score_for_every_objective_is_counted_and_left_out(workshop):
    scores = {"a": (1.0, None, 3.0), "b": (0.0, 1.0, 2.0)}
    records = [Record("p", ("x", "y", "z"), scores, group="p"), Record("q", ("x",), {"a": (1.0,)}, group="q")]
    tokeniser = workshop.model.tokeniser
    found = rated(records, tokeniser, ["a", "b"], directions={"b": "min"}, by_all=True)
    assert found.pairs.tolist() == [[0, 0], [1, 1]]
    assert found.rewards.tolist() == [[1.0, 0.0], [3.0, -2.0]]
    assert found.counts == {
        "left out: a response without a score for a": 1,
        "left out: a response without a score for b": 1,
    }
    later = rated(records, tokeniser, ["a", "b"], later=["a", "b"], by_all=True)
    assert len(later.pairs) == 4 and np.isnan(later.rewards[3, 1])
    assert len(rated(records, tokeniser, ["a", "b"]).pairs) == 4
    assert [len(rated(records, tokeniser, ["a"], later=later).pairs) for later in ([], ["a"])] == [3, 4]
    with pytest.raises(DataError, match="2 x left out: a response without a score for a"):
        rated([Record("p", ("x", "y"), {"b": (1.0, 2.0)}, group="p")], tokeniser, ["a", "b"], by_all=True)


def test_steps_have_whole_prompts_and_epochs_drop_and_repeat_none(workshop):
    source = batch_source(CANDIDATES[1], workshop)
    assert isinstance(source, ScoredResponses)
    dataset, _ = source.at(0)
    groups = len(dataset.pairs_of_group)
    per_step = groups_of(dataset, 8)
    assert per_step == round(8 * groups / len(dataset.pairs)) and len(set(map(len, dataset.pairs_of_group))) > 1
    met: list[int] = []
    for step in range(groups):  # so many epochs as prompts in a step
        _, pairs = source.at(step)
        named = dataset.groups[dataset.pairs[pairs, 0]]
        for group in set(named.tolist()):
            assert (named == group).sum() % (dataset.groups[dataset.pairs[:, 0]] == group).sum() == 0
        met += pairs.tolist()
    assert sorted(met) == sorted(list(range(len(dataset.pairs))) * per_step)
    assert [source.at(3)[1].tolist()] == [batch_source(CANDIDATES[0], workshop).at(3)[1].tolist()]


def test_the_combiner_and_the_loss_are_asked_once_for_all_responses(workshop, tiny_model_path, data):
    shop = other(workshop, tiny_model_path, data, "rejection-sampling")
    for candidate in CANDIDATES:
        source = batch_source(candidate, shop)
        dataset, _ = source.at(0)
        assert source.at(5)[0] is dataset and dataset.advantages is not None
        weights = np.array(candidate.preference.vector(shop.plan.objectives))
        signal = dataset.rewards @ weights
        assert source.figures["signal"] == pytest.approx(signal.mean()) and "kl_sampled" not in source.figures
        for own in dataset.pairs_of_group:
            rows = dataset.pairs[own, 0]
            best = dataset.advantages[rows]
            assert best.max() == len(rows) == best.sum() and signal[rows][best.argmax()] == signal[rows].max()


def test_rewards_come_from_plugins_and_through_transforms_too(workshop, tiny_model_path, data):
    """Responses without a score are scored; a transform shapes what counts, and not what is reported as the reward."""
    lengths = {"reward": "length"}
    objectives = {"helpful": lengths | {"transform": {"name": "scale", "factor": 3.0}}, "harmless": lengths}
    changes = {
        "objectives": objectives,
        "data": {"path": str(data), "held_out": 0.2, "margins": "reward", "reader": READER},
    }
    shop = workshop_of(tiny_model_path, data, "trajectory-balance", **changes)
    assert shop.material.margins == {"harmless": "reward", "helpful": "reward"}
    source = batch_source(CANDIDATES[0], shop)
    dataset, _ = source.at(0)
    assert shop.material.train is not None
    raw = shop.material.train.rewards
    assert np.isfinite(raw).all() and (raw[:, 0] == raw[:, 1]).all()
    np.testing.assert_allclose(dataset.rewards[:, 1], 3 * raw[:, 1])
    np.testing.assert_allclose(dataset.advantages, 3 * raw[:, 1])
    assert source.figures["helpful/reward"] == pytest.approx(raw[:, 1].mean())
    assert source.figures["helpful/shaped"] == pytest.approx(3 * raw[:, 1].mean())


def test_labels_of_single_completions_are_measured_across_prompts(tiny_model_path, tmp_path):
    """TRL's unpaired rows, one to a prompt: no two responses to a prompt can be compared."""
    file = tmp_path / "labels.jsonl"
    rows = [
        {"prompt": f"q{number}: ", "completion": "ab"[number % 2] * 4, "label": number % 2 == side, "objective": name}
        for number in range(20)
        for side, name in enumerate(("helpful", "harmless"))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shop = workshop_of(tiny_model_path, file, "kto", data={"path": str(file), "held_out": 0.3})
    pairs = shop.material.held_out.pairs
    assert pairs is not None and shop.material.train is not None
    assert shop.material.counts["held-out pairs of responses to different prompts"] == len(pairs.pairs) > 2
    for (chosen, rejected), judge in zip(pairs.pairs.tolist(), pairs.pair_objective.tolist(), strict=True):
        assert (pairs.rewards[chosen, judge], pairs.rewards[rejected, judge]) == (1, 0)
        assert pairs.groups[chosen] != pairs.groups[rejected]
    assert shop.evaluate(None).scores == {"harmless": 0.5, "helpful": 0.5}
    assert sorted(shop.material.train.rewards.sum(1).tolist()) == [1.0] * len(shop.material.train.pairs)
    (lines,), _ = trained(shop, [0])
    assert lines[-1]["loss"] < lines[0]["loss"] == pytest.approx(0.5)


def test_pairs_across_prompts_use_every_response_of_a_rare_label_once(workshop):
    scores = [0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    records = [Record(f"p{n}", ("xy",), {"a": (score,)}, group=f"p{n}") for n, score in enumerate(scores)]
    found = across_prompts(rated(records, workshop.model.tokeniser, ["a"]))
    assert found is not None and found.pairs.tolist() == [[1, 2], [5, 3]] and found.strength.tolist() == [1, 1]
    assert across_prompts(rated(records[2:5], workshop.model.tokeniser, ["a"])) is None


# --- behind other prompts -------------------------------------------------------------------------------------------


def test_each_prompt_has_the_next_response_to_another_one():
    own = [Sequence((1, 2, 10), 2), Sequence((1, 2, 11, 12), 2), Sequence((3, 20), 1), Sequence((4, 5, 6, 30, 31), 3)]
    made = crossed(own, [0, 0, 7, 3])
    assert [(each.prompt, each.response) for each in made] == [
        ((1, 2), (20,)),
        ((1, 2), (20,)),
        ((3,), (30, 31)),
        ((4, 5, 6), (10,)),
    ]
    assert crossed([Sequence((1, 2, 3), 2), Sequence((4, 5, 6), 1)], [0, 1])[0].ids == (2, 5, 6)  # no longer than given
    with pytest.raises(TrainingError, match=r"all of this step are to one; raise train.pairs_per_step"):
        crossed(own[:2], [0, 0])


def test_the_reference_point_is_the_mean_over_the_step_and_the_same_in_all_its_passes(
    workshop, tiny_model_path, data, monkeypatch
):
    shop = other(workshop, tiny_model_path, data, "kto")
    small = {"steps": 6, "pairs_per_step": 8, "lr": 5e-3, "tokens_per_pass": 40}
    cut = other(workshop, tiny_model_path, data, "kto", train=small)
    seen: list[list[float]] = []
    plain = type(shop.plan.objective).loss

    def looking(self, batch, terms):
        seen.append(batch.mismatched.tolist())
        return plain(self, batch, terms)

    monkeypatch.setattr(type(shop.plan.objective), "loss", looking)
    (whole,), [weights] = trained(shop, [1])
    passes = len(seen)
    (parts,), [again] = trained(cut, [1])
    assert len(seen) - passes > passes and all(len(set(each)) == 1 for each in seen)
    assert whole[0]["kl_mismatched"] == 0 != whole[-1]["kl_mismatched"]  # it begins as the reference, to the bit
    for name in ("loss", "kl_mismatched", "gradient_norm"):
        assert [line[name] for line in parts] == pytest.approx([line[name] for line in whole], rel=1e-4, abs=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-5)
    source = batch_source(CANDIDATES[1], shop)
    dataset, pairs = source.at(2)
    rows = list(dict.fromkeys(dataset.pairs[pairs, 0].tolist()))
    sequences = crossed([dataset.sequences[row] for row in rows], dataset.groups[rows].tolist())
    reference, own = (
        logps_under(shop.model, sequences, range(len(rows)), [adapter])[0] for adapter in (None, NAMES[0])
    )
    expected = np.mean([(a - b).sum() for a, b in zip(own, reference, strict=True)])
    assert mean_log_ratio(shop.model, dataset, pairs, NAMES[0], None) == pytest.approx(expected, abs=1e-5)
    assert abs(expected) > 1e-3


# --- side by side, interrupted, ended early -------------------------------------------------------------------------


def test_one_in_a_pass_of_three_is_trained_as_it_would_be_alone(workshop, tiny_model_path, data):
    shop = other(workshop, tiny_model_path, data, "kto")
    alone = [trained(shop, [number]) for number in range(3)]
    together, weights = trained(shop, [0, 1, 2])
    for mine, own, ((expected,), (truth,)) in zip(together, weights, alone, strict=True):
        for name in ("loss", "advantage", "gradient_norm", "kl_mismatched"):
            assert [line[name] for line in mine] == pytest.approx([line[name] for line in expected], rel=1e-4, abs=1e-5)
        for name, tensor in own.items():
            torch.testing.assert_close(tensor, truth[name], rtol=0, atol=1e-5)
    first, last = alone[0][1][0], alone[2][1][0]
    assert max((first[name] - last[name]).abs().max() for name in first) > 1e-3


def test_candidates_with_the_same_responses_share_their_passes(workshop, monkeypatch):
    """Though these count differently for each, which their losses must show."""
    made = []
    monkeypatch.setattr(engine, "pair_passes", lambda *given, inner=engine.pair_passes: made.append(0) or inner(*given))
    lines, _ = trained(workshop, [0, 2])
    assert len(made) == len(lines[0]) == 6
    assert lines[0][0]["loss"] != lines[1][0]["loss"]


def test_interrupted_and_resumed_equals_unbroken_byte_for_byte(tiny_model_path, data, tmp_path):
    train = {"steps": 4, "pairs_per_step": 8, "lr": 5e-3, "together": 1}
    settings = scored_config(tiny_model_path, data, "kto", train=train, search={"name": "grid", "points": 2})
    run.start(settings, tmp_path / "unbroken", registry.discover(), Observer())
    resumed = break_off_and_resume(settings, tmp_path / "run", StopAfterSteps(6))
    assert contents(resumed) == contents(tmp_path / "unbroken")
    file = next(iter(sorted(tmp_path.glob("run/candidates/*/metrics.jsonl"))))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    figures = {"loss", "signal", "advantage", "kl_estimate", "kl_mismatched", "helpful/reward", "helpful/weighted"}
    assert len(lines) == 4 and figures <= set(lines[0])


def test_an_early_stop_looks_at_held_out_responses_as_the_rules_then_count_them(tiny_model_path, data):
    train = {"steps": 6, "pairs_per_step": 8, "lr": 5e-3, "early_stop": {"every": 2, "patience": 1}}
    shop = workshop_of(tiny_model_path, data, "kto", train=train)
    job = job_of(CANDIDATES[1], shop, ())
    assert job.held_out is not None and shop.material.looked_at is not None
    signal = shop.material.looked_at.rewards @ np.array(CANDIDATES[1].preference.vector(shop.plan.objectives))
    assert job.held_out.advantages is not None
    assert job.held_out.advantages.tolist() == [1.0 if each > 0.5 else -1.0 for each in signal]
    (lines,), _ = trained(shop, [1])
    looks = {line: values["held_out_loss"] for line, values in enumerate(lines) if "held_out_loss" in values}
    assert next(iter(looks)) == 1 and 0.3 < looks[1] < 0.7  # a half is where it began


def test_a_dry_run_says_what_it_will_cost(tiny_model_path, data):
    plan = prepare(scored_config(tiny_model_path, data, "brain"), registry.discover())
    found = estimate(plan, Observer())
    assert found.tokens > 0 and found.seconds > 0 and found.seconds_of_sampling == 0
    assert found.counts["training responses"] > 20


# --- every loss by one line -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def assistant(tmp_path_factory) -> tuple[Path, Workshop]:
    """The demo's model and replies of its world, with their exact scores."""
    file = tmp_path_factory.mktemp("assistant") / "scored.jsonl"
    rows = []
    for prompt in grammar.PROMPTS[:12]:
        some = list(grammar.replies(prompt))[::37][:4]
        scores = [grammar.score(prompt, reply) for reply in some]
        row = {"prompt": prompt, "responses": some} | {
            name: [s[name] for s in scores] for name in ("helpful", "harmless")
        }
        rows.append(json.dumps(row) + "\n")
    file.write_text("".join(rows))
    return file, workshop_of(Path("tiny-assistant"), file, "filtered", train=TINY)


@pytest.mark.parametrize(
    "loss", LOSSES, ids=lambda each: each if isinstance(each, str) else "-".join(map(str, each.values()))
)
def test_it_trains_on_scored_replies_by_one_line(assistant, loss):
    file, workshop = assistant
    shop = other(workshop, Path("tiny-assistant"), file, loss, train=TINY)
    (lines,), [weights] = trained(shop, [1])
    assert len(lines) == 3 and all(np.isfinite(line["loss"]) and line["gradient_norm"] > 0 for line in lines)
    assert any(tensor.abs().max() > 1e-4 for name, tensor in weights.items() if "lora_B" in name)


ONLINE: list[Any] = [
    {"name": "kto", "threshold": "mean"},
    {"name": "adpo", "anchor": "sampler"},
    {"name": "brain", "proposal": "sampler"},
    {"name": "order-preserving"},
]


@pytest.fixture(scope="module")
def sampling(tiny_model_path, tmp_path_factory) -> tuple[Path, Workshop]:
    file = write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl")
    plan = prepare(settings_of(tiny_model_path, file, loss="brain"), registry.discover())
    return file, open_workshop(plan, Path(), Observer(), keep_cache=False)


@pytest.mark.parametrize("loss", ONLINE, ids=str)
def test_they_learn_from_sampled_responses_as_well(sampling, tiny_model_path, loss):
    file, workshop = sampling
    shop = replace(workshop, plan=prepare(settings_of(tiny_model_path, file, loss=loss), registry.discover()))
    shop.first_round.clear()
    (lines,), [weights] = trained(shop, [1])
    assert len(lines) == 12 and all(np.isfinite(line["loss"]) for line in lines)
    assert any(line["gradient_norm"] > 0 for line in lines)  # not in a step whose prompts have responses all alike
    assert any(tensor.abs().max() > 1e-4 for name, tensor in weights.items() if "lora_B" in name)


# --- conditional training -------------------------------------------------------------------------------------------


def test_responses_are_learned_behind_the_tags_of_their_own_rewards(tiny_model_path, data):
    """Conditional training (arXiv 2302.08582): likelihood of all, each behind whether it is good."""
    loss, condition = {"name": "filtered", "threshold": -1e9}, {"name": "tags", "of": "rewards", "levels": 1}
    shop = workshop_of(tiny_model_path, data, loss, condition=condition)
    first = shop.plan.propose(())[0]
    source = batch_source(first, shop)
    dataset, _ = source.at(0)
    decode = shop.model.tokeniser.tokenizer.decode
    assert shop.material.train is not None
    for sequence, plain, rewards in zip(
        dataset.sequences, shop.material.train.sequences, dataset.rewards.tolist(), strict=True
    ):
        harmless, helpful = map(round, rewards)
        prompt = decode(sequence.prompt, skip_special_tokens=True)
        assert prompt.startswith(f"<harmless {harmless}> <helpful {helpful}> q")
        assert sequence.response == plain.response
    assert dataset.advantages is not None and (dataset.advantages == 1).all()
    told: list[dict[str, Any]] = []
    trainee = Trainee(job_of(first, shop, ()), source, NAMES[0], lambda step, metrics: told.append(metrics))
    train_together(shop.model, [trainee], shop.cache, shop.accelerator)
    assert trainee.error is None and told[-1]["loss"] < told[0]["loss"]
