"""Log-sigmoids of rewards, weighed, as differences and margins of pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from moalign_plugins.combiners._shaped_margins import ShapedMargins

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "log-sigmoid-margins",
    "class": "LogSigmoidMargins",
    "summary": "pairs compared by weighted log-sigmoids of rewards: what falls short counts, gains above hardly",
    "paper": "arXiv:2402.00742",
}


class LogSigmoidMargins(ShapedMargins):
    """f = log sigmoid: the reward is sum_k w_k log s(c (r_k - ref_k)). arXiv 2402.00742.

    The logarithm of prod_k s(...)^w_k, so that all should be good; linear far below the reference, flat above it. On
    sampled responses it is "log-sigmoid".
    """

    called: ClassVar[str] = "log-sigmoid-margins"

    def bent(self, shifted: Tensor) -> Tensor:
        from torch.nn.functional import logsigmoid

        return logsigmoid(shifted)
