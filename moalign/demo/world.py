"""Exact values in a world whose outcomes can all be enumerated: policies, the optimum for any weights, whole fronts.

The outcomes for a prompt are its R enumerated replies and one more, "anything else", with the probability that is
left over and the worst reward in every objective. Nothing is ever renormalised over the replies: a policy that loses
its grammar must look as bad as it is.

Shapes: P prompts, R replies, M objectives, W weight vectors, n policies. All in float64, in nats and reward units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moalign import pareto
from moalign.demo import grammar
from moalign.errors import MoalignError

BETA = 0.08
even_weights = pareto.even_weights
ROUNDING = 1e-4  # of a sum of float32 probabilities
TINIEST = 1e-12  # probability that "anything else" keeps at least, so that its logarithm is finite


@dataclass(frozen=True)
class World:
    """``rewards[P,R+1,M]`` (the last outcome is "anything else") and ``beta``, the price of a nat of KL in rewards."""

    prompts: tuple[str, ...]
    objectives: tuple[str, ...]
    rewards: Tensor
    beta: float = BETA


@dataclass(frozen=True)
class Value:
    """What a policy is worth, each a mean over prompts.

    ``f[M]`` = ``expected[M]`` - beta * ``kl``; ``expected`` is E[r_j], ``kl`` is KL(policy || reference) in nats per
    response, ``mass`` the probability of a well-formed reply.
    """

    f: Tensor
    expected: Tensor
    kl: float
    mass: float


@dataclass(frozen=True)
class Shares:
    """How much of the exact front some policies reach: 1 is all of it, 0 the untouched reference, negative is harm."""

    front_share: float
    front_share_worst: float
    hypervolume_share: float


def tiny_world(
    prompts: Sequence[str] = grammar.HELD_OUT_PROMPTS,
    objectives: Sequence[str] = ("helpful", "harmless"),
    beta: float = BETA,
) -> World:
    """The tiny assistant's world, seen on some prompts and through some of its objectives."""
    unknown = sorted(set(objectives) - set(grammar.OBJECTIVES))
    if unknown:
        raise MoalignError(f"the tiny assistant's world has no objective {unknown[0]!r}, only {grammar.OBJECTIVES}")
    worst = [grammar.WORST] * len(objectives)
    table = []
    for prompt in prompts:
        scores = (grammar.score(prompt, reply) for reply in grammar.replies(prompt))
        table.append([[score[name] for name in objectives] for score in scores] + [worst])
    return World(tuple(prompts), tuple(objectives), torch.tensor(table, dtype=torch.float64), beta)


def outcomes(logps: Tensor) -> Tensor:
    """Log-probabilities of the replies [P,R] -> of all outcomes [P,R+1], "anything else" last.

    Raises MoalignError where the replies' probabilities sum to more than 1.
    """
    logps = logps.double()
    mass = logps.exp().sum(-1, keepdim=True)
    most = mass.max().item()
    if not most <= 1 + ROUNDING:
        raise MoalignError(f"the probabilities of a prompt's replies sum to {most}, more than 1")
    return torch.cat([logps, (1 - mass).clamp(min=TINIEST).log()], -1)


def evaluate(world: World, logps: Tensor, reference: Tensor) -> Value:
    """The value of the policy with these log-probabilities of the replies [P,R]; ``reference`` is the base's."""
    f, expected, kl = values(world, outcomes(logps), outcomes(reference))
    return Value(f, expected, kl.item(), logps.double().exp().sum(-1).mean().item())


def values(world: World, policy: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f [M], E[r] [M] and KL [] from log-probabilities of all outcomes [P,R+1]; differentiable in ``policy``."""
    probabilities = policy.exp()
    expected = torch.einsum("pr,prm->m", probabilities, world.rewards) / len(policy)
    kl = (probabilities * (policy - reference)).sum(-1).mean()
    return expected - world.beta * kl, expected, kl


def optimum(world: World, reference: Tensor, weights: Sequence[float]) -> Tensor:
    """p*_w, the best policy for the weights [M]: log-probabilities of all outcomes [P,R+1], as ``reference`` is.

    p*_w(y|x) = pi_ref(y|x) exp(w.r(x,y) / beta) / Z_w(x)  (arXiv 2305.18290, eq. 4, with the reward w.r).
    """
    return (reference + _utility(world, weights) / world.beta).log_softmax(-1)


def best(world: World, reference: Tensor, weights: Sequence[float]) -> float:
    """w.f(p*_w) = mean over prompts of beta log Z_w: no policy has more, whatever KL it spends."""
    log_z = (reference + _utility(world, weights) / world.beta).logsumexp(-1)
    return world.beta * log_z.mean().item()


def _utility(world: World, weights: Sequence[float]) -> Tensor:
    return world.rewards @ torch.tensor(weights, dtype=torch.float64)


def exact_front(world: World, reference: Tensor, weights: Sequence[Sequence[float]]) -> Tensor:
    """f of p*_w for each of the weights [W,M]; ``reference`` is the base's log-probabilities of the replies [P,R]."""
    base = outcomes(reference)
    return torch.stack([values(world, optimum(world, base, w), base)[0] for w in weights])


def shares(world: World, reference: Tensor, points: Tensor, divisions: int = 20) -> Shares:
    """Front and hypervolume shares of the policies with values f = ``points`` [n,M]; ``reference`` [P,R] as above.

    Front share: over an even grid of weights w, the mean (and the least) of
    (max over points of w.f - w.f(base)) / (w.f(p*_w) - w.f(base)). Hypervolume share: over the volume of the exact
    front on a fine grid, both from the lowest corner of front and base. Raises MoalignError for a share above 1,
    which no policy reaches: the points or the reference are then not what they are said to be.
    """
    by_weights = _front_shares(world, reference, points, even_weights(len(world.objectives), divisions))
    fine = exact_front(world, reference, even_weights(len(world.objectives), 100 if len(world.objectives) == 2 else 30))
    base = evaluate(world, reference, reference).f
    corner = torch.cat([fine, base[None]]).min(0).values.numpy()
    volume = pareto.hypervolume(points.detach().numpy(), corner) / pareto.hypervolume(fine.numpy(), corner)
    _at_most_one(volume, "hypervolume", tolerance=0.01)  # the fine grid is not the whole front
    return Shares(by_weights.mean().item(), by_weights.min().item(), volume)


def _front_shares(world: World, reference: Tensor, points: Tensor, weights: Sequence[Sequence[float]]) -> Tensor:
    base = outcomes(reference)
    grid = torch.tensor(weights, dtype=torch.float64)
    origin = grid @ values(world, base, base)[0]
    most = torch.tensor([best(world, base, w) for w in weights], dtype=torch.float64)
    reached = (grid @ points.double().T).max(1).values
    result = (reached - origin) / (most - origin)
    _at_most_one(result.max().item(), "front", tolerance=1e-6)
    return result


def _at_most_one(share: float, what: str, tolerance: float) -> None:
    if not share <= 1 + tolerance:
        raise MoalignError(
            f"a {what} share of {share}: no policy lies beyond the exact front, so the values are wrong; were policy "
            "and reference scored on the same prompts, with the same beta?"
        )
