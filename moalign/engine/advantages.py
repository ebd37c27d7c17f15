"""From the rewards of a round of sampled responses to what each of them counts: combiner first, then objective."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moalign import door
from moalign.api import Combiner, Objective, Plugin
from moalign.errors import PluginError
from moalign.types import Preference, Round


@dataclass
class Advantages:
    """One candidate's rule, with the state of a combiner that adapts. Begin anew to train anew."""

    objective: Objective
    combiner: Combiner
    preference: Preference
    objectives: tuple[str, ...]
    candidate: str
    state: Mapping[str, Any] = field(init=False)
    start: Tensor | None = None

    def __post_init__(self) -> None:
        known = self.preference.values
        ordered = replace(self.preference, values={name: known[name] for name in self.objectives if name in known})
        self.state = self._call(self.combiner, "init", ordered)

    def of(
        self,
        number: int,
        rewards: NDArray[np.float64],
        groups: NDArray[np.int64],
        log_ratios: NDArray[np.float64] | None,
        gram: Tensor | None = None,
        shaped: NDArray[np.float64] | None = None,
        greedy: NDArray[np.float64] | None = None,
    ) -> tuple[NDArray[np.float64], dict[str, float]]:
        """The advantages [N] of round ``number``, and figures for the metrics. Rewards [N,M] are all known.

        ``gram`` [M,M]: see ``Round``; where ``needs_gram``. ``shaped``: what transforms made of the rewards, for the
        signal; None: nothing. What adapts sees them raw. ``greedy`` [N,M]: the shaped rewards of the greedy response to
        each one's prompt, for objectives that need its signal; nothing else sees them.

        Raises PluginError where the combiner or the objective returns what it must not.
        """
        values, rows = torch.from_numpy(rewards), torch.from_numpy(groups)
        ratios = None if log_ratios is None else torch.from_numpy(log_ratios)
        if self.start is None:
            self.start = values.mean(0)
        seen = Round(number, values, rows, self.start, self.objectives, gram)
        self.state = self._call(self.combiner, "observe", self.state, seen)
        values = values if shaped is None else torch.from_numpy(shaped)
        weights = torch.tensor(self.preference.vector(self.objectives), dtype=torch.float64).expand_as(values)
        signal = self._numbers(self.combiner, "signal", values, weights, rows, self.state)
        baseline = [] if greedy is None else [torch.from_numpy(greedy)]
        baseline = [self._numbers(self.combiner, "signal", each, weights, rows, self.state) for each in baseline]
        multiplier = self._call(self.combiner, "multiplier", self.state)
        if not (isinstance(multiplier, int | float) and np.isfinite(multiplier)):
            who = door.origin(self.combiner).who
            raise PluginError(f"{who}, in multiplier: it must return a finite number, not {multiplier!r}")
        advantages = self._numbers(self.objective, "advantages", signal, rows, ratios, *baseline) * multiplier
        figures = {f"{name}/reward": mean for name, mean in zip(self.objectives, rewards.mean(0).tolist(), strict=True)}
        figures |= {"signal": float(signal.mean()), "advantage": float(advantages.abs().mean())}
        figures |= {name: float(each.mean()) for name, each in zip(["greedy"], baseline, strict=False)}
        if ratios is not None:
            figures["kl_sampled"] = float(ratios.mean())
        figures |= {f"combine/{name}": value for name, value in numbers_in(self.state)}
        return advantages.numpy(), figures

    @property
    def needs_gram(self) -> bool:
        return self.combiner.needs_gram

    def of_each(
        self,
        rewards: NDArray[np.float64],
        groups: NDArray[np.int64],
        log_ratios: NDArray[np.float64] | None,
        greedy: NDArray[np.float64] | None = None,
    ) -> NDArray[np.float64]:
        """[M,N]: the advantages as they would be if one objective's rewards were the whole signal."""
        rows = torch.from_numpy(groups)
        ratios = None if log_ratios is None else torch.from_numpy(log_ratios)
        columns = [torch.from_numpy(each).t().contiguous() for each in (rewards, greedy) if each is not None]
        found = [
            self._numbers(self.objective, "advantages", own, rows, ratios, *baseline)
            for own, *baseline in zip(*columns, strict=True)
        ]
        return np.stack([each.numpy() for each in found])

    def _call(self, plugin: Plugin, hook: str, *arguments: Any) -> Any:
        return door.call(plugin, hook, *arguments, candidate=self.candidate)

    def _numbers(self, plugin: Plugin, hook: str, first: Tensor, *others: Any) -> Tensor:
        """What the hook returns, checked to be one finite float64 for each row of its first argument."""
        return one_number_each(plugin, hook, self._call(plugin, hook, first, *others), len(first))


def one_number_each(plugin: Plugin, hook: str, found: Any, count: int) -> Tensor:
    """What the hook returned. Raises PluginError where it is not a finite float64 for each of ``count`` responses."""
    who = f"{door.origin(plugin).who}, in {hook}"
    good = isinstance(found, Tensor) and found.shape == (count,) and found.dtype == torch.float64
    if not good or found.device.type != "cpu":
        kind = isinstance(found, Tensor)
        what = f"{found.dtype} {list(found.shape)} on {found.device}" if kind else type(found).__name__
        raise PluginError(f"{who}: it must return float64 [{count}] on cpu, one number per response, not {what}")
    if not bool(torch.isfinite(found).all()):
        raise PluginError(f"{who}: it returned {float(found[~torch.isfinite(found)][0])}; numbers must be finite")
    return found


def numbers_in(state: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """NAME, and NAME/KEY of what is a mapping."""
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{key}", number) for key, number in numbers_in(value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, float(value)
