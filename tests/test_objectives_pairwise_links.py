"""f-DPO and chi-PO by hand: their links, the limits, the bounded exponential, the clip."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_objectives import make_batch, terms_of
from test_objectives_pairwise_forms import CLOSE, assert_same, at_logits, changed, slopes
from torch.nn.functional import logsigmoid, softplus

from moalign.api import log_ratios, pair_log_ratios
from moalign_plugins.objectives._pairs import EXPONENT, bounded_expm1
from moalign_plugins.objectives.chi_po import ChiPO
from moalign_plugins.objectives.dpo import DPO
from moalign_plugins.objectives.f_dpo import FDPO


def test_f_dpo_has_dpo_and_the_forward_kl_as_limits():
    batch, terms = make_batch(), terms_of(make_batch(), scale=1.5, margin=0.2)
    assert_same(FDPO(divergence="reverse-kl"), DPO(), batch, terms)
    assert_same(FDPO(divergence="alpha", alpha=1), FDPO(divergence="forward-kl"), batch, terms)
    # (1 - exp(-alpha a)) / alpha = a - alpha a^2 / 2 + ...; |a| < 6 here, and 1.5 * 0.1 of two of them counts
    assert log_ratios(batch).abs().max() < 6
    assert_same(FDPO(divergence="alpha", alpha=1e-9), DPO(), batch, terms, rtol=0, atol=1e-8)


def test_links_of_f_dpo_by_hand():
    ratios = torch.linspace(-3, 3, 25, dtype=torch.float64)
    u = ratios.exp()
    expected = {
        "reverse-kl": u.log(),
        "forward-kl": 1 - 1 / u,
        "js": (2 * u / (u + 1)).log(),
        "alpha": (1 - u**-0.3) / 0.3,
    }
    for divergence, values in expected.items():
        torch.testing.assert_close(FDPO(divergence=divergence, alpha=0.3).link(ratios), values, rtol=0, atol=1e-13)
    softened = math.log(2) - softplus(-ratios)
    torch.testing.assert_close(FDPO(divergence="js").link(ratios), softened, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("divergence", "slope"), [("reverse-kl", 1), ("forward-kl", 1), ("js", 0.5), ("alpha", 1)])
def test_slopes_of_links_at_the_reference(divergence, slope):
    batch = make_batch(at_reference=True)
    torch.testing.assert_close(
        slopes(FDPO(divergence=divergence), batch), slope * slopes(DPO(), batch), rtol=1e-13, atol=0
    )


def test_the_bounded_exponential_is_exact_below_its_bound_and_its_tangent_above():
    x = torch.tensor([-1e4, -1.0, 0.0, 1e-9, 5.0, EXPONENT, EXPONENT + 1, 1e4], dtype=torch.float64, requires_grad=True)
    values = bounded_expm1(x)
    (slope,) = torch.autograd.grad(values.sum(), x)
    torch.testing.assert_close(values[:6], x[:6].expm1(), rtol=1e-15, atol=0)
    torch.testing.assert_close(slope[:6], x[:6].exp(), rtol=1e-15, atol=0)
    torch.testing.assert_close(slope[6:], torch.full_like(slope[6:], math.exp(EXPONENT)), rtol=1e-15, atol=0)
    assert (values.diff() > 0).all() and values[7] < 1e13


@settings(max_examples=50, deadline=None)
@given(st.floats(-40, 40), st.floats(-40, 40))
def test_every_link_keeps_the_order_of_log_ratios(low, high):
    """Bounded or not: no two log-ratios that float64 tells apart in the link are turned round."""
    pair = torch.tensor(sorted((low, high)), dtype=torch.float64)
    for divergence in ("reverse-kl", "forward-kl", "js", "alpha"):
        assert FDPO(divergence=divergence).link(pair).diff() >= 0


def test_the_slope_of_chi_po_is_that_of_dpo_times_one_plus_the_ratio():
    """phi'(u) du / da = u + 1, at equal logits: a margin makes them equal."""
    batch = make_batch()
    phi = log_ratios(batch).exp() + log_ratios(batch)
    shift = 0.1 * (phi[batch.pairs[:, 0]] - phi[batch.pairs[:, 1]]).detach() - 0.1 * pair_log_ratios(batch).detach()
    terms = terms_of(batch)
    ours, theirs = slopes(ChiPO(), batch, terms), slopes(DPO(), batch, changed(terms, margin=-shift))
    torch.testing.assert_close(ours, theirs * (1 + log_ratios(batch).exp()), rtol=1e-11, atol=1e-14)


def test_chi_po_far_below_the_reference_is_dpo():
    """u adds less than exp(-30) to log u."""
    batch = make_batch()
    low = changed(batch, ref_logps=batch.ref_logps + 35 * batch.mask / batch.mask.sum(-1, keepdim=True))
    assert_same(ChiPO(), DPO(), low, rtol=0, atol=1e-12)


def test_the_clip_of_chi_po():
    z = torch.tensor([-3.0, -0.5, 0.3, 3.0], dtype=torch.float64)
    unclipped, batch = at_logits(ChiPO(beta=1.0), 1.0, z)
    logits = z.expm1() + z
    assert (logits.abs() > 2).tolist() == [True, False, False, True]
    clipped = ChiPO(beta=1.0, clip=1.0).loss(batch, terms_of(batch))
    torch.testing.assert_close(clipped, -logsigmoid(logits.clamp(-2, 2)), **CLOSE)
    torch.testing.assert_close(unclipped, -logsigmoid(logits), **CLOSE)
