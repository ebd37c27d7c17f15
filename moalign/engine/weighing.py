"""Rules that weigh the objectives' losses on labelled pairs anew in each step.

A labelled pair is one objective's, so that passes over the pairs of each objective in turn are together the passes of
the step, and each leaves the gradient of one mean loss. When all have run, the losses of the very step are known, and
with ``needs_gram`` the inner products of their gradients; what the rule makes of them weighs the gradients before the
optimizer sees their sum. It costs a gradient of the adapter for each objective, and a response that several objectives
have judged runs once, and counts among the tokens once, for each of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moalign import door
from moalign.api import Combiner, StepLosses
from moalign.data.dataset import PairDataset
from moalign.engine.advantages import numbers_in
from moalign.errors import PluginError
from moalign.types import Preference


@dataclass
class Weighing:
    """One candidate's rule with its state, and what is known of the step under way. Begin anew to train anew.

    ``minimised``: the weighted sum of the last step's losses.
    """

    combiner: Combiner
    preference: Preference
    objectives: tuple[str, ...]
    candidate: str
    state: Mapping[str, Any] = field(init=False)
    minimised: float = math.nan
    _losses: dict[int, float] = field(init=False, default_factory=dict)
    _gradients: dict[int, list[Tensor]] = field(init=False, default_factory=dict)
    _pairs: dict[int, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        known = self.preference.values
        ordered = replace(self.preference, values={name: known[name] for name in self.objectives if name in known})
        self.state = self._call("init", ordered)

    def begin(self) -> None:
        self._losses, self._gradients, self._pairs = {}, {}, {}

    def by_judge(self, dataset: PairDataset, pairs: np.ndarray) -> dict[int | None, np.ndarray]:
        """The pairs of a step by the objective that judged them. Raises PluginError where none judged one."""
        judges = dataset.pair_objective[pairs]
        if (judges < 0).any():
            who = door.origin(self.combiner).who
            raise PluginError(f"{who}: it weighs the losses of objectives, and a pair was judged by no single one")
        found: dict[int | None, np.ndarray] = {int(judge): pairs[judges == judge] for judge in np.unique(judges)}
        self._pairs = {judge: len(own) for judge, own in found.items() if judge is not None}
        return found

    def keep(self, judge: int, loss: float, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Take the gradients that a pass over pairs of this judge has left, and its part of the judge's mean loss."""
        left = [_gradient(parameter) for parameter in parameters]
        if judge in self._gradients:
            for known, more in zip(self._gradients[judge], left, strict=True):
                known += more
        else:
            self._gradients[judge] = [each.clone() for each in left]
        self._losses[judge] = self._losses.get(judge, 0.0) + loss
        for each in left:
            each.zero_()

    def settle(self, step: int, parameters: Sequence[torch.nn.Parameter], of_adapter: int) -> str | None:
        """Give the parameters the weighted sum of the objectives' gradients; what is wrong with these, if anything.

        ``of_adapter``: how many of the parameters are the adapter's, which come first; inner products are of these.
        Raises PluginError where the combiner returns what it must not.
        """
        for judge, gradients in self._gradients.items():
            if not bool(torch.stack([each.isfinite().all() for each in gradients]).all()):
                return f"gradient of the loss of {self.objectives[judge]} is not finite"
        self.state = self._call("observe_losses", self.state, self._seen(step, of_adapter))
        weights = self._weights()
        for place, parameter in enumerate(parameters):
            total = _gradient(parameter)
            for judge, gradients in self._gradients.items():
                total.add_(gradients[place], alpha=weights[judge])
        self.minimised = math.fsum(weights[judge] * loss for judge, loss in self._losses.items())
        return None

    @property
    def figures(self) -> dict[str, float]:
        return {f"combine/{name}": value for name, value in numbers_in(self.state)}

    def _seen(self, step: int, of_adapter: int) -> StepLosses:
        every = range(len(self.objectives))
        return StepLosses(
            number=step,
            losses=torch.tensor([self._losses.get(judge, math.nan) for judge in every], dtype=torch.float64),
            pairs=torch.tensor([self._pairs.get(judge, 0) for judge in every]),
            preference=torch.tensor(self.preference.vector(self.objectives), dtype=torch.float64),
            objectives=self.objectives,
            gram=self._gram(of_adapter) if self.combiner.needs_gram else None,
        )

    def _gram(self, of_adapter: int) -> Tensor:
        """[M,M], float64 on the CPU; 0 for an objective that judged no pair of the step."""
        judges = sorted(self._gradients)
        found = []
        for place in range(of_adapter):
            rows = torch.stack([self._gradients[judge][place].flatten().double() for judge in judges])
            found.append(rows @ rows.t())
        gram = torch.zeros(len(self.objectives), len(self.objectives), dtype=torch.float64)
        at = torch.tensor(judges)
        gram[at[:, None], at] = torch.stack(found).sum(0).cpu()
        return gram

    def _weights(self) -> list[float]:
        """The combiner's, checked, in the order of the objectives."""
        found = self._call("loss_weights", self.state)
        good = isinstance(found, Mapping) and set(found) == set(self.objectives)
        if not good or not all(_is_weight(value) for value in found.values()):
            who, names = door.origin(self.combiner).who, ", ".join(self.objectives)
            raise PluginError(
                f"{who}, in loss_weights: it must return a finite number that is not below 0 for each of {names}, not "
                f"{found!r}"
            )
        return [float(found[name]) for name in self.objectives]

    def _call(self, hook: str, *arguments: Any) -> Any:
        return door.call(self.combiner, hook, *arguments, candidate=self.candidate)


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    """Where gradients of the parameter add up. What is trained has it from the start."""
    assert parameter.grad is not None
    return parameter.grad
