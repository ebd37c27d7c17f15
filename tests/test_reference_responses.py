"""Losses that read a response of the reference to each prompt: SELM, XPO and VPO's online form; and in runs."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from interruptions import StopAfterCandidates, break_off_and_resume
from sweeps import contents, small_config, write_pairs
from test_objectives import make_batch, sums, terms_of

from moalign import registry
from moalign.api import PluginError, log_ratios
from moalign.engine import train as loop
from moalign.errors import ConfigError
from moalign.sweeps import plan, run
from moalign.sweeps.observe import Observer
from moalign.sweeps.workshop import open_workshop
from moalign.testing import check_objective
from moalign_plugins.objectives.dpo import DPO
from moalign_plugins.objectives.rpo import RPO
from moalign_plugins.objectives.selm import SELM
from moalign_plugins.objectives.vpo import VPO
from moalign_plugins.objectives.xpo import XPO

EVERY = [SELM(), SELM(beta=0.3, alpha=0.4), XPO(beta=0.3, alpha=0.2), VPO(optimistic=True), VPO(alpha=0.3)]
OPTIMISTIC = [loss for loss in EVERY if loss != VPO(alpha=0.3)]


def with_references(batch):
    """Three rows more, a response of the reference for each pair, of which the last two share one."""
    generator = torch.Generator().manual_seed(3)
    mask = (torch.arange(5) < torch.tensor([[4], [2]])).double()
    more = [-torch.rand(2, 5, generator=generator, dtype=torch.float64) * mask for _ in range(2)]
    return dataclasses.replace(
        batch,
        logps=torch.cat([batch.logps.detach(), more[0]]).requires_grad_(),
        ref_logps=torch.cat([batch.ref_logps, more[1]]),
        mask=torch.cat([batch.mask, mask]),
        preference=batch.preference[:1].expand(8, 2),
        groups=torch.cat([batch.groups, torch.tensor([0, 1])]),
        views={"reference": torch.tensor([6, 7, 7])},
    )


@pytest.mark.parametrize("loss", [*EVERY, SELM(alpha=0), XPO(alpha=0)], ids=repr)
def test_it_conforms(loss):
    check_objective(loss, prompts=2, tokens=3)


@pytest.mark.parametrize("kind", [SELM, XPO])
def test_without_optimism_it_is_dpo_and_nothing_is_sampled(kind):
    loss = kind(beta=0.3, alpha=0)
    batch, terms = make_batch(), terms_of(make_batch(), scale=1.7, margin=0.4)
    assert torch.equal(loss.loss(batch, terms), DPO(beta=0.3).loss(batch, terms))
    assert "reference_responses" not in loss.wants and "reference_responses" in kind().wants


@pytest.mark.parametrize(
    ("loss", "slope"),
    [
        (SELM(beta=0.3, alpha=0.4), 0.12),
        (XPO(beta=0.3, alpha=0.4), 0.4),
        (VPO(beta=0.3, alpha=0.4, optimistic=True), 0.12),
    ],
    ids=repr,
)
def test_the_reference_s_own_response_is_pushed_down_with_the_slope_of_the_paper(loss, slope):
    """d loss / d l(y0), once for each pair whose response it is; chosen and rejected have the gradient of DPO."""
    batch = with_references(make_batch())
    terms = terms_of(batch)
    (gradient,) = torch.autograd.grad(loss.loss(batch, terms).sum(), batch.logps)
    expected = slope * batch.mask[6:] * torch.tensor([[1.0], [2.0]])
    torch.testing.assert_close(gradient[6:], expected, rtol=1e-14, atol=0)
    (own,) = torch.autograd.grad(DPO(beta=0.3).loss(batch, terms).sum(), batch.logps)
    torch.testing.assert_close(gradient[:6], own[:6], rtol=1e-13, atol=1e-15)


def test_how_they_relate():
    """VPO's online form is SELM, XPO is SELM but for a constant, and VPO's offline form is RPO but for a constant."""
    batch = with_references(make_batch())
    terms = terms_of(batch, scale=1.7, margin=0.4)
    selm = SELM(beta=0.3, alpha=0.4).loss(batch, terms)
    vpo = VPO(beta=0.3, alpha=0.4, optimistic=True).loss(batch, terms)
    torch.testing.assert_close(selm, vpo, rtol=1e-14, atol=0)
    xpo = XPO(beta=0.3, alpha=0.12).loss(batch, terms)
    constant = 0.12 * (batch.ref_logps * batch.mask).sum(-1)[batch.views["reference"]]
    torch.testing.assert_close(xpo - constant, selm, rtol=1e-13, atol=0)
    gradients = [
        torch.autograd.grad(loss.loss(batch, terms).sum(), batch.logps)[0]
        for loss in (VPO(beta=0.3, alpha=0.4), RPO(beta=0.3, eta=0.4))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", OPTIMISTIC, ids=repr)
def test_scale_and_margin_act_on_the_logit_alone(loss):
    batch = with_references(make_batch())
    terms, plain = terms_of(batch, scale=1.7, margin=0.4), terms_of(batch)
    own = DPO(beta=loss.beta)
    expected = own.loss(batch, terms) - own.loss(batch, plain)
    torch.testing.assert_close(loss.loss(batch, terms) - loss.loss(batch, plain), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", OPTIMISTIC, ids=repr)
def test_without_responses_a_loss_says_what_is_missing(loss):
    with pytest.raises(PluginError, match=r'does not declare "reference_responses"'):
        loss.loss(make_batch(), terms_of(make_batch()))


def test_the_population_s_slope_at_the_reference_is_towards_what_it_does_not_say():
    """Where the reference says y0 with probability pi_ref(y0), E[grad a(y0)] is 0 at pi = pi_ref (a score), so that
    the optimism has no first-order effect there: it is -KL(pi_ref || pi), whose gradient is 0."""
    logits = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    reference = logits.detach().log_softmax(-1)
    batch = with_references(make_batch())
    expected = torch.zeros(5, dtype=torch.float64)
    for response, probability in enumerate(reference.exp().tolist()):
        own = logits.log_softmax(-1)[response]
        logps = torch.cat([batch.logps.detach()[:6], torch.zeros(2, 5).double()])
        logps = logps.index_put((torch.tensor([6, 7]), torch.tensor([0, 0])), own.expand(2))
        one = dataclasses.replace(batch, logps=logps)
        gradient = torch.autograd.grad(SELM(beta=1.0, alpha=1.0).loss(one, terms_of(one)).sum(), logits)[0]
        expected += probability * gradient
    assert float(expected.abs().max()) < 1e-14


# --- in runs --------------------------------------------------------------------------------------------------------


def settings_of(model_path, folder: Path, loss="selm", **changes):
    pairs = write_pairs(folder / "pairs.jsonl")
    train = {"steps": 3, "pairs_per_step": 4, "lr": 1e-2, "together": 2}
    return small_config(
        model_path, pairs, loss=loss, **({"train": train, "search": {"name": "grid", "points": 2}} | changes)
    )


def test_a_run_trains_on_them_and_resumes_bitwise(tiny_model_path, tmp_path):
    settings, registered = settings_of(tiny_model_path, tmp_path), registry.discover()
    run.start(settings, tmp_path / "whole", registered, Observer())

    parts = break_off_and_resume(settings, tmp_path / "parts", StopAfterCandidates())
    assert contents(parts) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "loss", [{"name": "xpo", "alpha": 0.1}, {"name": "vpo", "optimistic": True, "alpha": 1.0}], ids=str
)
def test_one_line_of_a_configuration_trains_with_it(loss, tiny_model_path, tmp_path):
    settings = settings_of(tiny_model_path, tmp_path, loss, train={"steps": 1, "pairs_per_step": 4, "together": 2})
    front = run.start(settings, tmp_path / "run", registry.discover(), Observer())
    assert len(front["points"]) == 2


def test_each_prompt_has_one_response_of_the_base_behind_its_own_tokens(tiny_model_path, tmp_path):
    settings = settings_of(tiny_model_path, tmp_path)
    prepared = plan.prepare(settings, registry.discover())
    workshops = [open_workshop(prepared, Path(), Observer(), keep_cache=False) for _ in range(2)]
    train, again = (workshop.material.train for workshop in workshops)
    assert train.content_hash == again.content_hash
    own = train.views["reference"]
    for pair, row in zip(train.pairs[:, 0], own, strict=True):
        assert train.sequences[row].prompt == train.sequences[pair].prompt
        assert 1 <= len(train.sequences[row].response) <= settings.evaluate.max_new_tokens
        assert train.groups[row] == train.groups[pair]
    assert len(set(own)) == len({train.sequences[row].prompt for row in own}) == 16
    assert len({train.sequences[row].response for row in own}) > 8  # samples, not one answer to all
    assert np.isnan(train.rewards[sorted(set(own) - set(train.pairs.flatten()))]).all()
    other = open_workshop(
        plan.prepare(settings.model_copy(update={"seed": 1}), registry.discover()), Path(), Observer(), keep_cache=False
    )
    assert other.material.train.content_hash != train.content_hash


def test_the_loss_sees_the_rows_and_each_response_counts_once(tiny_model_path, tmp_path, monkeypatch):
    """The row of a pair's view has the log-probabilities of the sampled response; metrics count pairs alone."""
    seen: list = []
    loss_of = loop.loss_of

    def looking(batch, job, *others):
        seen.append(batch)
        return loss_of(batch, job, *others)

    monkeypatch.setattr(loop, "loss_of", looking)
    settings = settings_of(tiny_model_path, tmp_path, train={"steps": 1, "pairs_per_step": 6, "together": 1})
    run.start(settings, tmp_path / "run", registry.discover(), Observer())
    batch = seen[0]
    named = Counter(batch.views["reference"].tolist())
    assert not set(named) & set(batch.pairs.flatten().tolist()) and max(named) < len(batch.logps)
    assert torch.equal(batch.groups[batch.views["reference"]], batch.groups[batch.pairs[:, 0]])
    torch.testing.assert_close(log_ratios(batch), torch.zeros(len(batch.logps)), rtol=0, atol=1e-5)  # step 0
    assert float(sums(batch).detach()[batch.views["reference"]].max()) < 0
    line = json.loads(next((tmp_path / "run/candidates").glob("*/metrics.jsonl")).read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(np.log(2), abs=1e-5) and line["kl_estimate"] == pytest.approx(0, abs=1e-6)


def test_an_early_stop_looks_at_held_out_pairs_with_responses_of_their_own(tiny_model_path, tmp_path):
    train = {"steps": 2, "pairs_per_step": 4, "lr": 1e-2, "together": 2, "early_stop": {"every": 1, "patience": 1}}
    settings = settings_of(tiny_model_path, tmp_path, train=train)
    workshop = open_workshop(plan.prepare(settings, registry.discover()), Path(), Observer(), keep_cache=False)
    looked_at = workshop.material.looked_at
    assert len(looked_at.views["reference"]) == len(looked_at.pairs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition": "soup"}, r"condition: loss 'selm' reads further sequences"),
        (
            {"reference": {"name": "previous-iterate", "every": 2}},
            r"'previous-iterate' does not go with loss 'selm', whose .* of the untouched base, .* add rollouts",
        ),
    ],
    ids=["condition", "reference"],
)
def test_where_it_has_no_place_it_is_refused(changes, message, tiny_model_path, tmp_path):
    with pytest.raises(ConfigError, match=message):
        plan.prepare(settings_of(tiny_model_path, tmp_path, **changes), registry.discover())
