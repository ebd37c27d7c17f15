"""Cosines of the objectives' gradients on labelled pairs, against gradients taken by hand; the metrics of a step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moalign import lora
from moalign.batch import Batch
from moalign.config import LoraSettings, ModelSettings
from moalign.data.dataset import PairDataset
from moalign.data.tokenise import Sequence
from moalign.diagnostics import conflict
from moalign.diagnostics.pair_gradients import pair_gradient_products
from moalign.engine.metrics import StepMetrics
from moalign.engine.model import LanguageModel, load
from moalign.lora import Stack
from moalign.types import Sample
from moalign_plugins.objectives.dpo import DPO
from moalign_plugins.objectives.rebel import REBEL

OBJECTIVES = ("harmless", "helpful", "short")
SLOTS = ("one", "two")
SPREAD = 0.1  # with larger adapters the last bits of the weights decide the fifth digit of a gradient


@pytest.fixture(scope="module")
def adapted(tiny_model_path) -> tuple[LanguageModel, Stack]:
    """Two adapters side by side, so that one of them is only a part of the block."""
    settings = ModelSettings(path=str(tiny_model_path), lora=LoraSettings(r=3))
    model = load(str(tiny_model_path), settings, torch.device("cpu"))
    made = lora.stack(model.policy, SLOTS)
    made.block.normal_(std=SPREAD, generator=torch.Generator().manual_seed(1))
    return model, made


def judged(vocabulary: int) -> PairDataset:
    """Four prompts of two responses; the first two objectives judge all of them, against each other, the third none."""
    rng = np.random.default_rng(0)
    sequences = []
    for _ in range(4):
        prompt = tuple(rng.integers(5, vocabulary, size=3).tolist())
        for size in rng.integers(2, 6, size=2):
            sequences.append(Sequence(prompt + tuple(rng.integers(5, vocabulary, size=size).tolist()), 3))
    pairs = [(2 * number + side, 2 * number + 1 - side) for number in range(4) for side in (0, 1)]
    rewards = rng.normal(size=(8, 3))
    rewards[3, 2] = np.nan
    return PairDataset(
        objectives=OBJECTIVES,
        sequences=tuple(sequences),
        samples=tuple(Sample("", "") for _ in sequences),
        pairs=np.array(pairs),
        pair_objective=np.array([0, 1] * 4),
        strength=np.ones(8),
        rewards=rewards,
        groups=np.arange(8) // 2,
        counts={},
    )


def by_hand(model, dataset, slot, objective, beta, regress):
    """The gradient of the mean loss, each response in a pass of its own, from the model's logits."""
    factors = [each for layer in lora.layers(model.policy) for each in (layer.lora_A[slot], layer.lora_B[slot])]
    weights = [each.weight.detach().clone().requires_grad_(True) for each in factors]

    def log_ratio(row: int) -> torch.Tensor:
        sequence = dataset.sequences[row]
        ids = torch.tensor([sequence.ids])
        own, reference = (logp(model, ids, sequence.prompt_length, each, slot, weights) for each in (True, False))
        return own - reference

    total, number = 0.0, 0
    for (first, second), judge in zip(dataset.pairs, dataset.pair_objective, strict=True):
        margin = float(dataset.rewards[first, objective] - dataset.rewards[second, objective])
        if (judge != objective and not regress) or (regress and np.isnan(margin)):
            continue
        z = beta * (log_ratio(first) - log_ratio(second))
        total = total + ((np.float32(margin) - z) ** 2 if regress else -torch.nn.functional.logsigmoid(z))
        number += 1
    return torch.cat([each.flatten() for each in torch.autograd.grad(total / number, weights)]).double()


def logp(model, ids, prompt, adapted, slot, weights):
    """The log-probability of the response, with the adapter's update added by a hook of each layer's own."""
    hooks = []
    with lora.active(model.policy, None):
        for place, layer in enumerate(lora.layers(model.policy) if adapted else ()):
            a, b, scaling = weights[2 * place], weights[2 * place + 1], layer.scaling[slot]
            hooks.append(
                layer.register_forward_hook(
                    lambda module, given, result, a=a, b=b, scaling=scaling: result + given[0] @ a.T @ b.T * scaling
                )
            )
        with torch.set_grad_enabled(adapted):
            logits = model.base(input_ids=ids).logits[0, prompt - 1 : -1]
        for hook in hooks:
            hook.remove()
    return logits.log_softmax(-1).gather(1, ids[0, prompt:, None]).sum()


