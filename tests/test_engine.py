"""The training loop: step 0, equivalences, what never reaches the optimizer, what plugins may not return."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from sweeps import small_config, write_pairs

from moalign import lora, registry
from moalign.api import Objective
from moalign.engine import model as models
from moalign.engine.batches import OfflineSource
from moalign.engine.model import TRAINED
from moalign.engine.train import train
from moalign.engine.trainee import Job, schedule
from moalign.errors import PluginError, TrainingError
from moalign.sweeps.candidate import batch_source, job_of
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import Workshop, open_workshop
from moalign.types import Candidate, Preference

BALANCED = Candidate("balanced", Preference("weights", {"harmless": 0.5, "helpful": 0.5}))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


def workshop_of(path: Path, pairs: Path, **changes) -> Workshop:
    plan = prepare(small_config(path, pairs, **changes), registry.discover())
    return open_workshop(plan, Path(), Observer(), keep_cache=False)


@pytest.fixture(scope="module")
def workshop(tiny_model_path, pairs) -> Workshop:
    return workshop_of(tiny_model_path, pairs)


def run(workshop: Workshop, job: Job | None = None, **settings) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Train the balanced candidate; its adapter's tensors and the metrics of every step."""
    job = job or job_of(BALANCED, workshop, ())
    job = replace(job, settings=job.settings.model_copy(update=settings))
    source = batch_source(BALANCED, workshop)
    assert isinstance(source, OfflineSource)
    metrics: list[dict] = []
    train(workshop.model, source, job, workshop.cache, Accelerator(), lambda step, values: metrics.append(values))
    return lora.weights(workshop.model.policy, TRAINED), metrics


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_policy_is_the_reference_at_step_0_and_the_loss_is_ln_2(workshop):
    seen = []

    class Watch(Objective):
        needs = frozenset({"pairs", "reference"})

        def loss(self, batch, terms):
            if not seen:
                seen.append((batch.logps.detach().clone(), batch.ref_logps.clone(), batch.mask.clone()))
            return job_of(BALANCED, workshop, ()).objective.loss(batch, terms)

    _, metrics = run(workshop, replace(job_of(BALANCED, workshop, ()), objective=Watch()), steps=1)
    policy, reference, mask = seen[0]
    assert torch.equal(policy, reference)
    assert policy[mask == 1].lt(0).all() and (policy[mask == 0] == 0).all()
    assert metrics[0]["helpful/loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert metrics[0]["loss"] == pytest.approx(math.log(2) / 2, abs=1e-7)  # every pair has the weight 1/2
    assert metrics[0]["kl_estimate"] == 0.0
    assert metrics[0]["helpful/accuracy"] == 0.5


def test_training_is_a_function_of_the_seed(workshop):
    first, first_metrics = run(workshop)
    torch.rand(7)  # the global generator is nobody's business
    second, second_metrics = run(workshop)
    assert largest_difference(first, second) == 0.0
    assert first_metrics == second_metrics
    other, _ = run(workshop, replace(job_of(BALANCED, workshop, ()), seed=1))
    assert largest_difference(first, other) > 0.0


def test_dropout_is_a_function_of_seed_candidate_and_step(tiny_model_path, pairs):
    lora_settings = {"path": str(tiny_model_path), "lora": {"r": 4, "alpha": 8, "dropout": 0.3}}
    shop = workshop_of(tiny_model_path, pairs, model=lora_settings)
    first, metrics = run(shop)
    torch.rand(3)
    again, _ = run(shop)
    assert largest_difference(first, again) == 0.0
    assert metrics[0]["harmless/loss"] == pytest.approx(math.log(2), abs=1e-7)  # B is zero, so dropout cannot show yet
    other, _ = run(shop, replace(job_of(BALANCED, shop, ()), candidate="somebody-else"))
    assert largest_difference(first, other) > 0.0


@pytest.mark.parametrize(
    "settings", [{"tokens_per_pass": 60}, {"tokens_per_pass": 1}, {"gradient_checkpointing": True}]
)
def test_less_memory_gives_the_same_adapter(workshop, settings):
    """Five decimals over 50 steps in float32; 60 tokens are two or three prompts with their pairs."""
    whole, _ = run(workshop, steps=50)
    parts, metrics = run(workshop, steps=50, **settings)
    assert largest_difference(whole, parts) < 1e-5
    assert all(name in metrics[0] for name in ("helpful/loss", "harmless/margin", "gradient_norm"))


def test_only_the_adapter_is_trained_and_all_of_it(workshop):
    fingerprint = models.base_fingerprint(workshop.model.policy.get_base_model())
    trained, _ = run(workshop, gradient_checkpointing=True, steps=2)
    assert fingerprint == workshop.model.fingerprint
    assert models.base_fingerprint(workshop.model.policy.get_base_model()) == fingerprint
    b_matrices = [tensor for name, tensor in trained.items() if "lora_B" in name]
    assert len(b_matrices) == 2 * 7  # layers x linear modules of a Llama block
    assert all(tensor.abs().max() > 0 for tensor in b_matrices)


class Broken(Objective):
    """Goes wrong from ``after`` steps on, in the given way."""

    needs = frozenset({"pairs", "reference"})
    way: str
    after: int = 0

    def loss(self, batch, terms):
        from moalign.api import pair_logits

        good = -torch.nn.functional.logsigmoid(pair_logits(batch, terms, 0.1))
        _calls.append(1)
        if len(_calls) <= self.after:
            return good
        ways = {
            "nan": lambda: good * math.nan,
            "inf": lambda: good * math.inf,
            "reduced": lambda: good.mean(),
            "detached": lambda: good.detach(),
            "none": lambda: None,
            "raises": lambda: {}["missing"],
        }
        return ways[self.way]()


_calls: list[int] = []


@pytest.mark.parametrize("way", ["nan", "inf"])
def test_non_finite_losses_never_reach_the_optimizer(workshop, way):
    _calls.clear()
    before, _ = run(workshop, steps=6, schedule="constant", warmup=0.0)
    job = replace(job_of(BALANCED, workshop, ()), objective=Broken(way=way, after=6))
    with pytest.raises(TrainingError, match=r"step 8: loss is (nan|inf).*the optimizer was not called"):
        run(workshop, job, steps=20, schedule="constant", warmup=0.0)
    assert largest_difference(before, lora.weights(workshop.model.policy, TRAINED)) == 0.0


@pytest.mark.parametrize(
    ("way", "message"),
    [
        (
            "reduced",
            r"'Broken' of .*, in loss: it must return one loss per pair, float32 \[8\] on cpu, not float32 \[\]",
        ),
        ("detached", "returned a loss without a gradient"),
        ("none", "not NoneType"),
        ("raises", "'Broken' of test_engine, in loss: KeyError: 'missing'"),
    ],
)
def test_what_a_loss_may_not_do_is_reported_by_name(workshop, way, message):
    _calls.clear()
    with pytest.raises(PluginError, match=message):
        run(workshop, replace(job_of(BALANCED, workshop, ()), objective=Broken(way=way)))


def test_an_objective_without_weight_does_not_count(workshop):
    """With the one-hot preference only the pairs that this objective judged pull."""
    only = Candidate("only", Preference("weights", {"harmless": 0.0, "helpful": 1.0}))
    _, metrics = run(workshop, replace(job_of(only, workshop, ()), candidate="only"), steps=40)
    last = metrics[-1]
    assert last["helpful/accuracy"] > 0.9
    assert last["harmless/accuracy"] < 0.1


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_schedules(workshop, kind):
    settings = workshop.plan.config.train.model_copy(update={"steps": 100, "warmup": 0.1, "schedule": kind})
    factors = [schedule(settings, step) for step in range(100)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[:10] == sorted(factors[:10]) and factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == 1.0 if kind == "constant" else factors[-1] < 0.05


def test_nothing_of_a_failed_candidate_reaches_the_next_one(workshop):
    """It fails in the second pass of a step, when the first pass has left gradients behind."""
    clean, _ = run(workshop, tokens_per_pass=60)
    _calls.clear()
    job = replace(job_of(BALANCED, workshop, ()), objective=Broken(way="raises", after=1))
    with pytest.raises(PluginError):
        run(workshop, job, tokens_per_pass=60)
    again, _ = run(workshop, tokens_per_pass=60)
    assert largest_difference(clean, again) == 0.0
