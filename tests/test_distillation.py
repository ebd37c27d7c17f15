"""Distillation from distributions over the vocabulary: AlignDistil as mathematics, and the engine's distributions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from references import HALF, Told, offline, same
from sweeps import small_config, write_pairs
from test_objectives import make_batch, terms_of
from torch import Tensor

from moalign import lora, registry
from moalign.api import Batch, PairTerms, PluginError
from moalign.engine import train as loop
from moalign.engine.trainee import Trainee
from moalign.sweeps import run
from moalign.sweeps.candidate import batch_source, job_of, slots
from moalign.sweeps.observe import Observer
from moalign.testing import check_objective
from moalign_plugins.objectives.align_distil import AlignDistil
from moalign_plugins.objectives.align_distil_simple import AlignDistilSimple

TOKENS, VOCABULARY = 20, 7  # of make_batch, all responses together
FULL = AlignDistil(teacher="x", contrary="y")
SIMPLE = AlignDistilSimple(teacher="x", beta=0.3, kl_weight=0.2)


def distributions(seed=0):
    names = ("policy", "teacher", "contrary", "reference")
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(TOKENS, VOCABULARY, generator=generator, dtype=torch.float64) for name in names}
    return {name: logits.log_softmax(-1) for name, logits in made.items()}


def batch_of(**changed):
    batch = make_batch()
    assert int(batch.mask.sum()) == TOKENS
    return dataclasses.replace(batch, distributions=distributions() | changed)


@pytest.mark.parametrize("loss", [FULL, SIMPLE, AlignDistil(teacher="x", contrary="y", slope=0.0)], ids=repr)
def test_it_conforms(loss):
    check_objective(loss, prompts=2, tokens=3)


@pytest.mark.parametrize("loss", [FULL, SIMPLE], ids=repr)
def test_it_is_the_divergence_as_written_averaged_over_tokens_then_over_the_pair(loss):
    batch = batch_of()
    each, at = [], 0
    for length in batch.mask.sum(-1).int().tolist():
        total = 0.0
        for p, z, rev, ref in zip(*(values[at : at + length] for values in batch.distributions.values()), strict=True):
            if loss is FULL:
                k = 15 * sum(abs(float(a.exp() - b.exp())) for a, b in zip(z, rev, strict=True)) + 1e-3
                target, factor = torch.log_softmax(z + k * (z - rev), 0), 0.1 / k
            else:
                target, factor = torch.log_softmax(1.5 * z - 0.5 * ref, 0), 0.2
            total += factor * float((p.exp() * (p - target)).sum()) / length
        each.append(total)
        at += length
    expected = [(each[a] + each[b]) / 2 for a, b in batch.pairs.tolist()]
    value = loss.loss(batch, terms_of(batch))
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_target_of_the_simple_variant_maximises_reward_less_divergence():
    """It is Gibbs, so that every policy falls short of it by kl_weight KL(pi || target), which is the loss."""
    given = distributions()
    z, reference = given["teacher"], given["reference"]
    target = (1.5 * z - 0.5 * reference).log_softmax(-1)

    def value(policy):
        return (policy.exp() * (0.3 * (z - reference) - 0.2 * (policy - reference))).sum(-1)

    for seed in range(3):
        policy = distributions(seed + 1)["policy"]
        short = 0.2 * (policy.exp() * (policy - target)).sum(-1)
        torch.testing.assert_close(value(target) - value(policy), short, rtol=1e-11, atol=1e-13)
    batch = batch_of(policy=target)
    torch.testing.assert_close(SIMPLE.loss(batch, terms_of(batch)), torch.zeros(3).double(), rtol=0, atol=1e-15)


def test_with_the_same_strength_the_simple_variant_gives_the_teacher_back():
    batch = batch_of(policy=distributions()["teacher"])
    loss = AlignDistilSimple(teacher="x", beta=0.3, kl_weight=0.3).loss(batch, terms_of(batch))
    torch.testing.assert_close(loss, torch.zeros(3).double(), rtol=0, atol=1e-15)


def test_where_both_adapters_agree_the_teacher_is_the_target_and_the_weight_is_largest():
    given = distributions()
    batch = batch_of(contrary=given["teacher"])
    each = (given["policy"].exp() * (given["policy"] - given["teacher"])).sum(-1)
    means = torch.stack([part.mean() for part in each.split(batch.mask.sum(-1).int().tolist())])
    expected = 100 * means[batch.pairs].mean(-1)
    torch.testing.assert_close(FULL.loss(batch, terms_of(batch)), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", [FULL, SIMPLE], ids=repr)
def test_gradcheck_and_what_it_refuses(loss):
    logits = torch.randn(TOKENS, VOCABULARY, dtype=torch.float64).requires_grad_()

    def losses(values):
        batch = batch_of(policy=values.log_softmax(-1))
        return loss.loss(batch, terms_of(batch))

    assert torch.autograd.gradcheck(losses, (logits,))
    with pytest.raises(PluginError, match=r"cannot use a combiner's scale and margin"):
        loss.loss(batch_of(), terms_of(batch_of(), margin=0.1))
    with pytest.raises(PluginError, match=r'does not declare "distributions"'):
        loss.loss(make_batch(), terms_of(make_batch()))


# --- in runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["align-distil", "align-distil-simple"])
def test_runs_train_on_distributions_that_fit_the_log_probabilities(
    name, tiny_model_path, small_run, tmp_path: Path, monkeypatch
):
    """Their entries at the response tokens are the log-probabilities of policy, guides and reference, each row sums to
    1, and a step towards the teacher lowers the loss."""
    seen: list = []
    loss_of = loop.loss_of

    def looking(batch, job, *others):
        seen.append((batch, {key: values.detach() for key, values in batch.distributions.items()}))
        return loss_of(batch, job, *others)

    monkeypatch.setattr(loop, "loss_of", looking)
    loss = {"name": name, "teacher": str(small_run / "candidates/w-1.00-0.00")}
    if name == "align-distil":
        loss["contrary"] = str(small_run / "candidates/w-0.00-1.00")
    pairs = write_pairs(tmp_path / "pairs.jsonl", prompts=4)
    train = {"steps": 4, "pairs_per_step": 6, "lr": 1e-2, "together": 2, "schedule": "constant", "warmup": 0.0}
    settings = small_config(tiny_model_path, pairs, loss=loss, train=train, search={"name": "grid", "points": 2})
    run.start(settings, tmp_path / "run", registry.discover(), Observer())
    batch, spread = seen[0]
    expected = {"policy": batch.logps.detach(), **batch.guides}
    if name == "align-distil-simple":
        expected["reference"] = batch.ref_logps
    assert spread.keys() == expected.keys()
    labels = {}
    for key, values in spread.items():
        own = expected[key][batch.mask > 0]
        torch.testing.assert_close(values.exp().sum(-1), torch.ones(len(own)), rtol=1e-5, atol=0)
        # the same token in all: the one whose log-probability it is under every policy
        labels[key] = (values - own[:, None]).abs() < 1e-4
    assert bool(torch.stack(list(labels.values())).all(0).any(1).all())
    for metrics in (tmp_path / "run/candidates").glob("*/metrics.jsonl"):
        losses = [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]
        assert losses[-1] < 0.9 * losses[0]


class WritesIntoTheTeacher(AlignDistilSimple):
    """Wrong: after its loss nothing is left of what the frozen policies said."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        losses = super().loss(batch, terms)
        for name in ("teacher", "reference"):
            batch.distributions[name].zero_()
        return losses


