"""Checks of rules for sampled responses: what they do over a few rounds of rewards, and with their state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moalign.api import Preference, Round
from moalign.testing.combiner_state import Course, agree, begun, observed, watched
from moalign.testing.combiner_trial import Trial, shown
from moalign.testing.review import short
from moalign.testing.states import through_json

if TYPE_CHECKING:
    from torch import Tensor

GROUPS = (4, 2, 4, 2, 7, 4, 7, 9, 2)  # of 3, 3, 2 responses and one, mixed, under the numbers of prompts
EQUAL = (4, 6)  # two responses to a prompt that have the same rewards in the first round
ROUNDS = 3


@dataclass(frozen=True)
class Answer:
    """What the rule says of one round."""

    signal: Tensor
    multiplier: float
    state: Mapping[str, Any]

    @property
    def numbers(self) -> Tensor:
        import torch

        return torch.cat([self.signal, self.signal.new_tensor([self.multiplier])])


def one_finite_number_per_response(t: Trial) -> None:
    """A float64 for each response in every round, a finite multiplier, and nothing that was handed over changed."""
    for preference, seen in _cases(t):
        play(t, preference, seen)


def rounds_are_answered_alike_twice(t: Trial) -> None:
    """The same preference and rounds: the same signals, multipliers and states."""
    COURSE.twice(t)


def state_is_plain_data(t: Trial) -> None:
    """The state is JSON data, and a rule that goes on from what JSON makes of it goes on in the same way."""
    COURSE.stored(t)


def order_of_responses_changes_nothing(t: Trial) -> None:
    """Responses in another order, and prompts under other numbers: the same signal for each response."""
    import torch

    order = torch.arange(len(GROUPS)).roll(4).flip(0)
    change = "let a response's signal follow from its rewards, its group and all responses, never from its place"
    for preference, seen in _cases(t):
        moved = [replace(each, rewards=each.rewards[order], groups=100 - each.groups[order]) for each in seen]
        tried = f"responses in another order, prompts under other numbers, {shown(preference)}"
        for before, after in zip(play(t, preference, seen), play(t, preference, moved), strict=True):
            same = agree(before.signal[order], after.signal) and math.isclose(before.multiplier, after.multiplier)
            t.review.require(same, tried, "another signal or multiplier", change)


def order_of_objectives_changes_no_signal(t: Trial) -> None:
    """Objectives in another order, in rewards, preference and names."""
    COURSE.renamed(t)


def a_better_response_is_not_worse(t: Trial) -> None:
    """A larger reward of one response does not lower its signal beside those of others to the prompt, and larger ones
    in all that counts raise it; where ``monotone`` is declared and no component is negative.
    """
    if not t.plugin.monotone:
        return
    change = "let the signal grow with every reward that is wanted, or declare monotone = False"
    for preference, seen in _cases(t):
        if preference.kind == "direction":
            continue
        state = play(t, preference, seen)[-1].state
        vector = preference.vector(seen[-1].objectives)
        counting = [index for index, value in enumerate(vector) if value != 0]
        for row in (0, 3, 8):
            for index in range(len(vector)):
                tried = f"a larger reward {index} of response {row}, {shown(preference)}"
                grown = _growth(t, preference, seen[-1], state, row, [index])
                t.review.require(grown >= -1e-9, tried, f"its signal falls by {-grown:g}", change)
            tried = f"larger rewards of response {row} in all that counts, {shown(preference)}"
            grown = _growth(t, preference, seen[-1], state, row, counting)
            t.review.require(grown > 0, tried, "a signal that is not larger beside the others of the prompt", change)


def pointwise_is_honest(t: Trial) -> None:
    """Where ``pointwise`` is declared, responses to one prompt alone have the signal that they have beside others."""
    if not t.plugin.pointwise:
        return
    change = "declare pointwise = False: what a response gets depends on others"
    for preference, seen in _cases(t):
        answer, last = play(t, preference, seen)[-1], seen[-1]
        for row in range(len(GROUPS)):
            tried = f"a response alone, {shown(preference)}"
            arguments = last.rewards[row : row + 1], _vector(preference, last)[:1], last.groups[row : row + 1]
            alone = watched(t, "signal", tried, *arguments, answer.state)
            _check_signal(t, tried, alone, 1)
            t.review.require(agree(alone[0], answer.signal[row]), tried, "another signal", change)


def signal_is_what_scalarise_says(t: Trial) -> None:
    """A rule for scored pairs as well gives one answer to both."""
    if "scored" not in t.plugin.accepts or not t.scalarises:
        return
    change = "let signal and scalarise agree, or accept one of the two units only"
    for preference, seen in _cases(t):
        for each, answer in zip(seen, play(t, preference, seen), strict=True):
            tried = f"signal and scalarise on the same rewards, {shown(preference)}"
            value = t.scalar(tried, each.rewards, _vector(preference, each)[0])
            t.review.require(agree(value, answer.signal), tried, "two answers", change)


CHECKS: tuple[Callable[[Trial], None], ...] = (
    one_finite_number_per_response,
    rounds_are_answered_alike_twice,
    state_is_plain_data,
    order_of_responses_changes_nothing,
    order_of_objectives_changes_no_signal,
    a_better_response_is_not_worse,
    pointwise_is_honest,
    signal_is_what_scalarise_says,
)


# --- playing rounds -------------------------------------------------------------------------------------------------


def _cases(t: Trial) -> Iterator[tuple[Preference, list[Round]]]:
    """Every preference that the rule accepts for sampled responses, with rounds to show it."""
    if "groups" in t.plugin.accepts:
        for preference, names in t.with_names(most=3):
            yield preference, _rounds(t, names)


def _rounds(t: Trial, names: tuple[str, ...]) -> list[Round]:
    """Made-up rewards in the inner part of the rule's range, and inner products where they are asked for."""
    import torch

    generator = torch.Generator().manual_seed(t.seed)
    low, high = t.plugin.reward_range
    found: list[Round] = []
    for number in range(ROUNDS):
        if math.isfinite(high - low):
            unit = torch.rand((len(GROUPS), len(names)), generator=generator, dtype=torch.float64)
            rewards = low + (high - low) * (0.1 + 0.6 * unit + 0.05 * number)
        else:
            rewards = torch.randn((len(GROUPS), len(names)), generator=generator, dtype=torch.float64) + 0.5 * number
        if number == 0:
            rewards[EQUAL[1]] = rewards[EQUAL[0]]
        start = found[0].start if found else rewards.mean(0)
        gradients = torch.randn((len(names), 5), generator=generator, dtype=torch.float64)
        gram = gradients @ gradients.T if t.plugin.needs_gram else None
        found.append(Round(number, rewards, torch.tensor(GROUPS), start, names, gram))
    return found


