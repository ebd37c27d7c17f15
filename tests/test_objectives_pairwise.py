"""What all pairwise losses keep to: the conformance kit, combiners' terms, extreme log-ratios, a run by its name."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import ClassVar

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from sweeps import small_config
from test_objectives import make_batch, sums, terms_of

from moalign import registry
from moalign.api import ConfigError, PluginError, log_ratios, pair_log_ratios
from moalign.sweeps import plan, run
from moalign.sweeps.observe import Observer
from moalign.testing import ConformanceError, check_objective
from moalign_plugins.objectives.adpo_pairwise import ADPOPairwise
from moalign_plugins.objectives.apo_down import APODown
from moalign_plugins.objectives.apo_zero import APOZero
from moalign_plugins.objectives.bco_pair import BCOPair
from moalign_plugins.objectives.chi_po import ChiPO
from moalign_plugins.objectives.cpl import CPL
from moalign_plugins.objectives.cpl_kl import CPLKL
from moalign_plugins.objectives.cpo import CPO
from moalign_plugins.objectives.discopop import DiscoPOP
from moalign_plugins.objectives.dno import DNO
from moalign_plugins.objectives.dpo import DPO
from moalign_plugins.objectives.exo import EXO
from moalign_plugins.objectives.f_dpo import FDPO
from moalign_plugins.objectives.ln_dpo import LengthNormalisedDPO
from moalign_plugins.objectives.nca import NCA
from moalign_plugins.objectives.orpo import ORPO, log_odds
from moalign_plugins.objectives.robust_dpo import RobustDPO
from moalign_plugins.objectives.sharpening import Sharpening
from moalign_plugins.objectives.simpo import SimPO
from moalign_plugins.objectives.slic import SLiC
from moalign_plugins.objectives.sppo import SPPO
from moalign_plugins.objectives.vpo import VPO


def plain(batch):
    return pair_log_ratios(batch)


def without_reference(batch):
    return of_pairs(batch, sums(batch))


def averaged(batch, values):
    return values / batch.mask.sum(-1).clamp(min=1)


def of_pairs(batch, values, lam=1.0):
    return values[batch.pairs[:, 0]] - lam * values[batch.pairs[:, 1]]


def linked(function):
    """The difference of a function of each response's log-ratio."""
    return lambda batch: of_pairs(batch, function(log_ratios(batch)))


def fading(values, batch, discount, lam):
    """Discounted sums where each row begins with its response."""
    powers = discount ** torch.arange(values.shape[1], dtype=values.dtype)
    return of_pairs(batch, (values * batch.mask * powers).sum(-1), lam)


# Each loss with what stands in its logit beside beta, by hand.
SHIFTABLE = [
    (DPO(beta=0.3, reference_weight=0.0), 0.3, without_reference),
    (DPO(beta=0.3, label_smoothing=0.2, reference_weight=1.0), 0.3, plain),
    (SLiC(beta=0.05), 0.05, plain),
    (SLiC(beta=0.05, reference_weight=0.0), 0.05, without_reference),
    (LengthNormalisedDPO(beta=2.0), 2.0, lambda b: of_pairs(b, averaged(b, log_ratios(b)))),
    (SimPO(label_smoothing=0.1), 2.0, lambda b: of_pairs(b, averaged(b, sums(b)))),
    (ORPO(lam=0.7), 1.0, lambda b: of_pairs(b, log_odds(averaged(b, sums(b)).clamp(max=-1e-3)))),
    (CPO(beta=0.3), 0.3, without_reference),
    (CPO(beta=0.3, average=False, label_smoothing=0.1), 0.3, without_reference),
    (FDPO(divergence="reverse-kl"), 0.1, plain),
    (FDPO(divergence="forward-kl"), 0.1, linked(lambda a: -(-a).exp())),
    (FDPO(divergence="js", beta=0.4), 0.4, linked(lambda a: -(1 + (-a).exp()).log())),
    (FDPO(divergence="alpha", alpha=0.3), 0.1, linked(lambda a: -(-0.3 * a).exp() / 0.3)),
    (ChiPO(beta=0.3), 0.3, linked(lambda a: a.exp() + a)),
    (ChiPO(beta=0.3, clip=30.0), 0.3, linked(lambda a: a.exp() + a)),
    (VPO(alpha=0.3), 0.1, plain),
    (CPL(discount=0.9), 0.1, lambda b: fading(b.logps, b, 0.9, 0.5)),
    (CPLKL(discount=0.9), 0.2, lambda b: fading(b.logps - b.ref_logps, b, 0.9, 0.75)),
    (DNO(beta=0.3), 0.3, plain),
    (ADPOPairwise(tau=2.0), 0.5, plain),
    (Sharpening(), 1.0, plain),
    (Sharpening(beta=0.5, average=True), 0.5, plain),
    (RobustDPO(), 0.1, plain),
    (EXO(beta=0.3), 0.3, plain),
    (DiscoPOP(), 0.1, plain),
]
OF_EACH_RESPONSE = [NCA(), BCOPair(), SPPO(beta=0.05), APOZero(), APODown()]
EVERY = [loss for loss, *_ in SHIFTABLE] + OF_EACH_RESPONSE
SCORES = {"name": "columns", "scores": {"helpful": "helpful"}}


