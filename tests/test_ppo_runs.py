"""Runs whose loss owns parameters: a value head that is trained, kept, resumed and handed on with its candidate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from interruptions import StopAfterSteps, kill_and_resume
from safetensors.torch import load_file
from sweeps import contents, small_config

from moalign import config, lora, registry, storage
from moalign.api import Combiner, Objective, TokenAdvantages, Tokens
from moalign.config import Config
from moalign.engine import owned
from moalign.engine import train as loop
from moalign.engine.advantages import Advantages
from moalign.engine.batches import RolloutSource
from moalign.engine.train import train_together
from moalign.engine.trainee import Trainee
from moalign.errors import ConfigError, PluginError, RunError, TrainingError
from moalign.sweeps import run
from moalign.sweeps.candidate import batch_source, job_of, slots
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import Workshop, open_workshop
from moalign.types import Candidate, Preference
from moalign_plugins.combiners.linear import Linear
from moalign_plugins.objectives.ppo import PPO

STEPS = 12  # three to a round
ROLLOUTS = {"rounds": 4, "samples": 3, "prompts": 5, "prompts_per_step": 4, "max_new_tokens": 5}
LOSS = {"name": "ppo", "beta": 0.1, "missing_end": -3.0}  # so that equal weights on opposite rewards are not nothing
HEAD = {"value.bias": [1], "value.weight": [32]}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q{'x' * (number % 3)}{number}: "}) + "\n" for number in range(12)))
    return file


def settings_of(model_path: Path, prompts: Path, **changes: Any) -> Config:
    online: dict[str, Any] = {
        "objectives": {"helpful": {"reward": "length"}, "harmless": {"reward": "length", "direction": "min"}},
        "train": {"steps": STEPS, "lr": 2e-3, "together": 2},
        "rollouts": ROLLOUTS,
        "loss": LOSS,
    }
    return small_config(model_path, prompts, **(online | changes))


@pytest.fixture(scope="module")
def settings(tiny_model_path, prompts) -> Config:
    return settings_of(tiny_model_path, prompts)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, settings) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "unbroken"
    run.start(settings, directory, registry.discover(), Observer())
    return directory


def test_the_head_lies_beside_the_adapter_and_in_the_manifest(unbroken):
    folders = sorted((unbroken / "candidates").iterdir())
    heads = [load_file(folder / owned.FILE) for folder in folders]
    assert len(heads) == 3
    for folder, head in zip(folders, heads, strict=True):
        assert {name: list(value.shape) for name, value in head.items()} == HEAD
        assert all(value.dtype == torch.float32 and bool(value.any()) for value in head.values())
        assert owned.FILE in storage.read_json(folder / "MANIFEST.json")["files"]
        assert storage.verify(folder) == []
    assert not torch.equal(heads[0]["value.weight"], heads[1]["value.weight"])


def test_the_values_figures_are_among_the_metrics(unbroken):
    lines = [json.loads(line) for line in (unbroken / "candidates/w-1.00-0.00/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == STEPS
    assert [line["loss/value"] == 0 for line in lines] == [step < 3 for step in range(STEPS)]
    assert lines[0]["loss/explained_variance"] == 0 != lines[-1]["loss/explained_variance"]
    assert {"signal", "advantage", "kl_sampled"} <= set(lines[0])


def test_interrupted_and_resumed_equals_unbroken_byte_for_byte(settings, unbroken, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run.start(settings, tmp_path / "run", registry.discover(), StopAfterSteps(9))
    run.resume(tmp_path / "run", registry.discover(), Observer())
    found = contents(tmp_path / "run")
    assert found == contents(unbroken)
    assert sum(name.endswith(owned.FILE) for name in found) == 3


def test_sigkill_in_the_middle_and_resume(settings, unbroken, tmp_path):
    assert contents(kill_and_resume(settings, tmp_path)) == contents(unbroken)


# --- side by side ---------------------------------------------------------------------------------------------------

CANDIDATES = [
    Candidate(f"c{number}", Preference("weights", {"harmless": share, "helpful": 1 - share}))
    for number, share in enumerate((0.0, 0.4, 1.0))
]
NAMES = slots(3)


@pytest.fixture(scope="module")
def workshop(settings) -> Workshop:
    return open_workshop(prepare(settings, registry.discover()), Path(), Observer(), keep_cache=False)


def trainee_of(
    workshop: Workshop, candidate: Candidate, slot: str, told: list[dict[str, Any]] | None = None
) -> Trainee:
    told = [] if told is None else told
    source = batch_source(candidate, workshop, slot)
    return Trainee(job_of(candidate, workshop, ()), source, slot, lambda step, metrics: told.append(metrics))


def trained(workshop: Workshop, trainees: list[Trainee]) -> None:
    workshop.first_round.clear()
    train_together(workshop.model, trainees, workshop.cache, workshop.accelerator)
    assert [trainee.error for trainee in trainees] == [None] * len(trainees)


@pytest.mark.parametrize("reaches", [False, True], ids=["detached", "value trains adapter"])
def test_one_in_a_pass_of_three_is_trained_as_it_would_be_alone(workshop, reaches):
    changes = {"loss.value_trains_adapter": reaches, "loss.missing_end": None}
    candidates = [replace(candidate, changes=changes) for candidate in CANDIDATES]
    alone = []
    for candidate in candidates:
        told: list[dict[str, Any]] = []
        trainee = trainee_of(workshop, candidate, NAMES[0], told)
        trained(workshop, [trainee])
        alone.append((told, lora.weights(workshop.model.policy, NAMES[0]), trainee.owned))
    lines: list[list[dict[str, Any]]] = [[] for _ in candidates]
    together = [trainee_of(workshop, *each) for each in zip(candidates, NAMES, lines, strict=True)]
    trained(workshop, together)
    for trainee, mine, (expected, weights, head) in zip(together, lines, alone, strict=True):
        for name in ("loss", "advantage", "kl_sampled", "gradient_norm", "loss/value", "loss/explained_variance"):
            assert [line[name] for line in mine] == pytest.approx([line[name] for line in expected], rel=1e-4, abs=1e-5)
        for name, tensor in lora.weights(workshop.model.policy, trainee.slot).items():
            torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-5)
        for name, own in trainee.owned.items():
            torch.testing.assert_close(own, head[name], rtol=0, atol=1e-5)
    first, *_, last = (head for *_, head in alone)
    assert (first["value.weight"] - last["value.weight"]).abs().max() > 1e-2


def test_the_value_reaches_the_adapter_only_where_asked(workshop):
    """With rewards of nothing and no KL only the value's error is left, and a head that is not 0."""
    moved = {}
    for reaches in (False, True):
        changes = {"loss.value_trains_adapter": reaches, "loss.beta": 0.0}
        trainee = trainee_of(workshop, replace(CANDIDATES[0], changes=changes), NAMES[0])
        loss = trainee.job.objective

        class OnlyValues(PPO):
            def parameters(self, width, generator):
                return {"value.weight": torch.ones(width) * 0.1, "value.bias": torch.ones(1)}

            def token_advantages(self, signal, groups, tokens):
                return TokenAdvantages(tokens.mask * 0, {"returns": tokens.mask * 0.5})

        objective = OnlyValues(**loss.model_dump())
        assert isinstance(trainee.source, RolloutSource) and trainee.source.advantages is not None
        trainee.source.advantages.objective = objective
        trainee.job = replace(trainee.job, objective=objective)
        trained(workshop, [trainee])
        weights = lora.weights(workshop.model.policy, NAMES[0])
        moved[reaches] = max(float(tensor.abs().max()) for name, tensor in weights.items() if "lora_B" in name)
    assert moved[False] == 0 < 1e-3 < moved[True]


