"""The gradient that the engine accumulates for sampled responses, against the listing of every reply to a prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from moalign import config, lora, registry
from moalign.api import Batch, Objective, PairTerms
from moalign.demo import grammar
from moalign.demo import world as worlds
from moalign.demo.enumeration import Enumeration, enumerate_replies, reply_logps
from moalign.engine import train as loop
from moalign.engine.advantages import Advantages
from moalign.engine.batches import RolloutSource
from moalign.engine.rewards import Scored
from moalign.engine.rollouts import Rollout
from moalign.engine.train import train_together
from moalign.engine.trainee import Trainee
from moalign.lora import Mixture
from moalign.sweeps.candidate import batch_source, job_of, slots
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import Workshop, open_workshop
from moalign.types import Candidate, Preference
from moalign_plugins.objectives.grpo import GRPO
from moalign_plugins.objectives.ppo import PPO
from moalign_plugins.objectives.reinforce import REINFORCE
from moalign_plugins.objectives.remax import ReMax
from moalign_plugins.objectives.rloo import RLOO

PROMPT = grammar.TRAIN_PROMPTS[0]
STEPS, GROUPS, SIZE = 30, 16, 2  # every step is an estimate of its own
NAMES, WEIGHTS = ("harmless", "helpful"), (0.3, 0.7)
CANDIDATE = Candidate("c", Preference("weights", dict(zip(NAMES, WEIGHTS, strict=True))))
(SLOT,) = slots(1)


@pytest.fixture(scope="module")
def workshop() -> Workshop:
    content = {
        "model": {"path": "tiny-assistant", "lora": {"r": 4, "alpha": 8}},
        "objectives": {
            name: {"reward": {"name": "tiny-assistant", "objective": name}} for name in grammar.OBJECTIVES[:2]
        },
        "data": {"path": "tiny-assistant"},
        "rollouts": {
            "rounds": 1,
            "prompts": STEPS * GROUPS,
            "samples": SIZE,
            "prompts_per_step": GROUPS,
            "max_new_tokens": 24,
        },
        "loss": {"name": "grpo"},
        "train": {"steps": STEPS},
    }
    plan = prepare(config.from_mapping(content), registry.discover())
    return open_workshop(plan, Path(), Observer(), keep_cache=False)


@pytest.fixture(autouse=True)
def policy_away_from_the_base(monkeypatch):
    """All of the adapter's numbers differ from 0, so that ratio and KL to the reference are those of two policies."""
    healthy = Trainee.prepare

    def prepare(self, model, parameters):
        healthy(self, model, parameters)
        noise = torch.randn(parameters[0].shape, generator=torch.Generator().manual_seed(0))
        parameters[0].data += 0.08 * noise

    monkeypatch.setattr(Trainee, "prepare", prepare)


@pytest.fixture(scope="module")
def every_reply(workshop) -> Enumeration:
    return enumerate_replies(workshop.model.tokeniser.tokenizer, [PROMPT])


@pytest.fixture(scope="module")
def sampled(workshop, every_reply) -> dict[str, list[Rollout]]:
    """The one round of responses, the same for every loss; drawn by the first test that asks."""
    return {}


def scores_of(workshop: Workshop) -> dict[tuple[int, ...], tuple[float, ...]]:
    """By token ids: a reply that is spelt with other tokens is none of those that are listed."""
    tokenizer, texts = workshop.model.tokeniser.tokenizer, grammar.replies(PROMPT)
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    scores = [grammar.score(PROMPT, text) for text in texts]
    names = workshop.plan.objectives
    return {
        (*each, tokenizer.eos_token_id): tuple(score[name] for name in names)
        for each, score in zip(ids, scores, strict=True)
    }


def source_for(objective: Objective, workshop: Workshop) -> RolloutSource:
    """One prompt again and again, each time with a number of its own."""
    source = batch_source(CANDIDATE, workshop, SLOT)
    assert isinstance(source, RolloutSource)
    known = scores_of(workshop)
    return replace(
        source,
        first_round=None,
        prompts=(tuple(workshop.model.tokeniser.prompt(PROMPT)),) * (STEPS * GROUPS),
        score=lambda rollouts: Scored(np.array([known.get(each.ids, (grammar.WORST,) * 2) for each in rollouts])),
        advantages=Advantages(objective, workshop.plan.combiner, CANDIDATE.preference, workshop.plan.objectives, "c"),
    )


