"""Whether the advantages of a loss on sampled responses are what the engine multiplies, and point the right way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from moalign.api import MoalignError
from moalign.testing.batch import RESPONSES, at_start, copied, plain_terms
from moalign.testing.review import described

if TYPE_CHECKING:
    from torch import Tensor

    from moalign.testing.objective import Trial

TOLERANCE = 1e-9  # of float64 sums in another order, relative


def made_up_round(t: Trial) -> tuple[Tensor, Tensor, Tensor | None]:
    """Signal, groups and log-ratios (None unless declared) [N]: 3 responses to each prompt and 1 to the last one.

    Responses to one prompt do not stand side by side, and the numbers of the prompts leave gaps.
    """
    import torch

    generator = torch.Generator().manual_seed(t.seed + 2)
    groups = torch.cat([torch.arange(t.prompts).repeat(RESPONSES) * 5 + 2, torch.tensor([1])])
    signal, log_ratios = torch.randn((2, len(groups)), generator=generator, dtype=torch.float64)
    return signal, groups, log_ratios if "reference" in t.plugin.needs else None


def advantages_of(
    t: Trial,
    tried: str,
    signal: Tensor,
    groups: Tensor,
    log_ratios: Tensor | None,
    greedy: Tensor | None = None,
) -> Tensor:
    """What the plugin makes of a round, with its kind, shape and finiteness checked and the arguments watched.

    ``greedy``: the greedy responses' signal for a loss that needs it, the same for all prompts if it is not said.
    """
    import torch

    arguments = [signal, groups, log_ratios]
    if "greedy" in t.plugin.needs:
        arguments.append(torch.full_like(signal, 0.25) if greedy is None else greedy)
    given = [None if each is None else each.clone() for each in arguments]
    change = "advantages must be found for every round of sampled responses"
    try:
        found = t.review.call(tried, change, t.plugin.advantages, *given)
    except MoalignError as error:
        t.review.fail(tried, described(error), change, error)
    names = ("signal", "groups", "log_ratios", "greedy")
    kept = zip(names, given, arguments, strict=False)
    written = [name for name, own, known in kept if own is not None and known is not None and not own.equal(known)]
    change = "compute new tensors; write into none that was handed over (no in-place operations)"
    t.review.require(not written, tried, f"{', '.join(written)} changed during the call", change)
    good = isinstance(found, torch.Tensor) and found.shape == signal.shape and found.dtype == torch.float64
    what = f"{found.dtype} {list(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
    change = f"return one number for each response, float64 [{len(signal)}] as the signal is"
    t.review.require(good, f"{tried}, {len(signal)} responses", f"advantages of {what}", change)
    bad = (~found.isfinite()).nonzero().flatten().tolist()
    change = "guard divisions: rewards may all be equal, and a prompt may have a single response"
    t.review.require(not bad, tried, f"the advantage of response {bad[:1]} is not finite: {found.tolist()}", change)
    return found


def advantages_are_one_number_per_response(t: Trial) -> None:
    """Finite, also where all rewards are equal, and twice the same."""
    if not t.grouped:
        return
    signal, groups, log_ratios = made_up_round(t)
    first = advantages_of(t, "a round of responses", signal, groups, log_ratios)
    second = advantages_of(t, "the same round again", signal, groups, log_ratios)
    change = "make the advantages a function of the arguments: no state of its own, no unseeded generator"
    same = bool((first == second).all())
    t.review.require(same, "the same round twice", f"{first.tolist()}, then {second.tolist()}", change)
    nothing = None if log_ratios is None else log_ratios * 0
    advantages_of(t, "a round whose responses have equal rewards", signal * 0 + 0.3, groups, nothing)
    one = None if log_ratios is None else log_ratios[:1]
    advantages_of(t, "a round of one response", signal[:1], groups[:1], one)


def advantages_go_with_their_responses(t: Trial) -> None:
    """Responses in another order, and prompts with other numbers, have the same advantages."""
    import torch

    if not t.grouped:
        return
    signal, groups, log_ratios = made_up_round(t)
    before = advantages_of(t, "a round of responses", signal, groups, log_ratios)
    order = torch.randperm(len(signal), generator=torch.Generator().manual_seed(t.seed))
    ratios = None if log_ratios is None else log_ratios[order]
    tried = "the responses of the round in another order"
    after = advantages_of(t, tried, signal[order], groups[order], ratios)
    change = "find the responses to one prompt through groups, never by their position"
    t.review.require(_agrees(before[order], after), tried, "other advantages", change)
    tried = "the prompts of the round with other numbers"
    after = advantages_of(t, tried, signal, 1000 - 3 * groups, log_ratios)
    change = "read groups only to see which responses have the same prompt"
    t.review.require(_agrees(before, after), tried, "other advantages", change)


def other_prompts_leave_advantages_alone(t: Trial) -> None:
    """How well responses to other prompts did does not matter. A rule that means it to is exempt."""
    if not t.grouped:
        return
    signal, groups, log_ratios = made_up_round(t)
    own = groups == groups[0]
    before = advantages_of(t, "a round of responses", signal, groups, log_ratios)[own]
    tried = "other rewards of the responses to other prompts"
    after = advantages_of(t, tried, signal.where(own, 3 * signal + 1), groups, log_ratios)[own]
    change = (
        "take means and deviations over the responses to one prompt. Where the whole round is meant, exempt "
        '"other_prompts_leave_advantages_alone"'
    )
    t.review.require(_agrees(before, after), tried, "other advantages of the responses to the first prompt", change)


def a_better_response_becomes_likelier(t: Trial) -> None:
    """More reward for one response of three, and the loss pushes its log-probability up more, or down less."""
    import torch

    if not t.grouped:
        return
    batch = at_start(t.batch())
    generator = torch.Generator().manual_seed(t.seed)
    signal = torch.randn(len(batch.groups), generator=generator, dtype=torch.float64)
    log_ratios = torch.zeros_like(signal) if "reference" in t.plugin.needs else None

    def slope(tried: str, rewards: Tensor) -> float:
        """Of the summed losses, in direction of the first response's log-probability."""
        advantages = advantages_of(t, tried, rewards, batch.groups, log_ratios)
        leaf = batch.logps.clone().requires_grad_()
        given = replace(copied(batch), logps=leaf, advantages=advantages)
        (gradient,) = torch.autograd.grad(t.plugin.loss(given, plain_terms(batch)).sum(), leaf)
        return gradient[0].sum().item()

    tried = "one more reward for one of three responses"
    more = signal.clone()
    more[0] += 1
    before, after = slope("a round of responses", signal), slope(tried, more)
    change = "let the advantage grow with the reward, and the loss be -advantage * log-probability in its direction"
    t.review.require(after < before, tried, f"a slope of the loss of {after:.3g}, before it {before:.3g}", change)


