"""The policy gradient that pays for chi-squared, as mathematics: by enumeration, at its optimum, and its limits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tabular import DIE, REWARDS, SPEECH, Situation, on_policy
from torch import Tensor

from moalign.api import PluginError
from moalign.testing import check_objective
from moalign_plugins.objectives.chi_squared import ChiSquared, without_largest
from moalign_plugins.objectives.rloo import RLOO

EXACT = {"rtol": 0, "atol": 1e-12}  # sums of a few hundred float64 of size 1


def chi2(of: Situation) -> Tensor:
    """chi2(policy || reference) of whole responses, by enumeration."""
    own, reference = (of.language.logps(each).sum(-1) for each in (of.policy, of.reference.detach()))
    return (2 * own - reference).exp().sum() - 1


@pytest.mark.parametrize("options", [{}, {"of": "square"}, {"beta": 0.3, "lam": 0.2, "entropy": 0.1}])
def test_it_conforms(options):
    check_objective(ChiSquared(**options))


@pytest.mark.parametrize("language", [DIE, SPEECH], ids=["one token", "trees"])
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_the_expected_gradient_is_that_of_the_reward_less_the_divergence(language, beta):
    one = on_policy(language)
    objective = ChiSquared(of="square", lam=0.3, beta=beta, longest=300)
    expected = one.gradient(-(one.reward() - 0.3 * chi2(one) - beta * one.divergence()))
    torch.testing.assert_close(one.expected_gradient(objective, 2), expected, **EXACT)


def test_the_root_has_the_gradient_of_its_value_where_the_round_is_the_whole_population():
    """Ten responses with the very frequencies of the policy: then the mean over the round is the expectation."""
    counts = torch.tensor([1, 2, 3, 4, 0])
    policy = (counts.double() / 10).clamp(min=1e-300).log().requires_grad_()
    one = replace(on_policy(DIE), policy=policy, sampler=policy)
    drawn = torch.repeat_interleave(torch.arange(5), counts)[None]
    found = one.gradient(one.losses(ChiSquared(lam=0.3), drawn).mean())
    expected = one.gradient(-(one.reward() - 0.3 * chi2(one).sqrt()))
    torch.testing.assert_close(found * 9 / 10, expected, **EXACT)  # leaving one out is G / (G - 1) of the mean's


def test_at_the_optimum_every_response_counts_the_same():
    """E[r] - lam chi2 is largest where L = 1 + (r - E_ref[r]) / (2 lam), as long as that is nowhere below 0."""
    rewards, lam = REWARDS[:5], 2.0
    reference = torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15], dtype=torch.float64)
    ratios = 1 + (rewards - reference @ rewards) / (2 * lam)
    assert float(ratios.min()) > 0
    counted = rewards - ChiSquared(of="square", lam=lam).price(ratios.log())
    torch.testing.assert_close(counted, counted[:1].expand(5), **EXACT)


def test_without_a_price_to_speak_of_it_is_rloo():
    one, drawn = on_policy(SPEECH), torch.tensor([[0, 1, 2, 3], [3, 3, 1, 5]])
    found = one.losses(ChiSquared(lam=1e-300, beta=0.1), drawn)
    assert torch.equal(found, one.losses(RLOO(beta=0.1), drawn))


@pytest.mark.parametrize("ratios", [[0.0, 0.0, 0.0], [-1.0, -0.5, 0.0]])
def test_where_the_round_sees_no_divergence_the_root_has_no_slope(ratios):
    assert ChiSquared().price(torch.tensor(ratios, dtype=torch.float64)).tolist() == [0.0] * 3


def test_a_response_far_away_pays_a_finite_price():
    far = torch.tensor([1000.0, 0.0], dtype=torch.float64)
    assert ChiSquared(of="square", lam=0.5, longest=10.0).price(far)[0].item() == pytest.approx(22026.465794806718)


def test_the_root_is_that_of_a_mean_without_the_largest_hundredth():
    values = torch.arange(250.0).flip(0)
    assert without_largest(values).tolist() == list(range(248))
    assert len(without_largest(values[:99])) == 99


def test_it_says_what_it_lacks():
    with pytest.raises(PluginError, match="reference"):
        ChiSquared().advantages(REWARDS, torch.zeros(6), None)
