"""The formula for the memory of K together, against the bytes that torch's own records show."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from sweeps import small_config, write_pairs
from torch import Tensor, nn

from benchmarks import measure
from moalign import registry
from moalign.engine import memory
from moalign.engine.allocations import counted
from moalign.engine.memory import Heights, Linear, Memory, PassSize
from moalign.engine.scoring import LogpCache
from moalign.engine.train import train_together
from moalign.engine.trainee import Trainee
from moalign.ops import chunked
from moalign.sweeps import together
from moalign.sweeps.candidate import batch_source, job_of, slots
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import Workshop, open_workshop
from moalign.types import Candidate, Preference
from moalign_plugins.objectives.dpo import DPO

CPU = torch.device("cpu")
STEPS = 2  # moments are there from the second step on
LORA: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": 0.3},
    "upper half": {"layers": "upper-half"},
}


@pytest.fixture(scope="module")
def workshops(tiny_model_path, tmp_path_factory) -> dict[str, Workshop]:
    pairs = write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")
    return {name: opened(tiny_model_path, pairs, changes) for name, changes in LORA.items()}


def opened(model: Path, pairs: Path, lora: dict[str, Any]) -> Workshop:
    settings = small_config(
        model,
        pairs,
        model={"path": str(model), "lora": {"r": 4, "alpha": 8} | lora},
        train={"steps": STEPS, "pairs_per_step": 12, "lr": 1e-3},
    )
    return open_workshop(prepare(settings, registry.discover()), Path(), Observer(), keep_cache=False)


def train(workshop: Workshop, number: int, **changes: Any) -> list[Trainee]:
    """So many candidates, by now with their gradients gone; fresh ones, so that moments are made anew."""
    trainees = []
    for place, slot in enumerate(slots(number)):
        share = place / max(1, number - 1)
        candidate = Candidate(f"c{place}", Preference("weights", {"harmless": share, "helpful": 1 - share}))
        job = job_of(candidate, workshop, ())
        job = replace(job, settings=job.settings.model_copy(update=changes))
        trainees.append(Trainee(job, batch_source(candidate, workshop, slot), slot, lambda step, metrics: None))
    train_together(workshop.model, trainees, LogpCache(workshop.model), Accelerator())
    return trainees


def predicted(workshop: Workshop, number: int, limit: int | None = None, checkpointing: bool = False) -> int:
    formula = memory.measure(workshop.model, checkpointing)
    source = batch_source(Candidate("c", Preference("weights", {"harmless": 0.5, "helpful": 0.5})), workshop)
    steps = [memory.passes(workshop.model, *source.at(step), limit) for step in range(STEPS)]
    assert all(len(sizes) > 1 for sizes in steps) == (limit is not None)
    return max(formula.training(number, sizes) for sizes in steps)


def allocated(workshop: Workshop, number: int, **changes: Any) -> int:
    """The most bytes at once, the base among them, as the profiler records torch's allocations."""
    train(workshop, number, **changes)  # slots are there
    policy = workshop.model.policy
    needed = [p for n, p in policy.named_parameters() if "lora_" not in n or any(f".{s}." in n for s in slots(number))]
    there = {tensor.data_ptr(): tensor.nbytes for tensor in (*needed, *policy.buffers())}
    return sum(there.values()) + measure.allocated_bytes(lambda: train(workshop, number, **changes), CPU)


@pytest.mark.parametrize(
    ("lora", "number", "changes"),
    [
        ("plain", 1, {}),
        ("plain", 3, {}),
        ("plain", 3, {"gradient_checkpointing": True}),
        ("plain", 1, {"tokens_per_pass": 120}),
        ("dropout", 3, {}),
        ("upper half", 1, {"gradient_checkpointing": True}),
        ("upper half", 3, {"gradient_checkpointing": True}),
        ("upper half", 3, {"tokens_per_pass": 120}),
        ("upper half", 1, {}),
    ],
)
def test_the_formula_is_within_a_tenth_of_what_torch_allocates(workshops, lora, number, changes):
    workshop = workshops[lora]
    found = allocated(workshop, number, **changes)
    told = predicted(workshop, number, changes.get("tokens_per_pass"), "gradient_checkpointing" in changes)
    base = memory.measure(workshop.model).base
    assert told - base == pytest.approx(found - base, rel=0.1)


class ReadsHidden(DPO):
    """Weighs hidden states, all of them, with something of its own."""

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference", "hidden"})

    def parameters(self, width, generator):
        return {"weight": torch.zeros(width)}

    def loss(self, batch, terms):
        said = (batch.hidden.detach() @ batch.parameters["weight"]).sum(-1)
        return super().loss(batch, replace(terms, margin=terms.margin + said[batch.pairs[:, 0]]))