@pytest.mark.parametrize("wrong", [0, 1])
def test_who_writes_into_a_distribution_fails_alone(wrong, tiny_model_path, small_run, tmp_path):
    """Its neighbour in the pass learns what it learns beside one that writes into nothing, to the last bit."""
    loss = {"name": "align-distil-simple", "teacher": str(small_run / "candidates/w-1.00-0.00")}
    train = {"steps": 1, "pairs_per_step": 6, "lr": 1e-2, "schedule": "constant", "warmup": 0.0}
    workshop = offline(tiny_model_path, tmp_path, loss=loss, train=train)

    def neighbour(first: AlignDistilSimple) -> tuple[list[Trainee], dict[str, Tensor]]:
        trainees = []
        for place, slot in enumerate(slots(2)):
            job = job_of(HALF, workshop, ())
            job = dataclasses.replace(job, objective=first) if place == wrong else job
            trainees.append(Trainee(job, batch_source(HALF, workshop, slot), slot, Told()))
        loop.train_together(workshop.model, trainees, workshop.cache, workshop.accelerator)
        return trainees, lora.weights(workshop.model.policy, trainees[1 - wrong].slot)

    _, expected = neighbour(AlignDistilSimple(teacher=loss["teacher"]))
    trainees, found = neighbour(WritesIntoTheTeacher(teacher=loss["teacher"]))
    assert "changed a tensor that it was given" in str(trainees[wrong].error)
    assert trainees[1 - wrong].error is None and same(expected, found)
