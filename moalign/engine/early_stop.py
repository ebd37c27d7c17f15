"""When a candidate has learned what it can: its loss on held-out pairs, looked at now and then, no longer falls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from moalign.config import EarlyStopSettings


@dataclass(frozen=True)
class Looks:
    """What the looks so far have shown; steps are numbered from 0, as in metrics.jsonl.

    ``lowest``     the lowest held-out loss, found after the step ``best_step`` (None: no look was finite)
    ``in_vain``    looks since then, none of which found a lower one
    """

    lowest: float = math.inf
    best_step: int | None = None
    in_vain: int = 0

    def after(self, step: int, loss: float) -> Looks:
        """Strictly lower counts, by however little; a loss that is not finite never does."""
        if math.isfinite(loss) and loss < self.lowest:
            return Looks(loss, step)
        return replace(self, in_vain=self.in_vain + 1)


@dataclass
class EarlyStop:
    """One candidate's looks, and a copy of its weights at the best of them (float32, as the adapter itself).

    The first look is after ``settings.every`` steps. The untouched base is not among the looks: it is a point of the
    front in any case, and a candidate that never got below it shows so by its scores, not by being the base again.
    """

    settings: EarlyStopSettings
    steps: int
    looks: Looks = Looks()
    stopped_at_step: int | None = None
    _best: list[Tensor] = field(default_factory=list, repr=False)

    def due(self, step: int) -> bool:
        """Whether there is a look after this step: every so many steps, and after the last."""
        return (step + 1) % self.settings.every == 0 or step + 1 == self.steps

    def note(self, step: int, loss: float, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether the training is over with this look; then ``parameters`` are again those of the best one."""
        self.looks = self.looks.after(step, loss)
        if self.looks.best_step == step:
            self._best = [parameter.detach().clone() for parameter in parameters]
        last = step + 1 == self.steps
        over = last or self.looks.in_vain >= self.settings.patience
        if over and not last:
            self.stopped_at_step = step
        if over and self._best:
            with torch.no_grad():
                for parameter, best in zip(parameters, self._best, strict=True):
                    parameter.copy_(best)
            self._best = []
        return over
