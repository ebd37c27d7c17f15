"""Whether a conditioner keeps to the contract of ``moalign.api.Conditioner``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING

from moalign import preference as preferences
from moalign.api import AdapterShape, Conditioner, Preference, PreferenceError, UserError
from moalign.testing.owned import ASKING, are_first_values, moved, named_tensors
from moalign.testing.review import Review, described, run, short

if TYPE_CHECKING:
    from torch import Tensor

NAMES = ("helpful", "harmless", "honest", "polite", "brief")
COUNTS = (2, 3, 5)  # of objectives
SHAPES = tuple(itertools.product((1, 7), (4, 8), (2, 3)))  # layers, rank, objectives
DRAWS = 40
APART = 0.5  # preferences at this distance are clearly different
CLOSE = 1e-5  # float32 gates of size 1
WIDTH, VOCABULARY, SPREAD = 6, 50, 0.3  # of the base's embeddings


def check_conditioner(plugin: Conditioner, *, seed: int = 0, exempt: Collection[str] = ()) -> None:
    """Check a conditioner on preferences that it draws over 2, 3 and 5 objectives (with ``angles``: over 2).

    With ``by`` "gates" or "vectors" on adapters of 1 and 7 layers, rank 4 and 8, of which ``check`` may refuse some.
    ``exempt``: names of checks to leave out. Raises ConformanceError.
    """
    import torch  # noqa: F401  (so that the watch over random states sees torch's)

    run(CHECKS, Trial(Review("conditioner", plugin), plugin, seed), exempt)


@dataclass
class Trial:
    review: Review
    plugin: Conditioner
    seed: int
    taken: dict[AdapterShape, dict[str, Tensor]] = field(default_factory=dict)
    """first values of its parameters, for each adapter that it does not refuse"""

    @property
    def counts(self) -> Sequence[int]:
        """Of objectives, over which it draws."""
        return COUNTS if self.plugin.angles is None else (2,)

    def draw(self, count: int, seed: int) -> Preference:
        """Checked to be a preference over the objectives that it was given, in their order."""
        tried = f"drawing a preference over {count} objectives"
        names, change = (
            NAMES[:count],
            "return a moalign.api.Preference, whatever the generator says",
        )
        found = self.review.answer(tried, change, self.plugin.draw, names, Random(self.seed + seed))
        self.review.require(isinstance(found, Preference), tried, short(found), change)
        change = f"return weights (sum 1, to {preferences.TOLERANCE:g}) or a direction (length 1), of finite numbers"
        self.review.require(found.kind != "thresholds", tried, short(found), change)
        try:
            preferences.parse(found, names)
        except PreferenceError as error:
            self.review.fail(tried, described(error), change, error)
        change = f"give a number for each objective, in the order {', '.join(names)}"
        self.review.require(tuple(found.values) == names, tried, short(list(found.values)), change)
        return found

    def preferences(self, count: int) -> list[Preference]:
        """Some that it draws and, where it draws weights, each objective alone, and all alike."""
        drawn = [self.draw(count, seed) for seed in range(DRAWS)]
        if any(each.kind != "weights" for each in drawn):
            return drawn
        alone = [{name: float(name == only) for name in NAMES[:count]} for only in NAMES[:count]]
        alike = dict.fromkeys(NAMES[:count], 1 / count)
        return [*drawn, *(Preference("weights", values) for values in (*alone, alike))]

    def text(self, given: Preference) -> str:
        """Checked to be some text, with the preference watched."""
        tried = _described(given)
        copy, change = _copied(given), "return the text for any preference that it draws, or that a user may name"
        found = self.review.answer(tried, change, self.plugin.text, copy)
        self.review.require(copy == given, tried, "the preference changed during the call", "write into nothing given")
        good = isinstance(found, str) and bool(found.strip())
        self.review.require(good, tried, short(found), "return a str with something in it for the model to read")
        return found

    def made(self, tried: str, given: Tensor, parameters: Mapping[str, Tensor], shape: AdapterShape) -> Tensor:
        """Checked for type, shape and value, with what was given watched."""
        import torch

        tried = f"{tried}, {shape.layers} layers of rank {shape.rank}, {shape.objectives} objectives"
        handed = given.clone(), {name: value.clone() for name, value in parameters.items()}
        by = self.plugin.by
        change = f"{by} must take any preferences and parameters; refuse an adapter in check, before a model is loaded"
        shape = replace(shape, embeddings=None)  # they are there for first values alone
        found = self.review.answer(tried, change, getattr(self.plugin, by), *handed, shape)
        kept = given.equal(handed[0]) and all(value.equal(handed[1][name]) for name, value in parameters.items())
        change = "compute new tensors; write into none that was handed over"
        self.review.require(kept, tried, "a tensor that it was given changed during the call", change)
        vectors = [len(given), self.plugin.virtual_tokens, shape.width] if by == "vectors" else []
        expected, each = vectors or [len(given), shape.layers, shape.rank], "row, layer and rank direction"
        got = f"{found.dtype} {list(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        good = isinstance(found, torch.Tensor) and list(found.shape) == expected and found.dtype == torch.float32
        each = "row, virtual token and unit of width" if vectors else each
        self.review.require(good, tried, got, f"return a float32 for each {each}, {expected}")
        change = "guard divisions and logarithms: a weight may be 0 or 1, a component of a direction negative"
        self.review.require(bool(found.isfinite().all()), tried, f"{by} that are NaN or inf", change)
        return found

    def adapters(self) -> Iterator[tuple[AdapterShape, Tensor, dict[str, Tensor]]]:
        """Those that it takes, with preferences [N,M] and parameters as training has them."""
        import torch

        for shape, first in self.taken.items():
            rows = [each.vector(NAMES[: shape.objectives]) for each in self.preferences(shape.objectives)]
            yield shape, torch.tensor(rows, dtype=torch.float32), moved(first, self.seed + 3, torch.float32)


def declarations_are_known(t: Trial) -> None:
    """``by`` is one of the ways, and ``tells_rewards`` is said; only text can tell of them."""
    good, change = t.plugin.by in ("text", "gates", "vectors"), 'declare "text", "gates" or "vectors"'
    t.review.require(good, "reading the class attribute `by`", short(t.plugin.by), change)
    if t.plugin.by == "vectors":
        number, change = t.plugin.virtual_tokens, "say how many there are, a whole number of 1 or more"
        good = isinstance(number, int) and not isinstance(number, bool) and number >= 1
        t.review.require(good, "reading virtual_tokens", short(number), change)
    told = t.plugin.tells_rewards
    good = told is False or (told is True and t.plugin.by == "text")
    t.review.require(good, "reading tells_rewards", short(told), 'say True or False; True only where `by` is "text"')


def draws_are_preferences(t: Trial) -> None:
    """Over 2, 3 and 5 objectives, or with ``angles`` over 2; weights whose sum is 1, or a direction of length 1."""
    for count in t.counts:
        for seed in range(DRAWS):
            t.draw(count, seed)


def draws_follow_the_generator(t: Trial) -> None:
    """The same seed gives the same preference, whatever was drawn in between; other seeds give others."""
    for count in t.counts:
        tried = f"drawing over {count} objectives with generators of the same seed"
        drawn = [t.draw(count, seed) for seed in range(DRAWS)]
        again = [t.draw(count, seed) for seed in range(DRAWS)]
        change = "draw from the generator that is handed over, and keep nothing between calls"
        t.review.require(drawn == again, tried, "other preferences the second time", change)
        tried = f"drawing over {count} objectives with generators of {DRAWS} seeds"
        change = "draw from the generator: the model follows only preferences like those that it was trained for"
        t.review.require(any(each != drawn[0] for each in drawn), tried, "the same preference each time", change)


def text_says_the_preference(t: Trial) -> None:
    """Where ``by`` is "text": some text, the same for equal preferences, whatever they are called."""
    if t.plugin.by != "text":
        return
    for count in t.counts:
        for each in t.preferences(count):
            first, again = t.text(each), t.text(each)
            change = "make the text of the preference alone: keep nothing between calls, draw nothing"
            t.review.require(first == again, f"{_described(each)}, twice", "another text the second time", change)
            named = t.text(replace(each, name="mine"))
            change = "read kind and values, not the name: those that are drawn in training have none"
            t.review.require(first == named, f"{_described(each)}, with a name", "another text", change)


def different_preferences_read_differently(t: Trial) -> None:
    if t.plugin.by != "text":
        return
    for count in t.counts:
        for first, second in _far_apart(t.preferences(count), NAMES[:count]):
            tried = f"{_described(first)} and {_described(second)}"
            change = "let the text say which preference it is; the model has nothing else to go by"
            t.review.require(t.text(first) != t.text(second), tried, f"the same text, {short(t.text(first))}", change)


def rewards_are_told(t: Trial) -> None:
    """Where ``tells_rewards``: some text of any finite rewards, the same for equal ones, and others for others."""
    if not t.plugin.tells_rewards:
        return
    for count in t.counts:
        low, high = (dict.fromkeys(NAMES[:count], value) for value in (0.0, 1.0))
        mixed = {name: place - 0.5 for place, name in enumerate(NAMES[:count])}
        said = []
        for rewards in (low, high, mixed, low):
            tried, given = f"rewards {', '.join(f'{each:.2g}' for each in rewards.values())}", dict(rewards)
            change = "return the text for any finite rewards, by the names of the objectives; write into none"
            found = t.review.answer(tried, change, t.plugin.text_of_rewards, given)
            good = isinstance(found, str) and bool(found.strip()) and given == rewards
            t.review.require(good, tried, short(found), change)
            said.append(found)
        change = "let the text say the rewards: the model learns from it what it is asked for"
        t.review.require(said[0] != said[1], "rewards of 0 and of 1", f"the same text, {short(said[0])}", change)
        change = "make the text of the rewards alone: keep nothing between calls, draw nothing"
        t.review.require(said[0] == said[3], "the same rewards twice", "another text the second time", change)


def parameters_have_first_values(t: Trial) -> None:
    """Finite float32 by name, a function of the generator, and a sound learning rate, for some adapter that ``check``
    does not refuse; only gates have some."""
    refused = ""
    for shape in (_shape(*each, t.plugin.by, t.seed) for each in SHAPES):
        if shape.objectives not in t.counts:
            continue
        tried, names = f"an adapter of rank {shape.rank}", NAMES[: shape.objectives]
        try:
            t.review.call(tried, "refuse an adapter with a ConfigError", t.plugin.check, shape.rank, names)
        except UserError as error:
            refused = described(error)
            continue
        try:
            first, again = (named_tensors(t.review, t.seed, t.plugin.parameters, shape) for _ in range(2))
        except UserError as error:
            t.review.fail(ASKING, described(error), "refuse an adapter in check, before a model is loaded", error)
        are_first_values(t.review, first, again, t.plugin.lr_factor)
        t.taken[shape] = first
    change = "take some adapter: refuse only what cannot work"
    t.review.require(bool(t.taken), f"{len(SHAPES)} adapters", f"each refused, the last: {refused}", change)
    owned = sorted({name for first in t.taken.values() for name in first})
    change = "own none: a text has no gradient, so that nothing would train them"
    t.review.require(t.plugin.by != "text" or not owned, ASKING, f'{owned}, though `by` is "text"', change)


def one_finite_gate_for_each_direction(t: Trial) -> None:
    """float32 [N,L,r] or vectors [N,k,D], for drawn preferences, each objective alone and one row, before and after
    training."""
    if t.plugin.by == "text":
        return
    for shape, given, now in t.adapters():
        t.made("preferences as drawn, and parameters as they are at first", given, t.taken[shape], shape)
        t.made("preferences as drawn, and parameters as training has them", given, now, shape)
        t.made("one preference", given[:1], now, shape)


def same_twice(t: Trial) -> None:
    if t.plugin.by == "text":
        return
    for shape, given, now in t.adapters():
        tried = "the same preferences twice"
        first, second = (t.made(tried, given, now, shape) for _ in range(2))
        change = f"make the {t.plugin.by} of the arguments alone: keep nothing between calls, draw nothing (no dropout)"
        t.review.require(first.equal(second), tried, f"other {t.plugin.by} the second time", change)


def rows_stand_alone(t: Trial) -> None:
    """Each row has the gates that it has alone, and in another order."""
    import torch

    if t.plugin.by == "text":
        return
    change = f"make the {t.plugin.by} of a row from that row alone: no mean, ranking or normalising over rows"
    for shape, given, now in t.adapters():
        together = t.made("preferences as drawn", given, now, shape)
        order = torch.randperm(len(given), generator=torch.Generator().manual_seed(t.seed))
        tried = "the same preferences in another order"
        t.review.require(
            _close(t.made(tried, given[order], now, shape), together[order]), tried, f"other {t.plugin.by}", change
        )
        for row in (0, len(given) - 1):
            alone = t.made("one of the preferences alone", given[[row]], now, shape)
            t.review.require(
                _close(alone[0], together[row]), "one of the preferences alone", f"other {t.plugin.by}", change
            )


def gradient_reaches_the_parameters(t: Trial) -> None:
    """Each of them has a finite gradient, and at their first values one of them has."""
    import torch

    if t.plugin.by == "text":
        return
    for shape, given, now in t.adapters():
        for tried, values in (("parameters as training has them", now), ("first values", t.taken[shape])):
            leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
            if not leaves:
                continue
            found = t.made(tried, given, leaves, shape)
            tried = f"the gradient at {tried}"
            change = "compute with torch from the parameters that are handed over, and detach none"
            t.review.require(found.requires_grad, tried, f"{t.plugin.by} without a graph", change)
            slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(t.seed))
            gradients = torch.autograd.grad((found * slope).sum(), list(leaves.values()), allow_unused=True)
            moving = {name: each for name, each in zip(leaves, gradients, strict=True) if each is not None}
            change = "guard divisions, roots and logarithms"
            finite = all(bool(each.isfinite().all()) for each in moving.values())
            t.review.require(finite, tried, "one that is not finite", change)
            still = sorted(name for name in leaves if name not in moving or not bool(moving[name].any()))
            if values is now:
                change = f"let the {t.plugin.by} read each parameter, or do not own it"
                t.review.require(not still, tried, f"none for {still}", change)
            change = "start where something moves: factors that are all 0 hold each other there for ever"
            t.review.require(len(still) < len(leaves), tried, "none for any parameter", change)


def different_preferences_have_different_gates(t: Trial) -> None:
    if t.plugin.by == "text":
        return
    for shape, _, now in t.adapters():
        for pair in _far_apart(t.preferences(shape.objectives), NAMES[: shape.objectives]):
            import torch

            rows = torch.tensor([each.vector(NAMES[: shape.objectives]) for each in pair], dtype=torch.float32)
            tried = " and ".join(map(_described, pair))
            first, second = t.made(tried, rows, now, shape)
            change = f"let the {t.plugin.by} depend on the preference; the model has nothing else to go by"
            t.review.require(not _close(first, second), tried, f"the same {t.plugin.by}", change)


CHECKS: tuple[Callable[[Trial], None], ...] = (
    declarations_are_known,
    draws_are_preferences,
    draws_follow_the_generator,
    parameters_have_first_values,
    text_says_the_preference,
    different_preferences_read_differently,
    rewards_are_told,
    one_finite_gate_for_each_direction,
    same_twice,
    rows_stand_alone,
    gradient_reaches_the_parameters,
    different_preferences_have_different_gates,
)


def _shape(layers: int, rank: int, objectives: int, by: str, seed: int) -> AdapterShape:
    """With the base's embeddings, where vectors stand beside them."""
    import torch

    plain = AdapterShape(layers, rank, objectives)
    if by != "vectors":
        return plain
    embeddings = SPREAD * torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(seed))
    return replace(plain, width=WIDTH, spread=SPREAD, embeddings=embeddings)


def _far_apart(found: Sequence[Preference], names: tuple[str, ...]) -> Iterator[tuple[Preference, Preference]]:
    """The two that are furthest from each other, and each objective alone beside the next, where they are there."""
    pairs = itertools.combinations(found, 2)
    furthest = max(pairs, key=lambda pair: math.dist(pair[0].vector(names), pair[1].vector(names)))
    if math.dist(furthest[0].vector(names), furthest[1].vector(names)) >= APART:
        yield furthest
    alone = [each for each in found[DRAWS:] if max(each.vector(names)) == 1]
    yield from itertools.pairwise(alone)


def _copied(given: Preference) -> Preference:
    return replace(given, values=dict(given.values))


def _described(given: Preference) -> str:
    return f"{given.kind} {', '.join(f'{name} {value:.2f}' for name, value in given.values.items())}"


def _close(first: Tensor, second: Tensor) -> bool:
    import torch

    return bool(torch.isclose(first, second, rtol=CLOSE, atol=CLOSE).all())
