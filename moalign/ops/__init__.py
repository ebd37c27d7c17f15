"""The fused core: the only way in which a loss sees the model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moalign.ops import chunked, reference
from moalign.ops.contract import IGNORED, Implementation, Options, TokenLogps, check, result_dtype

IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "reference": reference.token_logps,
    "chunked": chunked.token_logps,
}


def token_logps(
    hidden: Tensor,
    lm_head: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    *,
    entropy_gradient: bool = False,
    negligible: float = 0.0,
    chunk_tokens: int | None = None,
    implementation: str = "auto",
) -> TokenLogps:
    """Log-probability of each label under softmax(cap(hidden @ lm_head.T + bias) / temperature), in nats.

    ``hidden[N,D]``, ``lm_head[V,D]``, ``bias[V]`` of one dtype, ``labels[N]`` integers; cap(z) = c tanh(z / c) with
    c = softcap. Gradients flow to ``hidden``, and to ``lm_head`` and ``bias`` where they require one. A label of -100
    gives exactly 0 and no gradient. ``entropy`` adds each token's entropy, with ``entropy_gradient`` differentiable.

    ``negligible`` leaves those tokens of the vocabulary out of the gradient whose probability is below it at every
    position of a chunk; the gradient of a log-probability then errs by at most the sum of its probabilities left out
    times the largest norm of a row of ``lm_head``. Values are not touched. ``chunk_tokens``, the number of tokens whose
    logits are in memory together, changes nothing but rounding.

    Returns ``TokenLogps(logps[N], entropy[N] or None)``, float64 for float64 inputs, else float32.
    Raises ModelError for a label outside the vocabulary, ValueError for shapes, dtypes or options that do not fit.
    """
    options = Options(temperature, softcap, entropy or entropy_gradient, entropy_gradient, negligible, chunk_tokens)
    compute = select(implementation)
    check(hidden, lm_head, labels, bias, options)
    kept = labels != IGNORED
    if bool(kept.all()):
        return compute(hidden, lm_head, labels.long(), bias, options)
    rows = kept.nonzero().squeeze(1)
    scored = compute(hidden[rows], lm_head, labels[rows].long(), bias, options)
    zeros = torch.zeros(len(labels), dtype=result_dtype(hidden.dtype), device=hidden.device)
    logps = zeros.index_copy(0, rows, scored.logps)
    return TokenLogps(logps, None if scored.entropy is None else zeros.index_copy(0, rows, scored.entropy))


def select(implementation: str = "auto") -> Implementation:
    """The implementation of that name; "auto" is the fastest that runs everywhere. Raises ValueError for others."""
    name = "chunked" if implementation == "auto" else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"no implementation is called '{implementation}'; known: auto, {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name]


__all__ = ["IGNORED", "IMPLEMENTATIONS", "TokenLogps", "select", "token_logps"]
