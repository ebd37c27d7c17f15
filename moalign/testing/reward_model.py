"""Whether a form of reward models keeps to the contract of ``moalign.api.RewardModel``."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from moalign.api import Batch, RewardModel, UserError
from moalign.testing.batch import WIDTH, at_start, padded, rearranged
from moalign.testing.judgements import judged, otherwise, unlabelled
from moalign.testing.owned import are_first_values, moved, named_tensors
from moalign.testing.review import Review, described, first, run
from moalign.testing.reward_model_learning import CHECKS_OF_LEARNING
from moalign.testing.watched import changed_fields, copied

if TYPE_CHECKING:
    from torch import Tensor

KNOWN = ("context", "final", "logps", "pairs", "reference", "rewards")
NAMES = ("helpful", "harmless", "honest")
TOLERANCE = 1e-9  # of float64 sums in another order, relative


def check_reward_model(
    plugin: RewardModel, *, prompts: int = 3, tokens: int = 6, seed: int = 0, exempt: Collection[str] = ()
) -> None:
    """Check a form of reward models on made-up judgements of ``prompts`` prompts with 3 responses each.

    For three objectives or, where ``check`` or ``parameters`` refuses so many with a UserError, for two or one.
    ``exempt``: names of checks to leave out; "gradient_is_the_derivative" for a loss that detaches a part on purpose.
    Raises ConformanceError.
    """
    import torch  # noqa: F401  (so that the watch over random states sees torch's)

    run(CHECKS, Trial(Review("reward model", plugin), plugin, prompts, tokens, seed), exempt)


@dataclass
class Trial:
    review: Review
    plugin: RewardModel
    prompts: int
    tokens: int
    seed: int
    objectives: tuple[str, ...] = NAMES

    @property
    def paired(self) -> bool:
        """Whether there is a loss per pair, and not per row."""
        return "pairs" in self.plugin.needs

    @property
    def unit(self) -> str:
        return "pair" if self.paired else "row"

    def first_values(self) -> dict[str, Tensor]:
        """Of its parameters for a model of width 4."""
        return named_tensors(self.review, self.seed, self.plugin.parameters, WIDTH, self.objectives)

    def batch(self, dtype: Any = None, extra: Collection[str] = (), seed: int = 0) -> Batch:
        """What the engine supplies: what is declared in ``needs``, and ``extra``; its parameters have been trained."""
        import torch

        batch = judged(
            prompts=self.prompts,
            tokens=self.tokens,
            objectives=self.objectives,
            needs=self.plugin.needs | set(extra),
            missing=not self.paired,
            seed=self.seed + seed,
            dtype=dtype or torch.float64,
        )
        return replace(batch, parameters=moved(self.first_values(), self.seed + 3, batch.mask.dtype))

    def loss(self, tried: str, batch: Batch) -> Tensor:
        """The losses, one per pair or row, with their shape and finiteness checked and the inputs watched."""
        losses = self._called(tried, "a loss must take every batch that the engine can hand it", "loss", batch)
        count = len(batch.pairs if self.paired else batch.mask)
        size = "[P]" if self.paired else "[N]"
        change = f"return one loss per {self.unit}, {size} in the dtype of the batch: reduce nothing, squeeze nothing"
        self._is_tensor(f"{tried}, {count} {self.unit}s", losses, [count], batch, change)
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        change = "guard divisions and logarithms; a reward that is NaN is not known, and leaves the loss as it is"
        got = f"the loss of {first(self.unit, bad)} is not finite: {losses.tolist()}"
        self.review.require(not bad, tried, got, change)
        return losses

    def scores(self, tried: str, batch: Batch) -> Tensor:
        """Of all rows, without their labels; shape and finiteness checked and the inputs watched."""
        change = "score responses that nobody has judged: there are no pairs, and rewards to learn from are all NaN"
        scores = self._called(
            f"{tried}, to score", change, "scores", unlabelled(batch, rewards_are_labels=not self.paired)
        )
        shape = [len(batch.mask), len(self.objectives)]
        change = f"return a score per row and objective, {shape}, in the dtype of the batch"
        self._is_tensor(f"{tried}, to score", scores, shape, batch, change)
        bad = (~scores.isfinite()).any(1).nonzero().flatten().tolist()
        change = "guard divisions by counts of tokens that can be 0, logarithms and exponentials"
        self.review.require(not bad, tried, f"a score that is not finite, of {first('row', bad)}", change)
        return scores

    def _called(self, tried: str, change: str, method: str, batch: Batch) -> Tensor:
        given = copied(batch)
        found: Tensor = self.review.answer(tried, change, getattr(self.plugin, method), given)
        written = changed_fields(batch, given)
        change = "compute new tensors; write into none that was handed over (no in-place operations)"
        self.review.require(not written, tried, f"{', '.join(written)} changed during the call", change)
        return found

    def _is_tensor(self, tried: str, found: Any, shape: list[int], batch: Batch, change: str) -> None:
        import torch

        got = f"{found.dtype} {list(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        good = isinstance(found, torch.Tensor) and list(found.shape) == shape and found.dtype == batch.mask.dtype
        self.review.require(good, tried, got, change)


def declarations_are_known(t: Trial) -> None:
    """``needs`` names what the engine knows: labels, and something that carries a gradient."""
    tried, needs = "reading the class attributes", set(t.plugin.needs)
    unknown, names = sorted(needs - set(KNOWN)), ", ".join(f'"{name}"' for name in KNOWN)
    t.review.require(not unknown, tried, f"needs has {unknown}", f"the engine knows {names}")
    change = (
        'declare what scores are made of, "final" or "logps", and what they are learned from, "pairs" or "rewards"; '
        "or both of these, where scores are made of other scores"
    )
    good = needs >= {"pairs", "rewards"} or bool(needs & {"final", "logps"} and needs & {"pairs", "rewards"})
    t.review.require(good, tried, f"needs is {sorted(needs)}", change)
    change = 'declare "logps" too: those of the base are compared with those of the adapted model'
    t.review.require("reference" not in needs or "logps" in needs, tried, f"needs is {sorted(needs)}", change)


def parameters_have_first_values(t: Trial) -> None:
    """Finite float32 by name, a function of the generator, and a sound learning rate, for some number of objectives."""
    for count in range(len(NAMES), 0, -1):
        t.objectives = NAMES[:count]
        try:
            t.plugin.check(t.objectives)
            found, again = t.first_values(), t.first_values()
        except UserError as error:
            refused = described(error)
            continue
        return are_first_values(t.review, found, again, t.plugin.lr_factor)
    change = "take some number of objectives: refuse only what cannot work"
    t.review.fail("asking for the first values of its parameters", f"refused for 3, 2 and 1: {refused}", change)


def needs_are_enough(t: Trial) -> None:
    """What is not declared is not there."""
    tried = f"a batch with what `needs` declares and nothing else: {sorted(t.plugin.needs)}"
    try:
        _try(t, ())
    except Exception as error:
        missing = sorted(set(KNOWN) - t.plugin.needs)
        more = [names for size in range(1, len(missing) + 1) for names in combinations(missing, size)]
        lacking = next((each for each in more if _works(t, each)), ())
        names = " and ".join(f'"{name}"' for name in lacking)
        change = f"declare {names} in `needs`: with it the same call succeeds" if lacking else "find out why it raises"
        t.review.fail(tried, described(error), change, error)


def one_finite_loss_for_each(t: Trial) -> None:
    """In both precisions, for many pairs or rows and a single one, and where the adapted model is the base."""
    import torch

    t.loss("a batch in float64 beside a row without response tokens", t.batch())
    batch = t.batch(torch.float32)
    t.loss("a batch in float32", batch)
    rows, pairs = (batch.pairs[0].unique(), torch.tensor([0])) if t.paired else (torch.tensor([0]), batch.pairs[:, 0])
    t.loss(f"a single {t.unit}", rearranged(batch, rows, pairs))
    t.loss("an adapted model that is the base, as at step 0", at_start(batch))


def one_finite_score_for_each(t: Trial) -> None:
    """[N,M] for rows with and without labels; in both precisions, for many rows and a single one."""
    import torch

    for dtype in (torch.float64, torch.float32):
        batch = t.batch(dtype)
        t.scores(f"a batch in {dtype}", batch)
        t.scores("a single row", rearranged(batch, torch.tensor([0]), batch.pairs[:0, 0]))


def same_twice(t: Trial) -> None:
    change = "make the losses and scores functions of their argument: no state, no unseeded generator, no dropout"
    batch = t.batch()
    for what, ask in (("losses", t.loss), ("scores", t.scores)):
        before, after = ask("a batch", batch), ask("the same batch again", batch)
        t.review.require(before.equal(after), "the same batch twice", f"other {what} the second time", change)


def nothing_else_is_read(t: Trial) -> None:
    """Where something undeclared happens to be there, it changes nothing."""
    before = t.loss("a batch", t.batch()), t.scores("a batch", t.batch())
    for name in sorted(set(KNOWN) - t.plugin.needs):
        tried = f'the same batch with "{name}", which `needs` lacks'
        batch = t.batch(extra=[name])
        change = f'declare "{name}" in `needs`, or do not read it'
        for what, earlier, later in zip(
            ("losses", "scores"), before, (t.loss(tried, batch), t.scores(tried, batch)), strict=True
        ):
            t.review.require(_agrees(earlier, later), tried, f"other {what}", change)


def order_changes_nothing(t: Trial) -> None:
    """Rows and pairs in another order have the losses and scores that they have in this one."""
    import torch

    batch, generator = t.batch(), torch.Generator().manual_seed(t.seed + 1)
    rows = torch.randperm(len(batch.mask), generator=generator)
    pairs = torch.arange(len(batch.pairs))
    tried, change = "the rows of the batch in another order", "find rows through batch.pairs, never by their position"
    shuffled = rearranged(batch, rows, pairs)
    _compare(t, tried, t.loss("a batch", batch)[pairs if t.paired else rows], t.loss(tried, shuffled), change)
    _compare(t, tried, t.scores("a batch", batch)[rows], t.scores(tried, shuffled), change, "scores")
    order = torch.randperm(len(batch.pairs), generator=generator)
    tried, change = "the pairs of the batch in another order", "let the loss depend on the pair, not on its place"
    shuffled = rearranged(batch, torch.arange(len(batch.mask)), order)
    losses = t.loss("a batch", batch)
    _compare(t, tried, losses[order] if t.paired else losses, t.loss(tried, shuffled), change)


def others_change_nothing(t: Trial) -> None:
    """Each pair, or row, has the loss that it has among others, and each row its scores; padding is nothing."""
    import torch

    batch = t.batch()
    losses, scores = t.loss("a batch", batch), t.scores("a batch", batch)
    change = "take no statistics over the batch; which rows share it depends on the memory of the machine"
    for unit in range(len(losses)):
        rows = batch.pairs[unit].unique() if t.paired else torch.tensor([unit])
        alone = rearranged(batch, rows, torch.tensor([unit]) if t.paired else batch.pairs[:, 0])
        tried = f"one {t.unit} alone"
        _compare(t, tried, losses[[unit]], t.loss(tried, alone), change)
        _compare(t, tried, scores[rows], t.scores(tried, alone), change, "scores")
    tried, change = "three more columns of padding", "divide by batch.mask.sum(-1), never by the width of the batch"
    _compare(t, tried, losses, t.loss(tried, padded(batch, 3)), change)
    _compare(t, tried, scores, t.scores(tried, padded(batch, 3)), change, "scores")


def no_need_is_unused(t: Trial) -> None:
    """What is declared must matter: other values in its place give other losses or scores."""
    batch = t.batch()
    changed = otherwise(batch, t.batch(seed=1))
    before = t.loss("a batch", batch), t.scores("a batch", batch)
    for name in sorted(t.plugin.needs):
        tried, given = changed[name]
        same = _agrees(before[0], t.loss(tried, given)) and _agrees(before[1], t.scores(tried, given))
        change = f'take "{name}" out of `needs`: the engine pays for it (or use it)'
        t.review.require(not same, tried, f'the same losses and scores, though `needs` has "{name}"', change)


def head_is_what_scores_say(t: Trial) -> None:
    """Where ``head`` gives a matrix: scores = final @ head.T, so that the classifier that is exported is the model."""
    import torch

    batch = t.batch()
    change = "return [M,D] from head, or None where the scores are of another form"
    head: Any = t.review.call("head(parameters)", change, t.plugin.head, dict(batch.parameters))
    if head is None:
        return
    shape = [len(t.objectives), WIDTH]
    good = isinstance(head, torch.Tensor) and list(head.shape) == shape and batch.final is not None
    got = f"{list(head.shape)}" if isinstance(head, torch.Tensor) else type(head).__name__
    t.review.require(good, "head(parameters)", got, f"{change}, here {shape}")
    assert batch.final is not None
    same = _agrees(t.scores("a batch", batch), batch.final @ head.T)
    t.review.require(same, "final @ head.T", "other than scores", "let both say the same, or return None from head")


CHECKS: tuple[Callable[[Trial], None], ...] = (
    declarations_are_known,
    parameters_have_first_values,
    needs_are_enough,
    one_finite_loss_for_each,
    one_finite_score_for_each,
    same_twice,
    nothing_else_is_read,
    order_changes_nothing,
    others_change_nothing,
    no_need_is_unused,
    head_is_what_scores_say,
    *CHECKS_OF_LEARNING,
)


def _try(t: Trial, extra: tuple[str, ...]) -> None:
    batch = t.batch(extra=extra)
    t.plugin.loss(copied(batch))
    t.plugin.scores(unlabelled(copied(batch), rewards_are_labels=not t.paired))


def _works(t: Trial, extra: tuple[str, ...]) -> bool:
    try:
        _try(t, extra)
    except Exception:
        return False
    return True


def _compare(t: Trial, tried: str, expected: Tensor, found: Tensor, change: str, what: str = "losses") -> None:
    if not _agrees(expected, found):
        furthest = (expected - found).abs().max().item()
        t.review.fail(tried, f"{what} that differ by up to {furthest:.3g}", change)


def _agrees(one: Tensor, other: Tensor) -> bool:
    import torch

    return one.shape == other.shape and bool(torch.isclose(one, other, rtol=TOLERANCE, atol=TOLERANCE).all())
