"""How a step is computed changes nothing: layouts, passes, padding, checkpointing, chunks, implementations.

Fifty steps of real training in float32, dropout off; all ways end with the same adapters and log-probabilities to 1e-5.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from sweeps import small_config

from moalign import lora, ops, registry
from moalign.engine import model as models
from moalign.engine.layout import one_by_one
from moalign.engine.model import TRAINED, LanguageModel
from moalign.engine.scoring import LogpCache
from moalign.engine.train import train
from moalign.sweeps.candidate import batch_source, job_of
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import Workshop, open_workshop
from moalign.types import Candidate, Preference

BALANCED = Candidate("balanced", Preference("weights", {"harmless": 0.4, "helpful": 0.6}))
STEPS = 50
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Prompts of 2 to 40 characters, four responses of 1 to 20 to each; letters before digits."""
    rng = Random(0)
    rows = []
    for number in range(12):
        prompt = f"{number}" + "".join(rng.choice("xyz ") for _ in range(rng.choice([1, 5, 38])))
        texts = ["".join(rng.choice(letters) for _ in range(rng.randint(1, 20))) for letters in ("abc", "123") * 2]
        for first, second in ((0, 1), (2, 3), (0, 3)):
            for name in ("helpful", "harmless"):
                row = {"prompt": prompt, "chosen": texts[first], "rejected": texts[second], "objective": name}
                rows.append(json.dumps(row) + "\n")
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    file.write_text("".join(rows))
    return file


@pytest.fixture(scope="module")
def workshop(request, tiny_model_path, pairs) -> Workshop:
    targets = "all-linear" if request.param == "frozen head" else ["q_proj", "v_proj", "down_proj", "lm_head"]
    settings = small_config(
        tiny_model_path,
        pairs,
        model={"path": str(tiny_model_path), "lora": {"r": 4, "alpha": 8, "targets": targets}},
        train={"steps": STEPS, "pairs_per_step": 6, "lr": 2e-3},
        loss={"name": "dpo", "beta": 0.3},
    )
    return open_workshop(prepare(settings, registry.discover()), Path(), Observer(), keep_cache=False)


def run(workshop: Workshop, model: LanguageModel, **settings: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The adapter's tensors after training, with the policy's log-probabilities beside them, and every step's loss."""
    job = job_of(BALANCED, workshop, ())
    job = replace(job, settings=job.settings.model_copy(update=settings))
    losses: list[float] = []
    source = batch_source(BALANCED, workshop)
    train(model, source, job, LogpCache(model), Accelerator(), lambda _, metrics: losses.append(metrics["loss"]))
    tensors = lora.weights(model.policy, TRAINED)
    assert workshop.material.train is not None
    with lora.active(model.policy, TRAINED):
        tensors["log-probabilities"] = model.response_logps(one_by_one(workshop.material.train.sequences, 0))
    return tensors, losses


@pytest.fixture(scope="module")
def expected(workshop) -> tuple[dict[str, torch.Tensor], list[float]]:
    """A row for each sequence, one pass for each step, the reference implementation: nothing is clever here."""
    packing = replace(workshop.model.packing, shares=False, overhead=10**9, limit=10**9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "token_logps", partial(ops.token_logps, implementation="reference"))
        return run(workshop, replace(workshop.model, packing=packing))


WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # changes to the packing, changes to the settings
    "as it is": ({}, {}),
    "separate rows": ({"shares": False}, {}),
    "all that share a prompt in one row": ({"attention": 0.0}, {}),
    "one pass a step": ({"overhead": 10**9}, {}),
    "many passes": ({"overhead": 0}, {}),
    "a prompt at a time": ({}, {"tokens_per_pass": 1}),
    "more padding": ({"multiple": 64, "overhead": 10**9}, {}),
    "checkpointing": ({}, {"gradient_checkpointing": True}),
    "checkpointing, separate rows": ({"shares": False}, {"gradient_checkpointing": True}),
}


HEADS = ["frozen head"] * len(WAYS) + ["adapted head"] * 3
CASES = list(zip(HEADS, [*WAYS, "as it is", "a prompt at a time", "checkpointing, separate rows"], strict=True))


