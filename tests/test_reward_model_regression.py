"""The reward model `regression`: squared error on the scores that are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from reward_forms import NAMES, ROWS, check_form, gradients, made_up

from moalign.api import ConfigError, PluginError
from moalign_plugins.reward_models.regression import Regression

PER_OBJECTIVE = {"scale": {"helpful": 20.0, "brief": 0.5}, "shift": {"helpful": 10.0}}


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("options", [{}, {"scale": 2.0, "shift": -1.0}, PER_OBJECTIVE], ids=str)
def test_it_is_a_reward_model(options, missing):
    check_form(Regression(**options), missing=missing)


def test_the_loss_is_the_mean_over_the_scores_that_are_known():
    batch = made_up(Regression(), missing=True)
    scores, labels = (batch.final @ batch.parameters["head.weight"].T).tolist(), batch.rewards.tolist()
    expected = []
    for row in range(ROWS):
        errors = [(s - y) ** 2 for s, y in zip(scores[row], labels[row], strict=True) if y == y]
        expected.append(sum(errors) / len(errors) if errors else 0.0)
    assert expected[6] == 0
    torch.testing.assert_close(Regression().loss(batch), torch.tensor(expected, dtype=torch.float64))


def test_a_missing_score_has_no_gradient():
    batch = made_up(Regression())
    batch.rewards[:, 1] = torch.nan
    batch.rewards[3] = torch.nan
    _, found = gradients(Regression(), batch)
    assert found["head.weight"][1].eq(0).all() and found["final"][3].eq(0).all()
    assert found["head.weight"][0].ne(0).all() and found["final"][2].ne(0).any()


def test_what_is_written_beside_a_missing_score_does_not_matter():
    """The other scores of the row are as if the objective were not there."""
    batch = made_up(Regression())
    batch.rewards[:, 2] = torch.nan
    fewer = replace(
        batch,
        rewards=batch.rewards[:, :2],
        objectives=NAMES[:2],
        parameters={"head.weight": batch.parameters["head.weight"][:2]},
    )
    torch.testing.assert_close(Regression().loss(batch), Regression().loss(fewer))


def test_scores_are_mapped_by_scale_and_shift():
    form = Regression(scale=20.0, shift=10.0)
    labels = torch.tensor([[0.0, 1.0, 4.0], [2.5, torch.nan, 3.0]], dtype=torch.float64)
    mapped = form.from_labels(labels)
    torch.testing.assert_close(mapped[0], torch.tensor([10.0, 30.0, 90.0], dtype=torch.float64))
    form = Regression(**PER_OBJECTIVE)
    torch.testing.assert_close(form.from_labels(labels, NAMES)[0], torch.tensor([10.0, 1.0, 2.0], dtype=torch.float64))


def test_the_loss_in_mapped_units_is_that_of_mapped_scores():
    batch = made_up(Regression(), missing=True)
    by_hand = replace(batch, rewards=20 * batch.rewards + 10)
    torch.testing.assert_close(Regression(scale=20.0, shift=10.0).loss(batch), Regression().loss(by_hand))


def test_full_labels_are_fitted_by_least_squares():
    batch = made_up(Regression())
    weights = torch.linalg.lstsq(batch.final, batch.rewards).solution.T.contiguous()
    _, found = gradients(Regression(), replace(batch, parameters={"head.weight": weights}))
    torch.testing.assert_close(found["head.weight"], torch.zeros_like(weights), rtol=0, atol=1e-12)


def test_what_it_refuses():
    with pytest.raises(ValidationError):
        Regression(scale=-1.0)
    with pytest.raises(ValidationError):
        Regression(scale={"helpful": 0.0})
    with pytest.raises(ConfigError, match="shift: no objective 'helpfull'; there is helpful, harmless, brief"):
        Regression(shift={"helpfull": 1.0}).check(NAMES)
    with pytest.raises(PluginError, match="objectives"):
        Regression(scale={"helpful": 2.0}).loss(replace(made_up(Regression()), objectives=()))
