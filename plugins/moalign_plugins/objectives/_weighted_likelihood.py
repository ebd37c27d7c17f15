"""What the losses share that weigh likelihood by the exponential of a reward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moalign.api import PluginError

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 80.0  # of an exponent: e^88 is the last that float32 holds, and a step's losses are added up


def weights_of(rewards: Tensor, beta: float, who: str) -> Tensor:
    """exp(rewards / beta). Raises PluginError where float32 cannot hold that."""
    exponents = rewards / beta
    most = float(exponents.max()) if len(exponents) else 0.0
    if most > LARGEST:
        raise PluginError(
            f"objective '{who}': a reward of {most * beta:g} has the weight exp({most:.4g}), which no float32 holds; "
            "raise beta, or scale or shift the rewards with objectives.NAME.transform"
        )
    return exponents.exp()
