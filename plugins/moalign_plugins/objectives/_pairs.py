"""What losses on pairs share: log-probabilities of whole responses, differences, logits, and the logistic loss.

Responses are rows [N], pairs are [P]. A combiner reaches a loss where its logit is ``scale * beta * difference -
margin``, which is here for any difference, and in ``moalign.api.pair_logits`` for that of summed log-ratios.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moalign.api import Batch, PairTerms, PluginError, log_ratios

if TYPE_CHECKING:
    from torch import Tensor

EXPONENT = 20.0
"""up to which ``bounded_expm1`` is exact: e^20 is 5e8, and its tangent at 1e4 is still far from float32's largest"""


def log_probabilities(batch: Batch, *, average: bool = False) -> Tensor:
    """log pi(y|x), summed or (``average``) averaged over the response tokens; [N]."""
    totals = (batch.logps * batch.mask).sum(-1)
    return totals / lengths(batch) if average else totals


def average_log_ratios(batch: Batch) -> Tensor:
    """log pi(y|x) - log pi_ref(y|x), averaged over the response tokens; [N]."""
    return log_ratios(batch) / lengths(batch)


def lengths(batch: Batch) -> Tensor:
    """Response tokens of each row, at least 1, as a row of no pair may be empty; [N]."""
    return batch.mask.sum(-1).clamp(min=1)


def reference_tokens(batch: Batch) -> Tensor:
    """log pi_ref of each token; [N,T]. Raises PluginError where the loss does not declare that it reads them."""
    if batch.ref_logps is None:
        raise PluginError('the loss reads reference log-probabilities but does not declare "reference" in `needs`')
    return batch.ref_logps


def discounted(batch: Batch, values: Tensor, discount: float) -> Tensor:
    """Sum of discount^t values_t, with the response's first token at t = 0; [N,T] -> [N]."""
    place = (batch.mask.cumsum(-1) - 1).clamp(min=0)
    return (discount**place * values * batch.mask).sum(-1)


def of_pairs(batch: Batch, values: Tensor) -> tuple[Tensor, Tensor]:
    """Of each pair's chosen, and of its rejected response; [N] -> [P], [P]."""
    return values[batch.pairs[:, 0]], values[batch.pairs[:, 1]]


def difference(batch: Batch, values: Tensor) -> Tensor:
    """Of the chosen minus of the rejected response; [N] -> [P]."""
    chosen, rejected = of_pairs(batch, values)
    return chosen - rejected


def weighted_difference(batch: Batch, reference_weight: float) -> Tensor:
    """[l(yw) - l(yl)] - weight [l_ref(yw) - l_ref(yl)], l summed over tokens; [P]. At 0 no reference is read."""
    if reference_weight == 0:
        return difference(batch, log_probabilities(batch))
    ratios = (batch.logps - reference_weight * reference_tokens(batch)) * batch.mask
    return difference(batch, ratios.sum(-1))


def conservative_difference(batch: Batch, values: Tensor, lam: float) -> Tensor:
    """Of the chosen minus ``lam`` times of the rejected response; [N] -> [P]."""
    chosen, rejected = of_pairs(batch, values)
    return chosen - lam * rejected


def shifted(terms: PairTerms, beta: float, differences: Tensor) -> Tensor:
    """scale * beta * difference - margin; [P]."""
    return terms.scale * beta * differences - terms.margin


def logistic(logits: Tensor, wrong: Tensor | float = 0.0) -> Tensor:
    """-(1 - wrong) log sigmoid(z) - wrong log sigmoid(-z): cross-entropy to labels wrong with that probability; [P]."""
    from torch.nn.functional import logsigmoid

    if isinstance(wrong, float) and wrong == 0:
        return -logsigmoid(logits)
    return -(1 - wrong) * logsigmoid(logits) - wrong * logsigmoid(-logits)


def bounded_expm1(exponent: Tensor, limit: float = EXPONENT) -> Tensor:
    """exp(x) - 1 up to ``limit``, and beyond it the tangent there: increasing and finite, with a slope of exp(limit).

    What is far beyond keeps its order and its direction, which a clamp would take from it.
    """
    import torch

    inside = exponent.clamp(max=limit)
    return inside.expm1() + torch.exp(inside) * (exponent - inside)


def reward_differences(name: str, terms: PairTerms) -> Tensor:
    """The scalarised reward difference of each pair; [P]. Raises PluginError where it is missing or NaN."""
    if terms.difference is None:
        raise PluginError(f"objective '{name}' regresses on reward differences, and the combiner supplies none")
    unknown = terms.difference.isnan()
    if bool(unknown.any()):
        pair = int(unknown.nonzero()[0])
        raise PluginError(f"objective '{name}': the reward difference of pair {pair} of the batch is unknown (NaN)")
    return terms.difference


def refuse_terms(name: str, terms: PairTerms) -> None:
    """Raise PluginError where a combiner's scale and margin ask for what a loss without a pairwise logit cannot do."""
    if bool(((terms.scale != 1) | (terms.margin != 0)).any()):
        raise PluginError(f"objective '{name}' cannot use a combiner's scale and margin; combine with 'linear'")