def play(t: Trial, preference: Preference, seen: Sequence[Round], stored: bool = False) -> list[Answer]:
    """As the engine asks a rule, all that is handed over being watched. ``stored``: the state goes through JSON."""
    state, answers = begun(t, preference), []
    for each in seen:
        about = f"round {each.number}, {shown(preference)}"
        state = observed(t, "observe", about, through_json(state) if stored else state, each)
        signal = watched(t, "signal", about, each.rewards, _vector(preference, each), each.groups, state)
        _check_signal(t, f"signal, {about}", signal, len(each.rewards))
        multiplier = watched(t, "multiplier", about, state)
        good = isinstance(multiplier, int | float) and not isinstance(multiplier, bool) and math.isfinite(multiplier)
        t.review.require(good, f"multiplier, {about}", short(multiplier), "return one finite number")
        answers.append(Answer(signal, float(multiplier), deepcopy(state)))
    return answers


def _moved(seen: Round, columns: list[int]) -> Round:
    return replace(seen, rewards=seen.rewards[:, columns], start=seen.start[columns])


COURSE = Course(
    what=f"{ROUNDS} rounds",
    answer="signal or multiplier",
    hooks="observe, signal and multiplier",
    cases=_cases,
    play=play,
    moved=_moved,
)


def _vector(preference: Preference, seen: Round) -> Tensor:
    """The preference of every row, [N,M]."""
    import torch

    return torch.tensor(preference.vector(seen.objectives), dtype=torch.float64).expand_as(seen.rewards)


def _check_signal(t: Trial, tried: str, signal: Any, rows: int) -> None:
    import torch

    is_tensor = isinstance(signal, torch.Tensor)
    found = f"{signal.dtype} {list(signal.shape)}" if is_tensor else type(signal).__name__
    good = is_tensor and signal.shape == (rows,) and signal.dtype == torch.float64
    t.review.require(good, tried, found, f"return one float64 for each response: [{rows}]")
    change = "guard logarithms and divisions: a group may have one response, or rewards that are all the same"
    t.review.require(bool(signal.isfinite().all()), tried, "a signal that is not finite", change)


def _growth(
    t: Trial, preference: Preference, seen: Round, state: Mapping[str, Any], row: int, columns: Sequence[int]
) -> float:
    """By how much the row's signal grows, beside the mean of the others in its group, when its rewards do."""
    low, high = t.plugin.reward_range
    rewards = seen.rewards.clone()
    rewards[row, columns] += 0.1 * (high - low) if math.isfinite(high - low) else 0.5
    others = seen.groups == seen.groups[row]
    others[row] = False
    lead = []
    for each in (seen.rewards, rewards):
        signal: Tensor = t.plugin.signal(each, _vector(preference, seen), seen.groups, state)
        lead.append(float(signal[row] - signal[others].mean()))
    return lead[1] - lead[0]
