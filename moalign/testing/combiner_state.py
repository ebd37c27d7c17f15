"""What the checks of rules with a state share: those for rounds of sampled responses, and those that weigh losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from moalign.api import Preference, Round, StepLosses
from moalign.testing.combiner_trial import Trial, shown
from moalign.testing.review import short
from moalign.testing.states import check_state
from moalign.testing.watched import copied, unchanged

if TYPE_CHECKING:
    from torch import Tensor


class Answer(Protocol):
    """What the rule says of one round, or of the losses of one step."""

    @property
    def state(self) -> Mapping[str, Any]: ...

    @property
    def numbers(self) -> Tensor:
        """All of them, float64; objectives in the order of their names."""


@dataclass(frozen=True)
class Course:
    """Preferences with rounds or steps to show to the rule, and how it is asked about them.

    ``play``: for these, one answer each; the state between them goes through JSON where ``stored``. ``moved``: the
    numbers in one of them by objective, in this order of columns; names and inner products are moved here.
    """

    what: str
    answer: str
    hooks: str
    cases: Callable[[Trial], Iterator[tuple[Preference, list[Any]]]]
    play: Callable[[Trial, Preference, Sequence[Any], bool], Sequence[Answer]]
    moved: Callable[[Any, list[int]], Any]

    def twice(self, t: Trial) -> None:
        """The same preference and the same rounds: the same answers and states."""
        change = f"make {self.hooks} functions of their arguments: no state of their own, no generator"
        for preference, seen in self.cases(t):
            tried = f"{self.what}, twice, {shown(preference)}"
            answers = (self.play(t, preference, seen, False) for _ in range(2))
            for first, second in zip(*answers, strict=True):
                t.review.require(first.numbers.equal(second.numbers), tried, f"another {self.answer}", change)
                t.review.require(first.state == second.state, tried, "another state", change)

    def stored(self, t: Trial) -> None:
        """The state is JSON data, and the rule goes on from what JSON makes of it in the same way."""
        for preference, seen in self.cases(t):
            tried = f"the state through JSON, {shown(preference)}"
            answers = self.play(t, preference, seen, False)
            for state in [begun(t, preference), *(each.state for each in answers)]:
                check_state(t.review, tried, state)
            change = "read the state by name: the order of its keys may be another after it was stored"
            for before, after in zip(answers, self.play(t, preference, seen, True), strict=True):
                same = agree(before.numbers, after.numbers)
                t.review.require(same, tried, f"another {self.answer} from then on", change)

    def renamed(self, t: Trial) -> None:
        """Objectives in another order, in what is shown, in the preference and in names."""
        change = "find an objective by its name or by its place in the preference; none is special by position"
        for preference, seen in self.cases(t):
            moved, known = [self._rolled(each) for each in seen], preference.values
            other = replace(preference, values={name: known[name] for name in moved[0].objectives if name in known})
            tried = f"the objectives in another order, {shown(preference)}"
            answers = (self.play(t, *case, False) for case in ((preference, seen), (other, moved)))
            for before, after in zip(*answers, strict=True):
                t.review.require(agree(before.numbers, after.numbers), tried, f"another {self.answer}", change)

    def _rolled(self, seen: Any) -> Any:
        """With the first objective last."""
        columns = [*range(1, len(seen.objectives)), 0]
        gram = None if seen.gram is None else seen.gram[columns][:, columns]
        names = tuple(seen.objectives[column] for column in columns)
        return replace(self.moved(seen, columns), objectives=names, gram=gram)


def begun(t: Trial, preference: Preference) -> Any:
    return t.review.call(f"init with {shown(preference)}", "return the first state", t.plugin.init, preference)


def observed(t: Trial, hook: str, about: str, state: Any, seen: Round | StepLosses) -> Any:
    """The state after it."""
    state = watched(t, hook, about, state, seen)
    t.review.require(isinstance(state, dict), f"{hook}, {about}", short(state), "return the new state, a dict")
    return state


def watched(t: Trial, hook: str, about: str, *arguments: Any) -> Any:
    """What the hook returns for copies of the arguments, which it must leave as they are."""
    given = [copied(each) for each in arguments]
    tried = f"{hook}, {about}"
    change = f"{hook} must take every step, and every round of rewards in `reward_range`"
    found = t.review.answer(tried, change, getattr(t.plugin, hook), *given)
    same = all(unchanged(before, after) for before, after in zip(arguments, given, strict=True))
    change = "compute new tensors and a new state; write into none that was handed over"
    t.review.require(same, tried, "an argument changed during the call", change)
    return found


def agree(first: Tensor, second: Tensor) -> bool:
    """To float64 sums in another order."""
    import torch

    return bool(torch.isclose(first, second, rtol=1e-9, atol=1e-9).all())
