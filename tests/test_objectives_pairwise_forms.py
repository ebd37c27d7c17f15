"""Pairwise losses by hand: identities between them, limits, values and slopes at known points."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from test_objectives import LENGTHS, make_batch, sums, terms_of
from torch.nn.functional import logsigmoid, softplus

from moalign.api import log_ratios, pair_log_ratios
from moalign_plugins.objectives._pairs import discounted
from moalign_plugins.objectives.adpo_pairwise import ADPOPairwise
from moalign_plugins.objectives.apo_down import APODown
from moalign_plugins.objectives.apo_zero import APOZero
from moalign_plugins.objectives.bco_pair import BCOPair
from moalign_plugins.objectives.cpl import CPL
from moalign_plugins.objectives.cpl_kl import CPLKL
from moalign_plugins.objectives.cpo import CPO
from moalign_plugins.objectives.discopop import DiscoPOP
from moalign_plugins.objectives.dno import DNO
from moalign_plugins.objectives.dpo import DPO
from moalign_plugins.objectives.exo import EXO
from moalign_plugins.objectives.ln_dpo import LengthNormalisedDPO
from moalign_plugins.objectives.nca import NCA
from moalign_plugins.objectives.orpo import ORPO, log_odds
from moalign_plugins.objectives.robust_dpo import RobustDPO
from moalign_plugins.objectives.rpo import RPO
from moalign_plugins.objectives.sft import SFT
from moalign_plugins.objectives.sharpening import Sharpening
from moalign_plugins.objectives.simpo import SimPO
from moalign_plugins.objectives.slic import SLiC
from moalign_plugins.objectives.sppo import SPPO
from moalign_plugins.objectives.vpo import VPO

CLOSE = {"rtol": 1e-13, "atol": 1e-14}
Z = torch.tensor([-4.0, -0.7, 0.0, 0.2, 3.0], dtype=torch.float64)


def changed(batch, **fields):
    return dataclasses.replace(batch, **fields)


def slopes(loss, batch, terms=None):
    """d loss / d log pi of each response, [6]: that of its first token."""
    value = loss.loss(batch, terms or terms_of(batch)).sum()
    return torch.autograd.grad(value, batch.logps)[0][:, 0]


def assert_same(first, second, batch, terms=None, **tolerance):
    """Equal losses and equal gradients."""
    terms = terms or terms_of(batch)
    values = [loss.loss(batch, terms) for loss in (first, second)]
    torch.testing.assert_close(*values, **(CLOSE | tolerance))
    gradients = [torch.autograd.grad(value.sum(), batch.logps)[0] for value in values]
    torch.testing.assert_close(*gradients, **(CLOSE | tolerance))


def at_logits(loss, beta, z):
    """The losses of pairs whose logits are ``z``: the first response of each has all of the log-ratio."""
    count = len(z)
    ratios = torch.stack([z / beta, torch.zeros_like(z)], 1).reshape(-1, 1)
    batch = changed(
        make_batch(),
        logps=ratios.requires_grad_(),
        ref_logps=torch.zeros_like(ratios),
        mask=torch.ones_like(ratios),
        pairs=torch.arange(2 * count).view(-1, 2),
        pair_objective=torch.full((count,), -1),
        preference=torch.tensor([[0.3, 0.7]], dtype=torch.float64).expand(2 * count, 2),
        strength=torch.ones(count, dtype=torch.float64),
        groups=torch.arange(count).repeat_interleave(2),
        margins=torch.zeros(count, 2, dtype=torch.float64),
    )
    return loss.loss(batch, terms_of(batch)), batch


# --- dpo and its nearest ---------------------------------------------------------------------------------------------


def test_the_weight_of_the_reference():
    batch, terms = make_batch(), terms_of(make_batch(), scale=1.5, margin=0.2)
    for weight in (0, 0.5, 2):
        weighed = changed(batch, ref_logps=batch.ref_logps * weight)
        torch.testing.assert_close(
            DPO(reference_weight=weight).loss(batch, terms), DPO().loss(weighed, terms), rtol=1e-13, atol=0
        )


def test_without_a_weight_no_reference_is_asked_for():
    assert DPO().wants == SLiC().wants == {"pairs", "reference"}
    assert DPO(reference_weight=0).wants == SLiC(reference_weight=0).wants == {"pairs"}
    batch = make_batch()
    bare = changed(batch, ref_logps=None)
    assert torch.equal(DPO(reference_weight=0).loss(bare, terms_of(bare)), CPO(alpha=0).loss(batch, terms_of(batch)))


def test_the_hinge():
    values, _ = at_logits(SLiC(beta=0.5), 0.5, Z)
    torch.testing.assert_close(values, torch.tensor([5.0, 1.7, 1.0, 0.8, 0.0], dtype=torch.float64), **CLOSE)


def test_ln_dpo_is_dpo_with_beta_over_the_length_where_lengths_are_equal():
    batch = make_batch()
    width = batch.logps.shape[1]
    full = changed(batch, mask=torch.ones_like(batch.mask))
    assert_same(LengthNormalisedDPO(beta=2.0), DPO(beta=2.0 / width), full, terms_of(full, 1.5, 0.3))
    assert not torch.allclose(
        LengthNormalisedDPO(beta=2.0).loss(batch, terms_of(batch)), DPO(beta=2.0 / width).loss(batch, terms_of(batch))
    )


@pytest.mark.parametrize("loss", [LengthNormalisedDPO(), SimPO(), ORPO(), Sharpening(average=True)], ids=repr)
def test_averages_do_not_see_repetition(loss):
    """Every token written twice. Sharpening has the sum of log-ratios beside: its policy is at the reference."""
    batch = make_batch(at_reference=isinstance(loss, Sharpening))
    doubled = changed(
        batch, **{name: torch.cat([getattr(batch, name)] * 2, 1) for name in ("logps", "ref_logps", "mask")}
    )
    torch.testing.assert_close(loss.loss(batch, terms_of(batch)), loss.loss(doubled, terms_of(doubled)), **CLOSE)


def test_simpo_is_ln_dpo_with_a_uniform_reference_and_gamma_a_margin():
    batch, terms = make_batch(), terms_of(make_batch(), scale=1.5, margin=0.2)
    uniform = changed(batch, ref_logps=torch.zeros_like(batch.ref_logps))
    assert_same(SimPO(beta=2.0, gamma=0.0), LengthNormalisedDPO(beta=2.0), uniform, terms)
    further = changed(terms, margin=terms.margin + 0.6)
    torch.testing.assert_close(SimPO(gamma=0.6).loss(batch, terms), SimPO(gamma=0).loss(batch, further), **CLOSE)


def test_simpo_by_hand():
    batch = make_batch()
    means = sums(batch) / LENGTHS
    expected = -logsigmoid(2 * (means[batch.pairs[:, 0]] - means[batch.pairs[:, 1]]) - 1)
    torch.testing.assert_close(SimPO().loss(batch, terms_of(batch)), expected, **CLOSE)


def test_label_smoothing_means_the_same_everywhere():
    batch = make_batch()
    swapped = changed(batch, pairs=batch.pairs.flip(1))
    for kind, fixed in ((LengthNormalisedDPO, {}), (SimPO, {"gamma": 0}), (CPO, {"alpha": 0})):
        there, back = (kind(**fixed).loss(b, terms_of(b)) for b in (batch, swapped))
        smoothed = kind(label_smoothing=0.2, **fixed).loss(batch, terms_of(batch))
        torch.testing.assert_close(smoothed, 0.8 * there + 0.2 * back, **CLOSE)


# --- likelihoods beside ----------------------------------------------------------------------------------------------


def test_orpo_without_odds_is_supervised_fine_tuning():
    batch = make_batch()
    assert_same(ORPO(lam=0), SFT(), batch)


def test_orpo_by_hand():
    batch = make_batch()
    probability = (sums(batch) / LENGTHS).exp()
    odds = probability / (1 - probability)
    chosen, rejected = batch.pairs.T
    expected = -probability.log()[chosen] - 0.3 * (1 / (1 + odds[rejected] / odds[chosen])).log()
    torch.testing.assert_close(ORPO(lam=0.3).loss(batch, terms_of(batch)), expected, rtol=1e-11, atol=1e-12)


def test_log_odds_keep_their_digits_from_certainty_to_none():
    """float32 against float64: 8 rounding errors at most; a plain log(p / (1 - p)) loses half the digits at 1e-4."""
    logps = -torch.logspace(-5.5, 2, 400, dtype=torch.float32)
    exact = log_odds(logps.double())
    error = (log_odds(logps).double() - exact).abs() / exact.abs().clamp(min=1)
    assert error.max() < 8 * torch.finfo(torch.float32).eps
    plain = (logps.exp() / (1 - logps.exp())).log()
    assert ((plain.double() - exact).abs() / exact.abs().clamp(min=1)).max() > 1e-4
    around = torch.tensor([-math.log(2) - 1e-9, -math.log(2) + 1e-9], dtype=torch.float64)
    assert (log_odds(around).abs() < 1e-8).all()  # even odds, on both sides of the branch


def test_log_odds_of_certainty_are_those_of_the_bound():
    logps = torch.tensor([0.0, -1e-7, -1e-6], dtype=torch.float32, requires_grad=True)
    values = log_odds(logps)
    assert torch.equal(values[0], values[2]) and torch.equal(values[1], values[2])
    assert torch.autograd.grad(values[:2].sum(), logps)[0].tolist() == [0, 0, 0]


def test_cpo_is_its_two_parts():
    batch, terms = make_batch(), terms_of(make_batch(), scale=1.5, margin=0.2)
    preference = DPO(beta=0.3, reference_weight=0).loss(batch, terms)
    for average in (True, False):
        likelihood = SFT(average=average).loss(batch, terms_of(batch))
        both = CPO(beta=0.3, alpha=0.7, average=average).loss(batch, terms)
        torch.testing.assert_close(both, preference + 0.7 * likelihood, **CLOSE)


def test_vpo_offline_is_rpo_up_to_what_the_reference_says():
    batch, terms = make_batch(), terms_of(make_batch(), scale=1.5, margin=0.2)
    vpo, rpo = VPO(beta=0.3, alpha=0.2), RPO(beta=0.3, eta=0.2)
    torch.testing.assert_close(slopes(vpo, batch, terms), slopes(rpo, batch, terms), **CLOSE)
    reference = (batch.ref_logps * batch.mask).sum(-1)[batch.pairs[:, 0]]
    difference = vpo.loss(batch, terms) - rpo.loss(batch, terms)
    torch.testing.assert_close(difference, 0.2 * 0.3 * reference, rtol=1e-11, atol=1e-13)
    assert_same(VPO(alpha=0), DPO(), batch, terms)


# --- contrastive preference learning ---------------------------------------------------------------------------------


def test_cpl_without_conservatism_is_dpo():
    batch, terms = make_batch(), terms_of(make_batch(), scale=1.5, margin=0.2)
    assert_same(CPL(beta=0.3, lam=1), DPO(beta=0.3, reference_weight=0), batch, terms)
    assert_same(CPLKL(beta=0.3, lam=1), DPO(beta=0.3), batch, terms)
    uniform = changed(batch, ref_logps=torch.zeros_like(batch.ref_logps))
    assert_same(CPL(beta=0.3, discount=0.9), CPLKL(beta=0.3, lam=0.5, discount=0.9), uniform, terms)


def test_below_one_lam_prefers_to_make_both_responses_likelier():
    batch = make_batch()
    raised = changed(batch, logps=batch.logps + 0.5 * batch.mask / batch.mask.sum(-1, keepdim=True))
    for lam, better in ((0.5, True), (1.0, False)):
        before, after = (CPL(lam=lam).loss(b, terms_of(b)) for b in (batch, raised))
        assert (after < before - 1e-6).all() if better else torch.allclose(after, before, rtol=1e-12)
    up = slopes(CPL(lam=0.5), batch)
    torch.testing.assert_close(up[batch.pairs[:, 1]], -0.5 * up[batch.pairs[:, 0]], **CLOSE)


def test_the_discount_counts_from_the_responses_first_token_wherever_it_stands():
    values = torch.tensor([[2.0, 3.0, 5.0, 7.0], [2.0, 3.0, 5.0, 7.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]], dtype=torch.float64)
    batch = changed(make_batch(), mask=mask)
    found = discounted(batch, values, 0.5)
    assert found.tolist() == [2 + 1.5 + 1.25, 3 + 2.5 + 1.75]
    assert discounted(batch, values, 1.0).tolist() == [10, 15]


# --- soft labels -----------------------------------------------------------------------------------------------------


def test_certain_labels_make_dno_dpo():
    """The reward difference says which response is better, by so much that sigmoid is 1 in float64."""
    batch, terms = make_batch(), terms_of(make_batch())
    difference = torch.tensor([800.0, -800.0, 800.0], dtype=torch.float64)
    certain = changed(terms, difference=difference)
    ordered = changed(batch, pairs=torch.where(difference[:, None] > 0, batch.pairs, batch.pairs.flip(1)))
    for loss in (DNO(beta=0.3), ADPOPairwise(tau=1 / 0.3)):
        torch.testing.assert_close(loss.loss(batch, certain), DPO(beta=0.3).loss(ordered, terms), **CLOSE)


def test_a_soft_label_is_a_smoothed_one():
    batch, terms = make_batch(), terms_of(make_batch(), scale=1.5, margin=0.2)
    soft = changed(terms, difference=torch.full_like(terms.difference, 0.2 * math.log(0.9 / 0.1)))
    assert_same(ADPOPairwise(tau=0.5, beta_r=0.2), DPO(beta=2.0, label_smoothing=0.1), batch, soft)


def test_dno_and_adpo_are_one_loss():
    batch = make_batch()
    assert_same(DNO(beta=0.25), ADPOPairwise(tau=4.0, beta_r=1.0), batch, terms_of(batch, 1.5, 0.2))


@pytest.mark.parametrize("loss", [DNO(), ADPOPairwise(), Sharpening()], ids=repr)
def test_which_response_comes_first_does_not_matter(loss):
    batch = make_batch()
    swapped = changed(batch, pairs=batch.pairs.flip(1), margins=-batch.margins)
    torch.testing.assert_close(loss.loss(batch, terms_of(batch)), loss.loss(swapped, terms_of(swapped)), **CLOSE)


def test_adpo_is_the_divergence_between_two_softmaxes():
    batch = make_batch()
    u = (log_ratios(batch) / 0.5)[batch.pairs]
    rewards = torch.stack([terms_of(batch).difference, torch.zeros(3, dtype=torch.float64)], 1)
    q = (rewards / 0.3).softmax(1)
    expected = -(q * u.log_softmax(1)).sum(1)
    torch.testing.assert_close(ADPOPairwise().loss(batch, terms_of(batch)), expected, **CLOSE)
    entropy = -(q * q.log()).sum(1)
    torch.testing.assert_close(expected - entropy, (q * (q.log() - u.log_softmax(1))).sum(1), rtol=1e-12, atol=1e-14)


def test_the_slope_of_soft_labels_is_bounded_where_that_of_a_regression_is_not():
    batch = make_batch()
    wild = changed(terms_of(batch), difference=torch.tensor([1e6, -1e6, 1e3], dtype=torch.float64))
    assert slopes(DNO(beta=0.3), batch, wild).abs().max() <= 0.3


# --- labels that are wrong, and losses found otherwise ---------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_robust_dpo_is_unbiased_where_labels_are_turned_round(rate):
    batch = make_batch()
    swapped = changed(batch, pairs=batch.pairs.flip(1))
    there, back = (RobustDPO(label_smoothing=rate).loss(b, terms_of(b)) for b in (batch, swapped))
    torch.testing.assert_close((1 - rate) * there + rate * back, DPO().loss(batch, terms_of(batch)), rtol=1e-12, atol=0)
    assert_same(RobustDPO(label_smoothing=0), DPO(), batch)


def test_exo_is_a_divergence_and_zero_at_its_label():
    smoothing = 0.1
    best = math.log((1 - smoothing) / smoothing)
    values, batch = at_logits(
        EXO(beta=0.5, label_smoothing=smoothing), 0.5, torch.cat([Z, torch.tensor([best]).double()])
    )
    z = 0.5 * pair_log_ratios(batch)
    p, q = torch.stack([z, -z], 1).sigmoid(), torch.tensor([1 - smoothing, smoothing], dtype=torch.float64)
    torch.testing.assert_close(values, (p * (p / q).log()).sum(1), rtol=1e-12, atol=1e-15)
    assert values[-1].abs() < 1e-7 and (values[:-1] > 1e-3).all()


def test_discopop_by_hand_and_its_limits():
    values, batch = at_logits(DiscoPOP(beta=0.5), 0.5, Z)
    blend = (Z / 0.05).sigmoid()
    torch.testing.assert_close(values, (1 - blend) * -logsigmoid(Z) + blend * (-Z).exp(), rtol=1e-12, atol=1e-15)
    (gradient,) = torch.autograd.grad(values.sum(), batch.logps)
    assert gradient[4] > 0 > gradient[0]  # it rises at z = 0, and falls far on the wrong side
    torch.testing.assert_close(values[0], -logsigmoid(Z[0]), rtol=1e-12, atol=0)
    torch.testing.assert_close(values[-1], (-Z[-1]).exp(), rtol=1e-12, atol=0)


# --- a term for each response ----------------------------------------------------------------------------------------


def test_bco_bounds_dpo_from_above():
    for seed in range(20):
        batch = make_batch(seed=seed)
        assert (BCOPair(beta=0.5).loss(batch, terms_of(batch)) > DPO(beta=0.5).loss(batch, terms_of(batch))).all()


def test_nca_is_bco_with_half_of_each_response_held_down():
    batch = make_batch()
    rewards = 0.4 * log_ratios(batch)
    chosen, rejected = rewards[batch.pairs[:, 0]], rewards[batch.pairs[:, 1]]
    expected = softplus(-chosen) + softplus(chosen) / 2 + softplus(rejected) / 2
    torch.testing.assert_close(NCA(beta=0.4).loss(batch, terms_of(batch)), expected, **CLOSE)
    _, at_rest = at_logits(NCA(beta=0.4), 0.4, torch.tensor([math.log(2)], dtype=torch.float64))
    assert slopes(NCA(beta=0.4), at_rest)[0].abs() < 1e-15  # sigmoid(r) = 2 / 3


def test_sppo_is_zero_where_each_log_ratio_is_half_a_win():
    batch = make_batch()
    won = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, -1.0], dtype=torch.float64)  # rows 0, 3 and 4 are the chosen
    shift = (won * 0.5 / 0.2 - log_ratios(batch)).detach()
    solved = changed(batch, logps=batch.logps.detach() + (shift / LENGTHS)[:, None] * batch.mask)
    assert SPPO(beta=0.2).loss(solved, terms_of(solved)).max() < 1e-26
    at_reference = make_batch(at_reference=True)
    start = SPPO(beta=0.2).loss(at_reference, terms_of(at_reference))
    torch.testing.assert_close(start, torch.full((3,), 2 * 2.5**2, dtype=torch.float64), **CLOSE)


def test_the_two_anchored_losses_at_the_reference_and_their_directions():
    batch = make_batch(at_reference=True)
    chosen, rejected = batch.pairs.T
    for loss in (APOZero(beta=0.4), APODown(beta=0.4)):
        torch.testing.assert_close(loss.loss(batch, terms_of(batch)), torch.ones(3, dtype=torch.float64), **CLOSE)
    zero, down = slopes(APOZero(beta=0.4), batch), slopes(APODown(beta=0.4), batch)
    torch.testing.assert_close(zero[chosen], torch.full_like(zero[chosen], -0.1), **CLOSE)
    torch.testing.assert_close(zero[rejected], torch.full_like(zero[rejected], 0.1), **CLOSE)
    assert (
        down[chosen].abs().max() < 1e-16 and (down[rejected] > 0.09).all()
    )  # the chosen is at rest: both pulls cancel
    batch = make_batch()
    down = slopes(APODown(beta=0.4), batch)
    assert (down[rejected] > 0).all() and (down[chosen] + down[rejected] > 0).all()  # together they are lowered
