"""What losses share: log-ratios of responses and of pairs, as sums over response tokens of a ``Batch``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moalign.errors import PluginError
from moalign.types import Batch, PairTerms

if TYPE_CHECKING:
    from torch import Tensor


def log_ratios(batch: Batch) -> Tensor:
    """log pi(y|x) - log pi_ref(y|x), summed over the response tokens; [N]."""
    if batch.ref_logps is None:
        raise PluginError('the loss reads reference log-probabilities but does not declare "reference" in `needs`')
    return ((batch.logps - batch.ref_logps) * batch.mask).sum(-1)


def pair_log_ratios(batch: Batch) -> Tensor:
    """Log-ratio of the chosen minus log-ratio of the rejected response; [P]."""
    ratios = log_ratios(batch)
    return ratios[batch.pairs[:, 0]] - ratios[batch.pairs[:, 1]]


def pair_logits(batch: Batch, terms: PairTerms, beta: float) -> Tensor:
    """``scale * beta * (ratio of chosen - ratio of rejected) - margin``; [P]. What a pairwise objective sees."""
    return terms.scale * beta * pair_log_ratios(batch) - terms.margin


def chosen_logps(batch: Batch, *, mean: bool) -> Tensor:
    """log pi of the chosen response, summed or (``mean``) averaged over its tokens; [P]."""
    totals = (batch.logps * batch.mask).sum(-1)
    if mean:
        totals = totals / batch.mask.sum(-1).clamp(min=1)  # a row of another pair may be empty
    return totals[batch.pairs[:, 0]]


def pair_preference(batch: Batch) -> Tensor:
    """The preference of the candidate that each pair belongs to; [P,M]."""
    return batch.preference[batch.pairs[:, 0]]
