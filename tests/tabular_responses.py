"""Batches of single responses of a tabular policy, in float64."""

from __future__ import annotations

from typing import Any

import torch
from tabular import Language
from torch import Tensor

from moalign.api import Batch, Objective


def batch_of(
    language: Language,
    policy: Tensor,
    rows: Tensor,
    advantages: Tensor,
    groups: Tensor | None = None,
    reference: Tensor | None = None,
    old: Tensor | None = None,
    **more: Any,
) -> Batch:
    """These responses of the language under the policy; one group unless said otherwise."""
    count = len(rows)
    known = {
        name: language.logps(values.detach())[rows]
        for name, values in (("ref_logps", reference), ("old_logps", old))
        if values is not None
    }
    fields: dict[str, Any] = {
        "logps": language.logps(policy)[rows],
        "mask": language.mask[rows],
        "pairs": torch.arange(count)[:, None].expand(-1, 2),
        "pair_objective": torch.full((count,), -1),
        "preference": torch.ones(count, 1, dtype=torch.float64),
        "strength": torch.ones(count, dtype=torch.float64),
        "groups": torch.zeros(count, dtype=torch.long) if groups is None else groups,
        "advantages": advantages,
    }
    return Batch(**(fields | known | more))


def offline(objective: Objective, rewards: Tensor, groups: Tensor | None = None) -> Tensor:
    """The advantages of responses of a file: they count as the reference's own."""
    groups = torch.zeros(len(rewards), dtype=torch.long) if groups is None else groups
    return objective.advantages(rewards, groups, rewards * 0 if "reference" in objective.wants else None)


def minimised(language: Language, start: Tensor, loss: Any, steps: int = 60) -> Tensor:
    """The logits at which ``loss(logits)`` is smallest, from ``start``."""
    found = start.detach().clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [found], max_iter=steps, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(found)
        value.backward()
        return value

    optimiser.step(closure)
    return found.detach()
