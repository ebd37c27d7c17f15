"""Losses that own parameters, in the engine: each candidate's own, guarded, and measured where a round is sampled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from sweeps import small_config, write_pairs
from value_heads import (
    CANDIDATES,
    NAMES,
    ROLLOUTS,
    STEPS,
    errors_of,
    settings_of,
    trained,
    trainee_of,
    with_objective,
    write_prompts,
)

from moalign import config, lora, registry
from moalign.api import Combiner, TokenAdvantages, Tokens
from moalign.config import Config
from moalign.engine import train as loop
from moalign.engine.advantages import Advantages
from moalign.engine.batches import RolloutSource
from moalign.errors import PluginError, TrainingError
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import Workshop, open_workshop
from moalign.types import Candidate, Preference
from moalign_plugins.combiners.linear import Linear
from moalign_plugins.objectives.dpo import DPO
from moalign_plugins.objectives.ppo import PPO


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("data") / "prompts.jsonl")


@pytest.fixture(scope="module")
def settings(tiny_model_path, prompts) -> Config:
    return settings_of(tiny_model_path, prompts)


@pytest.fixture(scope="module")
def workshop(settings) -> Workshop:
    return open_workshop(prepare(settings, registry.discover()), Path(), Observer(), keep_cache=False)


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

    def looking(batch, job, *others):
        ratio = ((batch.logps - batch.old_logps) * batch.mask).detach().exp()
        values = job.objective.values(batch).detach()
        moved = float((values - batch.known["values"]).abs().max())
        seen.append((float((ratio - 1).abs().max()), moved, float(values.abs().max())))
        assert batch.advantages is None and batch.hidden.shape == (*batch.mask.shape, 32)
        assert not (batch.hidden * (1 - batch.mask[..., None])).any()
        return loss_of(batch, job, *others)

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


# --- what must never reach them ---------------------------------------------------------------------------------------


class Overflowing(PPO):
    """A finite loss with a gradient in the head that is not: the slope of a root at 0."""

    def loss(self, batch, terms):
        return super().loss(batch, terms) + (batch.parameters["value.bias"] * 0).abs().sqrt()


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


class Forgetful(PPO):
    """Measures something else in every pass."""

    passes: ClassVar[list[int]] = []

    def measure(self, batch):
        self.passes.append(len(batch.logps))
        return {"values": self.values(batch), f"more {len(self.passes)}": self.values(batch)}


class Twice(PPO):
    def token_advantages(self, signal, groups, tokens):
        given = super().token_advantages(signal, groups, tokens)
        return replace(given, known={**given.known, "values": given.advantages})


class NoFigures(PPO):
    def token_advantages(self, signal, groups, tokens):
        return replace(super().token_advantages(signal, groups, tokens), figures=None)


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
        (Forgetful, r"in measure: it gave \['more 1', 'values'\] before and \['more 2', 'values'\] now"),
        (Twice, r"in token_advantages: 'values' is measured already"),
        (NoFigures, r"in token_advantages: figures are numbers by name, not NoneType"),
        (Negative, r"in lr_factor: it must return a finite number from 0 on, not -1"),
        (Writing, r"in loss: it changed a tensor that it was given"),
    ],
)
def test_what_a_loss_must_not_do_names_it(workshop, kind, message, monkeypatch):
    packing = replace(workshop.model.packing, limit=16)  # a round is measured in several passes
    monkeypatch.setattr(workshop, "model", replace(workshop.model, packing=packing))
    trainee = with_objective(trainee_of(workshop, CANDIDATES[1], NAMES[0]), kind())
    with pytest.raises(PluginError, match=f"objective '{kind.__name__}'.*{message}"):
        _ = errors_of(workshop, trainee).result


# --- combiners ------------------------------------------------------------------------------------------------------


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


# --- pairs from files -----------------------------------------------------------------------------------------------


class WithOffset(DPO):
    """A margin between chosen and rejected that is learned, from the hidden state behind which they part."""

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference", "hidden"})

    def parameters(self, width, generator):
        return {"offset": torch.randn(width, generator=generator) * 0.01}

    def loss(self, batch, terms):
        first = (batch.hidden * (batch.mask.cumsum(-1) == 1)[..., None]).sum(1)
        margin = (first @ batch.parameters["offset"])[batch.pairs[:, 0]]
        return super().loss(batch, replace(terms, margin=terms.margin + margin))


def test_a_loss_on_pairs_may_own_parameters_and_an_early_stop_keeps_the_best(tiny_model_path, tmp_path, monkeypatch):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    train = {"steps": 8, "pairs_per_step": 8, "lr": 1e-2, "together": 1, "early_stop": {"every": 1, "patience": 2}}
    plan = prepare(small_config(tiny_model_path, pairs, train=train), registry.discover())
    plan = replace(plan, objective=WithOffset())
    workshop = open_workshop(plan, Path(), Observer(), keep_cache=False)
    trainee = trainee_of(workshop, CANDIDATES[1], NAMES[0])
    seen: list[torch.Tensor] = []
    looked = trainee.looked

    def looking(step: int, loss: float) -> None:
        seen.append(trainee.owned["offset"].detach().clone())
        assert np.isfinite(loss)
        looked(step, (0.7, 0.5, 0.6, 0.6)[step])  # the second look is the best

    monkeypatch.setattr(trainee, "looked", looking)
    trained(workshop, [trainee])
    assert trainee.result.best_step == 1 and len(seen) == 4
    assert torch.equal(trainee.owned["offset"], seen[1])
    assert all(not torch.equal(seen[1], seen[other]) for other in (0, 2, 3))


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
    assert share[0] == 0 and np.mean(share[-10:]) > 0.03
    first, *_, last = told[::3]
    assert first["loss/value"] == 0 and last["loss/value"] == pytest.approx(last["signal"], abs=0.1)
