"""Pairwise losses and their gradients equal those of TRL's own code on the same log-probabilities, or logits.

Where TRL computes something else than the paper, the test says what.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_agreement_trl import PAIRS, TOKENS, assert_equal, log_probabilities, own_loss, trl_loss
from torch.nn.functional import cross_entropy
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from moalign_plugins.objectives.apo_down import APODown
from moalign_plugins.objectives.apo_zero import APOZero
from moalign_plugins.objectives.bco_pair import BCOPair
from moalign_plugins.objectives.cpo import CPO
from moalign_plugins.objectives.discopop import DiscoPOP
from moalign_plugins.objectives.exo import EXO
from moalign_plugins.objectives.f_dpo import FDPO
from moalign_plugins.objectives.ln_dpo import LengthNormalisedDPO
from moalign_plugins.objectives.nca import NCA
from moalign_plugins.objectives.orpo import ORPO
from moalign_plugins.objectives.robust_dpo import RobustDPO
from moalign_plugins.objectives.simpo import SimPO
from moalign_plugins.objectives.slic import SLiC
from moalign_plugins.objectives.sppo import SPPO

BETAS = [0.1, 1.3]
DTYPES = [torch.float32, torch.float64]
VOCABULARY = 11


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (SLiC, "hinge"),
        (LengthNormalisedDPO, "sigmoid_norm"),
        (NCA, "nca_pair"),
        (BCOPair, "bco_pair"),
        (SPPO, "sppo_hard"),
        (APOZero, "apo_zero"),
        (APODown, "apo_down"),
    ],
)
def test_losses_with_beta_alone(kind, name, beta, dtype):
    logps, reference, mask = log_probabilities(dtype)
    ours = own_loss(kind(beta=beta), logps, reference, mask).mean()
    assert_equal(ours, trl_loss(logps, reference, mask, loss_types=[name], beta=beta), logps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_robust_dpo(dtype, smoothing):
    logps, reference, mask = log_probabilities(dtype)
    ours = own_loss(RobustDPO(beta=0.7, label_smoothing=smoothing), logps, reference, mask).mean()
    theirs = trl_loss(logps, reference, mask, loss_types=["robust"], beta=0.7, label_smoothing=smoothing)
    assert_equal(ours, theirs, logps)


@pytest.mark.parametrize("smoothing", [1e-3, 0.2])
def test_exo(smoothing):
    """TRL takes the logarithms of the labels in float32 whatever the dtype, so only float32 can agree."""
    logps, reference, mask = log_probabilities(torch.float32)
    ours = own_loss(EXO(beta=0.7, label_smoothing=smoothing), logps, reference, mask).mean()
    theirs = trl_loss(logps, reference, mask, loss_types=["exo_pair"], beta=0.7, label_smoothing=smoothing)
    assert_equal(ours, theirs, logps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_discopop(dtype, tau):
    logps, reference, mask = log_probabilities(dtype)
    ours = own_loss(DiscoPOP(beta=0.3, tau=tau), logps, reference, mask).mean()
    settings = {"beta": 0.3, "args": SimpleNamespace(discopop_tau=tau)}
    assert_equal(ours, trl_loss(logps, reference, mask, loss_types=["discopop"], **settings), logps)


def test_discopop_is_finite_where_trls_is_not():
    """exp(-z) alone overflows, and 0 times it is no number."""
    logps, reference, mask = log_probabilities(torch.float32)
    beta = 1e4
    assert not trl_loss(
        logps, reference, mask, loss_types=["discopop"], beta=beta, args=SimpleNamespace(discopop_tau=0.05)
    ).isfinite()
    assert own_loss(DiscoPOP(beta=beta), logps, reference, mask).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("ours", "theirs"), [("reverse-kl", "reverse_kl"), ("forward-kl", "forward_kl")])
def test_f_dpo_names_its_kl_as_trl_does(ours, theirs, dtype):
    logps, reference, mask = log_probabilities(dtype)
    own = own_loss(FDPO(beta=0.7, divergence=ours), logps, reference, mask).mean()
    assert_equal(
        own, trl_loss(logps, reference, mask, loss_types=["sigmoid"], beta=0.7, f_divergence_type=theirs), logps
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_f_dpo_with_the_jensen_shannon_divergence(dtype):
    logps, reference, mask = log_probabilities(dtype)
    own = own_loss(FDPO(beta=0.7, divergence="js"), logps, reference, mask).mean()
    settings = {"beta": 0.7, "f_divergence_type": "js_divergence"}
    assert_equal(own, trl_loss(logps, reference, mask, loss_types=["sigmoid"], **settings), logps)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_the_coefficient_of_trls_alpha_divergence_is_one_minus_alpha(alpha):
    """So TRL's 1 is the reverse KL, and its 0 the forward one. It knows float32 and shorter numbers only."""
    logps, reference, mask = log_probabilities(torch.float32)
    own = own_loss(FDPO(beta=0.7, divergence="alpha", alpha=alpha), logps, reference, mask).mean()
    settings = {"beta": 0.7, "f_divergence_type": "alpha_divergence"}
    theirs = [
        trl_loss(logps, reference, mask, loss_types=["sigmoid"], f_alpha_divergence_coef=coefficient, **settings)
        for coefficient in (1 - alpha, alpha)
    ]
    assert_equal(own, theirs[0], logps)
    assert alpha == 0.5 or (own - theirs[1]).abs() > 1e-3