@pytest.mark.parametrize("loss", EVERY, ids=repr)
def test_it_conforms(loss):
    """Its gradient is the derivative, it is honest about what it needs and whether a combiner reaches it, and more."""
    check_objective(loss, prompts=2, tokens=3)


@pytest.mark.parametrize(("loss", "beta", "difference"), SHIFTABLE, ids=[repr(case[0]) for case in SHIFTABLE])
def test_a_combiners_scale_and_margin_act_on_the_logit(loss, beta, difference):
    """L(scale, margin) is a function of scale * beta * difference - margin, with the difference as written above."""
    batch = make_batch()
    terms = terms_of(batch, scale=1.7, margin=0.4)
    folded = terms_of(batch, margin=0.4)
    folded = dataclasses.replace(folded, margin=folded.margin - 0.7 * beta * difference(batch).detach())
    torch.testing.assert_close(loss.loss(batch, terms), loss.loss(batch, folded), rtol=1e-11, atol=1e-12)
    assert not torch.allclose(loss.loss(batch, terms), loss.loss(batch, terms_of(batch)), rtol=1e-6)


@pytest.mark.parametrize("loss", OF_EACH_RESPONSE, ids=repr)
@pytest.mark.parametrize("change", [{"scale": 2.0}, {"margin": 0.1}], ids=str)
def test_losses_of_each_response_refuse_terms_that_they_could_only_ignore(loss, change):
    batch = make_batch()
    with pytest.raises(PluginError, match=r"cannot use a combiner's scale and margin; combine with 'linear'"):
        loss.loss(batch, terms_of(batch, **change))


def extreme(chosen, rejected, dtype=torch.float32):
    """One pair of two tokens each, with these log-ratios; the policy itself where there is no reference."""
    tokens = torch.tensor([[chosen / 2] * 2, [rejected / 2] * 2], dtype=dtype)
    policy, reference = tokens.clamp(max=0), (-tokens).clamp(max=0)
    return dataclasses.replace(
        make_batch(dtype),
        logps=policy.requires_grad_(),
        ref_logps=reference,
        mask=torch.ones(2, 2, dtype=dtype),
        pairs=torch.tensor([[0, 1]]),
        pair_objective=torch.tensor([-1]),
        preference=torch.tensor([[0.3, 0.7]], dtype=dtype).expand(2, 2),
        strength=torch.ones(1, dtype=dtype),
        groups=torch.zeros(2, dtype=torch.long),
        margins=torch.tensor([[1.0, -2.0]], dtype=dtype),
    )


@pytest.mark.parametrize("loss", EVERY, ids=repr)
def test_extreme_log_ratios_have_finite_losses_and_gradients(loss):
    """The policy's log-probability is 0 at the positive end: as sure as can be."""
    for chosen in (-1e4, 0.0, 1e4):
        for rejected in (-1e4, 0.0, 1e4):
            batch = extreme(chosen, rejected)
            value = loss.loss(batch, terms_of(batch))
            (gradient,) = torch.autograd.grad(value.sum(), batch.logps)
            assert value.isfinite().all() and gradient.isfinite().all(), (chosen, rejected)


PUSHED = [DPO(), SLiC(), LengthNormalisedDPO(), CPO(), FDPO(), ChiPO(), VPO(), CPLKL(), RobustDPO(), ORPO()]
PUSHED += [FDPO(divergence="forward-kl"), FDPO(divergence="alpha")]


@pytest.mark.parametrize("loss", PUSHED, ids=repr)
def test_a_pair_far_on_the_wrong_side_is_still_pushed_to_the_right_one(loss):
    """Bounded exponents do not take its direction from it."""
    batch = extreme(-1e4, 0.0)
    (gradient,) = torch.autograd.grad(loss.loss(batch, terms_of(batch)).sum(), batch.logps)
    assert (gradient[0] < 0).all()


def test_a_pair_beyond_the_clip_of_chi_po_is_left_alone():
    for batch, left in ((extreme(-1e4, 0.0), True), (extreme(-3.0, 0.0), False)):
        value = ChiPO(clip=1.0).loss(batch, terms_of(batch))
        assert (torch.autograd.grad(value.sum(), batch.logps)[0] == 0).all() == left