def gradients(objective: Objective, workshop: Workshop, sampled: dict[str, list[Rollout]], monkeypatch) -> torch.Tensor:
    """[STEPS,P]: what each step would give to the optimizer, which is never called; the adapter stays where it is."""
    found: list[torch.Tensor] = []

    def end(self, step):
        assert self.sound
        gradient = self.parameters[0].grad
        found.append(gradient.clone())
        gradient.zero_()

    monkeypatch.setattr(Trainee, "end", end)
    draw = RolloutSource.sample

    def once(self, number, names):
        key = "with greedy ones" if self.greedy else "drawn"
        if key not in sampled:
            sampled[key] = draw(self, number, names)[0]
        return [sampled[key]]

    monkeypatch.setattr(RolloutSource, "sample", once)
    job = replace(job_of(CANDIDATE, workshop, ()), objective=objective, needs=objective.wants)
    trainee = Trainee(job, source_for(objective, workshop), SLOT, lambda step, metrics: None)
    train_together(workshop.model, [trainee], workshop.cache, workshop.accelerator)
    assert trainee.error is None
    return torch.stack(found).double()


def exact(value, workshop: Workshop, every_reply: Enumeration) -> torch.Tensor:
    """Minus the gradient of value(outcomes under the policy, under the reference), of the parameters that are trained.

    Runs after ``gradients``, which leaves the adapter in its place.
    """
    policy = workshop.model.policy
    rows = lora.stack(policy, [SLOT]).parameters[SLOT]
    with torch.no_grad(), lora.active(policy, None):
        reference = reply_logps(policy, every_reply)
    with lora.mixed(policy, Mixture((SLOT,), (len(every_reply.input_ids),))):
        own = reply_logps(policy, every_reply)
        (-value(worlds.outcomes(own), worlds.outcomes(reference))).backward()
    assert own.exp().sum() > 0.97  # what is none of the replies has no reward, and little weight in the KL
    assert rows[0].grad is not None
    return rows[0].grad.double().clone()


def world_of(workshop: Workshop) -> worlds.World:
    return worlds.tiny_world([PROMPT], workshop.plan.objectives)


def utility(workshop: Workshop) -> torch.Tensor:
    return world_of(workshop).rewards[0] @ torch.tensor(WEIGHTS, dtype=torch.float64)


def target(workshop: Workshop, share: float, beta: float):
    """share * (E[w.r] - beta KL)"""

    def value(policy, reference):
        kl = (policy.exp() * (policy - reference)).sum()
        return share * ((policy[0].exp() * utility(workshop)).sum() - beta * kl)

    return value


def standardised(workshop: Workshop):
    """What has GRPO's gradient: sum over y of pi(y) E[A | y], with E[A | y] constant, for groups of two."""

    def value(policy, reference):
        difference = utility(workshop)[:, None] - utility(workshop)
        advantage = 0.5 * difference / (difference.abs() / 2**0.5 + 1e-4)
        return (policy[0].exp() * (advantage @ policy[0].detach().exp())).sum()

    return value


class WithValues(PPO):
    """Begins with values that are no good; as a baseline they change no expectation."""

    def parameters(self, width, generator):
        return {"value.weight": 0.03 * torch.randn(width, generator=generator), "value.bias": torch.ones(1) * 0.4}


BETA = 0.3
UNLISTED = -99.0


def entropy_bonus(workshop: Workshop, every_reply: Enumeration) -> torch.Tensor:
    """Minus the gradient of the entropies of next tokens, summed along each reply, replies as likely as they are."""
    policy = workshop.model.policy
    rows = lora.stack(policy, [SLOT]).parameters[SLOT]
    with lora.mixed(policy, Mixture((SLOT,), (len(every_reply.input_ids),))):
        with torch.no_grad():
            likely = reply_logps(policy, every_reply).exp()
        known = {"position_ids": every_reply.positions, "attention_mask": every_reply.attention}
        logps = policy(input_ids=every_reply.input_ids, use_cache=False, **known).logits.flatten(0, 1).log_softmax(-1)
        of_edges = -(logps.exp() * logps).sum(-1)[every_reply.parent]
        of_replies = torch.cat([of_edges, of_edges.new_zeros(1)])[every_reply.path].sum(-1)
        (-(likely * of_replies).sum()).backward()
    assert rows[0].grad is not None
    return rows[0].grad.double().clone()


class OfListedReplies(RLOO):
    """The bonus is for replies that are listed; the few others are told by their reward."""

    needs: ClassVar[frozenset[str]] = RLOO.needs | {"margins"}

    def loss(self, batch: Batch, terms: PairTerms) -> torch.Tensor:
        if batch.entropy is not None:
            assert batch.rewards is not None
            batch = replace(batch, entropy=batch.entropy * (batch.rewards[:, :1] > UNLISTED))
        return super().loss(batch, terms)


