"""Whether a reward keeps to the contract of ``moalign.api.Reward``."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from numbers import Real
from random import Random

from moalign.api import Reward, Sample, UserError
from moalign.testing.review import Review, described, run, short

TALK = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is the sky blue?"})
ORDINARY = (
    Sample("Why is the sky blue?", " Because air scatters blue light more than red light."),
    Sample("Why is the sky blue?", " It just is."),
    Sample("Name a prime number.", " 7"),
    Sample("Name a prime number.", " The number 7 is prime, and so are 11 and 13; 9 is not."),
)
ODD = {
    "an empty response": Sample("Why is the sky blue?", ""),
    "an empty prompt": Sample("", " Yes."),
    "white space alone": Sample("Say nothing.", " \n\t "),
    "unicode": Sample("¿Por qué?", " 因为空气 散射 蓝光 🟦 e\u0301 \u202eabc"),
    "control characters": Sample("Print.", " a\x07b\x1b[0m\u0000"),
    "special tokens as text": Sample("Print.", " </s><|endoftext|>[INST]"),
    "a very long response": Sample("Tell all.", " word" * 20_000),
    "one very long word": Sample("Tell all.", "x" * 100_000),
    "a conversation": Sample(TALK, " Air scatters blue light."),
    "a longer conversation": Sample((*TALK, {"role": "assistant", "content": "Air."}, TALK[1]), " As I said: air."),
}


def check_reward(
    plugin: Reward,
    *,
    samples: Sequence[Sample] = (),
    tolerance: float = 1e-4,
    seed: int = 0,
    exempt: Collection[str] = (),
) -> None:
    """Check a reward on ordinary and odd texts and on ``samples``, at least one of which it must score.

    ``samples`` are needed for a reward that knows prompts of its own only; foreign texts it may refuse with a
    DataError. ``tolerance``: how far a score may move, relative or absolute, where ``deterministic`` is False (a
    model's rounding in padded batches); else it may not move at all.
    ``exempt``: names of checks to leave out. Raises ConformanceError.
    """
    trial = Trial(Review("reward", plugin), plugin, list(samples), tolerance, seed)
    run(CHECKS, trial, exempt)


@dataclass
class Trial:
    review: Review
    plugin: Reward
    own: list[Sample]
    tolerance: float
    seed: int
    alone: list[tuple[Sample, float | None]] = field(default_factory=list)

    def score(self, tried: str, samples: Sequence[Sample]) -> list[float | None]:
        """Checked: one finite number or None per sample, and the samples untouched."""
        given = deepcopy(list(samples))
        change = "score any text; return None for one that cannot be judged, or refuse it with a DataError"
        found = self.review.call(tried, change, self._awaited, given)
        change = "copy what is to be sorted or changed; the samples belong to the host"
        self.review.require(given == list(samples), tried, "the samples were changed during the call", change)
        change = "return one entry per sample, in their order; None where the reward abstains"
        try:
            scores = list(found)
        except TypeError:
            self.review.fail(tried, short(found), change)
        got = f"{len(scores)} scores for {len(samples)} samples"
        self.review.require(len(scores) == len(samples), tried, got, change)
        for score in scores:
            number = isinstance(score, Real) and not isinstance(score, bool)
            change = "return plain finite numbers, larger is better, or None to abstain"
            self.review.require(score is None or (number and math.isfinite(score)), tried, short(score), change)
        return scores

    def _awaited(self, samples: list[Sample]) -> Sequence[float | None]:
        returned = self.plugin.score(samples)
        return asyncio.run(returned) if inspect.iscoroutine(returned) else returned

    def agree(self, first: float | None, second: float | None) -> bool:
        if first is None or second is None:
            return first is second
        tolerance = 0.0 if self.plugin.deterministic else self.tolerance
        return math.isclose(first, second, rel_tol=tolerance, abs_tol=tolerance)


def nothing_gives_nothing(t: Trial) -> None:
    tried = "no samples at all"
    try:
        t.score(tried, [])
    except UserError as error:
        t.review.fail(tried, described(error), "return [] for no samples", error)


def every_text_is_answered(t: Trial) -> None:
    """Each sample alone: a finite number, None, or for a foreign one a UserError with the reason."""
    t.alone = [(sample, t.score(f"the sample {short(sample)}", [sample])[0]) for sample in t.own]
    for name, sample in [*((f"the response {short(each.response)}", each) for each in ORDINARY), *ODD.items()]:
        try:
            t.alone.append((sample, t.score(name, [sample])[0]))
        except UserError:
            continue
    judged = [score for _, score in (t.alone[: len(t.own)] if t.own else t.alone) if score is not None]
    change = "score what can be scored; a reward that knows certain prompts only is checked with `samples` of these"
    t.review.require(bool(judged), f"{len(t.own) or len(ORDINARY) + len(ODD)} texts", "not a single score", change)


def neighbours_change_nothing(t: Trial) -> None:
    """All together, in another order and with repetitions, each sample gets the score that it has alone."""
    samples = [sample for sample, _ in t.alone]
    indices = list(range(len(samples)))
    orders = {
        "all samples together": indices,
        "all samples in another order": Random(t.seed).sample(indices, len(indices)),
        "every sample twice": indices + indices[::-1],
        "half of the samples": indices[::2],
    }
    for tried, order in orders.items():
        scores = t.score(tried, [samples[index] for index in order])
        for index, score in zip(order, scores, strict=True):
            alone = t.alone[index][1]
            change = "score every sample by itself: no ranking, centring or scaling over the batch; keep the order"
            if score is not None and alone is not None and math.isclose(score, alone, rel_tol=1e-4, abs_tol=1e-4):
                change = "set `deterministic: ClassVar[bool] = False`, as for padded batches, where all rounding counts"
            got = f"{score} for {short(samples[index].response)}, which alone has {alone}"
            t.review.require(t.agree(score, alone), tried, got, change)


def same_twice(t: Trial) -> None:
    samples = [sample for sample, _ in t.alone]
    first, second = t.score("all samples", samples), t.score("all samples again", samples)
    change = "score without chance: no dropout, no sampling, no clock"
    same = all(t.agree(*scores) for scores in zip(first, second, strict=True))
    t.review.require(same, "the same samples twice", f"{short(first)}, then {short(second)}", change)


CHECKS: tuple[Callable[[Trial], None], ...] = (
    nothing_gives_nothing,
    every_text_is_answered,
    same_twice,
    neighbours_change_nothing,
)
