"""Whether the advantages of a loss on sampled responses are what the engine multiplies, and point the right way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from moalign.api import TokenAdvantages
from moalign.testing.batch import at_start, plain_terms
from moalign.testing.rounds import MadeUpRound, advantages_of, asked, made_up_round, weighed
from moalign.testing.watched import copied

if TYPE_CHECKING:
    from torch import Tensor

    from moalign.testing.objective import Trial

TOLERANCE = 1e-9  # of float64 sums in another order, relative


def advantages_are_one_number_per_response(t: Trial) -> None:
    """Or per token. Finite, also where all rewards are equal, and twice the same."""
    import torch

    if not t.grouped:
        return
    given = made_up_round(t)
    first = advantages_of(t, "a round of responses", given)
    second = advantages_of(t, "the same round again", given)
    change = "make the advantages a function of the arguments: no state of its own, no unseeded generator"
    same = bool((first == second).all())
    t.review.require(same, "the same round twice", f"{first.tolist()}, then {second.tolist()}", change)
    equal = replace(given.without_kl(), signal=given.signal * 0 + 0.3)
    advantages_of(t, "a round whose responses have equal rewards", equal)
    advantages_of(t, "a round of one response", given.at(torch.tensor([0])))


def advantages_go_with_their_responses(t: Trial) -> None:
    """Responses in another order, and prompts with other numbers, have the same advantages."""
    import torch

    if not t.grouped:
        return
    given = made_up_round(t)
    before = advantages_of(t, "a round of responses", given)
    order = torch.randperm(len(given.signal), generator=torch.Generator().manual_seed(t.seed))
    tried = "the responses of the round in another order"
    after = advantages_of(t, tried, given.at(order))
    change = "find the responses to one prompt through groups, never by their position"
    t.review.require(_agrees(before[order], after), tried, "other advantages", change)
    tried = "the prompts of the round with other numbers"
    after = advantages_of(t, tried, replace(given, groups=1000 - 3 * given.groups))
    change = "read groups only to see which responses have the same prompt"
    t.review.require(_agrees(before, after), tried, "other advantages", change)


def other_prompts_leave_advantages_alone(t: Trial) -> None:
    """How well responses to other prompts did does not matter. A rule that means it to is exempt."""
    if not t.grouped:
        return
    given = made_up_round(t)
    own = given.groups == given.groups[0]
    before = advantages_of(t, "a round of responses", given)[own]
    tried = "other rewards of the responses to other prompts"
    after = advantages_of(t, tried, replace(given, signal=given.signal.where(own, 3 * given.signal + 1)))[own]
    change = (
        "take means and deviations over the responses to one prompt. Where the whole round is meant, exempt "
        '"other_prompts_leave_advantages_alone"'
    )
    t.review.require(_agrees(before, after), tried, "other advantages of the responses to the first prompt", change)


def a_better_response_becomes_likelier(t: Trial) -> None:
    """The worst response of three becomes the best, and the loss pushes its log-probability up more, or down less.

    Less would not do: a rule that learns from the best alone does not care by how much it is the best.
    """
    import torch

    if not t.grouped:
        return
    batch = at_start(t.batch())
    generator = torch.Generator().manual_seed(t.seed)
    signal = torch.randn(len(batch.groups), generator=generator, dtype=torch.float64)
    own = signal[batch.groups == batch.groups[0]]
    signal[0], more = own.min() - 0.5, signal.clone()
    more[0] = own.max() + 0.5
    log_ratios = torch.zeros_like(signal) if "reference" in t.plugin.wants else None
    greedy = torch.full_like(signal, 0.25) if "greedy" in t.plugin.wants else None

    def slope(tried: str, rewards: Tensor) -> float:
        """Of the summed losses, in direction of the first response's log-probability."""
        if t.weighs_tokens:
            given = weighed(t, batch, rewards)
        else:
            advantages = advantages_of(t, tried, MadeUpRound(rewards, batch.groups, log_ratios, None, greedy))
            given = replace(batch, advantages=advantages)
        if batch.rewards is not None:  # all objectives agree
            given = replace(given, rewards=rewards[:, None].expand_as(batch.rewards).to(batch.rewards))
        leaf = batch.logps.clone().requires_grad_()
        losses = t.plugin.loss(t.told(replace(copied(given), logps=leaf)), plain_terms(batch))
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        return gradient[0].sum().item()

    tried = "the worst of three responses becomes the best"
    before, after = slope("a round of responses", signal), slope(tried, more)
    change = "let the advantage grow with the reward, and the loss be -advantage * log-probability in its direction"
    t.review.require(after < before, tried, f"a slope of the loss of {after:.3g}, before it {before:.3g}", change)