@pytest.mark.parametrize(("workshop", "way"), CASES, indirect=["workshop"])
def test_layout_passes_padding_and_checkpointing_change_nothing(workshop, expected, way):
    packing, settings = WAYS[way]
    model = replace(workshop.model, packing=replace(workshop.model.packing, **packing))
    assert_same(run(workshop, model, **settings), expected)


@pytest.mark.parametrize(
    ("workshop", "tokens"), [("frozen head", 1), ("frozen head", 7), ("adapted head", 7)], indirect=["workshop"]
)
def test_chunks_of_the_head_change_nothing(workshop, expected, tokens, monkeypatch):
    monkeypatch.setattr(models, "token_logps", partial(ops.token_logps, chunk_tokens=tokens))
    assert_same(run(workshop, workshop.model), expected)


def assert_same(found, expected) -> None:
    (tensors, losses), (expected_tensors, expected_losses) = found, expected
    assert expected_losses[0] - expected_losses[-1] > 0.1  # it has learnt something, so that there is something to miss
    assert tensors.keys() == expected_tensors.keys()
    differences = {name: float((tensors[name] - expected_tensors[name]).abs().max()) for name in tensors}
    moved = max(float(tensor.abs().max()) for name, tensor in expected_tensors.items() if "lora_B" in name)
    assert moved > 1e-2
    print(f"loss {expected_losses[0]:.3f} -> {expected_losses[-1]:.3f}, largest B {moved:.3f}, "
          f"largest difference {max(differences.values()):.2g}, of losses "
          f"{max(abs(a - b) for a, b in zip(losses, expected_losses, strict=True)):.2g}")  # fmt: skip
    assert max(differences.values()) < TOLERANCE, max(differences, key=differences.__getitem__)
    assert losses == pytest.approx(expected_losses, abs=TOLERANCE)


@pytest.mark.parametrize("workshop", ["frozen head"], indirect=True)
def test_a_second_epoch_and_a_second_candidate_run_no_reference_pass(workshop, monkeypatch):
    """Forward passes of the bare base are counted: one epoch's worth, then none, whatever the passes look like."""
    of_the_base: list[int] = []
    ask = LanguageModel.response_states

    def counted(self, layout, *arguments, **options):
        if not torch.is_grad_enabled():
            of_the_base.append(len(layout.counts))
        return ask(self, layout, *arguments, **options)

    monkeypatch.setattr(LanguageModel, "response_states", counted)
    assert workshop.material.train is not None
    pairs = len(workshop.material.train.pairs)
    epoch = -(-pairs // 6)
    cache = LogpCache(workshop.model)
    job = job_of(BALANCED, workshop, ())
    after: list[int] = []
    for candidate in ("first", "second"):
        job = replace(job, candidate=candidate, settings=job.settings.model_copy(update={"steps": 3 * epoch}))
        source = batch_source(BALANCED, workshop)
        train(workshop.model, source, job, cache, Accelerator(), lambda *_: after.append(len(of_the_base)))
    assert after[0] > 0
    assert len(set(after[epoch - 1 :])) == 1
    assert models.base_fingerprint(workshop.model.base) == workshop.model.fingerprint


@pytest.mark.parametrize("workshop", ["frozen head"], indirect=True)
def test_checkpointing_computes_layers_again_and_the_head_once(workshop, monkeypatch):
    """In one step: every layer forward and again in backward, the head once in each pass of policy and reference."""
    calls = {"head": 0, "layer": 0, "pass": 0}

    def counted(name, function):
        def call(*arguments, **options):
            calls[name] += 1
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(models, "token_logps", counted("head", ops.token_logps))
    monkeypatch.setattr(LanguageModel, "hidden_states", counted("pass", LanguageModel.hidden_states))
    mlp = workshop.model.base.model.layers[0].mlp
    monkeypatch.setattr(mlp, "forward", counted("layer", mlp.forward))
    model = replace(workshop.model, packing=replace(workshop.model.packing, overhead=10**9))
    for again in (False, True):
        calls.update(head=0, layer=0, **{"pass": 0})
        source, job = batch_source(BALANCED, workshop), job_of(BALANCED, workshop, ())
        settings = job.settings.model_copy(update={"steps": 1, "gradient_checkpointing": again})
        train(model, source, replace(job, settings=settings), LogpCache(model), Accelerator(), lambda *_: None)
        assert calls == {"head": 2, "pass": 2, "layer": 3 if again else 2}
