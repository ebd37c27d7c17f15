"""The fused core: the only way in which a loss sees the model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from moalign.ops import chunked, reference, triton_rows
from moalign.ops.contract import IGNORED, Implementation, Options, TokenLogps, check, result_dtype


def _on_an_accelerator(
    hidden: Tensor, lm_head: Tensor, labels: Tensor, bias: Tensor | None, options: Options
) -> TokenLogps:
    """The chunked algorithm around the Triton row pass; where that cannot run, the reason is said and torch's used."""
    reason = triton_rows.available(lm_head.device, lm_head.dtype)
    if reason is None:
        return chunked.token_logps(hidden, lm_head, labels, bias, options, triton_rows.row_pass)
    warnings.warn(f"token_logps: {reason}; the slower implementation 'chunked' is used", RuntimeWarning, stacklevel=3)
    return chunked.token_logps(hidden, lm_head, labels, bias, options)


IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "reference": reference.token_logps,
    "chunked": chunked.token_logps,
    "triton": _on_an_accelerator,
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
    times the largest norm of a row of ``lm_head``, over the temperature. Values, the entropy's gradient and a trained
    head's are not touched. ``chunk_tokens``, the number of tokens whose
    logits are in memory together, changes nothing but rounding.

    Returns ``TokenLogps(logps[N], entropy[N] or None)``, float64 for float64 inputs, else float32.
    Raises ModelError for a label outside the vocabulary, ValueError for shapes, dtypes or options that do not fit.
    """
    options = Options(temperature, softcap, entropy or entropy_gradient, entropy_gradient, negligible, chunk_tokens)
    compute = select(implementation, hidden.device)
    check(hidden, lm_head, labels, bias, options)
    kept = labels != IGNORED
    if bool(kept.all()):
        return compute(hidden, lm_head, labels.long(), bias, options)
    rows = kept.nonzero().squeeze(1)
    scored = compute(hidden[rows], lm_head, labels[rows].long(), bias, options)
    zeros = torch.zeros(len(labels), dtype=result_dtype(hidden.dtype), device=hidden.device)
    logps = zeros.index_copy(0, rows, scored.logps)
    return TokenLogps(logps, None if scored.entropy is None else zeros.index_copy(0, rows, scored.entropy))


def distributions(
    hidden: Tensor,
    lm_head: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Log-probabilities of the whole vocabulary, [S,V], differentiable. All logits are in memory at once."""
    return reference.distributions(hidden, lm_head, bias, Options(temperature, softcap))


def select(implementation: str, device: torch.device) -> Implementation:
    """The implementation of that name; "auto" is the fastest for the device. Raises ValueError for unknown names."""
    name = implementation
    if name == "auto":
        name = "triton" if device.type == "cuda" else "chunked"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"no implementation is called '{implementation}'; known: auto, {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name]


__all__ = ["IGNORED", "IMPLEMENTATIONS", "TokenLogps", "distributions", "select", "token_logps"]