# --- the first update -----------------------------------------------------------------------------------------------


def test_at_the_first_update_of_a_round_ratio_and_values_are_those_of_its_sampling(workshop, monkeypatch):
    """In the first step of every round the policy is the one that sampled."""
    seen: list[tuple[float, float, float]] = []
    loss_of = loop.loss_of

    def looking(batch, job, metrics, thorough=True):
        ratio = ((batch.logps - batch.old_logps) * batch.mask).detach().exp()
        values = job.objective.values(batch).detach()
        moved = float((values - batch.known["values"]).abs().max())
        seen.append((float((ratio - 1).abs().max()), moved, float(values.abs().max())))
        assert batch.advantages is None and batch.hidden.shape == (*batch.mask.shape, 32)
        assert not (batch.hidden * (1 - batch.mask[..., None])).any()
        return loss_of(batch, job, metrics, thorough)

    monkeypatch.setattr(loop, "loss_of", looking)
    trained(workshop, [trainee_of(workshop, CANDIDATES[1], NAMES[0])])
    assert len(seen) == STEPS  # a pass each
    for ratio, moved, _ in seen[::3]:
        assert ratio < 1e-5 and moved < 1e-5
    assert min(ratio for ratio, *_ in seen[2::3]) > 1e-4 and min(moved for _, moved, _ in seen[2::3]) > 1e-3
    assert [size == 0 for *_, size in seen] == [step == 0 for step in range(STEPS)]


