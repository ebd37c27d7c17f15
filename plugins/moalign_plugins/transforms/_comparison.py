"""What the transforms that compare with the untouched base share: its rewards, and an error where there are none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moalign.api import PluginError, Responses

if TYPE_CHECKING:
    from torch import Tensor


def reference_rewards(about: Responses) -> Tensor:
    """Rewards [N,R] of the base's responses to the same prompts, NaN where unknown."""
    if about.reference is None:
        raise PluginError("it compares with the base's responses, and there are none; `references` must say how many")
    return about.reference
