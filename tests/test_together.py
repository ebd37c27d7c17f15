"""Candidates that share each pass over the base are trained as each would be alone, and fail alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from plain_training import trainable
from sweeps import small_config, write_pairs

from moalign import lora, registry
from moalign.api import Objective
from moalign.engine.layout import one_by_one
from moalign.engine.model import TRAINED, LanguageModel
from moalign.engine.scoring import LogpCache
from moalign.engine.train import train, train_together
from moalign.engine.trainee import Job, Trainee
from moalign.errors import ConfigError, ModelError, PluginError, TrainingError, UserError
from moalign.lora import Mixture
from moalign.report import wording
from moalign.sweeps import front, journal, run, together
from moalign.sweeps.candidate import batch_source, job_of, slots
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import Workshop, open_workshop
from moalign.types import Candidate, Preference

STEPS = 50


def candidates(*shares: float) -> list[Candidate]:
    return [
        Candidate(f"c{number}", Preference("weights", {"harmless": share, "helpful": 1 - share}))
        for number, share in enumerate(shares)
    ]


CANDIDATES = candidates(0.0, 0.3, 0.8)  # the first one trains on pairs of its own
ALIKE = candidates(0.1, 0.3, 0.8)  # all of them train on the same pairs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


LORA: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": 0.3},
    "upper half": {"layers": "upper-half", "dropout": 0.3},
}


@pytest.fixture(scope="module", params=LORA)
def workshop(request, tiny_model_path, pairs) -> Workshop:
    settings = small_config(
        tiny_model_path,
        pairs,
        model={"path": str(tiny_model_path), "lora": {"r": 4, "alpha": 8, "rslora": True} | LORA[request.param]},
        train={"steps": STEPS, "pairs_per_step": 6, "lr": 2e-3},
        loss={"name": "dpo", "beta": 0.3},
    )
    return open_workshop(prepare(settings, registry.discover()), Path(), Observer(), keep_cache=False)


def jobs(workshop: Workshop, among: list[Candidate] = CANDIDATES) -> list[Job]:
    """Preference, learning rate, schedule, strength of the KL term and number of steps all differ, and the pairs: the
    first one's preference is for one objective alone.

    The rate of the second is below 5e-3, where the last bit of a first weight makes 1e-2 of a log-probability in 50
    steps, also alone.
    """
    changes: list[dict[str, Any]] = [{}, {"lr": 3e-3, "schedule": "constant"}, {"lr": 1e-3, "steps": STEPS - 7}]
    made = []
    for candidate, change, beta in zip(among, changes, (0.3, 0.1, 0.5), strict=True):
        job = job_of(candidate, workshop, ())
        objective = job.objective.model_copy(update={"beta": beta})
        made.append(replace(job, settings=job.settings.model_copy(update=change), objective=objective))
    return made


def result(model: LanguageModel, workshop: Workshop, slot: str) -> dict[str, torch.Tensor]:
    tensors = lora.weights(model.policy, slot)
    assert workshop.material.train is not None
    with lora.active(model.policy, slot):
        tensors["log-probabilities"] = model.response_logps(one_by_one(workshop.material.train.sequences, 0))
    return tensors


def alone(workshop: Workshop, job: Job, candidate: Candidate) -> tuple[dict[str, torch.Tensor], list[float]]:
    model = workshop.model
    losses: list[float] = []
    source = batch_source(candidate, workshop)
    train(model, source, job, LogpCache(model), Accelerator(), noting(losses))
    return result(model, workshop, TRAINED), losses


def noting(losses: list[float]) -> Callable[[int, dict[str, Any]], None]:
    return lambda step, metrics: losses.append(metrics["loss"])


def in_one_pass(
    workshop: Workshop, all_jobs: list[Job], among: list[Candidate] = CANDIDATES
) -> tuple[list[Trainee], list[list[float]]]:
    losses: list[list[float]] = [[] for _ in all_jobs]
    trainees = []
    for candidate, job, slot, mine in zip(among, all_jobs, slots(3), losses, strict=True):
        trainees.append(Trainee(job, batch_source(candidate, workshop, slot), slot, noting(mine)))
    train_together(workshop.model, trainees, LogpCache(workshop.model), Accelerator())
    return trainees, losses


def largest(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize("among", [CANDIDATES, ALIKE], ids=["other pairs", "the same pairs"])
def test_a_candidate_in_a_pass_of_three_is_the_candidate_trained_alone(workshop, among):
    all_jobs = jobs(workshop, among)
    expected = [alone(workshop, job, candidate) for job, candidate in zip(all_jobs, among, strict=True)]
    trainees, losses = in_one_pass(workshop, all_jobs, among)
    tensors = [result(workshop.model, workshop, trainee.slot) for trainee in trainees]
    for trainee, mine, found, (truth, true_losses) in zip(trainees, losses, tensors, expected, strict=True):
        assert trainee.result.steps == len(mine) == len(true_losses)
        assert true_losses[-1] < 0.9 * true_losses[0]  # something was learned
        assert mine == pytest.approx(true_losses, abs=1e-5)
        assert largest(found, truth) < 1e-5
    assert largest(tensors[0], tensors[2]) > 1e-2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_changes_nothing(workshop, checkpointing):
    """Dropout masks are drawn again in backward, and are the same ones."""
    plain = [replace(job, settings=job.settings.model_copy(update={"steps": 8})) for job in jobs(workshop)]
    changed = [replace(j, settings=j.settings.model_copy(update={"gradient_checkpointing": True})) for j in plain]
    trainees, _ = in_one_pass(workshop, plain)
    expected = [result(workshop.model, workshop, trainee.slot) for trainee in trainees]
    trainees, _ = in_one_pass(workshop, changed)
    for trainee, truth in zip(trainees, expected, strict=True):
        assert largest(result(workshop.model, workshop, trainee.slot), truth) < 1e-5


class Diverging(Objective):
    """An objective whose loss is not a number from its sixth call on."""

    needs = frozenset({"pairs", "reference"})
    inner: Any
    calls: list[int] = []  # noqa: RUF012

    def loss(self, batch, terms):
        self.calls.append(1)
        losses = self.inner.loss(batch, terms)
        return losses * float("nan") if len(self.calls) > 5 else losses


def test_one_that_diverges_is_frozen_and_the_others_never_notice(workshop):
    all_jobs = jobs(workshop)
    trainees, losses = in_one_pass(workshop, all_jobs)
    expected = [result(workshop.model, workshop, trainee.slot) for trainee in trainees]
    all_jobs[1] = replace(all_jobs[1], objective=Diverging(inner=all_jobs[1].objective, calls=[]))
    trainees, found = in_one_pass(workshop, all_jobs)
    with pytest.raises(
        TrainingError,
        match=r"loss is nan, which objective 'Diverging' of test_together, in loss, made of finite log-.*, for 3 steps",
    ):
        _ = trainees[1].result
    assert len(found[1]) < 9
    for number in (0, 2):
        assert found[number] == pytest.approx(losses[number], abs=1e-5)
        assert largest(result(workshop.model, workshop, trainees[number].slot), expected[number]) < 1e-5
    frozen = lora.weights(workshop.model.policy, trainees[1].slot)
    assert all(tensor.isfinite().all() for tensor in frozen.values())


def test_rows_go_through_their_own_adapter(workshop):
    """A mixed batch gives what each adapter gives for its rows alone, and gradients reach no other adapter."""
    model, names = workshop.model, slots(3)
    lora.add_slots(model.policy, names)
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable(model.policy, *names).values():
        parameter.data.normal_(std=0.3, generator=generator)
    assert workshop.material.train is not None
    layout = one_by_one(workshop.material.train.sequences[:6], 0)
    with lora.mixed(model.policy, Mixture(tuple(names), (1, 3, 2))):
        logps = model.response_logps(layout)
        gradients = torch.autograd.grad(
            logps[1:4].sum(), lora.parameters(model.policy, names[0]), retain_graph=True, allow_unused=True
        )
        assert all(gradient is None or not gradient.any() for gradient in gradients)
        mine = torch.autograd.grad(logps[1:4].sum(), lora.parameters(model.policy, names[1]))
    for slot, rows in zip(names, (slice(0, 1), slice(1, 4), slice(4, 6)), strict=True):
        with lora.active(model.policy, slot):
            torch.testing.assert_close(model.response_logps(layout)[rows], logps[rows].detach(), rtol=1e-5, atol=1e-5)
    with lora.mixed(model.policy, Mixture((names[1],), (6,))):
        own = model.response_logps(layout)[1:4].sum()
        for got, expected in zip(mine, torch.autograd.grad(own, lora.parameters(model.policy, names[1])), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_mixture_that_does_not_fit_the_batch_is_refused(workshop):
    lora.add_slots(workshop.model.policy, slots(2))
    assert workshop.material.train is not None
    layout = one_by_one(workshop.material.train.sequences[:3], 0)
    with (
        lora.mixed(workshop.model.policy, Mixture(tuple(slots(2)), (1, 1))),
        pytest.raises(ValueError, match="a batch of 3 rows in a mixture of 2"),
    ):
        workshop.model.response_logps(layout)


def test_where_memory_does_not_suffice_half_are_trained_at_a_time(tiny_model_path, pairs, tmp_path, monkeypatch):
    forward = LanguageModel.hidden_states
    phases = []

    def limited(self, layout, *arguments, **options):
        if torch.is_grad_enabled() and len(layout.input_ids) > 9:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(self, layout, *arguments, **options)

    class Watch(Observer):
        def on_phase(self, what):
            phases.append(what)

    changes = {"train": {"steps": 3, "pairs_per_step": 8, "together": 3}}
    settings = small_config(tiny_model_path, pairs, **changes)
    expected = run.start(settings, tmp_path / "enough", registry.discover(), Observer())
    monkeypatch.setattr(LanguageModel, "hidden_states", limited)
    found = run.start(settings, tmp_path / "little", registry.discover(), Watch())
    assert any("3 candidates together: out of memory" in phase and "1 at a time" in phase for phase in phases)
    assert [point["id"] for point in found["points"]] == [point["id"] for point in expected["points"]]
    for point, other in zip(found["points"], expected["points"], strict=True):
        assert point["scores"] == pytest.approx(other["scores"], abs=1e-4)


def test_what_a_training_took_before_it_failed_is_spent(tiny_model_path, pairs, tmp_path, monkeypatch):
    forward, passes = LanguageModel.hidden_states, []

    def breaks(self, layout, *arguments, **options):
        passes.append(torch.is_grad_enabled())
        if passes.count(True) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(self, layout, *arguments, **options)

    changes = {"search": {"name": "listed"}, "preferences": {"one": "equal"}}
    train = {"steps": 3, "pairs_per_step": 8, "together": 1}
    settings = small_config(tiny_model_path, pairs, train=train, **changes)
    monkeypatch.setattr(LanguageModel, "hidden_states", breaks)
    with pytest.raises(TrainingError, match="every candidate failed"):
        run.start(settings, tmp_path / "run", registry.discover(), Observer())
    found = front.read(tmp_path / "run")
    (failed,) = found["failed"]
    assert failed["tokens"] > 0
    assert ("Tokens", f"0, and {failed['tokens']:,} of failed candidates") in wording.summary(found)


def test_how_many_together_is_measured_once_and_kept(tiny_model_path, pairs, tmp_path, monkeypatch):
    settings = small_config(tiny_model_path, pairs, train={"steps": 2, "pairs_per_step": 4})
    monkeypatch.setattr(together, "MEASURED_FROM", 2)
    monkeypatch.setattr(together, "seconds_per_candidate", lambda candidates, _: 1 / len(candidates))
    run.start(settings, tmp_path / "run", registry.discover(), Observer())
    events = [event for event in journal.read(tmp_path / "run" / "journal.jsonl") if event["event"] == "together"]
    assert events == [{"event": "together", "size": 3, "of": 3}]
    monkeypatch.setattr(together, "seconds_per_candidate", lambda candidates, _: float(len(candidates)))
    run.start(settings, tmp_path / "slow", registry.discover(), Observer())
    events = journal.read(tmp_path / "slow" / "journal.jsonl")
    assert {"event": "together", "size": 1, "of": 3} in events


def test_a_larger_proposal_is_measured_again_where_all_of_the_first_went_together(
    tiny_model_path, pairs, tmp_path, monkeypatch
):
    """Three from fresh weights, then eight that start from them."""
    search = {"name": "grid", "points": 11, "warm_start": "neighbour"}
    settings = small_config(tiny_model_path, pairs, search=search, train={"steps": 2, "pairs_per_step": 4})
    monkeypatch.setattr(together, "MEASURED_FROM", 2)
    for cost, expected in ((lambda size: 1 / size, [(3, 3), (8, 8)]), (float, [(1, 3)])):
        monkeypatch.setattr(together, "seconds_per_candidate", lambda candidates, _, cost=cost: cost(len(candidates)))
        directory = tmp_path / str(len(expected))
        run.start(settings, directory, registry.discover(), Observer())
        events = [event for event in journal.read(directory / "journal.jsonl") if event["event"] == "together"]
        assert [(event["size"], event["of"]) for event in events] == expected


def test_sizes_are_tried_again_where_no_one_is_clearly_faster(workshop, monkeypatch):
    tried = []

    def costs(each: dict[int, list[float]]):
        def seconds(candidates, _):
            tried.append(len(candidates))
            found = each[len(candidates)].pop(0)
            if found is None:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return found

        tried.clear()
        monkeypatch.setattr(together, "seconds_per_candidate", seconds)
        return together.measured_size(CANDIDATES, workshop)[0]

    assert costs({1: [1.0], 3: [0.8]}) == 3 and tried == [1, 3]
    assert costs({1: [1.0, 1.0], 2: [0.7], 3: [0.9, 0.8]}) == 2 and tried == [1, 3, 1, 2, 3]
    assert costs({1: [1.0, 0.5], 2: [0.9], 3: [0.9, 0.9]}) == 1  # the second time one by one was the faster
    assert costs({1: [1.0, 1.0], 2: [0.9], 3: [None, None]}) == 2
    assert costs({1: [1.0, 1.0], 2: [1.04], 3: [1.2, 1.04]}) == 3  # as good, within what times vary by


def test_in_a_short_run_a_rule_decides(tiny_model_path, pairs, monkeypatch):
    """Small passes wait for their overhead, large ones do not."""
    monkeypatch.setattr(together, "seconds_per_candidate", None)  # it is not called
    for overhead, expected in ((10_000.0, 3), (10.0, 1)):
        settings = small_config(tiny_model_path, pairs, train={"steps": together.MEASURED_FROM - 1})
        workshop = open_workshop(prepare(settings, registry.discover()), Path(), Observer(), keep_cache=False)
        packing = replace(workshop.model.packing, overhead=overhead)
        workshop.model = replace(workshop.model, packing=packing)
        assert together.measured_size(CANDIDATES, workshop) == (expected, {})


def test_what_fails_while_sizes_are_looked_at_is_left_to_the_training(workshop, monkeypatch):
    """Then each is trained alone, and what is wrong is the error of the candidate that has it; bad input is not."""

    def failing(error: Exception):
        def fail(*arguments):
            raise error

        return fail

    monkeypatch.setattr(together, "memory_of", failing(PluginError("it broke")))
    assert together.measured_size(CANDIDATES, workshop)[0] == 1
    monkeypatch.setattr(together, "memory_of", failing(UserError("the disk is full")))
    with pytest.raises(UserError, match="disk"):
        together.measured_size(CANDIDATES, workshop)


def test_pairs_that_cannot_count_take_no_place(workshop):
    """Under a rule that weighs judges, a candidate for one objective alone trains on that objective's pairs."""
    train = workshop.material.train
    assert train is not None
    only, middle, other = (workshop.pairs_for(candidate) for candidate in CANDIDATES)
    assert middle is other is train
    assert set(only.pair_objective) == {workshop.plan.objectives.index("helpful")}
    assert len(only.pairs) == (train.pair_objective == only.pair_objective[0]).sum()
    assert workshop.pairs_for(CANDIDATES[0]) is only