def test_what_a_round_is_told_of_its_tokens(workshop):
    """Each response with its own tokens from column 0 on, and whether it came to its end."""
    rounds: list[Tokens] = []

    class Listening(PPO):
        def token_advantages(self, signal, groups, tokens):
            rounds.append(tokens)
            return super().token_advantages(signal, groups, tokens)

    trainee = with_objective(trainee_of(workshop, CANDIDATES[1], NAMES[0]), Listening())
    trained(workshop, [trainee])
    assert isinstance(trainee.source, RolloutSource)
    dataset, tokens = trainee.source._dataset, rounds[-1]
    assert len(rounds) == ROLLOUTS["rounds"] and dataset is not None
    for row, sequence in enumerate(dataset.sequences):
        length = len(sequence.response)
        assert tokens.mask[row].tolist() == [1.0] * length + [0.0] * (tokens.mask.shape[1] - length)
        assert bool(tokens.ended[row]) == (sequence.response[-1] in workshop.model.end_ids)
        for values, known in ((tokens.old_logps, dataset.old_logps), (tokens.ref_logps, dataset.ref_logps)):
            assert values is not None and known is not None
            assert values[row, :length].tolist() == known[row].tolist() and not values[row, length:].any()
        assert tokens.measured["values"][row, :length].tolist() == dataset.known["values"][row].tolist()
    assert dataset.advantages is None and dataset.token_advantages is not None


# --- a parent's head --------------------------------------------------------------------------------------------------


def child_of(workshop: Workshop, parent: Path, **changes: Any) -> Trainee:
    candidate = Candidate("next", CANDIDATES[1].preference, changes=changes)
    job = job_of(candidate, workshop, ())
    job = replace(job, settings=job.settings.model_copy(update={"lr": 0.0}))
    source = batch_source(candidate, workshop, NAMES[0])
    return Trainee(job, source, NAMES[0], lambda step, metrics: None, parent)


def test_training_from_a_parent_begins_with_its_head(unbroken, workshop):
    parent = unbroken / "candidates/w-0.50-0.50"
    trainee = child_of(workshop, parent)
    trained(workshop, [trainee])
    written = storage.read_tensors(parent / owned.FILE)
    assert trainee.owned.keys() == written.keys()
    assert all(torch.equal(value, written[name]) for name, value in trainee.owned.items())


def test_a_parent_without_a_head_gives_first_values(unbroken, workshop, tmp_path):
    parent = unbroken / "candidates/w-0.50-0.50"
    for name in (lora.WEIGHTS_FILE, lora.CONFIG_FILE):
        (tmp_path / name).write_bytes((parent / name).read_bytes())
    trainee = child_of(workshop, tmp_path)
    trained(workshop, [trainee])
    assert all(not value.any() for value in trainee.owned.values())


