"""The reward model `mixture`: components mixed by a router on the prompt, and the update that adapts the weights."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import permutations

import pytest
import torch
from reward_forms import NAMES, PAIRS, check_form, gradients, made_up
from torch import Tensor

from moalign.api import Batch, PluginError, RewardModel
from moalign_plugins.reward_models.bradley_terry import BradleyTerry
from moalign_plugins.reward_models.mixture import Mixture


@pytest.mark.parametrize("options", [{}, {"components": 3, "balance": 0.2}, {"components": 1}], ids=str)
def test_it_is_a_reward_model(options):
    check_form(Mixture(**options))


assert_same = partial(torch.testing.assert_close, rtol=1e-14, atol=1e-14)


def test_one_component_is_bradley_terry():
    """To the last digits: another processor adds the same numbers up in another order."""
    form = Mixture(components=1)
    batch = made_up(form)
    plain = replace(batch, parameters={"head.weight": batch.parameters["head.weight"][0]})
    assert_same(form.loss(batch), BradleyTerry().loss(plain))
    assert_same(form.scores(batch), BradleyTerry().scores(plain))
    assert form.head(batch.parameters).equal(plain.parameters["head.weight"])
    (one, ours), (two, theirs) = gradients(form, batch), gradients(BradleyTerry(), plain)
    assert_same(one, two)
    assert_same(ours["final"], theirs["final"])
    assert Mixture(components=2).head(made_up(Mixture()).parameters) is None


def test_the_loss_is_the_negative_log_of_the_mixed_probability():
    form = Mixture(components=3)
    batch = made_up(form)
    values = batch.parameters
    expected = []
    for (w, r), k in zip(PAIRS, batch.pair_objective.tolist(), strict=True):
        router = values["router.weight"][:, k] @ batch.context[w] + values["router.bias"][:, k]
        components = values["head.weight"][:, k] @ (batch.final[w] - batch.final[r])
        expected.append(-(router.softmax(0) * components.sigmoid()).sum().log())
    torch.testing.assert_close(form.loss(batch), torch.stack(expected))


def test_components_in_another_order_are_the_same_mixture():
    form = Mixture(components=3, balance=0.1)
    batch = made_up(form)
    other = replace(batch, parameters={name: value[[2, 0, 1]] for name, value in batch.parameters.items()})
    torch.testing.assert_close(form.loss(other), form.loss(batch))
    torch.testing.assert_close(form.scores(other), form.scores(batch))


def test_the_same_component_twice_is_that_component():
    form = Mixture()
    batch = made_up(form)
    same = {**batch.parameters, "head.weight": batch.parameters["head.weight"][:1].expand(2, -1, -1).clone()}
    one = replace(batch, parameters={"head.weight": same["head.weight"][0]})
    batch = replace(batch, parameters=same)
    torch.testing.assert_close(form.loss(batch), BradleyTerry().loss(one))
    torch.testing.assert_close(form.scores(batch), BradleyTerry().scores(one))


def test_the_balance_is_the_divergence_from_equal_weights():
    form = Mixture(components=3, balance=0.5)
    batch = made_up(form)
    extra = form.loss(batch) - Mixture(components=3).loss(batch)
    weights = form.log_weights(batch).exp()[:, batch.pairs[:, 0], batch.pair_objective]
    torch.testing.assert_close(extra, 0.5 * (math.log(3) + (weights * weights.log()).sum(0)))
    assert (extra > 0).all()
    first = form.parameters(4, NAMES, torch.Generator().manual_seed(0))
    start = replace(batch, parameters={name: value.double() for name, value in first.items()})
    torch.testing.assert_close(form.log_weights(start).exp(), torch.full((3, 7, 3), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close(form.loss(start), Mixture(components=3).loss(start))


def test_extreme_components_and_routers_stay_finite():
    form = Mixture(balance=0.1)
    batch = made_up(form)
    losses, found = gradients(form, replace(batch, final=1e4 * batch.final, context=1e4 * batch.context))
    assert losses.isfinite().all() and all(value.isfinite().all() for value in found.values())


# --- two populations that disagree ----------------------------------------------------------------------------------

UTILITIES = torch.tensor([[4.0, 0.0, -2.0], [-3.0, 3.0, 0.0]], dtype=torch.float64)  # of three responses
SHARES = torch.tensor([0.6, 0.4], dtype=torch.float64)


def population() -> tuple[Batch, Tensor]:
    """All ordered pairs of three responses to one prompt, with how often a random judge prefers them so."""
    pairs = torch.tensor(list(permutations(range(3), 2)))
    difference = UTILITIES[:, pairs[:, 0]] - UTILITIES[:, pairs[:, 1]]
    nothing = torch.zeros(3, 1, dtype=torch.float64)
    batch = Batch(
        logps=nothing,
        mask=nothing,
        pairs=pairs,
        pair_objective=torch.zeros(len(pairs), dtype=torch.long),
        preference=nothing,
        strength=torch.ones(len(pairs), dtype=torch.float64),
        groups=torch.zeros(3, dtype=torch.long),
        final=torch.eye(3, dtype=torch.float64),
        context=torch.ones(3, 3, dtype=torch.float64),
        objectives=("only",),
    )
    return batch, (SHARES[:, None] * difference.sigmoid()).sum(0) / 3  # three unordered pairs, equally often


def fitted(form: RewardModel) -> float:
    """The lowest cross-entropy in nats per pair that descent finds."""
    batch, often = population()
    first = form.parameters(3, ("only",), torch.Generator().manual_seed(1))
    values = {name: value.double().requires_grad_() for name, value in first.items()}
    optimiser = torch.optim.LBFGS(values.values(), max_iter=300, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        total = (often * form.loss(replace(batch, parameters=values))).sum()
        total.backward()
        return total

    optimiser.step(closure)
    return closure().item()


def test_a_mixture_fits_two_populations_and_bradley_terry_cannot():
    _, often = population()
    total = often.reshape(3, 2).sum(1)  # (0,1), (0,2), (1,0), ...: every order of a pair is in it once
    assert often.sum().item() == pytest.approx(1) and total.sum().item() == pytest.approx(1)
    entropy = -(often * (3 * often).log()).sum().item()
    plain, mixed = fitted(BradleyTerry()), fitted(Mixture())
    assert mixed == pytest.approx(entropy, abs=1e-6)
    assert plain > entropy + 0.01


def test_it_says_what_is_not_supplied():
    with pytest.raises(PluginError, match='"context"'):
        Mixture().loss(replace(made_up(Mixture()), context=None))
    with pytest.raises(PluginError, match='"final"'):
        Mixture().loss(replace(made_up(Mixture()), final=None))
