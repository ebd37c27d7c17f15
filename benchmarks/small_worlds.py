"""Worlds in which everything about every policy is a sum: softmax policies over five replies to each of 24 prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moalign import pareto
from moalign.sweeps.optima import Sampled

PRICE, PROMPTS, REPLIES, SAMPLES, OBJECTIVES = 0.15, 24, 5, 12, 2
GRID = np.array(pareto.grid(OBJECTIVES))
Array = NDArray[np.float64]


class World:
    """Rewards [P,R,M] and a reference [P,R] drawn by a seed; what a policy [P,R] of log-probabilities is worth."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.rewards = self.rng.uniform(0, 1, (PROMPTS, REPLIES, OBJECTIVES))
        self.reference = np.log(self.rng.dirichlet(np.ones(REPLIES), PROMPTS))

    def tilted(self, weights: Array, strength: float = 1.0) -> Array:
        """The policy [P,R] for the weights [M]: the best one at ``strength`` 1, beyond that it pays too much KL."""
        return normalised(self.reference + strength * self.rewards @ weights / PRICE)

    def collapsed(self) -> Array:
        """A policy [P,R] that says one reply to each prompt, whichever."""
        return normalised(self.reference + 40 * np.eye(REPLIES)[self.rng.integers(0, REPLIES, PROMPTS)])

    def values(self, policy: Array) -> Array:
        """E[r_j] - price KL, [M]."""
        probabilities = np.exp(policy)
        cost = PRICE * (probabilities * (policy - self.reference)).sum(1).mean()
        return np.asarray(np.einsum("pr,prm->m", probabilities, self.rewards) / PROMPTS - cost)

    def most(self, weights: Array) -> float:
        """What no policy exceeds for the weights [M]."""
        return PRICE * float(np.log((np.exp(self.reference + self.rewards @ weights / PRICE)).sum(1)).mean())

    def front(self, points: int = 200) -> Array:
        """Values [points,M] of the best policies for even weights."""
        return np.array([self.values(self.tilted(weights)) for weights in even(points)])

    def sampled(self, policy: Array) -> Sampled:
        """What a run would keep of a policy: samples with their rewards and log-ratios."""
        places = np.array([self.rng.choice(REPLIES, SAMPLES, p=np.exp(row)) for row in policy])
        rewards = np.take_along_axis(self.rewards, places[..., None], 1).reshape(-1, OBJECTIVES)
        ratios = np.take_along_axis(policy - self.reference, places, 1).ravel()
        return Sampled(rewards, ratios, tuple(np.repeat(np.arange(PROMPTS), SAMPLES).tolist()))

    def shares(self, policies: Sequence[Array]) -> Array:
        """Of what the best gains over the reference, what these and it reach [W], for an even grid of weights."""
        base, points = GRID @ self.values(self.reference), np.array([self.values(policy) for policy in policies])
        reached = np.maximum((GRID @ points.T).max(1), base)
        return np.asarray((reached - base) / (np.array([self.most(weights) for weights in GRID]) - base))


def even(points: int) -> list[Array]:
    """Weights [M] from one objective alone to the other."""
    return [np.array([share, 1 - share]) for share in np.linspace(0, 1, points)]


def normalised(logits: Array) -> Array:
    return np.asarray(logits - np.log(np.exp(logits).sum(1, keepdims=True)))
