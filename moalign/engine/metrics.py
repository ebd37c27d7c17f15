"""Training metrics of one step, per objective, gathered over its passes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moalign.batch import Batch

OF_PAIRS = ("loss", "margin", "accuracy", "ranking_accuracy", "better_tokens", "worse_tokens")


class StepMetrics:
    """Sums over passes; ``summary`` gives means. ``loss`` is what is minimised: pairs count with their weight.
    ``pairs_without_weight`` is how many have none, where there are such.

    Per objective k, over the pairs that k judged (or, for scored and for sampled pairs, over those whose rewards of k
    differ): ``loss``, ``margin`` (implicit reward of the better minus that of the worse response, beta * log-ratio
    difference), ``accuracy`` (share of pairs whose better response has the larger log-ratio; equal counts a half),
    ``ranking_accuracy`` (share whose better response has the larger log-probability itself, arXiv 2405.19534; not where
    nobody reads log-probabilities), ``better_tokens`` and ``worse_tokens`` (mean lengths of the two). ``kl_estimate``
    is the mean over rows of exp(-a) - 1 + a summed over tokens (a: token log-ratio): an estimate of KL(policy ||
    reference) on the batch's responses, exact in expectation only for the policy's own samples. ``kl_mismatched``,
    where the loss needs it: the mean log-ratio of the responses behind prompts that they are not to. ``entropy``, where
    the loss needs it: the mean over response tokens. Rows of views count in none of these, but among the ``tokens``.

    ``minimised``: what is, where a rule weighs the objectives' losses only when all are known.
    """

    def __init__(self, objectives: tuple[str, ...]):
        self.objectives = objectives
        self.gradient_norm = math.nan
        self.tokens = 0
        self.mismatched: float | None = None
        self.minimised: float | None = None
        self._idle = 0
        self._kl: list[Tensor] = []
        self._loss: list[Tensor] = []
        self._entropy: list[Tensor] = []
        self._per_objective: list[list[Tensor]] = [[] for _ in objectives]  # each [rows, 6], as OF_PAIRS names them

    @torch.no_grad()
    def add(self, batch: Batch, losses: Tensor, weight: Tensor, beta: float) -> None:
        """``losses`` and ``weight`` of the batch's pairs [P]; or [2 P], with those of the same the other way round."""
        self.tokens += int(batch.mask.sum())
        ways, weights = losses.view(-1, len(batch.pairs)), weight.view(-1, len(batch.pairs))
        losses = ways[0]
        self._loss.append(torch.where(weights == 0, 0.0, ways * weights).sum(0))
        self._idle += int((weights == 0).all(0).sum())
        own = batch.pairs.unique() if batch.views else slice(None)
        if batch.entropy is not None:
            self._entropy.append(batch.entropy.detach()[own][batch.mask[own] > 0])
        difference = torch.zeros_like(losses)
        if batch.ref_logps is not None:
            log_ratio = ((batch.logps - batch.ref_logps) * batch.mask).detach()
            # clamped for display only: one wild token must not make the column unreadable
            self._kl.append(((-log_ratio).clamp(max=20.0).expm1() + log_ratio).sum(-1)[own])
            ratios = log_ratio.sum(-1)
            difference = ratios[batch.pairs[:, 0]] - ratios[batch.pairs[:, 1]]
        first, second = batch.pairs.unbind(1)
        sums, tokens = batch.logps.detach().sum(-1), batch.mask.sum(-1)
        both = torch.stack([difference, sums[first] - sums[second]])
        lengths = torch.stack([tokens[first], tokens[second]])
        half = both.new_tensor(0.5)
        for index in range(len(self.objectives)):
            sign = (batch.pair_objective == index).to(difference)
            if batch.margins is not None:
                scored = (batch.pair_objective == -1) & torch.isfinite(batch.margins[:, index])
                sign = torch.where(scored, batch.margins[:, index].nan_to_num().sign(), sign)
            if batch.preferred is not None:
                sign = (batch.preferred[:, index].nan_to_num(0.5) - 0.5).sign().to(difference)
            own = losses if len(ways) == 1 else torch.where(sign < 0, ways[1], losses)
            judged = sign != 0
            better = (both * sign)[:, judged]
            right = torch.heaviside(better, half) + 0 * better  # what is NaN stays NaN
            turned = torch.where(sign > 0, lengths, lengths.flip(0))[:, judged]
            columns = [torch.stack([own[judged], beta * better[0]]), right, turned]
            self._per_objective[index].append(torch.cat(columns).T)

    def summary(self) -> dict[str, Any]:
        """JSON-able means; an objective without pairs in this step has no columns."""
        result: dict[str, Any] = {"tokens": self.tokens, "gradient_norm": number(self.gradient_norm)}
        if self._loss:
            found = torch.cat(self._loss).mean().item() if self.minimised is None else self.minimised
            result["loss"] = number(found)
        if self._idle:
            result["pairs_without_weight"] = self._idle
        if self._entropy:
            result["entropy"] = number(torch.cat(self._entropy).mean().item())
        if self._kl:
            result["kl_estimate"] = number(torch.cat(self._kl).mean().item())
        if self.mismatched is not None:
            result["kl_mismatched"] = number(self.mismatched)
        for name, parts in zip(self.objectives, self._per_objective, strict=True):
            values = torch.cat(parts) if parts else torch.empty(0, len(OF_PAIRS))
            if len(values):
                means = dict(zip(OF_PAIRS, values.mean(0).tolist(), strict=True))
                if not self._kl:  # without a reference there is no log-ratio to speak of
                    del means["margin"], means["accuracy"]
                if math.isnan(means["ranking_accuracy"]):
                    del means["ranking_accuracy"]
                result |= {f"{name}/{what}": number(mean) for what, mean in means.items()}
        return result


def number(value: float) -> float | str:
    """JSON has no NaN; what is not finite is written as text rather than lost."""
    return value if math.isfinite(value) else str(value)