def greedy_responses_are_compared_with(t: Trial) -> None:
    """Where the greedy responses' signal is needed it matters, each prompt's to its own responses."""
    import torch

    if "greedy" not in t.plugin.wants:
        return
    given = made_up_round(t)
    groups, greedy = given.groups, 0.1 * given.groups
    given = replace(given, greedy=greedy)
    before = advantages_of(t, "a round of responses", given)
    own = groups == groups[0]
    tried = "a greedy response to the first prompt that is worth more"
    after = advantages_of(t, tried, replace(given, greedy=greedy + 2.0 * own))
    change = 'compare with `greedy`, or take "greedy" out of `needs`: the engine pays for these responses'
    t.review.require(not _agrees(before[own], after[own]), tried, "the same advantages", change)
    change = "compare each response with the greedy one to its own prompt, which stands at its place in `greedy`"
    t.review.require(_agrees(before[~own], after[~own]), tried, "other advantages for other prompts", change)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(t.seed))
    tried = "the responses of the round in another order"
    after = advantages_of(t, tried, given.at(order))
    t.review.require(_agrees(before[order], after), tried, "other advantages", change)


def other_policies_are_measured(t: Trial) -> None:
    """A loss that measures its tokens reads its guides there, once for a round, and another guide changes something."""
    if not t.measures_guides:
        return
    batch = t.batch()
    before = asked(t, "a round of responses", made_up_round(t, batch))
    for name, values in batch.guides.items():
        tried = f"other log-probabilities under '{name}' where the round is measured"
        given = made_up_round(t, replace(batch, guides={**batch.guides, name: 1.7 * values}))
        change = "do not ask for it, or use what `measure` finds in batch.guides: the engine pays for it"
        _require_another(t, tried, given, before, change)


def passages_matter(t: Trial) -> None:
    """What tokens of no passage would count is not what those of passages do."""
    if not t.weighs_tokens:
        return
    given = made_up_round(t)
    assert given.tokens is not None
    before = asked(t, "a round of responses", given)
    for name, numbers in given.tokens.passages.items():
        tried = f"a round in which no text matches the passage '{name}'"
        without = replace(given.tokens, passages={**given.tokens.passages, name: 0 * numbers})
        change = "do not ask for it, or use tokens.passages: the engine looks for it in every response"
        _require_another(t, tried, replace(given, tokens=without), before, change)


def _require_another(t: Trial, tried: str, given: MadeUpRound, before: TokenAdvantages, change: str) -> None:
    """Advantages, or something else that the loss is to know."""
    after = asked(t, tried, given)
    pairs = [(before.advantages, after.advantages)]
    pairs += [(known, after.known[kind]) for kind, known in before.known.items()]
    assert given.tokens is not None
    same = all(_agrees(one * given.tokens.mask, other * given.tokens.mask) for one, other in pairs)
    t.review.require(not same, tried, "the same advantages, and nothing else that is known", change)


CHECKS_OF_ADVANTAGES: tuple[Callable[[Trial], None], ...] = (
    advantages_are_one_number_per_response,
    advantages_go_with_their_responses,
    other_prompts_leave_advantages_alone,
    a_better_response_becomes_likelier,
    greedy_responses_are_compared_with,
    other_policies_are_measured,
    passages_matter,
)


def _agrees(first: Tensor, second: Tensor) -> bool:
    import torch

    return bool(torch.isclose(first, second, rtol=TOLERANCE, atol=TOLERANCE).all())