def test_a_head_that_does_not_fit_is_refused(unbroken, workshop, tmp_path):
    parent = unbroken / "candidates/w-0.50-0.50"
    for name in (lora.WEIGHTS_FILE, lora.CONFIG_FILE):
        (tmp_path / name).write_bytes((parent / name).read_bytes())
    owned.write(tmp_path, {"value.weight": torch.zeros(31)}, workshop.model.fingerprint)
    with pytest.raises(RunError, match=r"objective\.safetensors: it holds .*\[31\].* and the loss owns .*\[32\]"):
        _ = errors_of(workshop, child_of(workshop, tmp_path)).result
    owned.write(tmp_path, {"value.weight": torch.zeros(32)}, "another")
    with pytest.raises(RunError, match="trained with another base model"):
        _ = errors_of(workshop, child_of(workshop, tmp_path)).result


def errors_of(workshop: Workshop, trainee: Trainee) -> Trainee:
    """After its training, which must have failed."""
    workshop.first_round.clear()
    train_together(workshop.model, [trainee], workshop.cache, workshop.accelerator)
    assert trainee.error is not None
    return trainee


def test_warm_starts_of_a_sweep_go_on_with_the_head(tiny_model_path, prompts, tmp_path):
    """The values of its first round are those of its parent's last head, not nothing."""
    search = {"name": "grid", "points": 5, "warm_start": "neighbour", "warm_steps": 0.5}
    run.start(settings_of(tiny_model_path, prompts, search=search), tmp_path / "run", registry.discover(), Observer())
    lines = {
        folder.name: json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
        for folder in sorted((tmp_path / "run/candidates").iterdir())
    }
    assert {name for name, line in lines.items() if line["loss/value"] != 0} == {"w-0.25-0.75", "w-0.75-0.25"}


# --- what must never reach them ---------------------------------------------------------------------------------------


class Overflowing(PPO):
    """A finite loss with a gradient in the head that is not: the slope of a root at 0."""

    def loss(self, batch, terms):
        return super().loss(batch, terms) + (batch.parameters["value.bias"] * 0).abs().sqrt()


def with_objective(trainee: Trainee, objective: Objective) -> Trainee:
    assert isinstance(trainee.source, RolloutSource) and trainee.source.advantages is not None
    trainee.source.advantages.objective = objective
    trainee.job = replace(trainee.job, objective=objective, needs=frozenset(objective.needs))
    return trainee


def test_numbers_that_are_not_finite_reach_neither_head_nor_adapter(workshop):
    trainee = with_objective(trainee_of(workshop, CANDIDATES[1], NAMES[0]), Overflowing())
    with pytest.raises(TrainingError, match=r"gradient norm of the parameters of objective 'Overflowing'.* is nan"):
        _ = errors_of(workshop, trainee).result
    assert all(not value.any() for value in trainee.owned.values())
    weights = lora.weights(workshop.model.policy, NAMES[0])
    assert all(not tensor.any() for name, tensor in weights.items() if "lora_B" in name)


class Doubles(PPO):
    def parameters(self, width, generator):
        return {"value.weight": torch.zeros(width).double(), "value.bias": torch.zeros(1)}


class Responses(PPO):
    def measure(self, batch):
        return {"values": self.values(batch).sum(-1)}


class Bare(PPO):
    def token_advantages(self, signal, groups, tokens):
        return super().token_advantages(signal, groups, tokens).advantages


class Unknown(PPO):
    def token_advantages(self, signal, groups, tokens):
        given = super().token_advantages(signal, groups, tokens)
        return replace(given, known={"returns": given.known["returns"] * float("nan")})


class Negative(PPO):
    def lr_factor(self, name):
        return -1