def test_a_bonus_adds_the_gradient_of_the_entropies_at_sampled_beginnings(workshop, sampled, every_reply, monkeypatch):
    """The same responses with and without it: nothing but the bonus is left in the difference."""
    monkeypatch.setattr(grammar, "WORST", UNLISTED)
    plain, bonus = (
        gradients(OfListedReplies(beta=BETA, entropy=entropy), workshop, sampled, monkeypatch) for entropy in (0.0, 0.5)
    )
    found, expected = (bonus - plain) / 0.5, entropy_bonus(workshop, every_reply)
    along = found @ expected / expected.norm()
    error = along.std() / STEPS**0.5
    assert (along.mean() - expected.norm()).abs() < 4 * error < expected.norm()
    few = expected.abs().topk(20).indices
    errors = found[:, few].std(0) / STEPS**0.5
    assert ((found.mean(0) - expected)[few].abs() < 4 * errors).all()
    assert (expected[few].abs() > 3 * errors).sum() > 10


CASES = {
    "reinforce": (REINFORCE(beta=BETA, baseline="none"), lambda workshop: target(workshop, 1.0, BETA)),
    "reinforce, mean": (REINFORCE(beta=BETA), lambda workshop: target(workshop, 1 - 1 / SIZE, BETA)),
    "rloo": (RLOO(beta=BETA), lambda workshop: target(workshop, 1.0, BETA)),
    "rloo, k2": (RLOO(beta=BETA, kl="k2"), lambda workshop: target(workshop, 1.0, BETA)),
    "remax": (ReMax(beta=BETA), lambda workshop: target(workshop, 1.0, BETA)),
    "grpo": (GRPO(beta=0.0, length="none"), standardised),
    "ppo": (WithValues(beta=BETA, lam=1.0), lambda workshop: target(workshop, 1.0, BETA)),
}


@pytest.mark.parametrize("case", CASES)
def test_sampled_gradient_of_the_adapter_is_within_its_standard_error(
    case, workshop, sampled, every_reply, monkeypatch
):
    objective, value = CASES[case]
    found = gradients(objective, workshop, sampled, monkeypatch)
    expected = exact(value(workshop), workshop, every_reply)
    of_kl = exact(lambda policy, reference: -(policy.exp() * (policy - reference)).sum(), workshop, every_reply)
    for direction in (expected, of_kl):
        along = found @ direction / direction.norm()
        error = along.std() / STEPS**0.5
        assert (along.mean() - expected @ direction / direction.norm()).abs() < 4 * error
        if direction is expected:
            assert expected.norm() > 4 * error  # another gradient would be seen
        elif case in ("rloo", "rloo, k2", "remax"):
            assert BETA * of_kl.norm() > 4 * error  # and one without the KL
    few = expected.abs().topk(20).indices
    errors = found[:, few].std(0) / STEPS**0.5
    assert ((found.mean(0) - expected)[few].abs() < 4 * errors).all()
    assert (expected[few].abs() > 3 * errors).sum() > (3 if case in ("reinforce", "ppo") else 10)


# --- the ratio at the first update ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [True, False], ids=["packed", "a row for each"])
@pytest.mark.parametrize("members", [1, 3])
def test_the_ratio_to_the_policy_that_sampled_is_one_at_the_first_update(shares, members, workshop, monkeypatch):
    """In all layouts of rows, each response of every candidate, whose adapters are different."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def looking(batch, job, *others):
        assert batch.old_logps is not None and batch.ref_logps is not None
        moved = ((batch.logps - batch.old_logps) * batch.mask).detach()
        seen.append((moved, ((batch.logps - batch.ref_logps) * batch.mask).detach()))
        return loss_of(batch, job, *others)

    def end(self, step):
        self.parameters[0].grad.zero_()

    loss_of = loop.loss_of
    monkeypatch.setattr(loop, "loss_of", looking)
    monkeypatch.setattr(Trainee, "end", end)
    model = replace(workshop.model, packing=replace(workshop.model.packing, shares=shares))
    job = job_of(CANDIDATE, workshop, ())
    job = replace(job, settings=job.settings.model_copy(update={"steps": 1}))
    trainees = []
    for number, slot in enumerate(slots(members)):
        source = batch_source(CANDIDATE, workshop, slot)
        assert isinstance(source, RolloutSource)
        settings = source.settings.model_copy(update={"prompts": 12, "samples": 4, "prompts_per_step": 12})
        source = replace(source, model=model, first_round=None, settings=settings, steps=1)
        own = replace(job, seed=number, needs=job.objective.needs)
        trainees.append(Trainee(own, source, slot, lambda step, metrics: None))
    train_together(model, trainees, replace(workshop.cache, model=model), workshop.accelerator)
    assert [trainee.error for trainee in trainees] == [None] * members
    assert sum(len(moved) for moved, _ in seen) == members * 12 * 4
    assert max(moved.exp().sub(1).abs().max() for moved, _ in seen) < 1e-5
    assert min(away.abs().max() for _, away in seen) > 0.1
