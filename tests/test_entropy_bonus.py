"""The entropy of the next token through the fused core: its gradient, who gets it, and what a bonus for it does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_training import trainable
from sweeps import small_config
from test_layout import random_sequences
from torch import Tensor, nn

from moalign import lora, ops, registry
from moalign.config import Config, LoraSettings, ModelSettings
from moalign.engine import model as models
from moalign.engine import train as loop
from moalign.engine.gram import gradient_products
from moalign.engine.layout import Layout
from moalign.engine.model import TRAINED, LanguageModel
from moalign.engine.train import train_together
from moalign.engine.trainee import Trainee
from moalign.lora import Mixture
from moalign.sweeps import run
from moalign.sweeps.candidate import batch_source, job_of, slots
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.together import memory_of
from moalign.sweeps.workshop import Workshop, open_workshop
from moalign.types import Candidate, Preference
from moalign_plugins.objectives.grpo import GRPO
from moalign_plugins.objectives.rloo import RLOO

SEQUENCES = random_sequences(4)
STEPS = 4
BONUS = 0.5


def adapted(path: Path, targets: tuple[str, ...]) -> LanguageModel:
    settings = ModelSettings(lora=LoraSettings(r=3, alpha=6, targets=targets))
    model = models.load(str(path), settings, torch.device("cpu"))
    torch.manual_seed(1)
    for parameter in trainable(model.policy, TRAINED).values():
        nn.init.normal_(parameter, std=0.3)
    return model


def from_logits(model: LanguageModel, layout: Layout) -> tuple[Tensor, Tensor]:
    """Of the model's own logits, through its own head, by torch alone."""
    logits = model.policy(input_ids=layout.input_ids, use_cache=False).logits.flatten(0, 1)[layout.source]
    logps = logits.log_softmax(-1)
    chosen = logps.gather(-1, layout.labels[:, None])[:, 0]
    return layout.place(chosen), layout.place(-(logps.exp() * logps).sum(-1))


@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), ("q_proj", "lm_head")], ids=["frozen head", "adapted"])
def test_value_and_gradient_are_those_of_the_plain_logits(tiny_model_path, targets):
    """In float32; in float64 the core is compared in test_ops_token_logps.py."""
    model = adapted(tiny_model_path, targets)
    layout = model.lay_out(SEQUENCES, [[index] for index in range(len(SEQUENCES))])
    parameters = list(trainable(model.policy, TRAINED).values())
    found, expected = model.scores_of(model.response_states(layout), layout, entropy=True), from_logits(model, layout)
    assert found.entropy is not None and ((found.entropy != 0) == (layout.mask > 0)).all()
    weights = torch.linspace(-1, 1, found.logps.numel()).view_as(found.logps)
    gradients = []
    for logps, entropy in (found, expected):
        assert entropy is not None
        loss = (logps * weights - BONUS * entropy * weights.flip(0)).sum()
        gradients.append(torch.autograd.grad(loss, parameters))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
        assert theirs.abs().max() > 0


# --- in passes of several candidates --------------------------------------------------------------------------------

SHARES = (0.2, 0.5, 0.8)
CHANGES: tuple[dict[str, Any], ...] = ({"loss.entropy": BONUS}, {}, {"loss.entropy": 0.1})
CANDIDATES = [
    Candidate(f"c{number}", Preference("weights", {"brief": share, "wordy": 1 - share}), changes=change)
    for number, (share, change) in enumerate(zip(SHARES, CHANGES, strict=True))
]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q{number}: "}) + "\n" for number in range(8)))
    return file


def settings(tiny_model_path: Path, prompts: Path, **loss: Any) -> Config:
    return small_config(
        tiny_model_path,
        prompts,
        objectives={"brief": {"reward": "length"}, "wordy": {"reward": "length", "direction": "min"}},
        search={"name": "grid", "points": 2},
        train={"steps": STEPS, "lr": 5e-3, "together": 2},
        rollouts={"rounds": STEPS, "samples": 4, "prompts": 4, "prompts_per_step": 4, "max_new_tokens": 5},
        loss={"name": "grpo", "beta": 0.1} | loss,
    )


@pytest.fixture(scope="module")
def workshop(tiny_model_path, prompts) -> Workshop:
    plan = prepare(settings(tiny_model_path, prompts), registry.discover())
    return open_workshop(plan, Path(), Observer(), keep_cache=False)


def trained(workshop: Workshop, candidates: list[Candidate]) -> list[list[dict[str, Any]]]:
    workshop.first_round.clear()
    told: list[list[dict[str, Any]]] = [[] for _ in candidates]
    trainees = []
    for candidate, slot, mine in zip(candidates, slots(3), told, strict=False):
        note = lambda step, metrics, mine=mine: mine.append(metrics)  # noqa: E731
        trainees.append(Trainee(job_of(candidate, workshop, ()), batch_source(candidate, workshop, slot), slot, note))
    train_together(workshop.model, trainees, workshop.cache, workshop.accelerator)
    assert [trainee.error for trainee in trainees] == [None] * len(candidates)
    return told


