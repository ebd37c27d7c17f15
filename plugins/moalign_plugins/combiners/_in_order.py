"""What the rules share that compare responses by one objective after the other, the most important one first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moalign.api import PluginError

if TYPE_CHECKING:
    from torch import Tensor


def levels_of(rewards: Tensor, weights: Tensor) -> Tensor:
    """The mean reward of the objectives of each weight above 0, the largest weight first; [N,L]."""
    import torch

    values = [value for value in weights.unique().flip(0) if value > 0]
    return torch.stack([rewards[:, weights == value].mean(1) for value in values], dim=1)


def decided(differences: Tensor, bounds: Tensor) -> Tensor:
    """1 where the first level beyond its bound is positive, -1 where it is negative, 0 without; [..., L], [L] -> [...].

    Raises PluginError where a difference is unknown of which that depends.
    """
    import torch

    verdict = torch.zeros_like(differences[..., 0])
    for difference, bound in zip(differences.unbind(-1), bounds, strict=True):
        unknown = difference.isnan() & (verdict == 0)
        if bool(unknown.any()):
            raise PluginError("a reward that would decide a comparison is unknown")
        verdict = verdict.where(verdict != 0, difference.sign() * (difference.abs() > bound))
    return verdict
