"""Away from what one candidate says, towards what another says: guidance without a classifier, on logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moalign.api import ConfigError, Decoder, NextToken, Request

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "guidance",
    "class": "Guidance",
    "summary": "logits_u + scale (logits_c - logits_u): from one candidate, or the base, towards another and beyond",
    "paper": "arXiv:2207.12598",
}


class Guidance(Decoder):
    """0 is ``away``, 1 is ``towards``, both to the last bit; above 1 goes beyond what was trained.

    The result is pi_u^(1-g) pi_c^g, normalised for each token. With the base for u, and a candidate that is optimal for
    a reward at a price beta of KL, each token is tilted as by a price of beta / g, the values of what comes later being
    those of beta.
    """

    scale: float = 1.5
    """g; the further, the more of the difference"""
    towards: str | None = None
    """a candidate; without it the one that has all of the preference"""
    away: str | None = None
    """a candidate; without it the untouched base"""

    def speakers(self, request: Request) -> list[str | None]:
        towards = self.towards
        if towards is None:
            if len(request.shares) != 1:
                found = ", ".join(request.shares) or "none"
                raise ConfigError(f"towards: say which candidate; of those asked for ({found}) none has all the weight")
            (towards,) = request.shares
        if towards == self.away:
            raise ConfigError(f"away: '{towards}' is also where guidance goes; name another candidate, or leave it out")
        return [self.away, towards]

    def scores(self, request: Request, at: NextToken) -> Tensor:
        import torch

        away, towards = at.logits
        guided = torch.lerp(away, towards, self.scale)
        # what one of them says is impossible stays so; -inf - -inf would be NaN
        return guided.masked_fill(away.isneginf() | towards.isneginf(), float("-inf"))