class Writing(PPO):
    def loss(self, batch, terms):
        with torch.no_grad():
            batch.parameters["value.bias"].add_(1)
        return super().loss(batch, terms)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Doubles, r"in parameters: 'value\.weight' must be finite float32 on cpu; it is float64"),
        (Responses, r"in measure: 'values' must be float32 \[N,T\] as batch\.logps, .* it is torch\.float32"),
        (Bare, r"in token_advantages: it must return a moalign\.api\.TokenAdvantages, not Tensor"),
        (Unknown, r"in token_advantages: 'returns' has numbers that are not finite"),
        (Negative, r"in lr_factor: it must return a finite number from 0 on, not -1"),
        (Writing, r"in loss: it changed a tensor that it was given"),
    ],
)
def test_what_a_loss_must_not_do_names_it(workshop, kind, message):
    trainee = with_objective(trainee_of(workshop, CANDIDATES[1], NAMES[0]), kind())
    with pytest.raises(PluginError, match=f"objective '{kind.__name__}'.*{message}"):
        _ = errors_of(workshop, trainee).result


# --- combiners ------------------------------------------------------------------------------------------------------


def test_rules_that_read_inner_products_of_gradients_are_refused(tiny_model_path, prompts):
    with pytest.raises(ConfigError, match=r"'dynamic-gradient' reads inner products .* loss 'ppo' weighs each token"):
        prepare(settings_of(tiny_model_path, prompts, combine="dynamic-gradient"), registry.discover())


class Thrice(Linear):
    factor: ClassVar[float] = 3.0

    def multiplier(self, state):
        return self.factor


def test_a_multiplier_reaches_advantages_and_nothing_else():
    mask = (torch.arange(4) < torch.tensor([4, 2, 3])[:, None]).double()
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * mask
    tokens = Tokens(mask, torch.ones(3, dtype=torch.bool), -values.abs(), -values.abs() * 0.9, {"values": values})
    rewards, groups = np.array([[0.1, 2.0], [0.9, 1.0], [0.3, 0.0]]), np.array([4, 4, 7])
    half = Preference("weights", {"a": 0.5, "b": 0.5})

    def made(combiner: Combiner) -> tuple[TokenAdvantages, dict[str, float]]:
        rule = Advantages(PPO(whiten=True), combiner, half, ("a", "b"), "c")
        return rule.of_tokens(0, rewards, groups, None, tokens)

    (plain, figures), (thrice, more) = made(Linear()), made(Thrice())
    torch.testing.assert_close(thrice.advantages, 3 * plain.advantages, rtol=1e-15, atol=0)
    assert torch.equal(thrice.known["returns"], plain.known["returns"])
    assert more["advantage"] == pytest.approx(3 * figures["advantage"])
    assert figures["signal"] == pytest.approx(float((rewards @ [0.5, 0.5]).mean()))


# --- learning ---------------------------------------------------------------------------------------------------------


def test_the_head_learns_what_is_to_come():
    """On the tiny assistant, with a policy that hardly moves: on responses that it has not seen yet."""
    content = {
        "model": {"path": "tiny-assistant", "lora": {"r": 4, "alpha": 8}},
        "objectives": {
            name: {"reward": {"name": "tiny-assistant", "objective": name}} for name in ("concise", "helpful")
        },
        "data": {"path": "tiny-assistant"},
        "rollouts": {"rounds": 30, "prompts": 8, "samples": 8, "prompts_per_step": 8, "max_new_tokens": 20},
        "loss": {"name": "ppo", "beta": 0.05, "value_lr": 40.0, "value_epsilon": None},
        "train": {"steps": 90, "lr": 2e-4, "together": 1},
    }
    plan = prepare(config.from_mapping(content), registry.discover())
    workshop = open_workshop(plan, Path(), Observer(), keep_cache=False)
    told: list[dict[str, Any]] = []
    candidate = Candidate("c", Preference("weights", {"concise": 1.0, "helpful": 0.0}))
    trained(workshop, [trainee_of(workshop, candidate, NAMES[0], told)])
    share = [line["loss/explained_variance"] for line in told[::3]]
    assert share[0] == 0 and np.mean(share[-6:]) > 0.05
    first, *_, last = told[::3]
    assert first["loss/value"] == 0 and last["loss/value"] == pytest.approx(last["signal"], abs=0.1)
