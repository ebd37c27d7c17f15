"""Sampling from several policies in one call: what each says is its own, and follows its own distribution."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_training import trainable
from sweeps import small_config

from moalign import lora, registry
from moalign.engine import batches, rollouts
from moalign.engine.batches import RolloutSource
from moalign.engine.rollouts import sample
from moalign.engine.train import train_together
from moalign.engine.trainee import Trainee
from moalign.errors import TrainingError
from moalign.sweeps.candidate import batch_source, job_of, slots
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import Workshop, open_workshop
from moalign.types import Candidate, Preference

STEPS = 12
NAMES = slots(3)
ARGUMENTS = {"samples": 3, "temperature": 1.0, "max_new_tokens": 6, "seed": 3}


@pytest.fixture(scope="module")
def workshop(tiny_model_path, tmp_path_factory) -> Workshop:
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q{'x' * (number % 3)}{number}: "}) + "\n" for number in range(12)))
    settings = small_config(
        tiny_model_path,
        file,
        objectives={"helpful": {"reward": "length"}, "harmless": {"reward": "length", "direction": "min"}},
        train={"steps": STEPS, "lr": 2e-3},
        rollouts={"rounds": 4, "samples": 3, "prompts": 5, "prompts_per_step": 2, "max_new_tokens": 5},
        loss={"name": "rebel", "beta": 0.3},
    )
    return open_workshop(prepare(settings, registry.discover()), Path(), Observer(), keep_cache=False)


@pytest.fixture
def different(workshop) -> Workshop:
    """Three slots with weights so far apart that the policies say different things."""
    lora.add_slots(workshop.model.policy, NAMES)
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable(workshop.model.policy, *NAMES).values():
        parameter.data.normal_(std=0.5, generator=generator)
    return workshop


def test_what_a_policy_says_does_not_depend_on_who_else_is_sampled(different, monkeypatch):
    model, prompts = different.model, different.material.prompts
    alone = [sample(model, [name], prompts, **ARGUMENTS)[0] for name in NAMES]
    assert sample(model, NAMES, prompts, **ARGUMENTS) == alone
    assert alone[0] != alone[1] != alone[2]
    monkeypatch.setattr(rollouts, "ROWS_IN_ALL", 2 * len(prompts) * 3)  # two policies in a call, then one
    assert sample(model, NAMES, prompts, **ARGUMENTS) == alone


def test_equal_policies_say_the_same(workshop):
    """The noise is common to all of them."""
    lora.add_slots(workshop.model.policy, NAMES)
    for name in NAMES:
        lora.initialise(workshop.model.policy, name, 0)
    found = sample(workshop.model, NAMES, workshop.material.prompts, **ARGUMENTS)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_tokens_follow_the_softmax(different, temperature):
    """4,000 draws of one token for one prompt under two policies, against the probabilities; chi squared."""
    model, prompt = different.model, different.material.prompts[0]
    arguments = {"samples": 4000, "temperature": temperature, "max_new_tokens": 1, "seed": 5}
    found = sample(model, NAMES[:2], [prompt], **arguments)
    for name, mine in zip(NAMES[:2], found, strict=True):
        with lora.active(model.policy, name):
            logits = model.base(input_ids=torch.tensor([prompt])).logits[0, -1]
        expected = 4000 * (logits / temperature).softmax(-1).double().numpy()
        counts = np.bincount([rollout.ids[0] for rollout in mine], minlength=len(expected))
        common = expected > 5
        merged = np.append(expected[common], expected[~common].sum() + 1e-9)
        found_here = np.append(counts[common], counts[~common].sum())
        statistic = ((found_here - merged) ** 2 / merged).sum()
        degrees = len(merged) - 1
        assert degrees > 10
        assert statistic < degrees + 5 * np.sqrt(2 * degrees)  # five standard deviations


TIES = [0.5, 2.0, 2.0, -1.0, 2.0, 0.0]  # three tokens are the likeliest, with 0.29 each


@pytest.mark.parametrize(
    ("mass", "kept"), [(0.2, {1}), (0.3, {1, 2}), (0.6, {1, 2, 4}), (0.9, {0, 1, 2, 4}), (0.98, {0, 1, 2, 4, 5})]
)
def test_the_nucleus_is_the_smallest_set_of_that_mass_and_of_equals_the_first(mass, kept):
    scores = torch.tensor([TIES, TIES[::-1]])
    found = rollouts.nucleus(scores, mass)
    for row, mirrored in enumerate((False, True)):
        probabilities = scores[row].double().softmax(-1)
        inside = found[row].isfinite().nonzero().squeeze(1).tolist()
        assert len(inside) == len(kept) and (mirrored or set(inside) == kept)
        assert float(probabilities[inside].sum()) >= mass
        assert float(probabilities[inside].sum() - probabilities[inside].min()) < mass  # one less does not suffice
        assert found[row][inside].equal(scores[row][inside])


def test_the_nucleus_is_that_of_the_definition():
    """Against all subsets in order of size, for random scores; and a mass above all sums keeps everything."""
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(40, 6, generator=generator)
    for mass in (0.1, 0.5, 0.8, 0.95):
        for row, found in zip(scores, rollouts.nucleus(scores, mass), strict=True):
            likely = row.double().softmax(-1)
            size = next(
                n for n in range(1, 7) if max(float(likely[list(c)].sum()) for c in combinations(range(6), n)) >= mass
            )
            best = max(combinations(range(6), size), key=lambda chosen: float(likely[list(chosen)].sum()))
            assert found.isfinite().nonzero().squeeze(1).tolist() == list(best)
    assert rollouts.nucleus(scores, 1.0 - 1e-16).equal(scores)


def test_samples_of_a_nucleus_follow_its_distribution(different):
    """4,000 first tokens at temperature 0.7, against the probabilities over those of the nucleus; chi squared."""
    model, prompt = different.model, different.material.prompts[0]
    arguments = {"samples": 4000, "temperature": 0.7, "top_p": 0.8, "max_new_tokens": 1, "seed": 5}
    ((mine,),) = [sample(model, NAMES[:1], [prompt], **arguments)]
    with lora.active(model.policy, NAMES[0]):
        logits = model.base(input_ids=torch.tensor([prompt])).logits[0, -1]
    likely, ids = (logits.double() / 0.7).softmax(-1).sort(descending=True)
    size = int((likely.cumsum(-1) < 0.8).sum()) + 1
    expected = (4000 * likely[:size] / likely[:size].sum()).numpy()
    counts = np.bincount([rollout.ids[0] for rollout in mine], minlength=len(logits))
    assert counts.sum() == counts[ids[:size].numpy()].sum() == 4000  # nothing outside
    statistic = ((counts[ids[:size].numpy()] - expected) ** 2 / expected).sum()
    assert expected.min() > 5 and size > 10
    assert statistic < size - 1 + 5 * np.sqrt(2 * (size - 1))


def test_all_of_the_mass_is_plain_sampling(different, monkeypatch):
    """To the last bit: nothing is sorted, nothing masked."""
    model, prompts = different.model, different.material.prompts
    plain = sample(model, NAMES, prompts, **ARGUMENTS)
    monkeypatch.setattr(rollouts, "nucleus", None)
    assert sample(model, NAMES, prompts, **ARGUMENTS, top_p=1.0) == plain


def test_greedy_responses_take_the_likeliest_token_and_leave_the_samples_alone(different, monkeypatch):
    model, prompts = different.model, different.material.prompts
    plain = sample(model, NAMES, prompts, **ARGUMENTS)
    found = sample(model, NAMES, prompts, **ARGUMENTS, greedy=True)
    for name, mine, own in zip(NAMES, found, plain, strict=True):
        assert mine[: len(own)] == own and not any(each.greedy for each in own)
        likeliest = mine[len(own) :]
        assert [each.prompt for each in likeliest] == list(range(len(prompts)))
        assert all(each.greedy for each in likeliest)
        for prompt, rollout in zip(prompts, likeliest, strict=True):
            with lora.active(model.policy, name):
                logits = model.base(input_ids=torch.tensor([prompt + rollout.ids])).logits[0, len(prompt) - 1 : -1]
            assert logits.argmax(-1).tolist() == list(rollout.ids)
            assert rollout.ended or len(rollout.ids) == ARGUMENTS["max_new_tokens"]
    monkeypatch.setattr(rollouts, "ROWS", 7)  # a call ends within a prompt's samples
    cut = sample(model, NAMES, prompts, **ARGUMENTS, greedy=True)
    assert [own[-len(prompts) :] for own in cut] == [own[-len(prompts) :] for own in found]
    assert [len(own) for own in cut] == [len(own) for own in found]


def test_no_draw_of_the_generator_makes_an_impossible_token_likely(monkeypatch):
    """It may return 0, whose logarithm would beat every score."""
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, generator: self.fill_(1.0).index_fill_(1, ZERO, 0.0))
    scores = torch.tensor([[0.0, -40.0]])
    noisy = rollouts._Noise(rows=1, temperature=1.0, top_p=1.0, seed=0).on(scores, 0, torch.tensor([0]))
    assert noisy.isfinite().all() and noisy.argmax() == 0


ZERO = torch.tensor([1])


def test_where_memory_does_not_suffice_fewer_policies_are_sampled_at_a_time(different, monkeypatch):
    model, prompts = different.model, different.material.prompts
    expected = sample(model, NAMES, prompts, **ARGUMENTS)
    decode, asked = rollouts.decode, []

    def limited(model, adapters, prompts, *arguments):
        asked.append(len(adapters) * len(prompts))
        if asked[-1] > len(different.material.prompts) * 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(model, adapters, prompts, *arguments)

    monkeypatch.setattr(rollouts, "decode", limited)
    assert sample(model, NAMES, prompts, **ARGUMENTS) == expected
    rows = len(prompts) * 3
    assert asked == [3 * rows, rows, 2 * rows, rows, rows]


def test_scores_that_are_not_numbers_are_refused(different):
    first = lora.parameters(different.model.policy, NAMES[1])[0]
    first.data[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="not numbers"):
        sample(different.model, NAMES, different.material.prompts, **ARGUMENTS)


# --- in training ----------------------------------------------------------------------------------------------------

CANDIDATES = [
    Candidate(f"c{number}", Preference("weights", {"harmless": share, "helpful": 1 - share}))
    for number, share in enumerate((0.0, 0.5, 1.0))
]


def trained(workshop: Workshop, candidates: list[Candidate]) -> tuple[list[Trainee], list[list[float]]]:
    workshop.first_round.clear()
    losses: list[list[float]] = [[] for _ in candidates]
    trainees = []
    for candidate, slot, mine in zip(candidates, NAMES, losses, strict=False):
        source = batch_source(candidate, workshop, slot)
        note = lambda step, metrics, mine=mine: mine.append(metrics["loss"])  # noqa: E731
        trainees.append(Trainee(job_of(candidate, workshop, ()), source, slot, note))
    train_together(workshop.model, trainees, workshop.cache, workshop.accelerator)
    return trainees, losses


def test_rollouts_of_a_group_are_sampled_in_one_call_and_train_as_alone(workshop, monkeypatch):
    alone = []
    for candidate in CANDIDATES:
        (trainee,), (losses,) = trained(workshop, [candidate])
        alone.append((losses, lora.weights(workshop.model.policy, trainee.slot)))
    calls = []

    def counting(model, adapters, prompts, **arguments):
        calls.append(len(adapters))
        return sample(model, adapters, prompts, **arguments)

    monkeypatch.setattr(batches, "sample", counting)
    trainees, losses = trained(workshop, CANDIDATES)
    assert calls == [1, 3, 3, 3]  # the base, then all policies at each new round
    for trainee, mine, (expected, weights) in zip(trainees, losses, alone, strict=True):
        assert mine == pytest.approx(expected, abs=1e-5)
        for name, tensor in lora.weights(workshop.model.policy, trainee.slot).items():
            torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-5)
    assert losses[0] != pytest.approx(losses[2], abs=1e-3)


def test_one_that_cannot_pair_its_samples_fails_alone(workshop, monkeypatch):
    _, expected = trained(workshop, CANDIDATES)
    take = RolloutSource.take

    def collapsed(self, number, sampled):
        if number and self.slot == NAMES[1]:
            raise TrainingError("a policy that repeats itself has collapsed")
        take(self, number, sampled)

    monkeypatch.setattr(RolloutSource, "take", collapsed)
    trainees, losses = trained(workshop, CANDIDATES)
    with pytest.raises(TrainingError, match="collapsed"):
        _ = trainees[1].result
    assert len(losses[1]) == STEPS // 4
    for number in (0, 2):
        assert trainees[number].result.steps == STEPS
        assert losses[number] == pytest.approx(expected[number], abs=1e-5)
