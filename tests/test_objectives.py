"""Losses as mathematics: values at known points, limits, gradients, and what they do with a combiner's terms."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import logsigmoid

from moalign.api import Batch, PairTerms, PluginError, pair_log_ratios
from moalign_plugins.combiners.linear import Linear
from moalign_plugins.objectives.dpo import DPO
from moalign_plugins.objectives.ipo import IPO
from moalign_plugins.objectives.rebel import REBEL
from moalign_plugins.objectives.rpo import RPO
from moalign_plugins.objectives.sft import SFT

LENGTHS = torch.tensor([3, 5, 1, 4, 2, 5])
EVERY_LOSS = [
    DPO(),
    DPO(beta=0.7, label_smoothing=0.1),
    IPO(),
    IPO(beta=0.4, average=True),
    SFT(),
    SFT(average=False),
    RPO(),
    RPO(beta=0.5, eta=0.2, average=True),
    REBEL(beta=0.3),
]
PAIRWISE = [loss for loss in EVERY_LOSS if not isinstance(loss, SFT)]


def make_batch(dtype=torch.float64, seed=0, at_reference=False):
    """Six responses of different lengths in three pairs, with two objectives' margins."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(5) < LENGTHS[:, None]).to(dtype)
    logps = -torch.rand(6, 5, generator=generator, dtype=dtype) * mask
    reference = logps.clone() if at_reference else -torch.rand(6, 5, generator=generator, dtype=dtype) * mask
    return Batch(
        logps=logps.requires_grad_(),
        mask=mask,
        pairs=torch.tensor([[0, 1], [3, 2], [4, 5]]),
        pair_objective=torch.tensor([-1, -1, -1]),
        preference=torch.tensor([[0.3, 0.7]], dtype=dtype).expand(6, 2),
        strength=torch.ones(3, dtype=dtype),
        groups=torch.tensor([0, 0, 1, 1, 2, 2]),
        ref_logps=reference,
        margins=torch.randn(3, 2, generator=generator, dtype=dtype),
    )


def terms_of(batch, scale=1.0, margin=0.0):
    base = Linear().pair_terms(batch)
    return dataclasses.replace(base, scale=base.scale * scale, margin=base.margin + margin)


def sums(batch):
    return (batch.logps * batch.mask).sum(-1)


