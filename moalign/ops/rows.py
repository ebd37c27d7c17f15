"""The pass over a chunk of logits in torch operations: values and, in place, derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from moalign.ops.contract import Options, Rows

LOWEST = -1e30  # exp of it is 0 in every dtype


def row_pass(
    product: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    options: Options,
    *,
    dtype: torch.dtype | None = None,
    upstream: tuple[Tensor, Tensor | None] | None = None,
    entropy_gradient: bool = False,
) -> Rows:
    """As ``contract.RowPass`` says; any device, float32 and float64."""
    slope = _cap(product, bias, options, wants_slope=dtype is not None)
    largest = product.amax(-1, keepdim=True)
    label = labels[:, None]
    label_logit = product.gather(1, label)
    d_logps, d_entropy = (None, None) if upstream is None else upstream
    keeps_logits = options.entropy or entropy_gradient or d_entropy is not None
    if keeps_logits:
        # small numbers, so that the entropy does not cancel; and finite ones, since 0 * -inf is not 0
        product.sub_(largest).clamp_(min=LOWEST)
    # a row in place: one read for the largest, then the exponentials and their sum while the row is in the cache
    p = torch.softmax(product, -1) if keeps_logits else torch.softmax(product, -1, out=product)
    p_label = p.gather(1, label)
    others = p.scatter_(1, label, 0.0).sum(-1, keepdim=True)
    logps = _logps(p, p_label, others, label_logit, largest)
    entropy = mean = None
    if keeps_logits:
        mean = (p * product).sum(-1, keepdim=True) + p_label * (label_logit - largest).clamp(min=LOWEST)
        log_sum_exp = -torch.maximum(p.amax(-1, keepdim=True), p_label).log()
        entropy = (log_sum_exp - mean).squeeze(1)
    logps = logps.squeeze(1)
    if dtype is None:
        return Rows(logps, entropy, None, None)
    spread = None
    if mean is not None and (entropy_gradient or d_entropy is not None):
        spread = product.sub_(mean).mul_(p.scatter(1, label, p_label))
        spread = spread if slope is None else spread.mul_(slope)
    gradient = p.scatter_(1, label, -others)  # others = 1 - p at the label, summed and not subtracted
    if slope is not None:
        gradient.mul_(slope)
    if d_logps is not None:
        gradient.mul_(d_logps[:, None])
    if spread is not None and d_entropy is not None:
        gradient.addcmul_(spread, d_entropy[:, None])
    wanted = spread.to(dtype) if spread is not None and entropy_gradient else None
    return Rows(logps, entropy, gradient.to(dtype), wanted)


def _cap(product: Tensor, bias: Tensor | None, options: Options, wants_slope: bool) -> Tensor | None:
    """``product`` becomes the logits of the softmax; returns the softcap's slope where that is wanted."""
    if bias is not None:
        product.add_(bias)
    slope = None
    if options.softcap is not None:
        product.div_(options.softcap).tanh_()
        if wants_slope:
            slope = product.square().neg_().add_(1)
        product.mul_(options.softcap)
    if options.temperature != 1:
        product.div_(options.temperature)
    return slope


def _logps(p: Tensor, p_label: Tensor, others: Tensor, label_logit: Tensor, largest: Tensor) -> Tensor:
    """log p at the label [n,1]: from the sum of the others, it keeps its relative precision where p is nearly 1.

    A probability below the smallest normal number has lost its digits; there the log-sum-exp decides, which the most
    probable token gives: log p = logit - log-sum-exp holds for it too.
    """
    logps = -torch.log1p(others / p_label)
    lost = p_label < torch.finfo(p.dtype).tiny
    if not bool(lost.any()):
        return logps
    log_sum_exp = largest - torch.maximum(p.amax(-1, keepdim=True), p_label).log()
    return torch.where(lost, label_logit - log_sum_exp, logps)
