"""Checks of rules that weigh the objectives' losses on labelled pairs: what they say over a few steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moalign.api import Preference, StepLosses
from moalign.testing.combiner_state import Course, begun, observed, watched
from moalign.testing.combiner_trial import Trial, shown
from moalign.testing.review import short
from moalign.testing.states import through_json

if TYPE_CHECKING:
    from torch import Tensor

STEPS = 3
GRADIENT = 5  # numbers in each made-up one


@dataclass(frozen=True)
class Answer:
    """What the rule says of one step."""

    weights: Mapping[str, float]
    state: Mapping[str, Any]

    @property
    def numbers(self) -> Tensor:
        import torch

        return torch.tensor([self.weights[name] for name in sorted(self.weights)], dtype=torch.float64)


def one_weight_for_each_objective(t: Trial) -> None:
    """Finite and not below 0 in every step, twice the same, and nothing that was handed over changed."""
    COURSE.twice(t)


def state_of_losses_is_plain_data(t: Trial) -> None:
    """The state is JSON data, and a rule that goes on from what JSON makes of it goes on in the same way."""
    COURSE.stored(t)


def order_of_objectives_changes_no_weight(t: Trial) -> None:
    """Objectives in another order, in losses, preference and names."""
    COURSE.renamed(t)


def a_wanted_loss_is_lowered(t: Trial) -> None:
    """The only objective with weight has a weight above 0 in every step in which it judged a pair; others have 0."""
    for preference, seen in _cases(t):
        wanted = [name for name, value in preference.values.items() if value > 0]
        for each, answer in zip(seen, play(t, preference, seen), strict=True):
            tried = f"losses of step {each.number}, {shown(preference)}"
            idle = [name for name, value in answer.weights.items() if value > 0 and name not in wanted]
            change = "give no weight to the loss of an objective that has none in the preference"
            t.review.require(not idle, tried, f"a weight above 0 for {', '.join(idle)}", change)
            judged = bool(each.pairs[each.objectives.index(wanted[0])] > 0)
            if len(wanted) == 1 and judged:
                change = "let the loss of the only wanted objective count, or nothing is learned from it"
                t.review.require(answer.weights[wanted[0]] > 0, tried, f"weight 0 for {wanted[0]}", change)


CHECKS: tuple[Callable[[Trial], None], ...] = (
    one_weight_for_each_objective,
    state_of_losses_is_plain_data,
    order_of_objectives_changes_no_weight,
    a_wanted_loss_is_lowered,
)


# --- playing steps --------------------------------------------------------------------------------------------------


def _cases(t: Trial) -> Iterator[tuple[Preference, list[StepLosses]]]:
    """All weights that the rule accepts, with steps to show it, if it weighs losses."""
    if t.plugin.weighs_losses and "labelled" in t.plugin.accepts:
        for preference, names in t.with_names(most=3):
            if preference.kind == "weights":
                yield preference, _steps(t, preference, names)


def _steps(t: Trial, preference: Preference, names: tuple[str, ...]) -> list[StepLosses]:
    """Made-up losses; in the second step the last of several objectives has judged no pair."""
    import torch

    generator = torch.Generator().manual_seed(t.seed)
    found = []
    for number in range(STEPS):
        losses = 0.2 + torch.rand(len(names), generator=generator, dtype=torch.float64)
        gradients = torch.randn((len(names), GRADIENT), generator=generator, dtype=torch.float64)
        pairs = torch.arange(len(names)) + 2
        if number == 1 and len(names) > 1:
            losses[-1], gradients[-1], pairs[-1] = torch.nan, 0.0, 0
        gram = gradients @ gradients.T if t.plugin.needs_gram else None
        wanted = torch.tensor(preference.vector(names), dtype=torch.float64)
        found.append(StepLosses(number, losses, pairs, wanted, names, gram))
    return found


def play(t: Trial, preference: Preference, seen: Sequence[StepLosses], stored: bool = False) -> list[Answer]:
    """As the engine asks a rule, all that is handed over being watched. ``stored``: the state goes through JSON."""
    state, answers = begun(t, preference), []
    for each in seen:
        about = f"losses of step {each.number}, {shown(preference)}"
        state = observed(t, "observe_losses", about, through_json(state) if stored else state, each)
        weights = watched(t, "loss_weights", about, state)
        good = isinstance(weights, Mapping) and set(weights) == set(each.objectives)
        change = f"return one number for each of {', '.join(each.objectives)}, by name"
        t.review.require(good, f"loss_weights, {about}", short(weights), change)
        change = "return finite numbers that are not below 0: a judgement cannot count less than nothing"
        good = all(isinstance(value, int | float) and math.isfinite(value) and value >= 0 for value in weights.values())
        t.review.require(good, f"loss_weights, {about}", short(weights), change)
        answers.append(Answer(dict(weights), deepcopy(state)))
    return answers


def _moved(seen: StepLosses, columns: list[int]) -> StepLosses:
    return replace(seen, losses=seen.losses[columns], pairs=seen.pairs[columns], preference=seen.preference[columns])


COURSE = Course(
    what=f"{STEPS} steps",
    answer="weight",
    hooks="observe_losses and loss_weights",
    cases=_cases,
    play=play,
    moved=_moved,
)
