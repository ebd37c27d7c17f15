"""Combiners as mathematics: in a small world that can be enumerated, the minimiser of the population loss is known."""

from __future__ import annotations

import dataclasses
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moalign.api import Batch, PluginError, Preference, PreferenceError
from moalign_plugins.combiners.linear import Linear
from moalign_plugins.combiners.modpo import MODPO
from moalign_plugins.objectives.dpo import DPO
from moalign_plugins.objectives.ipo import IPO
from moalign_plugins.objectives.rebel import REBEL
from moalign_plugins.objectives.rpo import RPO

PROMPTS, RESPONSES, BETA = 2, 4, 0.3
WEIGHTS = [(1.0,), (0.7, 0.3), (0.05, 0.95), (0.2, 0.5, 0.3), (0.6, 0.0, 0.4)]


def world(weights, judges, seed=0, shift=0.0):
    """All ordered pairs of responses to each prompt, once for each judge; rewards r[prompt, response, objective].

    Returns the rewards (centred within half a unit, so that 1/2 + differences are probabilities), the reference's
    logits and a batch whose policy is yet to be filled in.
    """
    generator = torch.Generator().manual_seed(seed)
    m = len(weights)
    rewards = 0.5 * torch.rand(PROMPTS, RESPONSES, m, generator=generator, dtype=torch.float64) - 0.25
    reference = torch.randn(PROMPTS, RESPONSES, generator=generator, dtype=torch.float64)
    shifted = rewards + shift * torch.arange(1, PROMPTS + 1)[:, None, None]
    orders = [
        (prompt * RESPONSES + a, prompt * RESPONSES + b)
        for prompt in range(PROMPTS)
        for a, b in permutations(range(RESPONSES), 2)
    ]
    pairs = torch.tensor(orders * len(judges))
    rows = shifted.flatten(0, 1)
    batch = Batch(
        logps=torch.full((PROMPTS * RESPONSES, 1), torch.nan),
        mask=torch.ones(PROMPTS * RESPONSES, 1, dtype=torch.float64),
        pairs=pairs,
        pair_objective=torch.tensor(judges).repeat_interleave(len(orders)),
        preference=torch.tensor(weights, dtype=torch.float64).expand(PROMPTS * RESPONSES, m),
        strength=torch.ones(len(pairs), dtype=torch.float64),
        groups=torch.arange(PROMPTS).repeat_interleave(RESPONSES),
        ref_logps=reference.log_softmax(1).reshape(-1, 1),
        margins=rows[pairs[:, 0]] - rows[pairs[:, 1]],
    )
    return rewards, reference, batch


def at(batch, logits):
    return dataclasses.replace(batch, logps=logits.log_softmax(1).reshape(-1, 1))


def optimum(rewards, reference, weights, beta=BETA):
    """reference * exp(w.r / beta), as logits."""
    return reference + rewards @ torch.tensor(weights, dtype=torch.float64) / beta


def population_loss(objective, combiner, batch, probability):
    """The expected loss, every pair with the probability that its judge prefers the first response."""
    terms = combiner.pair_terms(batch)
    return (probability * terms.weight * objective.loss(batch, terms)).sum()


def own_margin(batch):
    return batch.margins.gather(1, batch.pair_objective[:, None]).squeeze(1)


def bradley_terry(batch):
    return torch.sigmoid(own_margin(batch))


def linear_link(batch):
    return 0.5 + own_margin(batch)


LABELS = [(DPO(beta=BETA), bradley_terry), (IPO(beta=BETA), linear_link), (RPO(beta=BETA, eta=0.0), bradley_terry)]


def judges_of(weights):
    """Each objective with weight as the only judge, and all of them together."""
    single = [(k,) for k, weight in enumerate(weights) if weight > 0]
    return [*single, tuple(range(len(weights)))]


CASES = [(weights, judges) for weights in WEIGHTS for judges in judges_of(weights)]


