"""The fastest matrix product we know of on each device, for what is measured as ours and as the floor."""

from __future__ import annotations

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x[n,K] @ weight[M,K].T, [n,M]."""
    if onednn(weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return torch.mm(x, weight.t())


def onednn(weight: Tensor) -> bool:
    """float32 on a CPU: oneDNN's product, which torch.mm does not use there, is the faster one on some processors."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and _WORKS


def _works() -> bool:
    try:
        x = torch.tensor([[1.0, 2.0]])
        return torch.ops.mkldnn._linear_pointwise(x, torch.ones(3, 2), None, "none", [], "").tolist() == [[3.0] * 3]
    except (AttributeError, RuntimeError, TypeError):
        return False


_WORKS = _works()
