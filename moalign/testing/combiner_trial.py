"""What the checks of combiners work with: preferences that the rule accepts, batches, and watched calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moalign.api import Batch, Combiner, MoalignError, PairTerms, Preference, PreferenceError
from moalign.testing.batch import made_up
from moalign.testing.review import Review, described, first
from moalign.testing.watched import changed_fields, copied, unchanged

if TYPE_CHECKING:
    from torch import Tensor

NAMES = ("concise", "harmless", "helpful", "truthful", "fluent", "polite", "terse", "witty")


@dataclass(frozen=True)
class Trial:
    review: Review
    plugin: Combiner
    objectives: int
    prompts: int
    tokens: int
    seed: int

    def accepts(self, preference: Preference) -> bool:
        tried = f"check() with {shown(preference)}"
        change = "raise PreferenceError, with the reason, for a preference that the rule has no meaning for"
        try:
            self.review.call(tried, change, self.plugin.check, preference)
        except PreferenceError:
            return False
        except MoalignError as error:
            self.review.fail(tried, described(error), change, error)
        return True

    def preferences(self) -> Iterator[tuple[Preference, list[float]]]:
        """Those that the rule accepts for pairs, with their vector; pairs have no meaning for thresholds."""
        if self.plugin.accepts & {"labelled", "scored"}:
            for preference, _ in self.with_names():
                if preference.kind != "thresholds":
                    yield preference, list(preference.values.values())

    def with_names(self, most: int = len(NAMES)) -> Iterator[tuple[Preference, tuple[str, ...]]]:
        """All that the rule accepts, with the names of all objectives, of which there are at most so many."""
        for count in range(1, min(self.objectives, most) + 1):
            yield from ((each, NAMES[:count]) for each in _preferences(count) if self.accepts(each))

    def kinds(self, preference: Preference) -> list[bool]:
        """Whether pairs are scored, for each kind that can occur: negative components go with scored pairs only."""
        negative = any(value < 0 for value in preference.values.values())
        kinds = sorted(self.plugin.accepts & {"labelled", "scored"})
        return [kind == "scored" for kind in kinds if kind == "scored" or not negative]

    def batch(self, preference: Preference, scored: bool, *, margins: bool = False, dtype: Any = None) -> Batch:
        """What the engine supplies: scored pairs have margins, labelled ones where the rule needs them."""
        import torch

        wanted = self.plugin.needs(preference) | ({"margins"} if scored or margins else set())
        batch = made_up(
            prompts=self.prompts,
            tokens=self.tokens,
            preference=list(preference.values.values()),
            needs=frozenset(wanted),
            scored=scored,
            seed=self.seed,
            dtype=dtype or torch.float64,
        )
        return batch if scored or not self.plugin.merges_judges else _judged_by_several(batch, self.seed)

    @property
    def scalarises(self) -> bool:
        """Whether the rule says what a response's rewards are worth by themselves."""
        return type(self.plugin).scalarise is not Combiner.scalarise

    def terms(self, tried: str, batch: Batch) -> PairTerms:
        """Checked for shape and finiteness, with the inputs watched."""
        given = copied(batch)
        change = "pair_terms must take every batch of the pairs that the rule `accepts`"
        terms = self.review.answer(tried, change, self.plugin.pair_terms, given)
        written = changed_fields(batch, given)
        change = "compute new tensors; write into none that was handed over"
        self.review.require(not written, tried, f"{', '.join(written)} changed during the call", change)
        names = ["scale", "margin", "weight"]
        if batch.preferred is None and bool((batch.pair_objective < 0).all()):
            names.append("difference")
        if getattr(terms, "reversed", None) is not None:
            names.append("reversed")
        for name in names:
            self._check_term(tried, name, getattr(terms, name, None), batch)
        return terms

    def _check_term(self, tried: str, name: str, value: Any, batch: Batch) -> None:
        import torch

        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        good = isinstance(value, torch.Tensor) and value.shape == (len(batch.pairs),) and value.is_floating_point()
        change = f"return one floating-point number per pair in {name}: a tensor [P]"
        self.review.require(good, f"{tried}, {len(batch.pairs)} pairs", f"{name} is {found}", change)
        bad = (~value.isfinite()).nonzero().flatten().tolist()
        change = (
            "guard divisions by weights that can be 0, and leave out what carries no weight before multiplying: "
            "0 * NaN is NaN"
        )
        self.review.require(not bad, tried, f"{name} of {first('pair', bad)} is not finite", change)

    def scalar(self, tried: str, rewards: Tensor, preference: Tensor) -> Tensor:
        """Checked for its shape, with the inputs watched."""
        import torch

        given = rewards.clone(), preference.clone()
        change = "scalarise must take rewards [..., M] and a preference [..., M] of any leading dimensions"
        value = self.review.answer(tried, change, self.plugin.scalarise, *given)
        for name, before, after in zip(("rewards", "preference"), (rewards, preference), given, strict=True):
            self.review.require(
                unchanged(before, after),
                tried,
                f"{name} changed during the call",
                "compute new tensors; write into none",
            )
        wanted = torch.broadcast_shapes(rewards.shape, preference.shape)[:-1]
        found = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        good = isinstance(value, torch.Tensor) and value.shape == wanted
        change = "reduce over the last dimension, the objectives, and over no other: [..., M] -> [...]"
        self.review.require(good, tried, f"a result of {found} where {list(wanted)} was due", change)
        return value


def judged_by(batch: Batch) -> Tensor:
    """[P,M]: whether the objective judged the pair."""
    import torch

    if batch.preferred is not None:
        return batch.preferred.isfinite()
    return batch.pair_objective[:, None] == torch.arange(batch.preference.shape[1])


def total_weight(terms: PairTerms) -> Tensor:
    """Of each pair, both ways round; [P]."""
    return terms.weight if terms.reversed is None else terms.weight + terms.reversed


def _judged_by_several(batch: Batch, seed: int) -> Batch:
    """The pairs, each for all its judges: the one that it had prefers its first response, others what they like."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shape = len(batch.pairs), batch.preference.shape[1]
    found = torch.tensor([0.0, 1.0, 0.5, torch.nan])[torch.randint(4, shape, generator=generator)]
    found.scatter_(1, batch.pair_objective[:, None], 1.0)
    nobody = torch.full_like(batch.pair_objective, -1)
    return replace(batch, pair_objective=nobody, preferred=found.to(batch.preference))


def _preferences(count: int) -> Iterator[Preference]:
    """Weights of so many objectives: equal, uneven, with a 0, one-hot; directions and thresholds."""
    names, total = NAMES[:count], count * (count + 1) / 2
    weights: list[Sequence[float]] = [[1 / count] * count]
    if count > 1:
        weights += [[(index + 1) / total for index in range(count)], *_one_hot(count)]
        yield Preference("direction", dict(zip(names, [0.8, -0.6, *[0.0] * (count - 2)], strict=True)))
        yield Preference("thresholds", {names[0]: 0.5})
    if count > 2:
        weights.append([0.25, 0.0, 0.75, *[0.0] * (count - 3)])
        yield Preference("thresholds", {names[0]: 0.5, names[2]: -0.5})
    yield from (Preference("weights", dict(zip(names, each, strict=True))) for each in weights)


def _one_hot(count: int) -> list[list[float]]:
    return [[float(index == each) for index in range(count)] for each in (0, count - 1)]


def shown(preference: Preference) -> str:
    return f"{preference.kind} ({', '.join(f'{value:.3g}' for value in preference.values.values())})"