@pytest.mark.parametrize(
    ("objective", "slot"), [(DPO(beta=0.3), "one"), (REBEL(beta=0.3), "two")], ids=["pairs", "margins"]
)
def test_one_pass_an_objective_gives_the_gradients_taken_by_hand(adapted, objective, slot):
    model, made = adapted
    dataset = judged(model.head.weight.shape[0])
    regress = "margins" in objective.wants
    found = pair_gradient_products(model, made, slot, objective, dataset)
    known = range(3) if regress else range(2)
    table = torch.stack([by_hand(model, dataset, slot, index, 0.3, regress) for index in known])
    expected = table @ table.t()
    torch.testing.assert_close(
        found[: len(known), : len(known)], expected, rtol=1e-5, atol=1e-5 * float(expected.diagonal().max())
    )
    assert regress or (found[2].isnan().all() and found[:, 2].isnan().all()), "it judges no pair"
    assert not made.gradients.any()


def test_pairs_turned_round_are_in_full_conflict_where_nothing_is_learned_yet(adapted):
    """At the base d is 0, where the loss on a pair and on the pair turned round have opposite slopes."""
    model, made = adapted
    lora.initialise(model.policy, "two", 3)
    try:
        found = conflict.cosines(
            pair_gradient_products(model, made, "two", DPO(), judged(model.head.weight.shape[0])).numpy()
        )
    finally:
        made.block.normal_(std=SPREAD, generator=torch.Generator().manual_seed(1))
    assert found[0, 1] == pytest.approx(-1, abs=1e-5) and np.isnan(found[2]).all()
    assert conflict.worst(found) == (0, 1, pytest.approx(-1, abs=1e-5))


def test_cosines_are_those_of_vectors():
    rng = np.random.default_rng(4)
    vectors = rng.normal(size=(3, 50)) * np.array([[1e-8], [1.0], [1e8]])
    found = conflict.cosines(vectors @ vectors.T)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(found, units @ units.T, atol=1e-12)
    vectors[1] = 0
    assert np.isnan(conflict.cosines(vectors @ vectors.T)[1]).all()
    assert conflict.worst(np.full((2, 2), np.nan)) is None


# --- metrics of a step ----------------------------------------------------------------------------------------------


def batch(**changes) -> Batch:
    """Three pairs: the first objective judges two, the second one; rows of 3, 1, 2, 2, 1 and 3 tokens."""
    lengths = torch.tensor([3, 1, 2, 2, 1, 3])
    mask = (torch.arange(3) < lengths[:, None]).float()
    content = {
        "logps": -mask,  # of a row, minus its length
        "mask": mask,
        "pairs": torch.tensor([[0, 1], [2, 3], [4, 5]]),
        "pair_objective": torch.tensor([0, 0, 1]),
        "preference": torch.full((6, 2), 0.5),
        "strength": torch.ones(3),
        "groups": torch.arange(6) // 2,
        "ref_logps": -2 * mask,
    }
    return Batch(**content | changes)


def summed(given: Batch) -> dict:
    metrics = StepMetrics(("one", "two"))
    metrics.add(given, torch.zeros(3), torch.ones(3), 0.1)
    return metrics.summary()


def test_ranking_stands_beside_preference_with_the_lengths_of_both():
    """The policy has the shorter one likelier, the implicit reward, the length itself, prefers the longer one."""
    found = summed(batch())
    assert (found["one/ranking_accuracy"], found["one/accuracy"]) == (0.25, 0.75)  # 3 against 1, and a tie
    assert (found["two/ranking_accuracy"], found["two/accuracy"]) == (1.0, 0.0)
    assert (found["one/better_tokens"], found["one/worse_tokens"]) == (2.5, 1.5)
    assert (found["two/better_tokens"], found["two/worse_tokens"]) == (1.0, 3.0)


def test_scored_pairs_are_turned_so_that_the_better_one_is_first():
    margins = torch.tensor([[-1.0, 2.0], [0.0, float("nan")], [1.0, 1.0]])
    found = summed(batch(pair_objective=torch.full((3,), -1), margins=margins))
    assert (found["one/better_tokens"], found["one/worse_tokens"]) == (1.0, 3.0)
    assert found["one/ranking_accuracy"] == 1.0 and found["one/accuracy"] == 0.0
    assert (found["two/better_tokens"], found["two/worse_tokens"]) == (2.0, 2.0)


def test_what_nobody_reads_has_no_column():
    assert "one/ranking_accuracy" in summed(batch(ref_logps=None))
    assert "one/accuracy" not in summed(batch(ref_logps=None))
    unread = summed(batch(logps=torch.full((6, 3), torch.nan), ref_logps=None))
    assert "one/ranking_accuracy" not in unread and unread["one/better_tokens"] == 2.5
