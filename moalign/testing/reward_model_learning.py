"""Whether a reward model learns what the judgements say: gradients, and which way they push the scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moalign.api import Batch
from moalign.testing.judgements import leaves_of, standing_in
from moalign.testing.owned import parameters_are_trained
from moalign.testing.review import described, first
from moalign.testing.watched import copied

if TYPE_CHECKING:
    from torch import Tensor

    from moalign.testing.reward_model import Trial

TOLERANCE = 1e-9
SMALL = 0.1
STEPS = 100


def gradient_reaches_the_model(t: Trial) -> None:
    """A finite gradient at the last hidden states and the log-probabilities, and none outside the mask."""
    import torch

    batch = t.batch(torch.float32)
    leaves = leaves_of(batch, t.plugin.needs)
    own = {name: value.clone().requires_grad_() for name, value in batch.parameters.items()}
    if not leaves:
        return
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
    """Trained on its batch, hidden states and all, it scores the chosen above the rejected response, by the objective
    that judged, and rows with more reward above those with less. An objective all of whose pairs have loss 0 is one
    that it does not learn."""
    batch = _quiet(t.batch())
    learned = set(batch.pair_objective[t.loss("a batch", batch) != 0].tolist()) if t.paired else ()
    scores = _trained(t, batch)
    for place, name in enumerate(t.objectives):
        if learned and place not in learned:
            continue
        found = _agreement(t, batch, scores[:, place], place)
        what = "scores of chosen less rejected responses" if t.paired else "rewards times scores"
        got = f"{what}, for {name}: {', '.join(f'{each:.2g}' for each in found)}"
        change = "larger scores and rewards are better; the score that counts is that of batch.pair_objective"
        t.review.require(all(each > 0 for each in found), f"{STEPS} steps of training on one batch", got, change)


def missing_rewards_teach_nothing(t: Trial) -> None:
    """A reward that is NaN is not taken for 0, and a row without any has no gradient at all."""
    import torch

    batch = t.batch()
    if batch.rewards is None or t.paired:
        return
    own = {name: value.clone().requires_grad_() for name, value in batch.parameters.items()}
    leaves = leaves_of(batch, t.plugin.needs)
    losses = t.loss("a batch", replace(standing_in(batch, leaves), parameters=own))
    none, some = batch.rewards.isnan().all(1), batch.rewards.isnan().any(1)
    change = "sum over the rewards that are known alone, chosen with torch.where or nan_to_num before the arithmetic"
    found = _gradients(losses[none].sum(), [*leaves.values(), *own.values()])
    pulled = any(each is not None and bool(each.any()) for each in found)
    t.review.require(not pulled, "a row of which all rewards are NaN", "a gradient", change)
    nought = t.loss("rewards of 0 where they were NaN", replace(batch, rewards=batch.rewards.nan_to_num()))
    alike = bool(torch.isclose(losses, nought, rtol=TOLERANCE, atol=TOLERANCE)[some & ~none].all())
    got = "the losses that they have where these rewards are 0"
    t.review.require(not alike or not bool((some & ~none).any()), "rows of which some rewards are NaN", got, change)


CHECKS_OF_LEARNING: tuple[Callable[[Trial], None], ...] = (
    gradient_reaches_the_model,
    gradient_is_the_derivative,
    parameters_are_trained,
    training_can_begin,
    better_is_more,
    missing_rewards_teach_nothing,
)


def _trained(t: Trial, batch: Batch) -> Tensor:
    """The scores after some steps on all that carries a gradient."""
    import torch

    leaves = leaves_of(batch, t.plugin.needs)
    own = {name: value.clone().requires_grad_() for name, value in batch.parameters.items()}
    optimizer = torch.optim.Adam([*leaves.values(), *own.values()], lr=0.1)
    given = replace(standing_in(batch, leaves), parameters=own)
    for step in range(STEPS):
        optimizer.zero_grad()
        torch.autograd.backward(t.loss(f"a batch in step {step} of a training", given).mean())
        optimizer.step()
    return t.scores("a batch after training", given).detach()


def _agreement(t: Trial, batch: Batch, scores: Tensor, place: int) -> list[float]:
    """How scores of an objective agree with what is known of it: numbers that should not be negative.

    Hidden states that are trained themselves can satisfy every pair; other scores, as features, some more than others.
    """
    if t.paired:
        chosen, rejected = batch.pairs[batch.pair_objective == place].T
        apart = scores[chosen] - scores[rejected]
        return apart.tolist() if t.plugin.needs & {"final", "logps"} or not len(apart) else [float(apart.mean())]
    assert batch.rewards is not None
    known = batch.rewards[:, place].isfinite()
    rewards = batch.rewards[known, place]
    return [float(((rewards - rewards.mean()) * scores[known]).mean())] if len(rewards) > 1 else []


def _quiet(batch: Batch) -> Batch:
    """With small numbers, and so with scores that are close to each other and losses that are not saturated."""
    found = {name: getattr(batch, name) for name in ("final", "logps", "ref_logps")}
    small: dict[str, Any] = {name: SMALL * value for name, value in found.items() if value is not None}
    return replace(batch, **small)


def _gradients(value: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
    import torch

    found = torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True) if leaves else ()
    return list(found)
