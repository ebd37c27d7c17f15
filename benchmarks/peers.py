"""Who is measured: each one as its own trainer or documentation calls it, at the settings that are best for it here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import recomputing

LogpsFunction = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden[N,D], lm_head[V,D], labels[N] -> logps[N]

MOALIGN = "moalign"
RECOMPUTING = "recomputing (ours)"


class Unavailable(Exception):
    """Why a variant cannot run here."""


@dataclass(frozen=True)
class Variant:
    """``load`` returns the function for a device, or raises Unavailable. ``about``: how it is called."""

    name: str
    about: str
    load: Callable[[torch.device], LogpsFunction]


def _module(name: str, distribution: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise Unavailable(f"{distribution} cannot be imported: {error}") from None


def _moalign(device: torch.device) -> LogpsFunction:
    from moalign.ops import token_logps

    return lambda hidden, lm_head, labels: token_logps(hidden, lm_head, labels).logps


def _recomputing(device: torch.device) -> LogpsFunction:
    return recomputing.token_logps


def _trl(device: torch.device) -> LogpsFunction:
    function = _module("trl.kernels", "trl").ChunkedLogProbFunction
    width = _module("trl.trainer.utils", "trl")._CHUNKED_LOGPROB_CHUNK_SIZE

    def logps(hidden: Tensor, lm_head: Tensor, labels: Tensor) -> Tensor:
        return function.apply(hidden, lm_head, None, labels, 1.0, width, None, 1.0, ("log_probs",))[0]

    return logps


def _liger_grpo(device: torch.device) -> LogpsFunction:
    base = _module("liger_kernel.chunked_loss.fused_linear_ppo", "liger-kernel").LigerFusedLinearPPOBase

    def logps(hidden: Tensor, lm_head: Tensor, labels: Tensor) -> Tensor:
        return base.chunk_forward(hidden[None], lm_head, labels[None])[0]

    return logps


def _liger_scaled(device: torch.device) -> LogpsFunction:
    module = _module("liger_kernel.ops.fused_linear_scaled_cross_entropy", "liger-kernel")
    function = module.LigerFusedLinearScaledCrossEntropyFunction
    return lambda hidden, lm_head, labels: -function.apply(hidden, lm_head, labels)


def _torch_reference(device: torch.device) -> LogpsFunction:
    linear_cross_entropy = _linear_cross_entropy()
    return lambda hidden, lm_head, labels: -linear_cross_entropy(hidden, lm_head, labels, reduction="none").float()


def _torch_chunked(device: torch.device) -> LogpsFunction:
    return _torch_with_options(None)


def _torch_rows(device: torch.device) -> LogpsFunction:
    return _torch_with_options(256 if device.type == "cpu" else 1024)


def _torch_with_options(rows: int | None) -> LogpsFunction:
    linear_cross_entropy = _linear_cross_entropy()
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable(f"torch {torch.__version__} has no LinearCrossEntropyOptions")
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)

    def logps(hidden: Tensor, lm_head: Tensor, labels: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, lm_head, labels, reduction="none", options=options).float()

    return logps


def _linear_cross_entropy() -> Callable[..., Tensor]:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy")
    return function


def _plain(device: torch.device) -> LogpsFunction:
    def logps(hidden: Tensor, lm_head: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(hidden, lm_head).float()
        return F.log_softmax(logits, -1).gather(1, labels[:, None]).squeeze(1)

    return logps


def _cut_cross_entropy(device: torch.device) -> LogpsFunction:
    linear_cross_entropy = _module("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    if device.type != "cuda":
        raise Unavailable("its kernels need a GPU")
    return lambda hidden, lm_head, labels: -linear_cross_entropy(hidden, lm_head, labels, reduction="none").float()


VARIANTS: tuple[Variant, ...] = (
    Variant(MOALIGN, "token_logps, implementation auto", _moalign),
    Variant(RECOMPUTING, "benchmarks/recomputing.py", _recomputing),
    Variant("TRL", "trl.kernels.ChunkedLogProbFunction, its trainers' tile width, log-probabilities only", _trl),
    Variant("Liger GRPO", "chunk_forward of LigerFusedLinearGRPO, all tokens as one sequence", _liger_grpo),
    Variant("Liger scaled CE", "LigerFusedLinearScaledCrossEntropy; SM90 kernels on Hopper, else torch", _liger_scaled),
    Variant("torch linear CE", "F.linear_cross_entropy, reduction none", _torch_reference),
    Variant("torch linear CE, auto", "the same with LinearCrossEntropyOptions()", _torch_chunked),
    Variant("torch linear CE, rows", "the same, batch_chunk_size 256 (GPU: 1,024)", _torch_rows),
    Variant("plain torch", "logits, log_softmax in float32, gather", _plain),
    Variant("cut-cross-entropy", "linear_cross_entropy, reduction none, its default filter", _cut_cross_entropy),
)