def test_an_adapted_head_cannot_be_shared(tiny_model_path, pairs, tmp_path):
    model = {"path": str(tiny_model_path), "lora": {"r": 2, "targets": ["q_proj", "lm_head"]}}
    settings = small_config(tiny_model_path, pairs, model=model, train={"steps": 1, "together": 2})
    with pytest.raises(ConfigError, match=r"train\.together: 2 .* the output head carries an adapter"):
        run.start(settings, tmp_path / "run", registry.discover(), Observer())


def test_layers_below_the_adapters_run_once_for_all_candidates(tiny_model_path, pairs):
    """And plain settings of the same share name the same layers."""
    for share in ("upper-half", 0.5):
        lora_settings = {"r": 2, "layers": share}
        model = {"path": str(tiny_model_path), "lora": lora_settings}
        settings = small_config(tiny_model_path, pairs, model=model, train={"steps": 1, "pairs_per_step": 4})
        workshop = open_workshop(prepare(settings, registry.discover()), Path(), Observer(), keep_cache=False)
        stack = workshop.model.base.model.layers
        assert [any("lora_" in name for name, _ in layer.named_parameters()) for layer in stack] == [False, True]
        seen: list[tuple[int, int]] = []
        hooks = [
            layer.register_forward_hook(lambda _, args, output, n=n, seen=seen: seen.append((n, len(output))))
            for n, layer in enumerate(stack)
        ]
        # of the second kind the first candidate has pairs of its own: as many rows as the others' shared ones
        for candidates, kinds in ((ALIKE, 1), (CANDIDATES, 2)):
            in_one_pass(workshop, [job_of(candidate, workshop, ()) for candidate in candidates], candidates)
            (_, below), (_, above) = seen[-2:]  # of the last pass that was trained
            assert above == 3 * below // kinds
        for hook in hooks:
            hook.remove()


def test_a_regular_expression_cannot_be_restricted_to_upper_layers(tiny_model_path, pairs, tmp_path):
    model = {"path": str(tiny_model_path), "lora": {"targets": ".*q_proj", "layers": "upper-half"}}
    settings = small_config(tiny_model_path, pairs, model=model)
    with pytest.raises(ModelError, match=r"model\.lora\.layers"):
        run.start(settings, tmp_path / "run", registry.discover(), Observer())
