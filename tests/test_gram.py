"""Inner products of the objectives' gradients from one backward pass, against a backward pass for each objective."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moalign import lora
from moalign.batch import PairTerms
from moalign.config import LoraSettings, ModelSettings
from moalign.data.dataset import PairDataset
from moalign.data.tokenise import Sequence
from moalign.engine import gram
from moalign.engine.gram import gradient_products
from moalign.engine.model import TRAINED, LanguageModel, load
from moalign.engine.tokens import batch_of
from moalign.lora import Mixture
from moalign.types import Sample
from moalign_plugins.objectives.rloo import RLOO

OBJECTIVES = ("harmless", "helpful", "short")
RESPONSES = 7


@pytest.fixture(scope="module", params=["all", "upper-half"])
def adapted(request, tiny_model_path) -> tuple[LanguageModel, torch.Tensor]:
    settings = ModelSettings(path=str(tiny_model_path), lora=LoraSettings(r=3, layers=request.param))
    model = load(str(tiny_model_path), settings, torch.device("cpu"))
    made = lora.stack(model.policy, [TRAINED])
    generator = torch.Generator().manual_seed(1)
    for parameter in lora.parameters(model.policy, TRAINED):
        parameter.data.normal_(std=0.2, generator=generator)
    return model, made.gradients


def sampled(vocabulary: int) -> PairDataset:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 6, size=(RESPONSES, 2))
    sequences = tuple(
        Sequence(tuple(rng.integers(5, vocabulary, size=sum(each)).tolist()), int(each[0])) for each in lengths
    )
    return PairDataset(
        objectives=OBJECTIVES,
        sequences=sequences,
        samples=tuple(Sample("", "") for _ in sequences),
        pairs=np.array([(row, row) for row in range(RESPONSES) if row != 2]),  # one of them has no reward
        pair_objective=np.full(RESPONSES - 1, -1),
        strength=np.ones(RESPONSES - 1),
        rewards=rng.normal(size=(RESPONSES, 3)),
        groups=np.arange(RESPONSES) // 2,
        counts={},
    )


def one_by_one(
    adapted: tuple[LanguageModel, torch.Tensor], dataset: PairDataset, advantages: np.ndarray, objective: RLOO
) -> torch.Tensor:
    """A gradient for each objective, from a forward and a backward pass of its own."""
    (model, gradients), rows, found = adapted, dataset.pairs[:, 0], []
    for own in advantages:
        layout = model.lay_out([dataset.sequences[row] for row in rows], [[place] for place in range(len(rows))])
        with lora.mixed(model.policy, Mixture((TRAINED,), (len(rows),))):
            batch = batch_of(dataset, rows, layout, model.response_logps(layout))
            batch = replace(batch, advantages=torch.from_numpy(own).float())
            objective.loss(batch, PairTerms.of_rows(batch.logps)).mean().backward()
        found.append(gradients[0].double())
        gradients.zero_()
    stacked = torch.stack(found)
    return stacked @ stacked.t()


@pytest.mark.parametrize("length", ["none", "response", 3.0])
@pytest.mark.parametrize("positions", [gram.POSITIONS, 20])
def test_one_pass_gives_what_a_pass_for_each_gives(adapted, monkeypatch, length, positions):
    monkeypatch.setattr(gram, "POSITIONS", positions)  # in one pass, or in several
    model, gradients = adapted
    dataset = sampled(model.head.weight.shape[0])
    advantages = np.random.default_rng(1).normal(size=(3, RESPONSES - 1))
    objective = RLOO(length=length)
    found = gradient_products(model, TRAINED, objective, dataset, advantages)
    expected = one_by_one(adapted, dataset, advantages, objective)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.diagonal().max()))
    assert not gradients.any(), "training goes on with gradients of its own"


def test_objectives_that_agree_have_the_same_gradient(adapted):
    model, _ = adapted
    dataset = sampled(model.head.weight.shape[0])
    own = np.random.default_rng(2).normal(size=RESPONSES - 1)
    found = gradient_products(model, TRAINED, RLOO(), dataset, np.stack([own, own, -2 * own]))
    assert float(found[0, 0]) > 0
    expected = found[0, 0] * torch.tensor([[1.0, 1, -2], [1, 1, -2], [-2, -2, 4]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


class Scaled(RLOO):
    """Reads what all rows have in common: a parameter of its own, and the candidate's preference."""

    def loss(self, batch, terms):
        return super().loss(batch, terms) * batch.parameters["z"] * batch.preference[:, 1]


def test_a_loss_finds_its_parameters_and_the_preference(adapted):
    model, _ = adapted
    dataset = sampled(model.head.weight.shape[0])
    advantages = np.random.default_rng(3).normal(size=(3, RESPONSES - 1))
    plain = gradient_products(model, TRAINED, RLOO(), dataset, advantages)
    z = torch.tensor(3.0, requires_grad=True)
    found = gradient_products(model, TRAINED, Scaled(), dataset, advantages, "c", (0.5, 0.25, 0.25), {"z": z})
    norms = plain.diagonal().sqrt()
    scales = torch.outer(norms, norms)  # gradients are rounded relative to their lengths, not to their products
    torch.testing.assert_close(found / scales, plain * (3 * 0.25) ** 2 / scales, rtol=0, atol=1e-5)
    assert z.grad is None
