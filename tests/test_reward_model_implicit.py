"""The reward models `implicit` and `implicit-outcome`: the log-ratio of the adapted model itself."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from reward_forms import PAIRS, ROWS, check_form, gradients, made_up
from torch.nn.functional import binary_cross_entropy_with_logits

from moalign.api import ConfigError, DataError, PairTerms, PluginError, log_ratios
from moalign_plugins.objectives.dpo import DPO
from moalign_plugins.reward_models.implicit import ImplicitFromPairs
from moalign_plugins.reward_models.implicit_outcome import ImplicitFromOutcomes

ONE = ("right",)
FORMS = [ImplicitFromPairs, ImplicitFromOutcomes]


@pytest.mark.parametrize("form", [ImplicitFromPairs(beta=0.7, label_smoothing=0.2), ImplicitFromOutcomes(beta=0.5)])
def test_it_is_a_reward_model(form):
    check_form(form, ONE)


def test_it_is_one_with_missing_outcomes():
    check_form(ImplicitFromOutcomes(beta=0.5), ONE, missing=True)


@pytest.mark.parametrize("form", FORMS)
def test_the_score_is_the_sum_of_the_rewards_of_tokens(form):
    batch = made_up(form(), ONE)
    rewards = form(beta=0.3).token_rewards(batch)
    assert rewards.shape == batch.mask.shape and rewards[batch.mask == 0].eq(0).all()
    torch.testing.assert_close(rewards.sum(1), 0.3 * log_ratios(batch))
    torch.testing.assert_close(form(beta=0.3).scores(batch)[:, 0], rewards.sum(1))


@pytest.mark.parametrize("form", FORMS)
def test_a_model_that_is_its_base_has_no_reward_and_costs_log_2(form):
    batch = made_up(form(), ONE)
    batch = replace(batch, logps=batch.ref_logps)
    assert form().scores(batch).eq(0).all() and form().token_rewards(batch).eq(0).all()
    torch.testing.assert_close(form().loss(batch), torch.full_like(form().loss(batch), math.log(2)))


@pytest.mark.parametrize("form", FORMS)
def test_beta_is_a_scale_of_the_log_ratio(form):
    batch = made_up(form(), ONE)
    stretched = replace(batch, logps=batch.ref_logps + 3 * (batch.logps - batch.ref_logps))
    torch.testing.assert_close(form(beta=0.6).loss(batch), form(beta=0.2).loss(stretched))


def test_from_pairs_it_is_direct_preference_optimisation():
    batch = made_up(ImplicitFromPairs(), ONE)
    one = torch.ones(len(PAIRS), dtype=torch.float64)
    terms = PairTerms(one, 0 * one, one)
    torch.testing.assert_close(ImplicitFromPairs(beta=0.3).loss(batch), DPO(beta=0.3).loss(batch, terms))
    ours, theirs = ImplicitFromPairs(label_smoothing=0.2), DPO(label_smoothing=0.1)
    torch.testing.assert_close(ours.loss(batch), theirs.loss(batch, terms))


def test_from_outcomes_it_is_binary_cross_entropy():
    form = ImplicitFromOutcomes(beta=0.4)
    batch = made_up(form, ONE)
    assert {0.0, 1.0} == set(batch.rewards.flatten().tolist())
    expected = binary_cross_entropy_with_logits(0.4 * log_ratios(batch), batch.rewards[:, 0], reduction="none")
    torch.testing.assert_close(form.loss(batch), expected)


def test_a_missing_outcome_has_loss_0_and_no_gradient():
    form = ImplicitFromOutcomes()
    batch = made_up(form, ONE)
    batch.rewards[2] = torch.nan
    losses, found = gradients(form, batch)
    assert losses[2] == 0 and found["logps"][2].eq(0).all()
    others = [row for row in range(ROWS) if row != 2]
    assert losses[others].gt(0).all() and found["logps"][others].ne(0).any(1).all()


def test_tokens_outside_the_response_do_not_matter():
    for form in FORMS:
        batch = made_up(form(), ONE)
        noisy = replace(batch, logps=batch.logps + 5 * (1 - batch.mask))
        assert form().loss(noisy).equal(form().loss(batch))
        assert form().token_rewards(noisy).equal(form().token_rewards(batch))


def test_what_it_refuses():
    for form in FORMS:
        with pytest.raises(ConfigError, match="there are 2: a, b"):
            form().check(("a", "b"))
        with pytest.raises(ValidationError):
            form(beta=0.0)
        with pytest.raises(PluginError, match='"reference"'):
            form().loss(replace(made_up(form(), ONE), ref_logps=None))
    batch = made_up(ImplicitFromOutcomes(), ONE)
    for wrong in (-1.0, 1.5):
        batch.rewards[0] = wrong
        with pytest.raises(DataError, match="from 0"):
            ImplicitFromOutcomes().loss(batch)
