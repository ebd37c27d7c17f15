"""The fastest matrix product we know of on each device, for what is measured as ours and as the floor."""

from __future__ import annotations

import torch
from torch import Tensor

from moalign.ops import products


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x[n,K] @ weight[M,K].T, [n,M]."""
    return products.onednn_linear(x, weight) if onednn(weight) else torch.mm(x, weight.t())


def onednn(weight: Tensor) -> bool:
    """float32 on a CPU: oneDNN's product, which torch.mm does not use there, is the faster one on some processors."""
    return products.uses_onednn(weight)
