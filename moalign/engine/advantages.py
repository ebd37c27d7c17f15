"""From the rewards of a round of sampled responses to what each of them counts: combiner first, then objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moalign import door
from moalign.api import Combiner, Objective, Plugin
from moalign.batch import Round, TokenAdvantages, Tokens
from moalign.engine.tokens import checked_advantages
from moalign.errors import PluginError
from moalign.types import Preference


@dataclass
class Advantages:
    """One candidate's rule, with the state of a combiner that adapts. Begin anew to train anew.

    ``asked`` [N,M]: for which preference each response of the round counts; None: all for the candidate's.
    """

    objective: Objective
    combiner: Combiner
    preference: Preference
    objectives: tuple[str, ...]
    candidate: str
    state: Mapping[str, Any] = field(init=False)
    start: Tensor | None = None
    asked: NDArray[np.float64] | None = None

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
        rows, ratios = torch.from_numpy(groups), None if log_ratios is None else torch.from_numpy(log_ratios)
        values = torch.from_numpy(rewards if shaped is None else shaped)
        likeliest = None if greedy is None else torch.from_numpy(greedy)
        signal, multiplier = self._signal(number, rewards, values, rows, gram)
        baseline = [] if likeliest is None else [self._combined(likeliest, rows)]
        advantages = self._numbers(self.objective, "advantages", signal, rows, ratios, *baseline) * multiplier
        figures = self._figures(rewards, signal, float(advantages.abs().mean()), ratios)
        if baseline:
            figures["greedy"] = float(baseline[0].mean())
        figures |= self._sizes_alone(values, rows, ratios, likeliest) | self._sizes_weighted(values, rows, signal)
        return advantages.numpy(), figures

    def combined(self, shaped: NDArray[np.float64], groups: NDArray[np.int64]) -> NDArray[np.float64]:
        """The signal [N] by the rule as it is, for what looks at a round beside it: nothing is observed."""
        return self._combined(torch.from_numpy(shaped), torch.from_numpy(groups)).numpy()

    def of_others(
        self, shaped: NDArray[np.float64], groups: NDArray[np.int64], log_ratios: NDArray[np.float64] | None
    ) -> NDArray[np.float64]:
        """The advantages [N] of responses that are no round, by the rule as it is: nothing is observed."""
        rows, ratios = torch.from_numpy(groups), None if log_ratios is None else torch.from_numpy(log_ratios)
        signal = self._combined(torch.from_numpy(shaped), rows)
        return (self._numbers(self.objective, "advantages", signal, rows, ratios) * self._multiplier()).numpy()

    def of_tokens(
        self,
        number: int,
        rewards: NDArray[np.float64],
        groups: NDArray[np.int64],
        log_ratios: NDArray[np.float64] | None,
        tokens: Tokens,
        shaped: NDArray[np.float64] | None = None,
    ) -> tuple[TokenAdvantages, dict[str, float]]:
        """The same for a loss that weighs tokens; what the combiner multiplies are their advantages, nothing else."""
        rows, ratios = torch.from_numpy(groups), None if log_ratios is None else torch.from_numpy(log_ratios)
        values = torch.from_numpy(rewards if shaped is None else shaped)
        signal, multiplier = self._signal(number, rewards, values, rows, None)
        found = self._call(self.objective, "token_advantages", signal, rows, tokens)
        given = checked_advantages(found, f"{door.origin(self.objective).who}, in token_advantages", tokens)
        given = replace(given, advantages=given.advantages.detach() * multiplier)
        size = given.advantages[tokens.mask > 0].abs().mean()
        figures = self._figures(rewards, signal, float(size), ratios) | self._sizes_weighted(values, rows, signal)
        return given, figures | {f"loss/{name}": float(value) for name, value in given.figures.items()}

    def of_pairs(
        self,
        number: int,
        rewards: NDArray[np.float64],
        groups: NDArray[np.int64],
        shaped: NDArray[np.float64] | None = None,
    ) -> tuple[NDArray[np.float64], dict[str, float]]:
        """The signal [N] alone, for losses on pairs of responses, which it labels."""
        rows, values = torch.from_numpy(groups), torch.from_numpy(rewards if shaped is None else shaped)
        signal, _ = self._signal(number, rewards, values, rows, None)
        means = dict(zip(self.objectives, rewards.mean(0).tolist(), strict=True))
        figures = {f"{name}/reward": mean for name, mean in means.items()} | {"signal": float(signal.mean())}
        figures |= {f"combine/{name}": value for name, value in numbers_in(self.state)}
        return signal.numpy(), figures | self._sizes_weighted(values, rows, signal)

    def _signal(
        self, number: int, rewards: NDArray[np.float64], values: Tensor, rows: Tensor, gram: Tensor | None
    ) -> tuple[Tensor, float]:
        """What the combiner, having seen the rewards of the round, makes of the shaped ones (``values``), and what it
        multiplies advantages by."""
        raw = torch.from_numpy(rewards)
        if self.start is None:
            self.start = raw.mean(0)
        seen = Round(number, raw, rows, self.start, self.objectives, gram)
        self.state = self._call(self.combiner, "observe", self.state, seen)
        signal = self._combined(values, rows)
        return signal, self._multiplier()

    def _multiplier(self) -> float:
        multiplier: Any = self._call(self.combiner, "multiplier", self.state)
        if not (isinstance(multiplier, int | float) and np.isfinite(multiplier)):
            who = door.origin(self.combiner).who
            raise PluginError(f"{who}, in multiplier: it must return a finite number, not {multiplier!r}")
        return multiplier

    def _combined(self, values: Tensor, rows: Tensor, *, thorough: bool = True) -> Tensor:
        """The combiner's signal for shaped rewards [N,M], with its state as it is."""
        own = self.preference.vector(self.objectives) if self.asked is None else self.asked
        weights = torch.as_tensor(own, dtype=torch.float64).expand_as(values)
        return self._numbers(self.combiner, "signal", values, weights, rows, self.state, thorough=thorough)

    def _figures(
        self, rewards: NDArray[np.float64], signal: Tensor, size: float, ratios: Tensor | None
    ) -> dict[str, float]:
        """``size``: of an advantage, on average."""
        figures = {f"{name}/reward": mean for name, mean in zip(self.objectives, rewards.mean(0).tolist(), strict=True)}
        figures |= {"signal": float(signal.mean()), "advantage": size}
        if ratios is not None:
            figures["kl_sampled"] = float(ratios.mean())
        return figures | {f"combine/{name}": value for name, value in numbers_in(self.state)}

    def _sizes_alone(
        self, values: Tensor, rows: Tensor, ratios: Tensor | None, greedy: Tensor | None
    ) -> dict[str, float]:
        """NAME/normalised: the mean size of the advantages that an objective's rewards alone have, without any KL."""
        nothing = None if ratios is None else ratios * 0

        def alone(place: int) -> Tensor:
            own, *baseline = (each[:, place].clone() for each in (values, greedy) if each is not None)
            return self._numbers(self.objective, "advantages", own, rows, nothing, *baseline, thorough=False)

        return {f"{name}/normalised": _size(alone, place) for place, name in enumerate(self.objectives)}

    def _sizes_weighted(self, values: Tensor, rows: Tensor, signal: Tensor) -> dict[str, float]:
        """NAME/weighted: how far the signal is, on average, from what it were if all had the objective's mean reward.

        Of a weighted sum it is |w_k| times the mean distance of a reward from its mean; 0 of what decides nothing.
        """

        def moved(place: int) -> Tensor:
            without = values.clone()
            without[:, place] = values[:, place].mean()
            return signal - self._combined(without, rows, thorough=False)

        return {f"{name}/weighted": _size(moved, place) for place, name in enumerate(self.objectives)}

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

    def _call(self, plugin: Plugin, hook: str, *arguments: Any, thorough: bool = True) -> Any:
        return door.call(plugin, hook, *arguments, candidate=self.candidate, thorough=thorough)

    def _numbers(self, plugin: Plugin, hook: str, first: Tensor, *others: Any, thorough: bool = True) -> Tensor:
        """What the hook returns, checked to be one finite float64 for each row of its first argument."""
        found = self._call(plugin, hook, first, *others, thorough=thorough)
        return one_number_each(plugin, hook, found, len(first))


def _size(values: Callable[[int], Tensor], place: int) -> float:
    """The mean size; nan where a plugin has no answer for rewards that nobody has: this is for the metrics alone."""
    try:
        return float(values(place).abs().mean())
    except PluginError:
        return math.nan


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
