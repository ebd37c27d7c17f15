"""PPO as mathematics: its advantages by definition, its expected gradient by enumeration, its loss by another hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tabular import SPEECH, Situation, on_policy, plain_terms
from torch import Tensor

from moalign.api import Batch, Tokens
from moalign_plugins.objectives._value_head import ValueHead, explained, generalised_advantages, whitened
from moalign_plugins.objectives.ppo import PPO
from moalign_plugins.objectives.reinforce import REINFORCE

EXACT = {"rtol": 0, "atol": 1e-12}  # sums of some hundred float64 of size 1
LENGTHS = torch.tensor([6, 1, 3, 5])
MASK = (torch.arange(6) < LENGTHS[:, None]).double()
ROWS = len(LENGTHS)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens_of(ended: Tensor | None = None) -> Tokens:
    return Tokens(
        mask=MASK,
        ended=torch.ones(ROWS, dtype=torch.bool) if ended is None else ended,
        old_logps=-drawn(0, *MASK.shape).abs() * MASK,
        ref_logps=-drawn(1, *MASK.shape).abs() * MASK,
        measured={"values": drawn(2, *MASK.shape) * MASK},
    )


SIGNAL, GROUPS = drawn(3, ROWS), torch.arange(ROWS)


# --- generalised advantages -----------------------------------------------------------------------------------------


def by_definition(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """The mean of the advantages over k steps, with the shares (1 - lam) lam^(k-1), the rest on the last of them."""
    found = torch.zeros_like(rewards)
    for row, length in enumerate(LENGTHS.tolist()):
        for t in range(length):
            steps = []
            for k in range(1, length - t + 1):
                ahead = sum(gamma**i * float(rewards[row, t + i]) for i in range(k))
                then = float(values[row, t + k]) if t + k < length else 0.0
                steps.append(ahead + gamma**k * then - float(values[row, t]))
            shares = [(1 - lam) * lam ** (k - 1) for k in range(1, len(steps))]
            shares.append(1 - sum(shares))
            found[row, t] = sum(share * step for share, step in zip(shares, steps, strict=True))
    return found


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_advantages_are_a_mean_of_those_over_k_steps(gamma, lam):
    rewards, values = drawn(4, *MASK.shape) * MASK, drawn(5, *MASK.shape)
    found = generalised_advantages(rewards, values, MASK, gamma, lam)
    torch.testing.assert_close(found, by_definition(rewards, values, gamma, lam), **EXACT)


def test_its_limits_are_returns_less_values_and_one_step():
    rewards, values = drawn(4, *MASK.shape) * MASK, drawn(5, *MASK.shape) * MASK
    to_come = rewards.flip(1).cumsum(1).flip(1) * MASK
    torch.testing.assert_close(generalised_advantages(rewards, values, MASK, 1.0, 1.0), to_come - values, **EXACT)
    following = torch.cat([values[:, 1:], torch.zeros(ROWS, 1)], 1)
    one_step = (rewards + 0.9 * following - values) * MASK
    torch.testing.assert_close(generalised_advantages(rewards, values, MASK, 0.9, 0.0), one_step, **EXACT)


def test_what_stands_behind_a_response_does_not_matter():
    rewards, values = drawn(4, *MASK.shape), drawn(5, *MASK.shape)
    found = generalised_advantages(rewards, values, MASK, 0.9, 0.7)
    noise = 1e3 * (1 - MASK)
    torch.testing.assert_close(generalised_advantages(rewards + noise, values + noise, MASK, 0.9, 0.7), found, **EXACT)
    assert (found * (1 - MASK) == 0).all()


def test_whitened_advantages_have_mean_nothing_and_deviation_one():
    tokens = MASK > 0
    found = whitened(drawn(6, *MASK.shape) * 7 + 3, MASK)
    assert float(found[tokens].mean()) == pytest.approx(0, abs=1e-12)
    assert float(found[tokens].std()) == pytest.approx(1, abs=1e-7)
    assert (found[~tokens] == 0).all()
    assert (whitened(MASK * 0.3, MASK).abs() < 1e-6).all()  # of equal numbers the last bit may differ
    given = PPO(whiten=True).token_advantages(SIGNAL, GROUPS, tokens_of())
    plain = PPO().token_advantages(SIGNAL, GROUPS, tokens_of())
    torch.testing.assert_close(given.advantages, whitened(plain.advantages, MASK), **EXACT)
    torch.testing.assert_close(given.known["returns"], plain.known["returns"], **EXACT)


# --- rewards of tokens ----------------------------------------------------------------------------------------------


def test_rewards_of_tokens_sum_to_the_signal_less_the_price_of_the_kl():
    tokens = tokens_of()
    rewards = PPO(beta=0.3).token_rewards(SIGNAL, tokens)
    log_ratios = (tokens.old_logps - tokens.ref_logps).sum(-1)
    torch.testing.assert_close(rewards.sum(-1), SIGNAL - 0.3 * log_ratios, **EXACT)
    torch.testing.assert_close(rewards[0, :5], -0.3 * (tokens.old_logps - tokens.ref_logps)[0, :5], **EXACT)
    assert (rewards * (1 - MASK) == 0).all()


@pytest.mark.parametrize("kl", ["k2", "k3", "forward"])
def test_a_kl_in_the_loss_is_not_in_the_rewards(kl):
    rewards = PPO(beta=0.3, kl=kl).token_rewards(SIGNAL, tokens_of())
    torch.testing.assert_close(rewards.sum(-1), SIGNAL, **EXACT)
    assert (rewards != 0).sum() == ROWS and (rewards[torch.arange(ROWS), LENGTHS - 1] == SIGNAL).all()


def test_a_response_without_an_end_gets_the_fixed_reward():
    ended = torch.tensor([True, False, True, False])
    given = PPO(beta=0.0, missing_end=-10.0).token_rewards(SIGNAL, tokens_of(ended)).sum(-1)
    assert given.tolist() == [float(SIGNAL[0]), -10.0, float(SIGNAL[2]), -10.0]
    plain = PPO(beta=0.0).token_rewards(SIGNAL, tokens_of(ended)).sum(-1)
    assert plain.tolist() == SIGNAL.tolist()


def test_explained_variance_is_that_of_the_rewards_to_come():
    to_come = drawn(7, *MASK.shape) * MASK
    assert explained(to_come, to_come, MASK)["explained_variance"] == 1
    assert explained(to_come * 0, to_come, MASK)["explained_variance"] == 0
    assert explained(-to_come, to_come, MASK)["explained_variance"] == pytest.approx(-3)
    constant = explained(MASK * 0.5, MASK, MASK)
    assert constant == {"value": 0.5, "explained_variance": 0.0}


# --- the expected gradient, over all responses ------------------------------------------------------------------------


def token_losses(
    world: Situation, objective: ValueHead, responses: Tensor, head: Tensor, guide: Tensor | None = None
) -> Tensor:
    """The losses of responses [K], each a round of its own, with a hidden state for every state of the language.

    ``head``: [S+1], weights and bias of the values. ``guide``: the logits of a further policy.
    """
    language = world.language
    old, reference = language.logps(world.sampler.detach()), language.logps(world.reference.detach())
    states = torch.zeros(len(language.responses), language.width, len(language.choices), dtype=torch.float64)
    for number, response in enumerate(language.responses):
        for place, (state, _) in enumerate(response):
            states[number, place, state] = 1.0
    count = len(responses)
    batch = Batch(
        logps=language.logps(world.policy)[responses],
        mask=language.mask[responses],
        pairs=torch.arange(count)[:, None].expand(-1, 2),
        pair_objective=torch.full((count,), -1),
        preference=torch.ones(count, 1, dtype=torch.float64),
        strength=torch.ones(count, dtype=torch.float64),
        groups=torch.arange(count),
        ref_logps=reference[responses],
        old_logps=old[responses],
        hidden=states[responses],
        parameters={"value.weight": head[:-1], "value.bias": head[-1:]},
        guides={} if guide is None else {"guide": language.logps(guide.detach())[responses]},
    )
    with torch.no_grad():
        measured = objective.measure(batch)
    tokens = Tokens(batch.mask, torch.ones(count, dtype=torch.bool), batch.old_logps, batch.ref_logps, measured)
    given = objective.token_advantages(world.rewards[responses], batch.groups, tokens)
    batch = replace(batch, token_advantages=given.advantages, known={**tokens.measured, **given.known})
    return objective.loss(batch, plain_terms(count))


def expected_gradient(world: Situation, objective: ValueHead, head: Tensor, guide: Tensor | None = None) -> Tensor:
    every = torch.arange(len(world.rewards))
    weight = world.language.logps(world.sampler.detach()).sum(-1).exp()
    return world.gradient((weight * token_losses(world, objective, every, head, guide)).sum())


NOTHING = torch.zeros(4, dtype=torch.float64)
SOMETHING = torch.tensor([0.4, -1.1, 0.8, 0.3], dtype=torch.float64)


@pytest.mark.parametrize("kl", ["reward", "k2", "k3", "forward"])
@pytest.mark.parametrize("head", [NOTHING, SOMETHING], ids=["no values", "some values"])
def test_with_all_rewards_to_come_the_expected_gradient_is_that_of_reinforce(kl, head):
    """Token by token, with what came before a token left out, and whatever the values are: they are a baseline."""
    world = on_policy(SPEECH)
    found = expected_gradient(world, PPO(beta=0.3, kl=kl, gamma=1.0, lam=1.0), head)
    reinforce = world.expected_gradient(REINFORCE(beta=0.3, kl=kl, baseline="none"), 1)
    torch.testing.assert_close(found, reinforce, **EXACT)
    if kl == "reward":
        torch.testing.assert_close(found, -world.gradient(world.reward() - 0.3 * world.divergence()), **EXACT)


def exact_values(world: Situation, beta: float) -> Tensor:
    """What is to come from each state on, under the policy that sampled; the last number is the bias, 0."""
    language = world.language
    probabilities = language.logps(world.sampler.detach()).sum(-1).exp()
    old, reference = language.logps(world.sampler.detach()), language.logps(world.reference.detach())
    totals, visits = torch.zeros(2, len(language.choices) + 1, dtype=torch.float64)
    for number, response in enumerate(language.responses):
        for place, (state, _) in enumerate(response):
            price = beta * (old - reference)[number, place:].sum()
            totals[state] += probabilities[number] * (world.rewards[number] - price)
            visits[state] += probabilities[number]
    return totals / visits.clamp(min=1e-300)


@pytest.mark.parametrize("lam", [0.0, 0.6])
def test_with_exact_values_so_it_is_for_every_lam(lam):
    """The bias of generalised advantages is that of the values; wrong values have one, which lam 1 has not."""
    world = on_policy(SPEECH)
    objective = PPO(beta=0.3, lam=lam)
    truth = -world.gradient(world.reward() - 0.3 * world.divergence())
    torch.testing.assert_close(expected_gradient(world, objective, exact_values(world, 0.3)), truth, **EXACT)
    assert (expected_gradient(world, objective, SOMETHING) - truth).abs().max() > 1e-2


def test_the_value_loss_leads_to_the_exact_values():
    """Its expected gradient at them is 0, and it is what a regression on the rewards to come has elsewhere."""
    world, objective = on_policy(SPEECH), PPO(beta=0.3, lam=1.0, value_epsilon=None, value_weight=1.0)
    every, weight = torch.arange(6), SPEECH.logps(world.sampler.detach()).sum(-1).exp()

    def slope(at: Tensor) -> Tensor:
        head = at.clone().requires_grad_()
        (found,) = torch.autograd.grad((weight * token_losses(world, objective, every, head)).sum(), head)
        return found

    truth = exact_values(world, 0.3)
    torch.testing.assert_close(slope(truth), NOTHING, **EXACT)
    elsewhere = slope(SOMETHING)
    visits = torch.zeros(3, dtype=torch.float64)
    for number, response in enumerate(SPEECH.responses):
        for state, _ in response:
            visits[state] += weight[number]
    by_hand = visits * (SOMETHING[:3] + SOMETHING[3] - truth[:3])
    torch.testing.assert_close(elsewhere, torch.cat([by_hand, by_hand.sum()[None]]), **EXACT)


def test_the_sampled_gradient_is_within_its_standard_error():
    """60 batches of 300 responses; four standard errors for each of the 8 parameters."""
    world, objective = on_policy(SPEECH), PPO(beta=0.3)
    expected = expected_gradient(world, objective, SOMETHING)
    generator = torch.Generator().manual_seed(0)
    probabilities = SPEECH.logps(world.sampler.detach()).sum(-1).exp()
    batches = probabilities.multinomial(60 * 300, replacement=True, generator=generator).view(60, 300)
    found = torch.stack([world.gradient(token_losses(world, objective, own, SOMETHING).mean()) for own in batches])
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - expected).abs() < 4 * error + 1e-12).all()
    assert (expected.abs() > 8 * error).sum() >= 4  # another gradient would be seen


# --- the loss, by another hand --------------------------------------------------------------------------------------


def by_hand(objective: PPO, numbers: dict[str, Any]) -> list[float]:
    """The losses in plain Python, from the text of the paper."""
    low, high, far, found = objective.epsilon_low, objective.epsilon_high, objective.value_epsilon, []
    assert low is not None and high is not None and far is not None
    for row, length in enumerate(LENGTHS.tolist()):
        total = 0.0
        for t in range(length):
            new, old, adv, value, before, target = (
                float(numbers[name][row, t]) for name in ("logps", "old", "advantages", "values", "before", "returns")
            )
            ratio = float(torch.tensor(new - old, dtype=torch.float64).exp())
            held = min(max(ratio, 1 - low), 1 + high)
            total -= min(ratio * adv, held * adv)
            near = before + min(max(value - before, -far), far)
            total += objective.value_weight * 0.5 * max((value - target) ** 2, (near - target) ** 2)
        found.append(total)
    return found


def numbers_of(dtype: torch.dtype) -> tuple[Batch, dict[str, Tensor]]:
    """A policy and a head that have moved, so that some ratios and some values are beyond their bounds."""
    old = -drawn(0, *MASK.shape).abs() * MASK
    hidden, weight, bias = drawn(8, *MASK.shape, 3) * MASK[..., None], drawn(9, 3), drawn(10, 1)
    known = {"values": drawn(11, *MASK.shape) * MASK, "returns": drawn(12, *MASK.shape) * MASK}
    logps, advantages = (old + 0.4 * drawn(13, *MASK.shape)) * MASK, drawn(14, *MASK.shape) * MASK
    batch = Batch(
        logps=logps.to(dtype),
        mask=MASK.to(dtype),
        pairs=torch.arange(ROWS)[:, None].expand(-1, 2),
        pair_objective=torch.full((ROWS,), -1),
        preference=torch.ones(ROWS, 1, dtype=dtype),
        strength=torch.ones(ROWS, dtype=dtype),
        groups=GROUPS,
        ref_logps=(old - 0.1 * MASK).to(dtype),
        old_logps=old.to(dtype),
        token_advantages=advantages.to(dtype),
        known={name: values.to(dtype) for name, values in known.items()},
        hidden=hidden.to(dtype),
        parameters={"value.weight": weight.to(dtype), "value.bias": bias.to(dtype)},
    )
    values = (hidden @ weight + bias) * MASK
    numbers = {"logps": logps, "old": old, "advantages": advantages, "values": values, "before": known["values"]}
    return batch, numbers | {"returns": known["returns"]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_loss_agrees_with_the_one_by_hand(dtype):
    objective = PPO(beta=0.1, value_weight=0.7)
    batch, numbers = numbers_of(dtype)
    found = objective.loss(batch, plain_terms(ROWS))
    expected = torch.tensor(by_hand(objective, numbers), dtype=torch.float64)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5  # the largest terms are of size 10
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    ratio = (numbers["logps"] - numbers["old"]).exp()[MASK > 0]
    moved = (numbers["values"] - numbers["before"]).abs()[MASK > 0]
    assert (ratio > 1.2).any() and (ratio < 0.8).any() and (ratio.log().abs() < 0.15).any()
    assert (moved > 0.2).any() and (moved < 0.2).any()


def test_a_value_beyond_its_bound_learns_only_where_its_error_is_the_larger_one():
    batch, _ = numbers_of(torch.float64)
    known = {"values": MASK * 0.0, "returns": MASK * 1.0}
    hidden = torch.zeros(ROWS, 6, 3, dtype=torch.float64)
    for bias, expected in ((0.1, -0.9), (0.5, 0.0), (2.0, 1.0)):  # within; beyond and nearer; beyond and too far
        head = {name: torch.zeros(size, dtype=torch.float64) for name, size in (("value.weight", 3), ("value.bias", 1))}
        head["value.bias"] += bias
        head["value.bias"].requires_grad_()
        losses = PPO(value_weight=1.0).loss(
            replace(batch, hidden=hidden, known=known, parameters=head), plain_terms(ROWS)
        )
        (slope,) = torch.autograd.grad(losses.sum(), head["value.bias"])
        assert float(slope) / float(MASK.sum()) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("reaches", [False, True])
def test_gradients_are_the_derivatives_and_reach_the_hidden_states_where_asked(reaches):
    objective = PPO(value_trains_adapter=reaches)
    batch, _ = numbers_of(torch.float64)
    leaves = [batch.logps, batch.parameters["value.weight"], batch.parameters["value.bias"], batch.hidden]
    leaves = [leaf.clone().requires_grad_() for leaf in (leaves if reaches else leaves[:3])]

    def losses(logps: Tensor, weight: Tensor, bias: Tensor, hidden: Tensor | None = None) -> Tensor:
        given = replace(batch, logps=logps, parameters={"value.weight": weight, "value.bias": bias})
        return objective.loss(given if hidden is None else replace(given, hidden=hidden), plain_terms(ROWS))

    assert torch.autograd.gradcheck(losses, tuple(leaves))
    hidden = batch.hidden.clone().requires_grad_()
    total = objective.loss(replace(batch, logps=leaves[0], hidden=hidden), plain_terms(ROWS)).sum()
    (found,) = torch.autograd.grad(total, hidden, allow_unused=True)
    assert (found is not None and bool(found.any())) == reaches


def test_lengths_divide_both_parts():
    batch, _ = numbers_of(torch.float64)
    whole = PPO(value_weight=0.7).loss(batch, plain_terms(ROWS))
    torch.testing.assert_close(PPO(value_weight=0.7, length="response").loss(batch, plain_terms(ROWS)), whole / LENGTHS)
    torch.testing.assert_close(PPO(value_weight=0.7, length=4).loss(batch, plain_terms(ROWS)), whole / 4)


def test_the_first_values_are_nothing_and_learn_at_their_own_rate():
    first = PPO(value_lr=3.0).parameters(5, torch.Generator())
    assert {name: value.tolist() for name, value in first.items()} == {"value.weight": [0.0] * 5, "value.bias": [0.0]}
    assert {PPO(value_lr=3.0).lr_factor(name) for name in first} == {3.0}