@pytest.mark.parametrize("loss", EVERY_LOSS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_value_per_pair_attached_and_in_the_dtype_of_the_batch(loss, dtype):
    batch = make_batch(dtype)
    value = loss.loss(batch, terms_of(batch))
    assert value.shape == (3,) and value.dtype == dtype
    (gradient,) = torch.autograd.grad(value.sum(), batch.logps)
    assert gradient.isfinite().all() and (gradient[batch.mask == 0] == 0).all()
    chosen = gradient[batch.pairs[:, 0]]
    assert (chosen.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("loss", EVERY_LOSS, ids=repr)
def test_gradcheck(loss):
    batch = make_batch()
    terms = terms_of(batch) if isinstance(loss, SFT) else terms_of(batch, scale=1.7, margin=0.4)
    assert torch.autograd.gradcheck(
        lambda logps: loss.loss(dataclasses.replace(batch, logps=logps), terms), (batch.logps,)
    )


@pytest.mark.parametrize("loss", EVERY_LOSS, ids=repr)
def test_the_weight_is_left_to_the_engine(loss):
    batch = make_batch()
    terms = terms_of(batch)
    heavy = dataclasses.replace(terms, weight=terms.weight * 100)
    assert torch.equal(loss.loss(batch, terms), loss.loss(batch, heavy))


@pytest.mark.parametrize("loss", EVERY_LOSS, ids=repr)
def test_a_pair_does_not_see_the_other_pairs(loss):
    batch = make_batch()
    alone = dataclasses.replace(
        batch, pairs=batch.pairs[1:2], pair_objective=batch.pair_objective[1:2], margins=batch.margins[1:2]
    )
    value = loss.loss(batch, terms_of(batch))[1:2]
    torch.testing.assert_close(value, loss.loss(alone, terms_of(alone)), rtol=1e-14, atol=0)


def test_dpo_at_the_reference_is_the_logarithm_of_two():
    for smoothing in (0.0, 0.3):
        batch = make_batch(at_reference=True)
        value = DPO(label_smoothing=smoothing).loss(batch, terms_of(batch))
        torch.testing.assert_close(value, torch.full((3,), math.log(2), dtype=torch.float64), rtol=1e-15, atol=0)


def test_the_limits_of_dpo():
    """Far on the right side the loss vanishes, far on the wrong side it is linear with slope beta; no overflow."""
    batch = make_batch(torch.float32)
    won = DPO(beta=0.1).loss(batch, terms_of(batch, margin=-200.0))
    lost = DPO(beta=0.1).loss(batch, terms_of(batch, margin=200.0))
    assert (won == 0).all()
    torch.testing.assert_close(lost, 200 - 0.1 * pair_log_ratios(batch))
    smoothed = DPO(beta=0.1, label_smoothing=0.25).loss(batch, terms_of(batch, margin=-200.0))
    torch.testing.assert_close(smoothed, 0.25 * (200 + 0.1 * pair_log_ratios(batch)))


def test_the_gradient_of_dpo_is_minus_beta_times_the_probability_of_being_wrong():
    batch = make_batch()
    (gradient,) = torch.autograd.grad(DPO(beta=0.2).loss(batch, terms_of(batch)).sum(), batch.logps)
    wrong = 0.2 * torch.sigmoid(-0.2 * pair_log_ratios(batch))
    for pair, (chosen, rejected) in enumerate(batch.pairs.tolist()):
        torch.testing.assert_close(gradient[chosen], -wrong[pair] * batch.mask[chosen], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(gradient[rejected], wrong[pair] * batch.mask[rejected], rtol=1e-12, atol=1e-15)


def test_smoothing_is_the_mixture_of_both_labels():
    batch = make_batch()
    swapped = dataclasses.replace(batch, pairs=batch.pairs.flip(1))
    mixture = 0.8 * DPO().loss(batch, terms_of(batch)) + 0.2 * DPO().loss(swapped, terms_of(swapped))
    torch.testing.assert_close(DPO(label_smoothing=0.2).loss(batch, terms_of(batch)), mixture, rtol=1e-14, atol=0)


@pytest.mark.parametrize("average", [False, True])
def test_rpo_without_its_pull_is_dpo(average):
    batch = make_batch()
    terms = terms_of(batch, scale=2.0, margin=0.3)
    without = RPO(beta=0.3, eta=0.0, average=average).loss(batch, terms)
    torch.testing.assert_close(without, DPO(beta=0.3).loss(batch, terms), rtol=1e-15, atol=0)


def test_the_gradient_of_rpo():
    """d loss / d log pi(chosen) = -beta sigmoid(-beta d) - eta beta; the paper's form, by hand."""
    batch = make_batch()
    (gradient,) = torch.autograd.grad(RPO(beta=0.3, eta=0.05).loss(batch, terms_of(batch)).sum(), batch.logps)
    slope = 0.3 * torch.sigmoid(-0.3 * pair_log_ratios(batch))
    for pair, (chosen, rejected) in enumerate(batch.pairs.tolist()):
        expected = -(slope[pair] + 0.05 * 0.3) * batch.mask[chosen]
        torch.testing.assert_close(gradient[chosen], expected, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(gradient[rejected], slope[pair] * batch.mask[rejected], rtol=1e-12, atol=1e-15)


def test_the_two_forms_of_rpo():
    batch = make_batch()
    terms = terms_of(batch)
    dpo, chosen = DPO(beta=0.3).loss(batch, terms), batch.pairs[:, 0]
    torch.testing.assert_close(RPO(beta=0.3, eta=0.2).loss(batch, terms), dpo - 0.2 * 0.3 * sums(batch)[chosen])
    mean = sums(batch)[chosen] / LENGTHS[chosen]
    torch.testing.assert_close(RPO(beta=0.3, eta=0.2, average=True).loss(batch, terms), dpo - 0.2 * mean)


def test_ipo_by_hand():
    batch = make_batch()
    difference = pair_log_ratios(batch)
    torch.testing.assert_close(IPO(beta=0.25).loss(batch, terms_of(batch)), (difference - 2.0) ** 2)
    at_reference = make_batch(at_reference=True)
    start = IPO(beta=0.25).loss(at_reference, terms_of(at_reference))
    torch.testing.assert_close(start, torch.full((3,), 4.0, dtype=torch.float64), rtol=1e-15, atol=0)


def test_ipo_is_the_squared_distance_of_the_pairwise_logit_from_one_half():
    batch = make_batch()
    logits = 1.5 * 0.25 * pair_log_ratios(batch) - 0.4
    value = IPO(beta=0.25).loss(batch, terms_of(batch, scale=1.5, margin=0.4))
    torch.testing.assert_close(value, ((logits - 0.5) / 0.25) ** 2)


def test_averaging_ipo_ignores_repetition():
    """Every token written twice: averages are the same, sums are not."""
    batch = make_batch()
    doubled = dataclasses.replace(
        batch, **{name: torch.cat([getattr(batch, name)] * 2, 1) for name in ("logps", "ref_logps", "mask")}
    )
    once, twice = (IPO(average=True).loss(b, terms_of(b)) for b in (batch, doubled))
    torch.testing.assert_close(once, twice, rtol=1e-13, atol=0)
    assert not torch.allclose(IPO().loss(batch, terms_of(batch)), IPO().loss(doubled, terms_of(doubled)))


def test_sft_is_the_negative_log_likelihood_of_the_chosen_response():
    batch = make_batch()
    chosen = batch.pairs[:, 0]
    terms = terms_of(batch)
    torch.testing.assert_close(SFT(average=False).loss(batch, terms), -sums(batch)[chosen])
    torch.testing.assert_close(SFT().loss(batch, terms), -sums(batch)[chosen] / LENGTHS[chosen])
    assert torch.equal(SFT().loss(dataclasses.replace(batch, ref_logps=None), terms), SFT().loss(batch, terms))


@pytest.mark.parametrize("change", [{"scale": 2.0}, {"margin": 0.1}])
def test_sft_refuses_terms_that_it_could_only_ignore(change):
    batch = make_batch()
    with pytest.raises(PluginError, match=r"'sft' cannot use a combiner's scale and margin; combine with 'linear'"):
        SFT().loss(batch, terms_of(batch, **change))


def test_rebel_is_zero_exactly_where_log_ratios_explain_the_rewards():
    batch = make_batch()
    terms = terms_of(batch)
    exact = dataclasses.replace(terms, difference=0.3 * pair_log_ratios(batch).detach())
    assert REBEL(beta=0.3).loss(batch, exact).abs().max() < 1e-30
    off_by_one = dataclasses.replace(exact, difference=exact.difference + 1)
    torch.testing.assert_close(REBEL(beta=0.3).loss(batch, off_by_one), torch.ones(3, dtype=torch.float64))


def test_rebel_does_not_care_which_response_comes_first():
    batch = make_batch()
    swapped = dataclasses.replace(batch, pairs=batch.pairs.flip(1), margins=-batch.margins)
    value, mirrored = (REBEL().loss(b, terms_of(b)) for b in (batch, swapped))
    torch.testing.assert_close(value, mirrored, rtol=1e-14, atol=0)


def test_the_gradient_of_rebel_at_the_reference_is_the_pairwise_policy_gradient():
    batch = make_batch(at_reference=True)
    (gradient,) = torch.autograd.grad(REBEL(beta=0.2).loss(batch, terms_of(batch)).sum(), batch.logps)
    difference = batch.margins @ torch.tensor([0.3, 0.7], dtype=torch.float64)
    for pair, (first, second) in enumerate(batch.pairs.tolist()):
        push = 2 * 0.2 * difference[pair]
        torch.testing.assert_close(gradient[first], -push * batch.mask[first], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(gradient[second], push * batch.mask[second], rtol=1e-12, atol=1e-15)


def test_rebel_refuses_unknown_differences():
    batch = make_batch()
    terms = terms_of(batch)
    with pytest.raises(PluginError, match="'rebel' regresses on reward differences, and the combiner supplies none"):
        REBEL().loss(batch, dataclasses.replace(terms, difference=None))
    unknown = terms.difference.clone()
    unknown[1] = torch.nan
    with pytest.raises(PluginError, match="reward difference of pair 1 of the batch is unknown"):
        REBEL().loss(batch, dataclasses.replace(terms, difference=unknown))


@pytest.mark.parametrize("loss", [loss for loss in PAIRWISE if not getattr(loss, "average", False)], ids=repr)
def test_pairwise_losses_see_policy_and_terms_only_through_the_pairwise_logit(loss):
    """Doubling scale and margin is doubling beta's product: with scale 2 and half the log-ratios nothing changes."""
    batch = make_batch()
    if isinstance(loss, RPO):
        loss = RPO(beta=loss.beta, eta=0)
    halved = dataclasses.replace(
        batch, logps=batch.logps / 2, ref_logps=batch.ref_logps / 2, mask=batch.mask, margins=batch.margins
    )
    plain, scaled = loss.loss(batch, terms_of(batch, margin=0.2)), loss.loss(halved, terms_of(batch, 2.0, 0.2))
    torch.testing.assert_close(plain, scaled, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("loss", PAIRWISE, ids=repr)
def test_pairwise_losses_name_what_they_need(loss):
    assert "reference" in loss.wants
    assert ("margins" in loss.wants) == isinstance(loss, REBEL) and ("pairs" in loss.wants) != ("margins" in loss.wants)
    batch = make_batch()
    with pytest.raises(PluginError, match="does not declare"):
        loss.loss(dataclasses.replace(batch, ref_logps=None), terms_of(batch))


@pytest.mark.parametrize("kind", [DPO, IPO, RPO, REBEL])
@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan, math.inf])
def test_bad_betas_are_refused(kind, beta):
    with pytest.raises(ValidationError, match="beta"):
        kind(beta=beta)


def test_a_loss_cannot_be_changed_after_construction_nor_take_unknown_keys():
    with pytest.raises(ValidationError):
        DPO().beta = 0.2
    with pytest.raises(ValidationError, match="betta"):
        DPO(betta=0.2)
    with pytest.raises(ValidationError, match="label_smoothing"):
        DPO(label_smoothing=0.5)


def test_terms_of_the_test_are_those_of_a_plain_loss():
    batch = make_batch()
    terms = terms_of(batch)
    assert isinstance(terms, PairTerms)
    torch.testing.assert_close(DPO().loss(batch, terms), -logsigmoid(0.1 * pair_log_ratios(batch)))
