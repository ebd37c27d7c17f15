"""What the losses share that reward tokens with the log-ratios of a trained adapter, beside a value head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moalign.api import Batch, PluginError, Tokens
from moalign_plugins.objectives._value_head import ValueHead

if TYPE_CHECKING:
    from torch import Tensor


class GuidedTokens(ValueHead):
    """Subclasses add what they make of ``log_ratios_of_guide`` to the rewards of the tokens."""

    guide: str
    """folder of a trained adapter of the same base model, such as runs/first/candidates/only-helpful; with {candidate}
    in place of the last name, each candidate's own"""

    def guides(self) -> Mapping[str, str]:
        return {"guide": self.guide}

    def measure(self, batch: Batch) -> Mapping[str, Tensor]:
        return {**super().measure(batch), **batch.guides}

    def log_ratios_of_guide(self, tokens: Tokens) -> Tensor:
        """log pi_guide - log pi_ref of each response token, 0 elsewhere; [N,T]."""
        if tokens.ref_logps is None:
            raise PluginError('the loss reads log-ratios but does not declare "reference" in `needs`')
        return (tokens.measured["guide"] - tokens.ref_logps) * tokens.mask