@pytest.mark.parametrize("number", [1, 3])
def test_hidden_states_that_a_loss_reads_are_counted(workshops, number):
    plain, objective = workshops["plain"], ReadsHidden()
    reading = replace(plain, plan=replace(plain.plan, objective=objective))
    source = batch_source(Candidate("c", Preference("weights", {"harmless": 0.5, "helpful": 0.5})), reading)
    beside = max(
        memory.of_loss(objective, plain.model, number, memory.passes(plain.model, *source.at(step)))
        for step in range(STEPS)
    )
    found = allocated(reading, number) - memory.measure(plain.model).base
    told = predicted(plain, number) - memory.measure(plain.model).base
    assert told + beside == pytest.approx(found, rel=0.1)
    assert memory.of_loss(plain.plan.objective, plain.model, number, []) == 0


def test_weights_moments_and_gradient_are_counted_to_the_byte(workshops):
    workshop = workshops["plain"]
    formula = memory.measure(workshop.model)
    for number in (1, 3):
        trainees = train(workshop, number)
        weights = sum(parameter.nbytes for trainee in trainees for parameter in trainee.parameters)
        states = [state for trainee in trainees for state in trainee.optimizer.state.values()]
        moments = sum(value.nbytes for state in states for value in state.values() if value.ndim)
        assert weights == number * formula.adapter
        assert moments == 2 * number * formula.adapter
        assert formula.training(number, []) == formula.base + weights + moments + weights  # and the gradients


def saved_bytes(workshop: Workshop, within: nn.Module | None = None) -> tuple[int, PassSize]:
    """Of distinct tensors that autograd keeps in the reference's layout of all sequences; ``within`` a module alone."""
    model, dataset = workshop.model, workshop.material.train
    assert dataset is not None
    sequences = list(dataset.sequences)
    layout = model.lay_out(sequences, [[index] for index in range(len(sequences))])
    frozen = {tensor.untyped_storage().data_ptr() for tensor in model.policy.parameters()}
    saved: dict[int, int] = {}
    counting = [within is None]

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if counting[0] and storage.data_ptr() not in frozen:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    handles = []
    if within is not None:
        handles.append(within.register_forward_pre_hook(lambda *_: counting.__setitem__(0, True)))
        handles.append(within.register_forward_hook(lambda *_: counting.__setitem__(0, False)))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = model.response_logps(layout)
    for handle in handles:
        handle.remove()
    assert kept.requires_grad
    return sum(saved.values()), PassSize(len(layout.input_ids), layout.input_ids.shape[1], len(layout.labels))


def test_only_a_pass_with_shared_rows_has_a_mask(workshops):
    formula = memory.measure(workshops["plain"].model)
    assert formula.apart.kept.attended == pytest.approx(0, abs=0.1)
    assert formula.shared.kept.attended == pytest.approx(4, abs=0.1)  # float32, one for all layers and heads
    assert formula.apart.kept.position == pytest.approx(formula.shared.kept.position, rel=0.1)


def test_what_is_kept_is_what_autograd_saves(workshops):
    """But for the layout's own indices, which were there before, and the result: a few per cent."""
    workshop = workshops["plain"]
    saved, size = saved_bytes(workshop)
    kept = memory.measure(workshop.model).apart.kept.of(size)
    assert 0.99 * saved <= kept <= 1.05 * saved


def test_with_adapters_in_the_upper_half_nothing_is_kept_below(workshops):
    everywhere, upper = workshops["plain"], workshops["upper half"]
    assert saved_bytes(everywhere, everywhere.model.base.model.layers[0])[0] > 0
    assert saved_bytes(upper, upper.model.base.model.layers[0])[0] == 0
    assert saved_bytes(upper, upper.model.base.model.layers[1])[0] > 0
    memory.measure(upper.model, checkpointing=True)  # transformers' switch asks for gradients of the embeddings
    assert saved_bytes(upper, upper.model.base.model.layers[0])[0] == 0
    one, two = (memory.measure(each.model).apart.kept.position for each in (upper, everywhere))
    assert 0.4 < one / two < 0.6


def test_checkpointing_keeps_less_and_needs_less(workshops):
    plain, checkpointed = (memory.measure(workshops["plain"].model, on) for on in (False, True))
    size = PassSize(8, 64, 256)
    assert checkpointed.apart.kept.of(size) < 0.2 * plain.apart.kept.of(size)
    assert checkpointed.activations(size) < 0.8 * plain.activations(size)  # of two layers one is there again


def test_measuring_leaves_the_model_as_it_was(workshops):
    model = workshops["plain"].model
    before = {name: parameter.clone() for name, parameter in model.policy.named_parameters()}
    formula = memory.measure(model, checkpointing=True)
    assert formula == memory.measure(model, checkpointing=True)
    after = dict(model.policy.named_parameters())
    for name, parameter in before.items():
        assert torch.equal(after[name], parameter) and after[name].grad is None
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.policy.modules())
    assert not any(module.training for module in model.base.modules())


