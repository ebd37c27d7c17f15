"""The specification: what every other implementation must equal. All logits at once; autograd does the gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moalign.ops.contract import TokenLogps, result_dtype


def token_logps(
    hidden: Tensor,
    lm_head: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
) -> TokenLogps:
    """log softmax(cap(hidden @ lm_head.T + bias) / temperature)[labels], where cap(z) = softcap * tanh(z / softcap)."""
    logits = F.linear(hidden, lm_head, bias).to(result_dtype(hidden.dtype))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probabilities = F.log_softmax(logits / temperature, dim=-1)
    logps = log_probabilities.gather(1, labels[:, None]).squeeze(1)
    if not entropy:
        return TokenLogps(logps, None)
    return TokenLogps(logps, torch.special.entr(log_probabilities.detach().exp()).sum(-1))
