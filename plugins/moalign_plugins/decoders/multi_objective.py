"""Multi-objective decoding: candidates trained for one objective each, mixed token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from moalign.api import Decoder, MoalignError, NextToken, PreferenceError, Request

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "multi-objective",
    "class": "MultiObjective",
    "summary": "candidates' log-probabilities mixed token by token, for any preference between theirs (MOD)",
    "paper": "arXiv:2406.18853",
}

Divergence = Literal["reverse-kl", "forward-kl", "alpha", "jsd"]
MOST_STEPS = 200
CLOSE = 1e-9  # how near to 1 the sum of the probabilities must come


class MultiObjective(Decoder):
    """pi(s) = ref(s) g(sum_k w_k f'(pi_k(s) / ref(s)) - z), with g the inverse of f' and z so that the sum is 1.

    The optimum of sum_k w_k r_k less the f-divergence, E_ref f(pi / ref), where each pi_k is the optimum for its own
    r_k. Under reverse KL, f = u log u, it is pi_1^w_1 ... pi_K^w_K but for a factor, and the base is not needed.

    What is exact: all of it for responses of one token. For longer ones the formula holds for whole responses, and
    token by token it is normalised too early: under reverse KL log pi(y) = sum_k w_k log pi_k(y) - sum_t log Z_t, with
    Z_t <= 1 the sum over tokens of pi_1^w_1 ... pi_K^w_K, while the optimum has one constant for all y. They agree
    where sum_t log Z_t is the same for all responses, so for a single candidate and for equal ones.
    """

    divergence: Divergence = "reverse-kl"
    """that of the candidates' training from its reference"""
    alpha: float = Field(default=0.5, gt=0, le=1)
    """of the alpha-divergence, f'(u) = (1 - u^-alpha) / alpha; towards 0 it is reverse KL, 1 is forward KL"""
    level: Literal["token", "prefix"] = "token"
    """prefix: ratios of the response so far with the token, and z left out, as the paper's greedy search has it; the
    same as token under reverse KL"""
    weights: Mapping[str, float] = {}
    """of candidates, not negative, sum 1; without it those that the preference asks for"""

    @field_validator("weights")
    @classmethod
    def _sum_to_one(cls, weights: Mapping[str, float]) -> Mapping[str, float]:
        if weights and (min(weights.values()) < 0 or abs(math.fsum(weights.values()) - 1) > 1e-6):
            raise ValueError(f"weights are not negative and sum to 1, not {dict(weights)}")
        return weights

    def speakers(self, request: Request) -> list[str | None]:
        shares = self._shares(request)
        if not shares:
            raise PreferenceError("there is nothing to mix: ask for a preference between candidates, or give weights")
        base: list[str | None] = [] if len(shares) == 1 or self.divergence == "reverse-kl" else [None]
        return [*shares, *base]

    def scores(self, request: Request, at: NextToken) -> Tensor:
        weights = list(self._shares(request).values())
        if len(weights) == 1:
            return at.logits[0]
        logps = at.logits.double().log_softmax(-1)
        if self.divergence == "reverse-kl":
            return mixed(logps, weights).to(at.logits.dtype)
        by_prefix = self.level == "prefix"
        if by_prefix:
            logps = logps + at.past[..., None]
        found = f_mixed(logps[:-1], logps[-1], weights, self.divergence, self.alpha, normalise=not by_prefix)
        return found.log_softmax(-1).to(at.logits.dtype)

    def _shares(self, request: Request) -> dict[str, float]:
        shares = self.weights or request.shares
        return {name: share for name, share in shares.items() if share > 0}


def mixed(logps: Tensor, weights: Sequence[float]) -> Tensor:
    """sum_k w_k log pi_k: [K,...,V] -> [...,V], normalised by no one; -inf where one of them is."""
    total = logps[0] * weights[0]
    for each, weight in zip(logps[1:], weights[1:], strict=True):
        total = total + each * weight
    return total


def f_mixed(
    logps: Tensor,
    reference: Tensor,
    weights: Sequence[float],
    divergence: Divergence,
    alpha: float = 0.5,
    *,
    normalise: bool = True,
) -> Tensor:
    """log of ref g(sum_k w_k f'(pi_k / ref) - z): float64 [K,...,V] and [...,V] -> [...,V].

    Closed forms, with u = pi / ref: forward KL f' = -1 / u, so a weighted harmonic mean; alpha f' = (1 - u^-alpha) /
    alpha, a power mean; Jensen-Shannon f' = log(2 u / (1 + u)), g(v) = e^v / (2 - e^v). Each f' is concave, so that
    without z the sum is at most 1 (Jensen) and z <= 0: the root of a convex function, to which Newton's method comes
    from one side. Not ``normalise``: z = 0.
    """
    import torch

    if divergence == "reverse-kl":
        found = mixed(logps, weights)
        return found.log_softmax(-1) if normalise else found
    possible = ~(reference.isneginf() | logps.isneginf().any(0))
    ratios = torch.where(possible, logps - reference, 0.0)
    if divergence == "jsd":
        inner = -mixed(torch.nn.functional.softplus(-ratios), weights)  # sum_k w_k log(u / (1 + u)), below 0
        least = reference.exp().log1p()  # no token has more than all of the probability
        rest = _jensen_shannon_rest(-inner, reference, possible) if normalise else -inner
        rest = rest.maximum(least)
        found = reference - rest - torch.log(-torch.expm1(-rest))
    else:
        power = 1.0 if divergence == "forward-kl" else alpha
        scale = ratios.new_tensor(weights).view(-1, *[1] * (ratios.ndim - 1))
        inner = (scale * torch.exp(-power * ratios)).sum(0)
        rest = _power_rest(inner, reference, possible, power) if normalise else inner
        found = reference - torch.log(rest.maximum(torch.exp(power * reference))) / power
    return found.masked_fill(~possible, -torch.inf)


def _power_rest(inner: Tensor, reference: Tensor, possible: Tensor, power: float) -> Tensor:
    """S - t, S = ``inner``, with t so that sum ref (S - t)^(-1/power) = 1; t = -power z."""
    import torch

    def terms(rest: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.exp(reference - torch.log(rest) / power)
        return found, found / rest / power

    return _rest(inner, torch.exp(power * reference), reference, possible, terms)


def _jensen_shannon_rest(inner: Tensor, reference: Tensor, possible: Tensor) -> Tensor:
    """c - t, c = ``inner``, with t so that sum ref / (e^(c - t) - 1) = 1; t = -z."""
    import torch

    def terms(rest: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        grown = -torch.expm1(-rest)
        found = torch.exp(reference - rest - torch.log(grown))
        return found, found / grown

    return _rest(inner, reference.exp().log1p(), reference, possible, terms)


def _rest(
    inner: Tensor,
    least: Tensor,
    reference: Tensor,
    possible: Tensor,
    terms: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """``inner`` - t, [...,V], where the sum over tokens of ``terms``, which rises with t and bends upwards, is 1.

    Newton's method from the first t at which a token alone would have all the probability (``inner`` - t = ``least``).
    t is held as its distance from what that token has, since the two may agree in all their digits. The excess falls
    with each step; once it does not, that is rounding, and the row is done, if it is near enough.
    """
    import torch

    shape, size = inner.shape, inner.shape[-1]
    inner, least, reference, possible = (each.reshape(-1, size) for each in (inner, least, reference, possible))
    first = torch.where(possible, inner - least, torch.inf).argmin(-1, keepdim=True)
    apart = inner - inner.gather(-1, first)
    distance = least.gather(-1, first)
    excess = torch.full_like(distance, torch.inf)
    rows = torch.arange(len(inner), device=inner.device)
    for _ in range(MOST_STEPS):
        rest = (apart[rows] + distance[rows]).maximum(least[rows])
        values, slopes = (torch.where(possible[rows], each, 0.0) for each in terms(rest, reference[rows]))
        found = values.sum(-1, keepdim=True) - 1
        falling = (found > 1e-3 * CLOSE) & (found < excess[rows])
        excess[rows] = found.minimum(excess[rows])
        distance[rows] += torch.where(falling, found / slopes.sum(-1, keepdim=True), 0.0)
        rows = rows[falling.squeeze(-1)]
        if not len(rows):
            break
    if not bool((excess.abs() <= CLOSE).all()):
        raise MoalignError(f"the mix has no normaliser to be found, its sum stays off by {excess.abs().max():g}")
    return (apart + distance).view(shape)
