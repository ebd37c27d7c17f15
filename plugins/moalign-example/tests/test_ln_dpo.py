from __future__ import annotations

import torch
from moalign.api import Batch, PairTerms, log_ratios, pair_logits
from moalign.testing import check_objective
from torch.nn.functional import logsigmoid

from moalign_example.ln_dpo import LNDPO

SCALE, MARGIN = 1.5, 0.25


def batch(chosen: int, rejected: int, repeat: int = 1) -> Batch:
    """One pair of responses of so many tokens, every token ``repeat`` times."""
    generator = torch.Generator().manual_seed(0)
    width = max(chosen, rejected)
    lengths = torch.tensor([[chosen], [rejected]])
    mask = (torch.arange(width) < lengths).double().repeat_interleave(repeat, 1)
    logps, reference = (
        -torch.rand(2, width, generator=generator, dtype=torch.float64).repeat_interleave(repeat, 1) * mask
        for _ in range(2)
    )
    return Batch(
        logps=logps,
        ref_logps=reference,
        mask=mask,
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
    check_objective(LNDPO())


def test_of_equal_lengths_it_is_dpo_with_beta_over_the_length():
    pair = batch(5, 5)
    expected = -logsigmoid(pair_logits(pair, terms(), 3.0 / 5))
    torch.testing.assert_close(LNDPO(beta=3.0).loss(pair, terms()), expected, rtol=1e-12, atol=0)


def test_of_other_lengths_each_log_ratio_is_divided_by_its_own():
    pair = batch(3, 7)
    chosen, rejected = log_ratios(pair).tolist()
    z = torch.tensor([SCALE * 3.0 * (chosen / 3 - rejected / 7) - MARGIN], dtype=torch.float64)
    torch.testing.assert_close(LNDPO(beta=3.0).loss(pair, terms()), -logsigmoid(z), rtol=1e-12, atol=0)


def test_every_token_said_three_times_changes_nothing():
    once, thrice = (LNDPO().loss(batch(3, 7, repeat), terms()) for repeat in (1, 3))
    torch.testing.assert_close(once, thrice, rtol=1e-12, atol=0)