@pytest.mark.parametrize(("objective", "probability"), LABELS, ids=lambda x: getattr(x, "__name__", repr(x)))
@pytest.mark.parametrize(("weights", "judges"), CASES, ids=str)
def test_whoever_judged_the_pairs_modpo_is_stationary_at_the_optimum(weights, judges, objective, probability):
    rewards, reference, batch = world(weights, judges)
    logits = optimum(rewards, reference, weights).requires_grad_()
    loss = population_loss(objective, MODPO(), at(batch, logits), probability(batch))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.abs().max() < 1e-12 / min(weight for weight in weights if weight > 0)
    away = (reference + 0.1 * rewards[..., 0]).requires_grad_()
    (elsewhere,) = torch.autograd.grad(population_loss(objective, MODPO(), at(batch, away), probability(batch)), away)
    assert elsewhere.abs().max() > 1e-4


@pytest.mark.parametrize(("objective", "probability"), LABELS[:2], ids=lambda x: getattr(x, "__name__", repr(x)))
@pytest.mark.parametrize(("weights", "judges"), [((0.7, 0.3), (0,)), ((0.7, 0.3), (1,)), ((0.2, 0.5, 0.3), (0, 1, 2))])
def test_minimising_modpo_leads_to_the_optimum(weights, judges, objective, probability):
    rewards, reference, batch = world(weights, judges)
    logits = reference.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [logits], lr=1, max_iter=300, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        loss = population_loss(objective, MODPO(), at(batch, logits), probability(batch))
        loss.backward()
        return loss

    optimiser.step(closure)
    found, expected = logits.detach().softmax(1), optimum(rewards, reference, weights).softmax(1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert (reference.softmax(1) - expected).abs().max() > 0.01


def test_without_margins_the_optimum_is_missed():
    """The same labels under linear weighting, or a margin of the wrong sign: the tests above can fail."""
    weights = (0.7, 0.3)
    rewards, reference, batch = world(weights, (0,))
    logits = optimum(rewards, reference, weights).requires_grad_()
    plain = population_loss(DPO(beta=BETA), Linear(), at(batch, logits), bradley_terry(batch))
    flipped = dataclasses.replace(batch, margins=-batch.margins)
    wrong = population_loss(DPO(beta=BETA), MODPO(), at(flipped, logits), bradley_terry(batch))
    for loss in (plain, wrong):
        assert torch.autograd.grad(loss, logits)[0].abs().max() > 1e-3


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_rebel_has_no_residual_at_the_optimum(weights):
    rewards, reference, batch = world(weights, (0,))
    batch = dataclasses.replace(batch, pair_objective=torch.full_like(batch.pair_objective, -1))
    solved, started = at(batch, optimum(rewards, reference, weights)), at(batch, reference)
    terms = Linear().pair_terms(solved)
    assert REBEL(beta=BETA).loss(solved, terms).max() < 1e-24
    assert REBEL(beta=BETA).loss(started, terms).max() > 1e-3


@pytest.mark.parametrize(("objective", "combiner"), [(DPO(), MODPO()), (IPO(), MODPO()), (REBEL(), Linear())], ids=repr)
def test_adding_a_constant_per_prompt_to_the_rewards_changes_nothing(objective, combiner):
    losses = []
    for shift in (0.0, 4.0):
        _, reference, batch = world((0.2, 0.5, 0.3), (0, 1, 2), shift=shift)
        batch = at(batch, reference.flip(1))
        losses.append(objective.loss(batch, combiner.pair_terms(batch)))
    torch.testing.assert_close(*losses, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("objective", [DPO(), DPO(label_smoothing=0.2), IPO(), RPO()], ids=repr)
def test_with_a_one_hot_preference_modpo_is_the_plain_loss(objective):
    _, reference, batch = world((0.0, 1.0, 0.0), (0, 1, 2))
    batch = dataclasses.replace(at(batch, reference.flip(1)), margins=None)
    modpo, linear = MODPO().pair_terms(batch), Linear().pair_terms(batch)
    assert torch.equal(modpo.weight, linear.weight)
    assert torch.equal(modpo.weight, (batch.pair_objective == 1).double())
    assert torch.equal(objective.loss(batch, modpo), objective.loss(batch, linear))


def test_modpo_by_hand():
    _, _, batch = world((0.2, 0.5, 0.3), (1,))
    terms = MODPO().pair_terms(batch)
    ones = torch.ones_like(terms.scale)
    torch.testing.assert_close(terms.scale, 2 * ones)
    torch.testing.assert_close(terms.weight, 0.5 * ones)
    torch.testing.assert_close(terms.margin, (0.2 * batch.margins[:, 0] + 0.3 * batch.margins[:, 2]) / 0.5)
    assert terms.difference is None


@pytest.mark.parametrize("small", [1e-3, 1e-6, 1e-12, 1e-19, 1e-30, 1e-40, 0.0])
def test_gradients_stay_bounded_as_the_judges_weight_vanishes(small):
    _, reference, batch = world((small, 1.0), (0,))
    batch = dataclasses.replace(
        at(batch, reference.flip(1)), **{name: getattr(batch, name).float() for name in ("preference", "margins")}
    )
    logps = batch.logps.float().requires_grad_()
    batch = dataclasses.replace(batch, logps=logps, ref_logps=batch.ref_logps.float(), mask=batch.mask.float())
    terms = MODPO().pair_terms(batch)
    for field in (terms.scale, terms.margin, terms.weight):
        assert field.isfinite().all()
    weighted = terms.weight * DPO(beta=BETA).loss(batch, terms)
    assert weighted.isfinite().all()
    for value in weighted:
        (gradient,) = torch.autograd.grad(value, logps, retain_graph=True)
        assert gradient.abs().max() <= BETA * (1 + 1e-5)
    if small < 1e-20:
        assert (terms.weight == 0).all() and (terms.scale == 1).all() and (terms.margin == 0).all()


def test_what_carries_no_weight_may_be_unknown():
    _, _, batch = world((0.6, 0.0, 0.4), (0, 1, 2))
    unknown = batch.margins.clone()
    unknown[:, 1] = torch.nan
    known = dataclasses.replace(batch, margins=unknown)
    for field in ("scale", "margin", "weight"):
        assert torch.equal(getattr(MODPO().pair_terms(known), field), getattr(MODPO().pair_terms(batch), field))
    difference = Linear().pair_terms(known).difference
    torch.testing.assert_close(difference, 0.6 * batch.margins[:, 0] + 0.4 * batch.margins[:, 2])


def test_the_judges_own_margin_is_not_needed_by_a_pairwise_loss():
    _, reference, batch = world((0.6, 0.4), (0,))
    margins = batch.margins.clone()
    margins[:, 0] = torch.nan
    partial = dataclasses.replace(at(batch, reference), margins=margins)
    value = DPO().loss(partial, MODPO().pair_terms(partial))
    assert torch.equal(value, DPO().loss(at(batch, reference), MODPO().pair_terms(batch)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_modpo_names_the_objective_whose_margin_is_unknown(bad):
    _, _, batch = world((0.2, 0.5, 0.3), (0,))
    margins = batch.margins.clone()
    margins[4, 2] = bad
    with pytest.raises(PluginError, match=r"margin of objective 2 is unknown for pair 4 .* the weight 0.3"):
        MODPO().pair_terms(dataclasses.replace(batch, margins=margins))
    with pytest.raises(PluginError, match="needs the margins of the other objectives"):
        MODPO().pair_terms(dataclasses.replace(batch, margins=None))


def test_modpo_refuses_pairs_that_nobody_judged():
    _, _, batch = world((0.2, 0.8), (0,))
    judges = batch.pair_objective.clone()
    judges[3] = -1
    with pytest.raises(PluginError, match="needs to know which objective judged a pair"):
        MODPO().pair_terms(dataclasses.replace(batch, pair_objective=judges))


def test_candidates_in_one_pass_get_the_terms_they_get_alone():
    """Two prompts as rows of two candidates: the preference is looked up per pair."""
    first, second = (0.2, 0.8), (0.9, 0.1)
    batches = [world(weights, (0, 1))[2] for weights in (first, second)]
    rows = torch.cat([batches[0].preference[:RESPONSES], batches[1].preference[RESPONSES:]])
    together = dataclasses.replace(batches[0], preference=rows)
    of_first = together.pairs[:, 0] < RESPONSES
    for combiner in (Linear(), MODPO()):
        mixed, alone = combiner.pair_terms(together), [combiner.pair_terms(batch) for batch in batches]
        for field in ("scale", "margin", "weight"):
            expected = torch.where(of_first, getattr(alone[0], field), getattr(alone[1], field))
            assert torch.equal(getattr(mixed, field), expected)


def test_linear_by_hand():
    _, _, batch = world((0.2, 0.8), (0, 1))
    judges = batch.pair_objective.clone()
    judges[::5] = -1
    terms = Linear().pair_terms(dataclasses.replace(batch, pair_objective=judges))
    assert torch.equal(terms.scale, torch.ones_like(terms.scale)) and (terms.margin == 0).all()
    expected = {-1: 1.0, 0: 0.2, 1: 0.8}
    assert terms.weight.tolist() == [expected[judge] for judge in judges.tolist()]
    torch.testing.assert_close(terms.difference, batch.margins @ torch.tensor([0.2, 0.8], dtype=torch.float64))
    assert Linear().pair_terms(dataclasses.replace(batch, margins=None)).difference is None


def test_a_direction_with_a_negative_component_scalarises_but_cannot_weigh_judgements():
    _, _, batch = world((0.6, -0.8), (0, 1))
    with pytest.raises(PluginError, match=r"objective 1 has the negative weight -0\.8"):
        Linear().pair_terms(batch)
    nobody = dataclasses.replace(batch, pair_objective=torch.full_like(batch.pair_objective, -1))
    terms = Linear().pair_terms(nobody)
    torch.testing.assert_close(terms.difference, batch.margins @ torch.tensor([0.6, -0.8], dtype=torch.float64))
    assert (terms.weight == 1).all()


@pytest.mark.parametrize("combiner", [Linear(), MODPO()], ids=repr)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), m=st.integers(1, 5))
def test_scalarise_is_the_inner_product_and_nan_counts_only_where_it_carries_weight(combiner, data, m):
    numbers = st.lists(st.floats(-100, 100), min_size=m, max_size=m)
    rewards = torch.tensor(data.draw(numbers), dtype=torch.float64)
    weights = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=m, max_size=m))).double()
    unknown = torch.tensor(data.draw(st.lists(st.booleans(), min_size=m, max_size=m)))
    seen = rewards.masked_fill(unknown, torch.nan)
    value = combiner.scalarise(seen.expand(3, m), weights.expand(3, m))
    assert value.shape == (3,)
    if (unknown & (weights != 0)).any():
        assert value.isnan().all()
    else:
        torch.testing.assert_close(value, (rewards @ weights).expand(3), rtol=1e-12, atol=1e-12)


