"""Runs that keep posteriors, and what several tests read of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from moalign.lora import mixing, posterior_file
from moalign.lora.posterior import Posterior

STEPS, LAST = 9, 5  # half of 9 steps, rounded up
TRAIN = {"steps": STEPS, "pairs_per_step": 8, "lr": 1e-2, "together": 2}
KEEPING = TRAIN | {"posterior": 0.5}
MIDDLE, HELPFUL, HARMLESS = "w-0.50-0.50", "w-0.00-1.00", "w-1.00-0.00"
FILE = "posterior.safetensors"


def kept(directory: Path, candidate: str) -> Posterior:
    """A candidate's, from its folder."""
    adapter = mixing.read(directory / "candidates" / candidate, alone=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.tensors.items()}
    return posterior_file.read(directory / "candidates" / candidate, shapes, adapter.base)


def largest(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """Difference of two sets of tensors of the same names."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)
