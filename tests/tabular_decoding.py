"""Worlds of a few tokens and a few steps, in which every response can be enumerated; float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moalign.api import Decoder, NextToken, Request

TOKENS, STEPS = 4, 3
CLOSE = {"rtol": 1e-11, "atol": 1e-11}  # sums of some tens of float64 terms


def distribution(seed: int, steps: int = STEPS, scale: float = 1.0) -> Tensor:
    """Log-probabilities of all responses, [V] * steps."""
    generator = torch.Generator().manual_seed(seed)
    table = scale * torch.randn([TOKENS] * steps, generator=generator, dtype=torch.float64)
    return table.flatten().log_softmax(0).view(table.shape)


def rewards(seed: int, steps: int = STEPS) -> Tensor:
    return torch.randn([TOKENS] * steps, generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float64)


def optimum(reference: Tensor, reward: Tensor, beta: float) -> Tensor:
    """log of ref exp(r / beta) / Z: the most of E[r] - beta KL(pi || ref)."""
    return (reference + reward / beta).flatten().log_softmax(0).view(reference.shape)


def worth(policy: Tensor, reference: Tensor, reward: Tensor, beta: float) -> float:
    """E[r] - beta KL(pi || ref)."""
    return float((policy.exp() * (reward - beta * (policy - reference))).sum())


def beginnings(policy: Tensor, step: int) -> Tensor:
    """Log-probability of each beginning of ``step`` tokens, [V^step]."""
    return policy.reshape(TOKENS**step, -1).logsumexp(-1)


def next_token(policy: Tensor, step: int) -> Tensor:
    """Log-probabilities of the next token behind each beginning, [V^step, V]."""
    return (beginnings(policy, step + 1) - beginnings(policy, step).repeat_interleave(TOKENS)).view(-1, TOKENS)


def soft_values(reference: Tensor, reward: Tensor, beta: float, step: int) -> Tensor:
    """beta log E_ref[exp(r / beta)] behind each beginning, [V^step]: what the optimal policy still expects."""
    tilted = (reference + reward / beta).reshape(TOKENS**step, -1).logsumexp(-1)
    return beta * (tilted - beginnings(reference, step))


def expected_values(reference: Tensor, reward: Tensor, step: int) -> Tensor:
    """E_ref[r] behind each beginning, [V^step]: what the reference still expects."""
    inside = (reference.exp() * reward).reshape(TOKENS**step, -1).sum(-1)
    return inside / beginnings(reference, step).exp()


def decoded(decoder: Decoder, request: Request, policies: Mapping[str | None, Tensor]) -> Tensor:
    """Log-probabilities of all responses where the decoder chooses each token; ``policies`` by speaker.

    Hidden states, [..., 1], are the number of the beginning in its step plus 1000 for each step.
    """
    speakers = decoder.speakers(request)
    (shape,) = {policy.shape for policy in policies.values()}
    total = torch.zeros(1, dtype=torch.float64)
    for step in range(len(shape)):
        count = TOKENS**step
        held = [policies[name] for name in speakers]

        def ahead(tokens: Tensor, step: int = step, count: int = count) -> Tensor:
            return (1000 * (step + 1) + torch.arange(count)[:, None] * TOKENS + tokens)[..., None].double()

        at = NextToken(
            ids=torch.zeros(count, step, dtype=torch.long),
            logits=torch.stack([next_token(policy, step) for policy in held]),
            past=torch.stack([beginnings(policy, step) for policy in held]),
            ahead=ahead,
        )
        logps = decoder.scores(request, at).log_softmax(-1)
        total = (total[:, None] + logps).flatten()
    return total.view(shape)


def table_of(values_by_step: Mapping[int, Tensor]):
    """A value head for ``decoded``: by the step and the number of the beginning."""

    def head(hidden: Tensor) -> Tensor:
        numbers = hidden[..., 0].long()
        (step,) = set((numbers // 1000).flatten().tolist())
        return values_by_step[step][numbers % 1000]

    return head
