"""The reward model `features`: Bradley-Terry on a small network over other scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from reward_forms import NAMES, PAIRS, check_form, gradients, made_up
from torch.nn.functional import logsigmoid, silu

from moalign.api import ConfigError, DataError, PluginError
from moalign_plugins.reward_models.features import Features

TWO = {"features": ("harmless", "brief")}


@pytest.mark.parametrize("hidden", [(), (3,), (3, 2)], ids=str)
def test_it_is_a_reward_model(hidden):
    check_form(Features(**TWO, hidden=hidden))


def test_the_networks_are_these():
    form = Features(**TWO, hidden=(3, 2))
    batch = made_up(form)
    for column in range(len(NAMES)):
        state = batch.rewards[:, 1:]
        for index in (0, 1):
            weight, bias = (batch.parameters[f"hidden.{index}.{part}"][column] for part in ("weight", "bias"))
            state = silu(state @ weight.T + bias)
        expected = state @ batch.parameters["output.weight"][column]
        torch.testing.assert_close(form.scores(batch)[:, column], expected)
    scores, judged = form.scores(batch), batch.pair_objective.tolist()
    difference = torch.stack([scores[w, k] - scores[r, k] for (w, r), k in zip(PAIRS, judged, strict=True)])
    learned = torch.tensor([NAMES[k] == "helpful" for k in judged])
    torch.testing.assert_close(form.loss(batch), -logsigmoid(difference).where(learned, 0.0))


def test_an_objective_that_is_a_feature_is_not_learned():
    form = Features(**TWO)
    batch = made_up(form)
    losses, found = gradients(form, batch)
    of_features = batch.pair_objective != 0
    assert losses[of_features].eq(0).all() and losses[~of_features].gt(0).all()
    assert all(value[1:].eq(0).all() and value[0].ne(0).any() for value in found.values())
    batch.rewards[batch.pairs[of_features].flatten(), 1] = torch.nan  # who judges by a feature need not know it
    batch = replace(batch, pair_objective=torch.ones_like(batch.pair_objective))
    assert form.loss(batch).eq(0).all()


def test_an_objective_that_no_pair_judged_scores_0():
    form = Features(**TWO)
    first = form.parameters(4, NAMES, torch.Generator().manual_seed(0))
    batch = replace(made_up(form), parameters={name: value.double() for name, value in first.items()})
    assert form.scores(batch).eq(0).all()
    _, found = gradients(form, replace(batch, pair_objective=torch.full((len(PAIRS),), 0)))
    assert found["output.weight"][1:].eq(0).all() and found["output.weight"][0].ne(0).any()


def newton(differences: np.ndarray, ridge: float) -> np.ndarray:
    """Logistic regression without intercept, all labels 1, with a penalty ridge/2 |w|^2: an independent fit."""
    weights = np.zeros(differences.shape[1])
    for _ in range(50):
        wrong = 1 / (1 + np.exp(differences @ weights))
        gradient = ridge * weights - differences.T @ wrong
        hessian = ridge * np.eye(len(weights)) + differences.T @ (differences * (wrong * (1 - wrong))[:, None])
        weights = weights - np.linalg.solve(hessian, gradient)
    return weights


def worth_learning(order: list[int]):
    """60 pairs judged by noisy weights on four features, the features in this order; the first objective judges."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(120, 4))
    pairs = np.arange(120).reshape(60, 2)
    better = (features[pairs[:, 0]] - features[pairs[:, 1]]) @ np.array([1.0, -0.5, 0.3, 0.0])
    pairs = np.where((better + generator.logistic(size=60) > 0)[:, None], pairs, pairs[:, ::-1])
    names = tuple("abcd"[index] for index in order)
    columns = np.concatenate([np.full((120, 1), np.nan), features], axis=1)
    form = Features(features=names, hidden=())
    few = made_up(form, ("judged", *"abcd"))
    batch = replace(
        few,
        rewards=torch.tensor(columns),
        pairs=torch.tensor(pairs.copy()),
        pair_objective=torch.zeros(60, dtype=torch.long),
        strength=torch.ones(60),
    )
    return form, batch, (features[pairs[:, 0]] - features[pairs[:, 1]])[:, order]


def descended(form, batch, ridge: float) -> np.ndarray:
    weights = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=500, tolerance_change=1e-16, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        total = form.loss(replace(batch, parameters={"output.weight": weights})).sum() + ridge / 2 * (weights**2).sum()
        total.backward()
        return total

    optimiser.step(closure)
    assert weights[1:].detach().eq(0).all()
    return weights[0].detach().numpy()


def test_without_hidden_layers_it_is_logistic_regression_on_differences():
    form, batch, differences = worth_learning([0, 1, 2, 3])
    expected = newton(differences, 0.1)
    np.testing.assert_allclose(descended(form, batch, 0.1), expected, atol=1e-6)
    assert expected[0] > 0.3 and expected[1] < -0.1


def test_features_in_another_order_have_their_weights_in_that_order():
    plain, shuffled = (descended(*worth_learning(order)[:2], 0.1) for order in ([0, 1, 2, 3], [2, 0, 3, 1]))
    np.testing.assert_allclose(shuffled, plain[[2, 0, 3, 1]], atol=1e-6)


def test_a_response_without_a_feature_is_refused_and_without_another_score_is_not():
    form = Features(**TWO)
    batch = made_up(form, missing=True)  # helpful of row 1, which is no feature, and all of row 6, in no pair
    losses, found = gradients(form, batch)
    assert losses.isfinite().all() and all(value.isfinite().all() for value in found.values())
    with pytest.raises(DataError, match="no score for 'harmless'"):
        form.scores(batch)
    batch.rewards[0, 2] = torch.nan
    with pytest.raises(DataError, match="no score for 'brief'"):
        form.loss(batch)


def test_what_it_refuses():
    for wrong in ({"features": ()}, {"features": ("brief", "brief")}, {**TWO, "hidden": (0,)}):
        with pytest.raises(ValidationError):
            Features(**wrong)
    with pytest.raises(ConfigError, match="features: no objective 'short'; there is helpful, harmless, brief"):
        Features(features=("short",)).check(NAMES)
    with pytest.raises(ConfigError, match="every objective is a feature"):
        Features(features=NAMES).check(NAMES)
    with pytest.raises(PluginError, match="by name"):
        Features(**TWO).loss(replace(made_up(Features(**TWO)), objectives=()))