def greedy_responses_are_compared_with(t: Trial) -> None:
    """Where the greedy responses' signal is needed it matters, each prompt's to its own responses."""
    import torch

    if "greedy" not in t.plugin.needs:
        return
    signal, groups, log_ratios = made_up_round(t)
    greedy = 0.1 * groups
    before = advantages_of(t, "a round of responses", signal, groups, log_ratios, greedy)
    own = groups == groups[0]
    tried = "a greedy response to the first prompt that is worth more"
    after = advantages_of(t, tried, signal, groups, log_ratios, greedy + 2.0 * own)
    change = 'compare with `greedy`, or take "greedy" out of `needs`: the engine pays for these responses'
    t.review.require(not _agrees(before[own], after[own]), tried, "the same advantages", change)
    change = "compare each response with the greedy one to its own prompt, which stands at its place in `greedy`"
    t.review.require(_agrees(before[~own], after[~own]), tried, "other advantages for other prompts", change)
    order = torch.randperm(len(signal), generator=torch.Generator().manual_seed(t.seed))
    ratios = None if log_ratios is None else log_ratios[order]
    tried = "the responses of the round in another order"
    after = advantages_of(t, tried, signal[order], groups[order], ratios, greedy[order])
    t.review.require(_agrees(before[order], after), tried, "other advantages", change)


CHECKS_OF_ADVANTAGES: tuple[Callable[[Trial], None], ...] = (
    advantages_are_one_number_per_response,
    advantages_go_with_their_responses,
    other_prompts_leave_advantages_alone,
    a_better_response_becomes_likelier,
    greedy_responses_are_compared_with,
)


def _agrees(first: Tensor, second: Tensor) -> bool:
    import torch

    return bool(torch.isclose(first, second, rtol=TOLERANCE, atol=TOLERANCE).all())
