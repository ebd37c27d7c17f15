"""Whether a reward model learns what the judgements say: gradients, and which way they push the scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moalign.api import Batch
from moalign.testing.batch import copied
from moalign.testing.judgements import leaves_of, raising, slopes, standing_in
from moalign.testing.owned import parameters_are_trained
from moalign.testing.review import described, first

if TYPE_CHECKING:
    from torch import Tensor

    from moalign.testing.reward_model import Trial

TOLERANCE = 1e-9
SMALL = 0.1
OF_RESPONSES = ("final", "logps")


def gradient_reaches_the_model(t: Trial) -> None:
    """A finite gradient at the last hidden states and the log-probabilities, and none outside the mask."""
    import torch

    batch = t.batch(torch.float32)
    leaves = leaves_of(batch, t.plugin.needs)
    own = {name: value.clone().requires_grad_() for name, value in batch.parameters.items()}
    losses = t.loss("a batch", replace(standing_in(batch, leaves), parameters=own))
    tried, names = "the gradient of the summed losses", ", ".join(f"batch.{name}" for name in leaves)
    t.review.require(losses.requires_grad, tried, "losses without a graph", f"detach none of {names}")
    found = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
    for name, gradient in zip(leaves, found, strict=True):
        some = name == "context" or (gradient is not None and bool(gradient.any()))
        t.review.require(some, tried, f"none at batch.{name}", f"do not detach batch.{name}, which trains the adapter")
        if gradient is None:
            continue
        bad = (~gradient.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        change = (
            "keep roots, logarithms and divisions away from points where their slope is infinite; choose known rewards "
            "with torch.where before the arithmetic, not after it: 0 times NaN is NaN"
        )
        t.review.require(not bad, tried, f"one that is not finite at batch.{name}, {first('row', bad)}", change)
    if "logps" in leaves:
        outside = (found[list(leaves).index("logps")] * (1 - batch.mask)).abs().max().item()
        change = "multiply by batch.mask before summing over tokens; a token outside it is none of the response"
        t.review.require(outside == 0, tried, f"a gradient outside the mask, up to {outside:g}", change)


def gradient_is_the_derivative(t: Trial) -> None:
    """autograd against central differences, in float64."""
    import torch

    batch = t.batch()
    leaves = leaves_of(batch, t.plugin.needs)
    own = {name: value.clone().requires_grad_() for name, value in batch.parameters.items()}
    tried = f"torch.autograd.gradcheck in float64, through {', '.join(f'batch.{name}' for name in leaves)}"
    tried += " and batch.parameters" if own else ""

    def losses(*given: Tensor) -> Tensor:
        values = [value * 1 for value in given]
        parameters = dict(zip(own, values[len(leaves) :], strict=True))
        return t.plugin.loss(
            replace(standing_in(copied(batch), dict(zip(leaves, values, strict=False))), parameters=parameters)
        )

    change = (
        "let the backward pass be that of the value: no detach, no `.data`, no rounding in between. Where a part is "
        'detached on purpose, exempt "gradient_is_the_derivative"'
    )
    try:
        torch.autograd.gradcheck(losses, (*leaves.values(), *own.values()))
    except Exception as error:
        t.review.fail(tried, described(error).partition(" numerical:")[0], change, error)


def training_can_begin(t: Trial) -> None:
    """With the first values something moves, the parameters or the adapter."""
    batch = t.batch()
    own = {name: value.to(batch.mask.dtype).requires_grad_() for name, value in t.first_values().items()}
    leaves = leaves_of(batch, t.plugin.needs)
    losses = t.loss("a batch, with the first values", replace(standing_in(batch, leaves), parameters=own))
    found = _gradients(losses.sum(), [*own.values(), *leaves.values()]) if losses.requires_grad else []
    moves = any(each is not None and bool(each.any()) for each in found)
    change = "start where something moves: factors that are all 0 hold each other there for ever"
    t.review.require(moves, "the gradient at the first values", "none for anything", change)


def better_is_more(t: Trial) -> None:
    """The loss of a pair falls with the chosen response's score and rises with the rejected one's; a higher reward
    asks for a higher score. Each by the score of the objective that judged."""
    batch = _quiet(t.batch())
    leaves = leaves_of(batch, t.plugin.needs & set(OF_RESPONSES))
    batch = standing_in(batch, leaves)
    directions, there = raising(t.scores("a batch", batch), leaves)
    if not t.paired:
        return _more_reward_asks_for_more(t, batch, leaves, directions)
    losses = t.loss("a batch", batch)
    fallen = []
    for place, (pair, judge) in enumerate(zip(batch.pairs.tolist(), batch.pair_objective.tolist(), strict=True)):
        steep = slopes(losses[place], leaves)
        for row, side, sign in ((pair[0], "chosen", -1), (pair[1], "rejected", 1)):
            change = "larger scores are better; the score that counts is that of batch.pair_objective"
            move = float(sign * steep[row] @ directions[row, judge])
            tried, got = f"more score for the {side} response", "a loss that moves the wrong way"
            t.review.require(move > -TOLERANCE or not bool(there[row, judge]), tried, got, change)
            fallen.append(move > TOLERANCE)
    change = "let the loss be a function of the scores"
    t.review.require(any(fallen), "more score for the chosen response", "the same losses", change)


def missing_rewards_teach_nothing(t: Trial) -> None:
    """Where a reward is NaN the loss does not ask for another score, and a row without any has no gradient at all."""
    if "rewards" not in t.plugin.needs or t.paired:
        return
    batch = _quiet(t.batch())
    leaves = leaves_of(batch, t.plugin.needs & set(OF_RESPONSES))
    own = {name: value.clone().requires_grad_() for name, value in batch.parameters.items()}
    batch = replace(standing_in(batch, leaves), parameters=own)
    directions, there = raising(t.scores("a batch", batch), leaves)
    losses = t.loss("a batch of which some rewards are not known (NaN)", batch)
    assert batch.rewards is not None
    unknown = batch.rewards.isnan()
    change = "sum over the rewards that are known alone, chosen with torch.where or nan_to_num before the arithmetic"
    pulled = (slopes(losses, leaves)[:, None, :] * directions).sum(-1)[unknown & there]
    got = "a loss that asks for another score where no reward is known"
    t.review.require(bool((pulled.abs() < TOLERANCE).all()), "a row of which some rewards are NaN", got, change)
    found = _gradients(losses[unknown.all(1)].sum(), list(own.values()))
    some = any(each is not None and bool(each.any()) for each in found)
    t.review.require(not some, "a row of which all rewards are NaN", "a gradient for the parameters", change)


CHECKS_OF_LEARNING: tuple[Callable[[Trial], None], ...] = (
    gradient_reaches_the_model,
    gradient_is_the_derivative,
    parameters_are_trained,
    training_can_begin,
    better_is_more,
    missing_rewards_teach_nothing,
)


def _more_reward_asks_for_more(t: Trial, batch: Batch, leaves: dict[str, Tensor], directions: Tensor) -> None:
    assert batch.rewards is not None
    pulls = []
    for rewards in (batch.rewards / 2, batch.rewards / 2 + 0.5):
        losses = t.loss("a batch with other rewards", replace(batch, rewards=rewards))
        pulls.append((slopes(losses, leaves)[:, None, :] * directions).sum(-1)[batch.rewards.isfinite()])
    lower, higher = pulls
    change = "larger scores are better, and so are larger rewards"
    tried = "higher rewards"
    t.review.require(bool((higher < lower + TOLERANCE).all()), tried, "a loss that asks for lower scores", change)
    t.review.require(bool((higher < lower).any()), tried, "a loss that asks for the same scores", change)


def _quiet(batch: Batch) -> Batch:
    """With small numbers, and so with scores that are close to each other and losses that are not saturated."""
    found = {name: getattr(batch, name) for name in ("final", "logps", "ref_logps")}
    small: dict[str, Any] = {name: SMALL * value for name, value in found.items() if value is not None}
    return replace(batch, **small)


def _gradients(value: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
    import torch

    found = torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True) if leaves else ()
    return list(found)
