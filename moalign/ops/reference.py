"""The specification: what every other implementation must equal. All logits at once; autograd does the gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moalign.ops.contract import Options, TokenLogps, result_dtype


def token_logps(hidden: Tensor, lm_head: Tensor, labels: Tensor, bias: Tensor | None, options: Options) -> TokenLogps:
    """log softmax(cap(hidden @ lm_head.T + bias) / temperature)[labels], where cap(z) = softcap * tanh(z / softcap)."""
    log_probabilities = distributions(hidden, lm_head, bias, options)
    logps = log_probabilities.gather(1, labels[:, None]).squeeze(1)
    if not options.entropy:
        return TokenLogps(logps, None)
    if not options.entropy_gradient:
        log_probabilities = log_probabilities.detach()
    return TokenLogps(logps, -(log_probabilities.exp() * log_probabilities).sum(-1))


def distributions(hidden: Tensor, lm_head: Tensor, bias: Tensor | None, options: Options) -> Tensor:
    """The same of every token of the vocabulary, [S,V]: so much memory, and once more for its gradient."""
    logits = F.linear(hidden, lm_head, bias).to(result_dtype(hidden.dtype))
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    return F.log_softmax(logits / options.temperature, dim=-1)