@pytest.fixture
def asked(monkeypatch) -> list[bool]:
    """Whether the entropy's gradient was formed, for each call of the core that has a gradient."""
    asked: list[bool] = []

    def token_logps(*arguments, **options):
        if torch.is_grad_enabled():
            asked.append(options["entropy_gradient"])
        return ops.token_logps(*arguments, **options)

    monkeypatch.setattr(models, "token_logps", token_logps)
    return asked


def test_one_in_a_pass_of_three_is_trained_as_it_would_be_alone(workshop):
    alone = []
    for candidate in CANDIDATES:
        (metrics,) = trained(workshop, [candidate])
        alone.append((metrics, lora.weights(workshop.model.policy, TRAINED)))
    together = trained(workshop, CANDIDATES)
    for slot, mine, (expected, weights), change in zip(slots(3), together, alone, CHANGES, strict=True):
        names = ["loss", "gradient_norm", "kl_sampled"] + ["entropy"] * bool(change)
        assert all(("entropy" in line) == bool(change) for line in mine)
        for name in names:
            assert [line[name] for line in mine] == pytest.approx([line[name] for line in expected], rel=1e-4, abs=1e-5)
        for name, tensor in lora.weights(workshop.model.policy, slot).items():
            torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-5)


def test_it_is_handed_out_where_it_is_wanted_and_computed_where_anybody_wants_it(workshop, asked, monkeypatch):
    seen: dict[str, set[bool]] = {}

    def looking(batch, job, *arguments):
        seen.setdefault(job.candidate, set()).add(batch.entropy is not None)
        assert batch.entropy is None or ((batch.entropy != 0) == (batch.mask > 0)).all()
        return loss_of(batch, job, *arguments)

    loss_of = loop.loss_of
    monkeypatch.setattr(loop, "loss_of", looking)
    trained(workshop, CANDIDATES)
    assert seen == {"c0": {True}, "c1": {False}, "c2": {True}} and set(asked) == {True}
    asked.clear()
    trained(workshop, CANDIDATES[1:2])
    assert seen["c1"] == {False} and asked and set(asked) == {False}


def test_the_plan_says_what_each_candidate_needs_and_what_memory_it_takes(workshop):
    plan = workshop.plan
    assert ["entropy" in plan.needs(candidate) for candidate in CANDIDATES] == [True, False, True]
    base, without = memory_of(CANDIDATES[1:2], workshop, [1])
    same, wanted = memory_of(CANDIDATES[:1], workshop, [1])
    assert base == same and wanted[1] > without[1]


# --- what it does ---------------------------------------------------------------------------------------------------


def entropies(directory: Path) -> list[list[float]]:
    files = sorted(directory.glob("candidates/*/metrics.jsonl"))
    return [[json.loads(line)["entropy"] for line in file.read_text().splitlines()] for file in files]


def test_a_bonus_keeps_the_policy_open(prompts, tmp_path):
    """A bonus a hundred times as large as another ends with more entropy, and the first round is the same."""
    found = {}
    for bonus in (0.05, 5.0):
        directory = tmp_path / str(bonus)
        run.start(settings(Path("tiny-assistant"), prompts, entropy=bonus), directory, registry.discover(), Observer())
        found[bonus] = entropies(directory)
    for little, much in zip(found[0.05], found[5.0], strict=True):
        assert little[0] == pytest.approx(much[0], rel=1e-5) and much[0] > 0
        assert much[-1] > max(much[0], little[-1]) + 0.05  # nats; four steps


def test_the_objectives_gradients_are_what_they_are_without_a_bonus(workshop):
    """It does not depend on the rewards, as a price of the KL in the loss does not."""
    source = batch_source(CANDIDATES[1], workshop, TRAINED)
    lora.stack(workshop.model.policy, [TRAINED])
    for parameter in lora.parameters(workshop.model.policy, TRAINED):
        parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    dataset, _ = source.at(0)
    drawn = np.random.default_rng(0).normal(size=(2, len(dataset.pairs)))
    for kind in (RLOO, GRPO):
        plain, bonus = (
            gradient_products(workshop.model, TRAINED, kind(entropy=entropy), dataset, drawn)
            for entropy in (0.0, BONUS)
        )
        torch.testing.assert_close(bonus, plain, rtol=1e-6, atol=1e-6 * float(plain.abs().max()))


def test_a_row_alone_has_the_entropies_that_it_has_among_others(tiny_model_path):
    model = adapted(tiny_model_path, ("q_proj", "down_proj"))
    shared = [replace(each, prompt_length=2, ids=(*SEQUENCES[0].ids[:2], *each.response)) for each in SEQUENCES[:3]]
    apart, together = (model.lay_out(shared, rows) for rows in ([[0], [1], [2]], [[0, 1, 2]]))
    with lora.mixed(model.policy, Mixture((TRAINED,), (3,))):
        first = model.scores_of(model.response_states(apart), apart, entropy=True)
    with lora.mixed(model.policy, Mixture((TRAINED,), (1,))):
        second = model.scores_of(model.response_states(together), together, entropy=True)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