REFUSED = [
    (ADPOPairwise, {"tau": 0}),
    (ChiPO, {"clip": 0}),
    (CPL, {"lam": 1.5}),
    (CPLKL, {"discount": 0}),
    (DiscoPOP, {"tau": 2}),
    (DPO, {"reference_weight": -0.1}),
    (EXO, {"label_smoothing": 0}),
    (FDPO, {"alpha": 0}),
    (FDPO, {"divergence": "kl"}),
    (ORPO, {"lam": -1}),
    (RobustDPO, {"label_smoothing": 0.5}),
    (SimPO, {"gamma": -1}),
    (SPPO, {"beta": 0}),
]


@pytest.mark.parametrize(("kind", "options"), REFUSED, ids=lambda x: getattr(x, "__name__", str(x)))
def test_options_without_a_meaning_are_refused_by_name(kind, options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        kind(**options)


@pytest.mark.parametrize("loss", [DNO(), ADPOPairwise()], ids=repr)
def test_soft_labels_refuse_unknown_differences(loss):
    batch = make_batch()
    terms = terms_of(batch)
    with pytest.raises(PluginError, match="and the combiner supplies none"):
        loss.loss(batch, dataclasses.replace(terms, difference=None))
    with pytest.raises(PluginError, match="reward difference of pair 0 of the batch is unknown"):
        loss.loss(batch, dataclasses.replace(terms, difference=terms.difference * torch.nan))


@pytest.mark.parametrize("loss", [loss for loss in EVERY if "reference" in loss.wants], ids=repr)
def test_without_its_reference_a_loss_says_what_is_missing(loss):
    batch = make_batch()
    with pytest.raises(PluginError, match='does not declare "reference"'):
        loss.loss(dataclasses.replace(batch, ref_logps=None), terms_of(batch))


def test_who_says_that_labels_do_not_matter_is_held_to_it():
    class Lies(Sharpening):
        def loss(self, batch, terms):
            return DPO().loss(batch, terms)

    class Hides(Sharpening):
        symmetric: ClassVar[bool] = False

    with pytest.raises(ConformanceError, match="other losses, though symmetric is True"):
        check_objective(Lies(), prompts=2, tokens=3)
    with pytest.raises(ConformanceError, match='the same losses, though `needs` has "pairs"'):
        check_objective(Hides(), prompts=2, tokens=3)


# --- by its name in a configuration ----------------------------------------------------------------------------------

BY_NAME = {sys.modules[type(loss).__module__].REGISTRATION["name"]: loss for loss in EVERY}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Labelled pairs, and scored responses for losses that need reward differences."""
    folder = tmp_path_factory.mktemp("data")
    pairs, scored = folder / "pairs.jsonl", folder / "scored.jsonl"
    texts = [(f"q{number}: ", "ab" * (1 + number % 3), "12" * (1 + number % 2)) for number in range(8)]
    rows = [{"prompt": p, "chosen": a, "rejected": b, "objective": "helpful"} for p, a, b in texts]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [
        {"prompt": prompt, "response": text, "helpful": score}
        for prompt, *pair in texts
        for text, score in zip(pair, (1, 0), strict=True)
    ]
    scored.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {False: {"path": str(pairs)}, True: {"path": str(scored), "reader": SCORES}}


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_one_line_of_a_configuration_trains_with_it(name, data, tiny_model_path, tmp_path):
    material = data["margins" in BY_NAME[name].wants]
    settings = small_config(
        tiny_model_path,
        material["path"],
        loss=name,
        objectives={"helpful": None},
        data={**material, "held_out": 0.25},
        search={"name": "grid", "points": 1},
        train={"steps": 2, "pairs_per_step": 4, "lr": 1e-2},
    )
    run.start(settings, tmp_path / "run", registry.discover(), Observer())
    (candidate,) = (tmp_path / "run" / "candidates").iterdir()
    weights = load_file(candidate / "adapter_model.safetensors")
    grown = [value for key, value in weights.items() if "lora_B" in key]  # 0 before the first step
    assert grown and all(value.isfinite().all() for value in grown) and any(value.any() for value in grown)


@pytest.mark.parametrize("loss", OF_EACH_RESPONSE, ids=repr)
def test_modpo_is_refused_before_anything_is_loaded_where_it_has_no_logit_to_reach(loss, data, tiny_model_path):
    name = next(name for name, each in BY_NAME.items() if each is loss)
    path = data[False]["path"]
    with pytest.raises(ConfigError, match=f"combine: 'modpo' works through scale and margin.*'{name}' has none"):
        plan.prepare(small_config(tiny_model_path, path, loss=name, combine="modpo"), registry.discover())