# --- trainers of losses without a reference, which read logits -------------------------------------------------------


class Stand(SimpleNamespace):
    """What of a trainer its computation of the loss reads; a batch is its own concatenation of pairs."""

    is_encoder_decoder = False
    aux_loss_enabled = False
    pad_token_id = padding_value = 0
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x)

    def concatenated_inputs(self, batch, **_):
        return batch


class StandForCPO(Stand):
    label_smoothing = 0.0
    alpha = 0.0
    cpo_loss = CPOTrainer.cpo_loss
    concatenated_forward = CPOTrainer.concatenated_forward
    get_batch_logps = staticmethod(CPOTrainer.get_batch_logps)


class StandForORPO(Stand):
    odds_ratio_loss = ORPOTrainer.odds_ratio_loss
    concatenated_forward = ORPOTrainer.concatenated_forward
    get_batch_logps = staticmethod(ORPOTrainer.get_batch_logps)


def texts(dtype):
    """Logits [2P,T+1,V], the labels of a batch in TRL's form, and our log-probabilities and mask."""
    _, _, mask = log_probabilities(dtype)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2 * PAIRS, TOKENS + 1, VOCABULARY, generator=generator, dtype=dtype).requires_grad_()
    tokens = torch.randint(VOCABULARY, (2 * PAIRS, TOKENS + 1), generator=generator)
    labels = tokens.masked_fill(torch.cat([torch.zeros(2 * PAIRS, 1), mask], 1) == 0, -100)
    attention = torch.cat([torch.ones(2 * PAIRS, 1), mask.flip(1).cumsum(1).flip(1) > 0], 1).long()  # to the last label
    batch = {
        "chosen_labels": labels[:PAIRS],
        "concatenated_labels": labels,
        "concatenated_input_ids": tokens,
        "concatenated_attention_mask": attention,
    }
    logps = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2) * mask
    return logits, batch, logps, mask


def trainer_loss(trainer, stand, logits, batch):
    loss, _ = trainer.get_batch_loss_metrics(stand, lambda *_, **__: SimpleNamespace(logits=logits), batch)
    return loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo_has_trls_gamma(dtype, smoothing):
    logits, batch, logps, mask = texts(dtype)
    stand = StandForCPO(loss_type="simpo", beta=2.0, simpo_gamma=0.6, cpo_alpha=0.0, label_smoothing=smoothing)
    ours = own_loss(SimPO(beta=2.0, gamma=0.6, label_smoothing=smoothing), logps, None, mask).mean()
    assert_equal(ours, trainer_loss(CPOTrainer, stand, logits, batch), logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpo_weights_long_responses_more_in_trl(dtype):
    """TRL's likelihood is a mean over all tokens of the batch: our sums over their number."""
    logits, batch, logps, mask = texts(dtype)
    stand = StandForCPO(loss_type="sigmoid", beta=0.3, cpo_alpha=0.7, label_smoothing=0.1)
    preference = own_loss(CPO(beta=0.3, alpha=0.0, label_smoothing=0.1), logps, None, mask)
    both = own_loss(CPO(beta=0.3, alpha=0.7, average=False, label_smoothing=0.1), logps, None, mask)
    ours = preference.mean() + (both - preference).sum() / mask[:PAIRS].sum()
    assert_equal(ours, trainer_loss(CPOTrainer, stand, logits, batch), logits)


def test_the_odds_ratio_of_orpo_is_trls_and_its_likelihood_is_of_the_response_alone():
    """TRL computes the odds in float32 whatever the dtype, and its likelihood is a mean over the batch's tokens, those
    of the prompts among them."""
    logits, batch, logps, mask = texts(torch.float32)
    predicted, tokens = logits[:PAIRS, :-1], batch["concatenated_input_ids"][:PAIRS, 1:]
    shown = batch["concatenated_attention_mask"][:PAIRS, 1:] == 1
    assert shown.sum() > mask[:PAIRS].sum()  # prompts are there
    likelihood = cross_entropy(predicted[shown], tokens[shown])
    odds = own_loss(ORPO(lam=0.4), logps, None, mask) - own_loss(ORPO(lam=0.0), logps, None, mask)
    theirs = trainer_loss(ORPOTrainer, StandForORPO(beta=0.4), logits, batch)
    assert_equal(odds.mean() + likelihood, theirs, logits)
    own = own_loss(ORPO(lam=0.0), logps, None, mask)
    torch.testing.assert_close(own, -(logps.sum(1) / mask.sum(1))[:PAIRS])
