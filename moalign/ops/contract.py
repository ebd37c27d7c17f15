"""What every implementation of ``token_logps`` takes and returns; labels of -100 never reach an implementation."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moalign.errors import ModelError

IGNORED = -100


class TokenLogps(NamedTuple):
    """``logps[N]`` in nats, with a gradient; ``entropy[N]`` in nats, a metric without one (None: not asked for).

    float64 for float64 inputs, else float32.
    """

    logps: Tensor
    entropy: Tensor | None


class Implementation(Protocol):
    """``token_logps`` on checked inputs whose labels all lie in [0, V). N may be 0."""

    def __call__(
        self,
        hidden: Tensor,
        lm_head: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        *,
        temperature: float,
        softcap: float | None,
        entropy: bool,
    ) -> TokenLogps: ...


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the softmax is computed and results are returned."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(
    hidden: Tensor, lm_head: Tensor, labels: Tensor, bias: Tensor | None, temperature: float, softcap: float | None
) -> None:
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
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be positive and finite, got {softcap}")
    bad = ((labels < 0) & (labels != IGNORED)) | (labels >= len(lm_head))
    if bool(bad.any()):
        raise ModelError(
            f"token id {int(labels[bad][0])} is outside the model's head of {len(lm_head)} tokens; "
            f"the tokenizer does not belong to this model (only {IGNORED} marks a token to be ignored)"
        )


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
