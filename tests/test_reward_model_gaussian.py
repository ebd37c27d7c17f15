"""The reward models `gaussian` and `gaussian-pairs`: several heads with a mean and a standard deviation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reward_forms import NAMES, PAIRS, check_form, gradients, made_up
from torch.distributions import Normal

from moalign.api import ConfigError
from moalign_plugins.reward_models.gaussian import Gaussian
from moalign_plugins.reward_models.gaussian_pairs import GaussianPairs

FORMS = [Gaussian, GaussianPairs]


@pytest.mark.parametrize("options", [{}, {"heads": 1, "alpha": 1.0}, {"heads": 3, "least_deviation": 0.0}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_it_is_a_reward_model(form, options):
    check_form(form(**options))


def test_it_is_one_with_missing_scores():
    check_form(Gaussian(scale={"brief": 3.0}, shift=0.5), missing=True)


def test_the_loss_is_the_negative_log_density_of_the_scores():
    form = Gaussian(heads=3, scale=2.0, shift=1.0)
    batch = made_up(form)
    means, deviations = form.gaussians(batch)
    density = Normal(means, deviations).log_prob(2 * batch.rewards + 1)
    torch.testing.assert_close(form.loss(batch), -density.mean(0).mean(1))


def test_the_loss_of_a_pair_is_the_negative_log_probability_of_a_positive_difference():
    form = GaussianPairs(heads=2, centre=0.0)
    batch = made_up(form)
    means, deviations = form.gaussians(batch)
    expected = []
    for (w, r), k in zip(PAIRS, batch.pair_objective.tolist(), strict=True):
        spread = (deviations[:, w, k] ** 2 + deviations[:, r, k] ** 2).sqrt()
        above = 1 - Normal(means[:, w, k] - means[:, r, k], spread).cdf(torch.zeros(2, dtype=torch.float64))
        expected.append(-above.log().mean())
    torch.testing.assert_close(form.loss(batch), torch.stack(expected))


def test_the_probability_of_a_pair_is_the_share_of_draws_where_chosen_is_above():
    form = GaussianPairs(heads=1, centre=0.0)
    batch = made_up(form)
    means, deviations = form.gaussians(batch)
    draws = Normal(means[0], deviations[0]).sample((200_000,))
    judged = batch.pair_objective
    above = draws[:, batch.pairs[:, 0], judged] > draws[:, batch.pairs[:, 1], judged]
    torch.testing.assert_close((-form.loss(batch)).exp(), above.double().mean(0), rtol=0, atol=5e-3)


@pytest.mark.parametrize("form", FORMS)
def test_one_head_is_plain_whatever_alpha(form):
    batch = made_up(form(heads=1))
    plain = batch.final @ batch.parameters["mean.weight"][0].T
    for alpha in (0.0, 0.3, 1.0):
        torch.testing.assert_close(form(heads=1, alpha=alpha).scores(batch), plain)
    assert form(heads=1).head(batch.parameters).equal(batch.parameters["mean.weight"][0])
    assert form(heads=2).head(made_up(form(heads=2)).parameters) is None


@pytest.mark.parametrize("form", FORMS)
def test_scores_rise_with_alpha_from_the_smallest_head_to_the_surest(form):
    batch = made_up(form())
    means, deviations = form().gaussians(batch)
    scores = torch.stack([form(alpha=alpha).scores(batch) for alpha in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)])
    assert (scores.diff(dim=0) >= -1e-12).all() and (scores[-1] > scores[0] + 0.1).any()
    torch.testing.assert_close(scores[0], means.min(0).values)
    for row in range(len(batch.mask)):
        for column in range(len(NAMES)):
            surest = deviations[:, row, column].argmin()
            assert scores[-1, row, column] == pytest.approx(means[surest, row, column].item())


@pytest.mark.parametrize("form", FORMS)
def test_heads_that_say_the_same_score_the_same_whatever_alpha(form):
    batch = made_up(form(heads=4))
    same = {name: value[:1].expand_as(value).clone() for name, value in batch.parameters.items()}
    batch = replace(batch, parameters=same)
    torch.testing.assert_close(form(heads=4, alpha=0.0).scores(batch), form(heads=4, alpha=1.0).scores(batch))


@pytest.mark.parametrize("form", FORMS)
def test_heads_start_apart_with_deviation_1(form):
    first = form(least_deviation=0.0).parameters(4, NAMES, torch.Generator().manual_seed(0))
    batch = replace(made_up(form()), parameters={name: value.double() for name, value in first.items()})
    means, deviations = form(least_deviation=0.0).gaussians(batch)
    assert deviations.eq(1).all()
    assert means.std(0).min() > 1e-3


def test_the_best_deviation_is_the_root_mean_square_error():
    """With one constant deviation its gradient is 0 there, and nowhere else."""
    form = Gaussian(heads=1, least_deviation=0.0)
    batch = made_up(form, ("only",))
    values = {name: torch.zeros_like(value) for name, value in batch.parameters.items()}
    values["mean.weight"] = batch.parameters["mean.weight"]
    error = batch.rewards[:, 0] - batch.final @ values["mean.weight"][0, 0]
    for factor in (1.0, 1.5):
        values["log_deviation.bias"] = (factor * error.square().mean().sqrt()).log().reshape(1, 1)
        _, found = gradients(form, replace(batch, parameters=values))
        assert (abs(found["log_deviation.bias"].item()) < 1e-10) == (factor == 1.0)


def test_an_exact_fit_has_a_bound_with_a_least_deviation():
    form = Gaussian(heads=1, least_deviation=1e-3)
    batch = made_up(form, ("only",))
    values = {name: torch.zeros_like(value) for name, value in batch.parameters.items()}
    values["log_deviation.bias"] -= 1e4
    exact = replace(batch, parameters=values, rewards=torch.zeros_like(batch.rewards))
    losses, found = gradients(form, exact)
    assert losses.isfinite().all() and all(value.isfinite().all() for value in found.values())


def test_far_wrong_pairs_stay_finite():
    form = GaussianPairs()
    batch = made_up(form)
    losses, found = gradients(form, replace(batch, final=30 * batch.final))
    assert losses.isfinite().all() and losses.max() > 30
    assert all(value.isfinite().all() for value in found.values())


def test_a_missing_score_has_no_gradient():
    form = Gaussian()
    batch = made_up(form)
    batch.rewards[:, 1] = torch.nan
    _, found = gradients(form, batch)
    for name in ("mean.weight", "log_deviation.weight", "log_deviation.bias"):
        assert found[name][:, 1].eq(0).all() and found[name][:, 0].ne(0).all()


def test_a_wrong_name_is_refused():
    with pytest.raises(ConfigError, match="scale: no objective 'kind'"):
        Gaussian(scale={"kind": 2.0}).parameters(4, NAMES, torch.Generator())
