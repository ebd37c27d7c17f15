"""An average of adapters that are trained already."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import field_validator

from moalign.api import Reference

REGISTRATION = {
    "name": "soup",
    "class": "Soup",
    "summary": "a fixed weighted sum of given adapters, such as two of supervised fine-tuning",
    "paper": "arXiv:2411.01798",
}


class Soup(Reference):
    """theta_ref = theta_base + sum_k c_k s_k B_k A_k, exactly: the ranks add up.

    SALSA (arXiv 2411.01798) has c theta_1 + (1 - c) theta_2 of two models that were fine-tuned apart, c = 1/2, which is
    this with shares that sum to 1; unverified: from memory of the paper. There the policy starts from one of the two;
    here it starts as always, from fresh weights or as a warm start says.

    Where a file does not say on which weights it was trained, as of adapters that peft itself wrote, it is taken to be
    the run's base, with a warning.
    """

    fixed: ClassVar[bool] = True

    shares: dict[str, float]
    """how much of each adapter, by its folder in the peft format, such as runs/first/candidates/only-helpful; they need
    not sum to 1"""

    @field_validator("shares")
    @classmethod
    def _are_adapters(cls, shares: dict[str, float]) -> dict[str, float]:
        if not any(shares.values()):
            raise ValueError("name adapters with a share that is not 0, such as {runs/a: 0.5, runs/b: 0.5}")
        for path, share in shares.items():
            if not math.isfinite(share):
                raise ValueError(f"{path}: {share} is no share")
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                if not (Path(path).expanduser() / name).is_file():
                    raise ValueError(f"no directory with an {name}: {path}")
        return shares

    def adapters(self) -> Mapping[str, float]:
        return self.shares
