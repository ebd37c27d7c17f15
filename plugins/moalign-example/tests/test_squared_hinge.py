from __future__ import annotations

import pytest
import torch
from moalign.api import Batch, PairTerms, pair_logits
from moalign.testing import check_objective

from moalign_example.squared_hinge import SquaredHinge

SCALE, MARGIN = 1.5, 0.25


def batch(logit: float) -> Batch:
    """One pair of responses of three tokens whose log-ratios differ by ``logit``."""
    reference = torch.tensor([[-1.0, -0.5, -2.0], [-0.3, -0.7, -1.1]], dtype=torch.float64)
    logps = reference + torch.tensor([[logit / 3], [0.0]], dtype=torch.float64)
    return Batch(
        logps=logps.requires_grad_(),
        ref_logps=reference,
        mask=torch.ones(2, 3, dtype=torch.float64),
        pairs=torch.tensor([[0, 1]]),
        pair_objective=torch.tensor([0]),
        preference=torch.ones(2, 1, dtype=torch.float64),
        strength=torch.ones(1),
        groups=torch.zeros(2, dtype=torch.long),
    )


def terms() -> PairTerms:
    one = torch.ones(1, dtype=torch.float64)
    return PairTerms(scale=SCALE * one, margin=MARGIN * one, weight=one)


def test_conformance():
    check_objective(SquaredHinge())


def test_below_1_it_is_the_square_of_what_is_missing():
    pair = batch(-2.0)
    missing = 1 - pair_logits(pair, terms(), 0.4)
    assert float(missing.detach()) == pytest.approx(1 + SCALE * 0.4 * 2 + MARGIN)
    torch.testing.assert_close(SquaredHinge(beta=0.4).loss(pair, terms()), missing**2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("logit", [3.0, 50.0])
def test_from_1_on_there_is_neither_loss_nor_gradient(logit):
    pair = batch(logit)
    loss = SquaredHinge(beta=1.0).loss(pair, terms())
    loss.sum().backward()
    assert loss.tolist() == [0.0] and not pair.logps.grad.any()