WEIGHTED = Preference("weights", {"a": 0.4, "b": 0.6})
ONE_HOT = Preference("weights", {"a": 0.0, "b": 1.0})
DIRECTION = Preference("direction", {"a": 0.8, "b": -0.6})
THRESHOLDS = Preference("thresholds", {"a": 0.5})


def test_what_the_combiners_accept_and_need():
    for preference in (WEIGHTED, ONE_HOT, DIRECTION):
        Linear().check(preference)
        assert Linear().needs(preference) == frozenset()
    for preference in (WEIGHTED, ONE_HOT):
        MODPO().check(preference)
    assert MODPO().needs(WEIGHTED) == {"margins"} and MODPO().needs(ONE_HOT) == frozenset()
    assert MODPO().needs(Preference("weights", {"only": 1.0})) == frozenset()


@pytest.mark.parametrize(
    ("combiner", "preference", "message"),
    [
        (Linear(), THRESHOLDS, r"'linear' has no meaning for thresholds \(a >= 0.5\)"),
        (MODPO(), THRESHOLDS, "'modpo' divides by the weights of objectives; it has no thresholds"),
        (MODPO(), DIRECTION, "it has no direction"),
    ],
)
def test_preferences_without_a_meaning_are_refused(combiner, preference, message):
    with pytest.raises(PreferenceError, match=message):
        combiner.check(preference)
