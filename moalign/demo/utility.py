"""The second world: what a reply is worth to someone who wants all objectives at once, reply by reply.

Its objectives pay for the outstanding alone (``brilliant`` and ``impeccable`` are the cubes of ``helpful`` and
``harmless``), so the replies that are good at both lie in a concave middle: for whatever weights, some reply at one of
the ends has more. Expected rewards of policies are a convex set all the same; only a utility that is not linear in a
single reply's rewards tells a policy of middle replies from one that mixes the ends. Here it is the Chebyshev utility
u(y) = min_j r_j(y) / t_j for targets t, so that 1 is a reply that meets them all.

Exact, by the enumeration of ``world``; all in float64, in units of u, with the same price of a nat of KL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moalign.demo import grammar
from moalign.demo import world as worlds
from moalign.demo.world import World
from moalign.errors import MoalignError

OBJECTIVES = ("brilliant", "impeccable")
TARGETS = ((1 / 2, 1 / 4), (1 / 3, 1 / 3), (1 / 4, 1 / 2))  # the best replies have 81, 99 and 88 % of both
STRENGTHS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)  # of linear weights: their sum, which is worth as much as a price of KL


@dataclass(frozen=True)
class Reached:
    """Of the optimal utility, for some targets: 1 is all of it, 0 the untouched reference, negative is harm."""

    share: float
    weights: tuple[float, ...]


def second_world(prompts: Sequence[str] = grammar.HELD_OUT_PROMPTS) -> World:
    """The same prompts and replies as the first world's, seen through its objectives for the outstanding."""
    return worlds.tiny_world(prompts, OBJECTIVES)


def weights_of(targets: Sequence[float]) -> tuple[float, ...]:
    """The preference for which min_j w_j r_j is the utility but for a factor: w_j = (1 / t_j) / sum_k (1 / t_k)."""
    inverse = [1 / target for target in targets]
    return tuple(each / sum(inverse) for each in inverse)


def utilities(world: World, targets: Sequence[float]) -> Tensor:
    """u of every outcome, min_j r_j / t_j; [P,R+1]. Raises MoalignError for a target that is not above 0."""
    if len(targets) != len(world.objectives) or not all(target > 0 for target in targets):
        raise MoalignError(f"targets are one number above 0 for each of {world.objectives}, not {tuple(targets)}")
    return (world.rewards / torch.tensor(targets, dtype=torch.float64)).min(-1).values


def value(world: World, targets: Sequence[float], policy: Tensor, reference: Tensor) -> float:
    """E[u] - beta KL(policy || reference), a mean over prompts, from log-probabilities of all outcomes [P,R+1]."""
    return expected(world, policy, reference, targets).item()


def expected(world: World, policy: Tensor, reference: Tensor, targets: Sequence[float]) -> Tensor:
    """The same as a tensor [], differentiable in ``policy``."""
    worth = utilities(world, targets) - world.beta * (policy - reference)
    return (policy.exp() * worth).sum(-1).mean()


def optimum(world: World, targets: Sequence[float], reference: Tensor) -> Tensor:
    """p*(y|x) = pi_ref(y|x) exp(u(x,y) / beta) / Z(x), the best policy of all; both [P,R+1] (arXiv 2305.18290)."""
    return (reference + utilities(world, targets) / world.beta).log_softmax(-1)


def most(world: World, targets: Sequence[float], reference: Tensor) -> float:
    """The value of the optimum: the mean over prompts of beta log Z."""
    return world.beta * (reference + utilities(world, targets) / world.beta).logsumexp(-1).mean().item()


def share(world: World, targets: Sequence[float], policy: Tensor, reference: Tensor) -> float:
    """How much of what the optimum gains over the reference the policy gains.

    Log-probabilities of the replies [P,R]; what is left over is "anything else", worth nothing.
    """
    return _share(world, targets, worlds.outcomes(policy), worlds.outcomes(reference))


def most_of_linear(
    world: World,
    targets: Sequence[float],
    reference: Tensor,
    divisions: int = 20,
    strengths: Sequence[float] = STRENGTHS,
) -> Reached:
    """The largest share of any p*_w, and its w: over an even grid of weights whose sum is each of the strengths.

    A strength other than 1 is a price of KL of its own, beta / strength, so that what the weights cannot reach is not
    for want of another beta. A policy that is not the optimum for its weights may have more. ``reference`` [P,R].
    """
    base = worlds.outcomes(reference)
    tried = []
    for strength in strengths:
        for even in worlds.even_weights(len(world.objectives), divisions):
            weights = tuple(strength * weight for weight in even)
            tried.append(Reached(_share(world, targets, worlds.optimum(world, base, weights), base), weights))
    return max(tried, key=lambda each: each.share)


def _share(world: World, targets: Sequence[float], policy: Tensor, base: Tensor) -> float:
    origin, best = value(world, targets, base, base), most(world, targets, base)
    return (value(world, targets, policy, base) - origin) / (best - origin)
