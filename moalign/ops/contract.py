"""What every implementation of ``token_logps`` takes and returns; labels of -100 never reach an implementation."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moalign.errors import ModelError

IGNORED = -100


class TokenLogps(NamedTuple):
    """``logps[N]`` in nats, with a gradient; ``entropy[N]`` in nats (None: not asked for), with one only on request.

    float64 for float64 inputs, else float32.
    """

    logps: Tensor
    entropy: Tensor | None


class Options(NamedTuple):
    """What ``token_logps`` takes beside its tensors; its docstring says what each means."""

    temperature: float = 1.0
    softcap: float | None = None
    entropy: bool = False
    entropy_gradient: bool = False
    negligible: float = 0.0
    chunk_tokens: int | None = None


class Implementation(Protocol):
    """``token_logps`` on checked inputs whose labels all lie in [0, V). N may be 0."""

    def __call__(
        self, hidden: Tensor, lm_head: Tensor, labels: Tensor, bias: Tensor | None, options: Options
    ) -> TokenLogps: ...


class Rows(NamedTuple):
    """What a row pass leaves of a chunk: ``logps[n]``, ``entropy[n]``, and [n,V] gradients where they were wanted."""

    logps: Tensor
    entropy: Tensor | None
    gradient: Tensor | None
    entropy_gradient: Tensor | None


class RowPass(Protocol):
    """From ``product[n,V]`` = hidden @ lm_head.T, float32 or float64, to the log-probability of ``labels[n]``.

    With z = cap(product + bias) / temperature and p = softmax(z) the derivatives are written times -temperature, which
    the caller undoes on [n,D]: ``gradient``, for d_logps = 1 and d_entropy = 0 where ``upstream`` is None, is
    (d_logps (p - onehot) + d_entropy p (z - E[z])) cap', and ``entropy_gradient`` the second term alone. ``dtype`` is
    that of the gradients, None where only values are wanted. At the label p - 1 is expm1(logp): the difference would
    cancel for tokens that the model is sure of. ``product`` is consumed, and what is returned may lie in its memory.
    """

    def __call__(
        self,
        product: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        options: Options,
        *,
        dtype: torch.dtype | None = None,
        upstream: tuple[Tensor, Tensor | None] | None = None,
        entropy_gradient: bool = False,
    ) -> Rows: ...


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the softmax is computed and results are returned."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(hidden: Tensor, lm_head: Tensor, labels: Tensor, bias: Tensor | None, options: Options) -> None:
    """Raise ValueError for shapes, dtypes or options that do not fit, ModelError for labels outside the head."""
    if hidden.ndim != 2 or lm_head.ndim != 2 or hidden.shape[1] != lm_head.shape[1]:
        raise ValueError(f"hidden must be [N,D] and lm_head [V,D], got {_shape(hidden)} and {_shape(lm_head)}")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels must be [N] with N = {len(hidden)}, got {_shape(labels)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if bias is not None and bias.shape != lm_head.shape[:1]:
        raise ValueError(f"bias must be [V] with V = {len(lm_head)}, got {_shape(bias)}")
    if len({hidden.dtype, lm_head.dtype, lm_head.dtype if bias is None else bias.dtype}) > 1:
        bias_dtype = "" if bias is None else f", bias {bias.dtype}"
        raise ValueError(f"one dtype is needed: hidden is {hidden.dtype}, lm_head {lm_head.dtype}{bias_dtype}")
    if not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating point, got {hidden.dtype}")
    temperature, softcap = options.temperature, options.softcap
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be positive and finite, got {softcap}")
    if not 0 <= options.negligible < 1:
        raise ValueError(f"negligible is a probability below 1, got {options.negligible}")
    if options.chunk_tokens is not None and options.chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {options.chunk_tokens}")
    bad = ((labels < 0) & (labels != IGNORED)) | (labels >= len(lm_head))
    if bool(bad.any()):
        raise ModelError(
            f"token id {int(labels[bad][0])} is outside the model's head of {len(lm_head)} tokens; "
            f"the tokenizer does not belong to this model (only {IGNORED} marks a token to be ignored)"
        )


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