def test_a_model_of_few_positions_is_measured_within_them(workshops, monkeypatch):
    model = workshops["plain"].model
    usual = memory.measure(model)
    monkeypatch.setattr(model.base.config, "max_position_embeddings", 40)
    longest: list[int] = []
    lay_out = type(model).lay_out

    def noting(self, sequences, rows):
        longest.append(max(len(sequence.ids) for sequence in sequences))
        return lay_out(self, sequences, rows)

    monkeypatch.setattr(type(model), "lay_out", noting)
    found = memory.measure(model)
    assert found.apart.kept.position == pytest.approx(usual.apart.kept.position, rel=1e-3)
    assert found.shared.kept.position == pytest.approx(usual.shared.kept.position, rel=1e-3)
    assert max(longest) <= 40


def test_logits_are_counted_for_one_chunk_however_many_tokens(workshops, monkeypatch):
    workshop = workshops["plain"]
    vocabulary = len(workshop.model.head.weight)
    monkeypatch.setattr(chunked, "CPU_BYTES", 4 * vocabulary * 20)
    monkeypatch.setattr(chunked, "MM_BYTES", 4 * vocabulary * 20)
    formula = memory.measure(workshop.model)
    assert formula.chunk == 20
    assert 4 * vocabulary <= formula.logits < 4 * vocabulary + 2 * formula.hidden
    few, many = (formula.activations(PassSize(2, 4, tokens)) for tokens in (20, 40))
    assert many - few == pytest.approx(20 * (formula.apart.kept.token + formula.hidden), abs=1)


def test_sizes_that_cannot_fit_are_not_tried(workshops, monkeypatch):
    workshop = workshops["plain"]
    candidates = [
        Candidate(f"c{n}", Preference("weights", {"harmless": n / 3, "helpful": 1 - n / 3})) for n in range(4)
    ]
    base, needed = together.memory_of(candidates, workshop, [1, 2, 4])
    assert base == memory.measure(workshop.model).base
    assert needed[4] == pytest.approx(4 * needed[1], rel=1e-3)
    monkeypatch.setattr(together, "MEASURED_FROM", 1)
    monkeypatch.setattr(memory, "available", lambda device: needed[2])
    size, seconds = together.measured_size(candidates, workshop)
    assert size <= 2 and set(seconds) == {1, 2} and math.isfinite(seconds[2])
    monkeypatch.setattr(memory, "available", lambda device: 0)
    assert together.measured_size(candidates, workshop)[0] == 1
    monkeypatch.setattr(memory, "available", lambda device: None)  # nobody knows: all are tried
    assert math.isfinite(together.measured_size(candidates, workshop)[1][4])


def test_a_step_is_as_high_as_its_largest_pass_on_four_numbers_for_each_parameter():
    flat = Heights(Linear(0.0, 10.0, 0.0, 0.0), Linear(0.0, 10.0, 0.0, 0.0))
    formula = Memory(base=1000, adapter=100, apart=flat, shared=flat, hidden=0, logits=0.0, chunk=1)
    large, small = PassSize(4, 25, 1), PassSize(1, 5, 1)
    assert formula.training(1, [large]) == 1000 + 400 + 1000
    assert formula.training(1, [large, large]) == 1000 + 400 + 1000
    assert formula.training(2, [large, small]) == 1000 + 800 + 2000
    assert formula.training(2, [small]) == 1000 + 800 + 100


def test_a_line_through_measured_passes_finds_its_coefficients():
    made = [(1, 8, 3), (2, 8, 6), (1, 20, 9), (3, 11, 2), (2, 14, 5)]
    sizes = [PassSize(*each) for each in made]
    truth = Linear(7.0, 120.0, 2.0, 33.0, 15.0)
    found = Linear.through(sizes, [round(truth.of(size)) for size in sizes])
    assert found.of(PassSize(5, 50, 40)) == pytest.approx(truth.of(PassSize(5, 50, 40)), rel=1e-9)


def test_the_count_follows_storages_and_not_tensors():
    given = torch.zeros(100)
    with counted(CPU) as allocations:
        given[10:].add_(1)
        assert allocations.live == allocations.peak == 0  # views and what is written in place are nothing new
        first = given + 1
        view = first[:10]
        assert allocations.live == 400
        second = torch.cat([first, first])
        assert allocations.live == allocations.peak == 1200
        del first
        assert allocations.live == 1200  # its view is there
        del second, view
        assert allocations.live == 0 and allocations.peak == 1200
        allocations.restart()
        assert allocations.peak == 0


def test_the_benchmarks_record_sees_what_is_freed_again():
    def call() -> None:
        large = torch.zeros(2**20)
        del large
        small = torch.zeros(2**10)
        small.add_(1)

    assert measure.allocated_bytes(call, CPU) == pytest.approx(2**22, abs=64)


def test_what_an_earlier_record_saw_does_not_lower_this_one():
    kept: list[Tensor] = []

    def call() -> None:
        kept.clear()
        torch.zeros(2**20)

    measure.allocated_bytes(lambda: kept.append(torch.zeros(2**20)), CPU)
    assert measure.allocated_bytes(call, CPU) == pytest.approx(2**22, abs=64)
