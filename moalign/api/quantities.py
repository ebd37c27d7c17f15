"""What losses and observers share: log-ratios and logits of pairs, and the numbers of a run under flat names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moalign.batch import Batch, PairTerms
from moalign.errors import PluginError
from moalign.types import Outcome

if TYPE_CHECKING:
    from torch import Tensor


# --- what losses share ----------------------------------------------------------------------------------------------


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


# --- what observers share --------------------------------------------------------------------------------------------


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What of a step's metrics a curve can show; "nan" and "inf", for which JSON has no numbers, are numbers again."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, int | float) or value in ("nan", "inf", "-inf"):
            found[name] = float(value)
    return found


def figures(outcome: Outcome) -> dict[str, float]:
    """The numbers of an outcome: ``scores/NAME`` and ``stderr/NAME`` per objective, ``kl``, ``tokens``, the details."""
    found = {f"scores/{name}": score for name, score in outcome.scores.items()}
    found |= {f"stderr/{name}": error for name, error in outcome.stderr.items()}
    if outcome.kl is not None:
        found["kl"] = outcome.kl
    return found | {"tokens": float(outcome.tokens)} | dict(outcome.details)
