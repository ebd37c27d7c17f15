"""Training metrics of one step, per objective, gathered over its passes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moalign.types import Batch


class StepMetrics:
    """Sums over passes; ``summary`` gives means. ``loss`` is what is minimised: pairs count with their weight.

    Per objective k, over the pairs that k judged (or, for scored pairs, over all): ``loss``, ``margin`` (implicit
    reward of the better minus that of the worse response, beta * log-ratio difference), ``accuracy`` (share of pairs
    whose better response has the larger log-ratio; equal counts a half). ``kl_estimate`` is the mean over rows of
    exp(-a) - 1 + a summed over tokens (a: token log-ratio): an estimate of KL(policy || reference) on the batch's
    responses, exact in expectation only for the policy's own samples. ``entropy``, where the loss needs it: the mean
    over response tokens. Rows of views count in neither, but among the ``tokens``.
    """

    def __init__(self, objectives: tuple[str, ...]):
        self.objectives = objectives
        self.gradient_norm = math.nan
        self.tokens = 0
        self._kl: list[Tensor] = []
        self._loss: list[Tensor] = []
        self._entropy: list[Tensor] = []
        self._per_objective: list[list[Tensor]] = [[] for _ in objectives]  # each [rows, 3]: loss, margin, accuracy

    @torch.no_grad()
    def add(self, batch: Batch, losses: Tensor, weight: Tensor, beta: float) -> None:
        self.tokens += int(batch.mask.sum())
        own = batch.pairs.unique() if batch.views else slice(None)
        self._loss.append(torch.where(weight == 0, 0.0, losses * weight))
        if batch.entropy is not None:
            self._entropy.append(batch.entropy.detach()[own][batch.mask[own] > 0])
        difference = torch.zeros_like(losses)
        if batch.ref_logps is not None:
            log_ratio = ((batch.logps - batch.ref_logps) * batch.mask).detach()
            # clamped for display only: one wild token must not make the column unreadable
            self._kl.append(((-log_ratio).clamp(max=20.0).expm1() + log_ratio).sum(-1)[own])
            ratios = log_ratio.sum(-1)
            difference = ratios[batch.pairs[:, 0]] - ratios[batch.pairs[:, 1]]
        for index in range(len(self.objectives)):
            sign = (batch.pair_objective == index).to(difference)
            if batch.margins is not None:
                scored = (batch.pair_objective == -1) & torch.isfinite(batch.margins[:, index])
                sign = torch.where(scored, batch.margins[:, index].nan_to_num().sign(), sign)
            judged = sign != 0
            better = (difference * sign)[judged]
            accuracy = (better > 0).float() + 0.5 * (better == 0).float()
            self._per_objective[index].append(torch.stack([losses[judged], beta * better, accuracy], -1))

    def summary(self) -> dict[str, Any]:
        """JSON-able means; an objective without pairs in this step has no columns."""
        result: dict[str, Any] = {"tokens": self.tokens, "gradient_norm": number(self.gradient_norm)}
        if self._loss:
            result["loss"] = number(torch.cat(self._loss).mean().item())
        if self._entropy:
            result["entropy"] = number(torch.cat(self._entropy).mean().item())
        if self._kl:
            result["kl_estimate"] = number(torch.cat(self._kl).mean().item())
        for name, parts in zip(self.objectives, self._per_objective, strict=True):
            values = torch.cat(parts) if parts else torch.empty(0, 3)
            if len(values):
                loss, margin, accuracy = values.mean(0).tolist()
                result[f"{name}/loss"] = number(loss)
                if self._kl:  # without a reference there is no log-ratio to speak of
                    result[f"{name}/margin"] = number(margin)
                    result[f"{name}/accuracy"] = number(accuracy)
        return result


def number(value: float) -> float | str:
    """JSON has no NaN; what is not finite is written as text rather than lost."""
    return value if math.isfinite(value) else str(value)
