"""The reward model `bradley-terry`: its loss as mathematics."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from reward_forms import NAMES, PAIRS, check_form, gradients, made_up
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from moalign_plugins.reward_models.bradley_terry import BradleyTerry

OPTIONS = [
    {},
    {"label_smoothing": 0.3},
    {"margin": "strength", "margin_scale": 0.7},
    {"margin": "strength", "label_smoothing": 0.2, "smooth_below": 1.0, "centre": 0.1},
]


def differences(batch):
    """Of the scores of each pair under the objective that judged it, by hand."""
    scores = batch.final @ batch.parameters["head.weight"].T
    judged = batch.pair_objective.tolist()
    return torch.stack([scores[w, k] - scores[r, k] for (w, r), k in zip(PAIRS, judged, strict=True)])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_a_reward_model(options):
    check_form(BradleyTerry(**options))


def test_the_loss_is_the_cross_entropy_of_the_judging_objectives_difference():
    batch = made_up(BradleyTerry())
    difference = differences(batch)
    torch.testing.assert_close(BradleyTerry().loss(batch), -logsigmoid(difference))
    labels = torch.full_like(difference, 1 - 0.3 / 2)  # (1 - e) y + e/2 at y = 1
    expected = binary_cross_entropy_with_logits(difference, labels, reduction="none")
    torch.testing.assert_close(BradleyTerry(label_smoothing=0.3).loss(batch), expected)


def test_equal_scores_cost_log_2_whatever_the_smoothing():
    batch = made_up(BradleyTerry())
    batch = replace(batch, final=torch.zeros_like(batch.final))
    for form in (BradleyTerry(), BradleyTerry(label_smoothing=0.4)):
        torch.testing.assert_close(form.loss(batch), torch.full((len(PAIRS),), math.log(2), dtype=torch.float64))


def test_only_the_head_of_the_judging_objective_learns_from_a_pair():
    batch = made_up(BradleyTerry())
    for objective in range(len(NAMES)):
        judged = replace(batch, pair_objective=torch.full((len(PAIRS),), objective))
        _, found = gradients(BradleyTerry(centre=0.1), judged)
        assert (found["head.weight"].abs().sum(1) > 0).tolist() == [k == objective for k in range(len(NAMES))]


def test_a_margin_moves_the_point_without_gradient_by_itself():
    """With smoothed labels the loss has a minimum: at the logit of the label, and the margin later with one."""
    smoothing, scale = 0.2, 0.7
    form = BradleyTerry(label_smoothing=smoothing, margin="strength", margin_scale=scale)
    batch = made_up(form)
    lowest = math.log((1 - smoothing / 2) / (smoothing / 2))
    for index, (chosen, rejected) in enumerate(PAIRS):
        final = torch.zeros_like(batch.final)
        final[chosen, 0] = lowest + scale * batch.strength[index]
        weights = torch.zeros_like(batch.parameters["head.weight"])
        weights[:, 0] = 1.0
        alone = replace(
            batch,
            final=final.requires_grad_(),
            parameters={"head.weight": weights},
            pairs=torch.tensor([[chosen, rejected]]),
            pair_objective=batch.pair_objective[index : index + 1],
            strength=batch.strength[index : index + 1],
        )
        (gradient,) = torch.autograd.grad(form.loss(alone).sum(), final)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_a_margin_is_in_the_gradient():
    """Added to the loss it would not be."""
    batch = made_up(BradleyTerry())
    _, without = gradients(BradleyTerry(), batch)
    _, with_margin = gradients(BradleyTerry(margin="strength"), batch)
    assert not torch.allclose(without["head.weight"], with_margin["head.weight"], rtol=1e-2)


def test_margin_0_is_the_plain_loss():
    batch = made_up(BradleyTerry())
    still = replace(batch, strength=torch.zeros_like(batch.strength))
    assert BradleyTerry(margin="strength").loss(still).equal(BradleyTerry().loss(batch))


def test_weak_judgements_alone_are_smoothed_and_strong_ones_alone_have_a_margin():
    form = BradleyTerry(margin="strength", label_smoothing=0.3, smooth_below=1.0)
    batch = replace(made_up(form), strength=torch.tensor([0.2, 1.0, 3.0, 0.99, 1.01], dtype=torch.float64))
    weak = torch.tensor([True, False, False, True, False])
    smoothed, margin = BradleyTerry(label_smoothing=0.3).loss(batch), BradleyTerry(margin="strength").loss(batch)
    torch.testing.assert_close(form.loss(batch), smoothed.where(weak, margin))


def test_centring_is_a_square_of_the_sum_and_sets_the_level():
    batch = made_up(BradleyTerry())
    scores, judged = BradleyTerry().scores(batch), batch.pair_objective
    total = scores[batch.pairs[:, 0], judged] + scores[batch.pairs[:, 1], judged]
    torch.testing.assert_close(BradleyTerry(centre=0.1).loss(batch) - BradleyTerry().loss(batch), 0.1 * total**2)


def test_extreme_differences_stay_finite():
    form = BradleyTerry(label_smoothing=0.1)
    batch = made_up(form)
    batch = replace(batch, final=1e6 * batch.final)
    losses, found = gradients(form, batch)
    assert losses.isfinite().all() and all(value.isfinite().all() for value in found.values())


def test_a_pair_that_nobody_judged_is_no_pair_of_the_last_objective():
    batch = replace(made_up(BradleyTerry()), pair_objective=torch.full((len(PAIRS),), -1))
    with pytest.raises(RuntimeError, match="index -1"):
        BradleyTerry().loss(batch)


def test_the_first_weights_have_the_stated_spread():
    weights = BradleyTerry().parameters(400, ("a", "b"), torch.Generator().manual_seed(0))["head.weight"]
    assert weights.shape == (2, 400) and weights.var().item() == pytest.approx(1 / 401, rel=0.15)


@pytest.mark.parametrize(
    "options", [{"margin_scale": 2.0}, {"smooth_below": 1.0}, {"label_smoothing": 0.5}, {"centre": -1.0}], ids=str
)
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(ValidationError):
        BradleyTerry(**options)
