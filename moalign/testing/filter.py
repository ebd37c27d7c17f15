"""Whether a filter keeps to the contract of ``moalign.api.Filter``."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moalign.api import ConfigError, Filter, Kept, Sampled
from moalign.testing.review import Review, run, short
from moalign.testing.watched import copied, unchanged

if TYPE_CHECKING:
    from torch import Tensor

LONGEST = 600  # tokens of a made-up response
METHODS = ("keep_responses", "keep_pairs")
OBJECTIVES = ("objective_0", "objective_1")


def check_filter(
    plugin: Filter, *, prompts: int = 4, samples: int = 5, seed: int = 0, exempt: Collection[str] = ()
) -> None:
    """Check a filter on made-up rewards of ``samples`` responses to each of ``prompts`` prompts, and on odd ones.

    Where its ``check`` refuses objectives that are called objective_0 and objective_1, those that it asks for cannot be
    made up: then nothing but that is tried. ``exempt``: names of checks to leave out. Raises ConformanceError.
    """
    import torch  # noqa: F401  (so that the watch over random states sees torch's)

    run(CHECKS, Trial(Review("filter", plugin), plugin, prompts, samples, seed), exempt)


@dataclass(frozen=True)
class Trial:
    review: Review
    plugin: Filter
    prompts: int
    samples: int
    seed: int

    @property
    def methods(self) -> list[str]:
        """Those that it has of its own, where it works with these objectives."""
        try:
            self.review.call("check()", "raise ConfigError, or nothing", self.plugin.check, OBJECTIVES)
        except ConfigError:
            return []
        return own(self.plugin)

    def case(self) -> Sampled:
        """Responses in no order, of which some say the same."""
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        count = self.prompts * self.samples
        groups = torch.arange(self.prompts).repeat_interleave(self.samples)[torch.randperm(count, generator=generator)]
        rewards = torch.randn((count, len(OBJECTIVES)), generator=generator, dtype=torch.float64)
        return Sampled(
            number=3,
            signal=rewards.mean(1),
            rewards=rewards,
            groups=groups,
            lengths=torch.randint(1, LONGEST, (count,), generator=generator),
            ended=torch.rand(count, generator=generator) < 0.7,
            texts=tuple(f"response {row % (count - 2)}" for row in range(count)),
            objectives=OBJECTIVES,
        )

    def cases(self) -> Iterator[tuple[str, Sampled]]:
        """The ordinary one, and what occurs more rarely."""
        import torch

        about = self.case()
        yield "rewards of both signs", about
        for value, what in ((0.0, "rewards that are all 0"), (1.0, "rewards that are all 1")):
            yield what, replace(about, signal=about.signal * 0 + value, rewards=about.rewards * 0 + value)
        yield "rewards of a million", replace(about, signal=1e6 + about.signal, rewards=1e6 + about.rewards)
        yield "one response", rows_of(about, torch.tensor([0]))
        yield "a group of its own for each response", replace(about, groups=torch.arange(len(about.groups)) * 7)
        yield "responses that all say the same", replace(about, texts=("alike",) * len(about.texts))

    def ask(self, method: str, tried: str, about: Sampled, seed: int = 0) -> Kept:
        """Checked for kind, shape, weights and reasons, with the inputs watched."""
        import torch

        given: list[Any] = [copied(about)]
        count = len(about.signal)
        if method == METHODS[1]:
            given.append(pairs_of(about))
            count = len(given[1])
        before = [copied(each) for each in given]
        change = f"{method} must take the responses of any round"
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        found: Any = self.review.answer(tried, change, getattr(self.plugin, method), *given, generator)
        same = all(map(unchanged, before, given))
        change = "compute new tensors; write into none that was handed over"
        self.review.require(same, tried, "what was handed over changed during the call", change)
        self.review.require(isinstance(found, Kept), tried, short(found), "return a moalign.api.Kept")
        weights = found.weights
        got = f"{weights.dtype} {list(weights.shape)}" if isinstance(weights, torch.Tensor) else type(weights).__name__
        good = isinstance(weights, torch.Tensor) and weights.shape == (count,) and weights.dtype == torch.float64
        what = "response" if method == METHODS[0] else "pair"
        self.review.require(good, f"{tried}, {count} {what}s", got, f"return as weights a float64 for each {what}")
        bad = weights[~(weights.isfinite() & (weights >= 0))].tolist()
        self.review.require(not bad, tried, f"the weight {bad[:1]}", "return finite weights, none below 0")
        self.check_reasons(tried, found, count)
        return found

    def check_reasons(self, tried: str, found: Kept, count: int) -> None:
        reasons = found.reasons
        good = isinstance(reasons, tuple) and len(reasons) == count and all(isinstance(each, str) for each in reasons)
        self.review.require(good, tried, short(reasons), "return as reasons a tuple of as many texts")
        both = list(zip(found.weights.tolist(), reasons, strict=True))
        wrong = [each for each in both if (each[0] == 0) != bool(each[1])]
        change = 'give each that has the weight 0 a reason, and "" to each that has a weight'
        self.review.require(not wrong, tried, f"weight and reason {wrong[:1]}", change)
        odd = [each for each in reasons if "/" in each or "\n" in each or each in ("kept", "pairs")]
        change = "write reasons as a few words: counts stand in the metrics as filter/REASON, beside filter/kept"
        self.review.require(not odd, tried, short(odd[:1]), change)
        change = "write a few reasons, the same for all that are left out for it, without numbers of their own"
        self.review.require(len(set(reasons)) <= max(8, count // 2), tried, f"{len(set(reasons))} reasons", change)
        figures = dict(found.figures)
        numbers = all(isinstance(each, int | float) and not isinstance(each, bool) for each in figures.values())
        clash = figures.keys() & {*reasons, "kept", "pairs"}
        change = "return as figures numbers, by names that are no reasons, nor kept, nor pairs"
        try:
            json.dumps(figures, allow_nan=False)
        except (TypeError, ValueError):
            numbers = False
        self.review.require(numbers and not clash, tried, short(figures), change)


def it_chooses_something(t: Trial) -> None:
    """It has a method for responses, or for labelled pairs, or both."""
    change = f"write {METHODS[0]} or {METHODS[1]}, or both"
    t.review.require(bool(own(t.plugin)), "reading its methods", "neither of the two", change)


def each_has_a_weight_or_a_reason(t: Trial) -> None:
    for method in t.methods:
        for tried, about in t.cases():
            t.ask(method, f"{method}: {tried}", about)


def what_it_draws_is_the_generators(t: Trial) -> None:
    """The same seed, twice, with another in between."""
    import torch

    for method in t.methods:
        tried = f"{method}: the same round twice, with generators of the same seed"
        first, _, again = (t.ask(method, tried, t.case(), seed) for seed in (0, 1, 0))
        same = torch.equal(first.weights, again.weights) and first.reasons == again.reasons
        change = "draw from the generator alone, and keep nothing in the plugin"
        t.review.require(same, tried, "another choice the second time", change)


def order_changes_nothing(t: Trial) -> None:
    """Responses in another order, and groups with other numbers; where nothing is drawn."""
    import torch

    for method in t.methods:
        about = replace(t.case(), texts=tuple(f"response {row}" for row in range(t.prompts * t.samples)))
        tried = f"{method}: the same responses in another order"
        before = t.ask(method, tried, about)
        if any(not torch.equal(before.weights, t.ask(method, tried, about, seed).weights) for seed in range(1, 6)):
            continue  # it draws, and who is met first gets another draw
        renumbered = t.ask(
            method, f"{method}: the same groups with other numbers", replace(about, groups=about.groups * 3)
        )
        change = "use the groups' numbers only to see which responses belong together"
        same = torch.equal(before.weights, renumbered.weights)
        t.review.require(same, f"{method}: the same groups with other numbers", "another choice", change)
        if method == METHODS[1]:
            continue  # which pairs there are is another order by then
        order = torch.randperm(len(about.signal), generator=torch.Generator().manual_seed(t.seed))
        after = t.ask(method, tried, rows_of(about, order))
        change = "treat the responses alike wherever they stand; those to one prompt need not stand side by side"
        t.review.require(torch.equal(before.weights[order], after.weights), tried, "another choice", change)


CHECKS: tuple[Callable[[Trial], None], ...] = (
    it_chooses_something,
    each_has_a_weight_or_a_reason,
    what_it_draws_is_the_generators,
    order_changes_nothing,
)


def own(plugin: Filter) -> list[str]:
    return [name for name in METHODS if plugin.has(name)]


def pairs_of(about: Sampled) -> Tensor:
    """All pairs within the groups whose signals differ, the larger one first."""
    larger = about.signal[:, None] > about.signal
    return ((about.groups[:, None] == about.groups) & larger).nonzero()


def rows_of(about: Sampled, rows: Tensor) -> Sampled:
    values = {name: getattr(about, name)[rows] for name in ("signal", "rewards", "groups", "lengths", "ended")}
    return replace(about, **values, texts=tuple(about.texts[row] for row in rows.tolist()))
