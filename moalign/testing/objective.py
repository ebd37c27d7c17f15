"""Whether a loss on token log-probabilities keeps to the contract of ``moalign.api.Objective``."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from moalign.api import Batch, Objective, PairTerms
from moalign.testing.advantages import CHECKS_OF_ADVANTAGES
from moalign.testing.batch import agrees, at_start, made_up, otherwise, padded, plain_terms, rearranged, rows_of, spoken
from moalign.testing.companions import NAME, companion_learns, companion_of
from moalign.testing.owned import (
    first_values,
    losses_of,
    moved,
    parameters_are_trained,
    parameters_have_first_values,
)
from moalign.testing.passages import passages_are_expressions
from moalign.testing.review import Review, described, first, run
from moalign.testing.rounds import advantages_of, made_up_round, weighed
from moalign.testing.terms import shiftable_is_honest, weight_is_left_to_the_engine
from moalign.testing.views import folders, folders_follow_from_options, names_of_views, views_are_texts
from moalign.testing.watched import changed_fields, copied

if TYPE_CHECKING:
    from torch import Tensor

OF_GROUPS = {
    "old_logps": "only responses that the policy sampled have old log-probabilities",
    "token_advantages": "only tokens of responses that the policy sampled have advantages",
    "greedy": "greedy responses are compared with those that the policy sampled",
    "rewards": 'pairs have "margins", the differences of rewards',
}
KNOWN = {
    "pairs",
    "margins",
    "reference",
    "base",
    "groups",
    "entropy",
    "hidden",
    "distributions",
    "mismatched",
    "reference_responses",
    *OF_GROUPS,
}


def check_objective(
    plugin: Objective,
    *,
    prompts: int = 3,
    tokens: int = 6,
    objectives: int = 3,
    seed: int = 0,
    exempt: Collection[str] = (),
) -> None:
    """Check a loss on made-up batches of ``prompts`` prompts with 3 responses of up to ``tokens`` tokens each.

    With "groups" in ``needs`` its ``advantages`` or ``token_advantages`` too, on made-up rounds; and its parameters.
    ``exempt``: names of checks to leave out; "gradient_is_the_derivative" for a loss that detaches a part on purpose.
    Raises ConformanceError.
    """
    import torch  # noqa: F401  (so that the watch over random states sees torch's)

    run(CHECKS, Trial(Review("objective", plugin), plugin, prompts, tokens, objectives, seed), exempt)


@dataclass(frozen=True)
class Trial:
    review: Review
    plugin: Objective
    prompts: int
    tokens: int
    objectives: int
    seed: int

    @property
    def grouped(self) -> bool:
        """Whether the loss takes responses one by one, and not pairs of them."""
        return "groups" in self.plugin.wants

    @property
    def measures_guides(self) -> bool:
        """Whether guides are read once for a round, where the loss measures its tokens, and not in each step."""
        return self.weighs_tokens and type(self.plugin).measure is not Objective.measure

    @property
    def weighs_tokens(self) -> bool:
        return "token_advantages" in self.plugin.wants

    @property
    def unit(self) -> str:
        return "response" if self.grouped else "pair"

    @property
    def supplied(self) -> tuple[str, ...]:
        """What the engine could supply beside the pairs or responses."""
        own = ("old_logps", "rewards") if self.grouped else ("margins",)
        return ("base", "entropy", "hidden", "mismatched", "reference", *own)

    def batch(self, dtype: Any = None, extra: Collection[str] = (), seed: int = 0) -> Batch:
        """What the engine supplies: what is declared in ``needs``, and ``extra``; its parameters have been trained."""
        import torch

        batch = made_up(
            prompts=self.prompts,
            tokens=self.tokens,
            preference=[(index + 1) / sum(range(self.objectives + 1)) for index in range(self.objectives)],
            needs=self.plugin.wants | set(extra),
            scored=bool(self.plugin.wants & {"margins", "groups"}),
            seed=self.seed + seed,
            dtype=dtype or torch.float64,
            guides=[*sorted(folders(self)), *([] if companion_of(self) is None else [NAME])],
            views=names_of_views(self),
        )
        own = first_values(self)
        at_sampling, now = (moved(own, self.seed + number, batch.logps.dtype) for number in (3, 4))
        batch = replace(batch, parameters=now)
        if not self.weighs_tokens:
            return batch
        signal = torch.randn(len(batch.groups), generator=torch.Generator().manual_seed(self.seed + seed)).double()
        return weighed(self, batch, signal, at_sampling)

    def told(self, batch: Batch) -> Batch:
        """As its loss is told of it: with distributions over a vocabulary that belong to its log-probabilities, where
        it reads them, and without guides where these are read before, as a round is measured."""
        if "distributions" in self.plugin.wants:
            return spoken(batch)
        return replace(batch, guides={}) if self.measures_guides else batch

    def loss(self, tried: str, batch: Batch, terms: PairTerms | None = None) -> Tensor:
        """The losses, one per pair or response, with their shape and finiteness checked and the inputs watched."""
        import torch

        terms = plain_terms(batch) if terms is None else terms
        batch = self.told(batch)
        given, given_terms = copied(batch), copied(terms)
        change = "a loss must take every batch that the engine can hand it"
        losses = self.review.answer(tried, change, self.plugin.loss, given, given_terms)
        written = changed_fields(batch, given) + [f"terms.{name}" for name in changed_fields(terms, given_terms)]
        change = "compute new tensors; write into none that was handed over (no in-place operations)"
        self.review.require(not written, tried, f"{', '.join(written)} changed during the call", change)
        found = f"{losses.dtype} {list(losses.shape)}" if isinstance(losses, torch.Tensor) else type(losses).__name__
        unit, size = self.unit, "[N]" if self.grouped else "[P]"
        change = f"return one loss per {unit}, {size}: reduce over tokens, never over {unit}s, and squeeze nothing away"
        good = isinstance(losses, torch.Tensor) and losses.shape == (len(batch.pairs),)
        self.review.require(good, f"{tried}, {len(batch.pairs)} {unit}s", found, change)
        change = f"compute in the dtype of batch.logps, here {batch.logps.dtype}"
        self.review.require(losses.dtype == batch.logps.dtype, tried, f"losses of {losses.dtype}", change)
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        change = "guard divisions by counts of tokens that can be 0, logarithms and exponentials"
        self.review.require(not bad, tried, f"the loss of {first(unit, bad)} is not finite: {losses.tolist()}", change)
        return losses


def declarations_are_known(t: Trial) -> None:
    """``needs`` and ``needs_with`` name what the engine knows, and which pairs the loss learns from."""
    tried = "reading the class attributes"
    strangers = sorted(set(t.plugin.needs_with) - set(type(t.plugin).model_fields))
    change = "name options of the class, which are its fields"
    t.review.require(not strangers, tried, f"needs_with has {strangers}", change)
    needs = t.plugin.wants
    unknown = sorted(set(needs).union(*t.plugin.needs_with.values()) - KNOWN)
    names = ", ".join(f'"{name}"' for name in sorted(KNOWN))
    t.review.require(not unknown, tried, f"needs has {unknown}", f"the engine knows {names}")
    change = (
        'declare "pairs" (labelled, chosen before rejected), "margins" (in any order, with reward differences) or '
        '"groups" (single responses with rewards), and "groups" without the others'
    )
    good = bool(needs & {"pairs", "margins"}) != ("groups" in needs)
    t.review.require(good, tried, f"needs is {sorted(needs)}", change)
    for name, why in OF_GROUPS.items():
        change = f'declare "groups" too: {why}'
        t.review.require("groups" in needs or name not in needs, tried, f"needs is {sorted(needs)}", change)
    t.review.require(
        isinstance(t.plugin.shiftable, bool), tried, f"shiftable is {t.plugin.shiftable!r}", "True or False"
    )
    change = "return what a nat of KL costs in rewards: a finite number, not below 0, which is for no price"
    price: Any = t.review.answer("kl_price()", change, t.plugin.kl_price)
    good = isinstance(price, int | float) and not isinstance(price, bool) and 0 <= price < math.inf
    t.review.require(good, "kl_price()", repr(price), change)


def needs_are_enough(t: Trial) -> None:
    """What is not declared is not there."""
    tried = f"a batch with what `needs` declares and nothing else: {sorted(t.plugin.wants)}"
    plain = t.batch()
    try:
        t.plugin.loss(copied(t.told(plain)), plain_terms(plain))
    except Exception as error:
        lacking = next((each for each in _more(t) if _works(t, each)), ())
        names = " and ".join(f'"{name}"' for name in lacking)
        change = f"declare {names} in `needs`: with it the same call succeeds" if lacking else "find out why it raises"
        t.review.fail(tried, described(error), change, error)


def nothing_else_is_read(t: Trial) -> None:
    """Where something undeclared happens to be there, because a combiner needs it, it changes nothing."""
    before = t.loss("a batch", t.batch())
    for name in sorted(set(t.supplied) - t.plugin.wants):
        tried = f'the same batch with "{name}", which `needs` lacks'
        change = f'declare "{name}" in `needs`, or do not read it: whether it is there depends on the combiner'
        t.review.require(agrees(before, t.loss(tried, t.batch(extra=[name]))), tried, "other losses", change)


def one_finite_value_per_pair(t: Trial) -> None:
    """In float32, for many pairs that share rows and for a single one, and where the policy is the reference."""
    import torch

    t.loss("a batch in float64 beside a row without response tokens", t.batch())
    batch = t.batch(torch.float32)
    t.loss("a batch in float32", batch)
    t.loss(f"a single {t.unit}", rearranged(batch, rows_of(batch, torch.tensor([0])), torch.tensor([0])))
    t.loss("a policy that is its reference, as at step 0", at_start(batch))


def same_twice(t: Trial) -> None:
    tried = "the same batch and terms twice"
    change = "make the loss a function of its arguments: no state of its own, no unseeded generator"
    batch = t.batch()
    before, after = t.loss(tried, batch), t.loss(tried, batch)
    t.review.require(bool((before == after).all()), tried, f"{before.tolist()}, then {after.tolist()}", change)


def padding_changes_nothing(t: Trial) -> None:
    tried = "three more columns of padding"
    change = "sum over batch.mask; a mean over tokens divides by batch.mask.sum(-1), never by the width of the batch"
    _compare(t, tried, t.batch(), padded(t.batch(), 3), change)


def order_changes_nothing(t: Trial) -> None:
    """Rows and pairs in another order give the same losses in that order."""
    import torch

    batch, generator = t.batch(), torch.Generator().manual_seed(t.seed + 1)
    rows = torch.randperm(len(batch.logps), generator=generator)
    if t.grouped:
        change = "let the loss of a response depend on the response, not on its place in the batch"
        tried = "the responses of the batch in another order"
        return _compare(t, tried, batch, rearranged(batch, rows, rows), change, rows)
    same = torch.arange(len(batch.pairs))
    change = "find the rows of a pair through batch.pairs, never by their position"
    _compare(t, "the rows of the batch in another order", batch, rearranged(batch, rows, same), change)
    order = torch.randperm(len(batch.pairs), generator=generator)
    change = "let the loss of a pair depend on the pair, not on its place in the batch"
    shuffled = rearranged(batch, torch.arange(len(batch.logps)), order)
    _compare(t, "the pairs of the batch in another order", batch, shuffled, change, order)


def other_prompts_change_nothing(t: Trial) -> None:
    """The engine cuts a step into passes as memory has it; only the pairs of one prompt stay together."""

    batch = t.batch()
    one = (batch.groups == batch.groups[0]).nonzero().flatten()
    pairs = (batch.groups[batch.pairs[:, 0]] == batch.groups[0]).nonzero().flatten()
    change = "take no statistics over the batch; which prompts share it depends on the memory of the machine"
    _compare(t, "the pairs of one prompt alone", batch, rearranged(batch, one, pairs), change, pairs)


def gradient_reaches_the_tokens(t: Trial) -> None:
    """Every loss has a finite gradient with respect to logps, and none outside the mask."""
    import torch

    batch = t.batch(torch.float32)
    cases = [
        ("the gradient of the summed losses", batch),
        ("the same where the policy is its reference, as at step 0", at_start(batch)),
    ]
    for tried, each in cases:
        leaf = each.logps.clone().requires_grad_()
        losses = t.loss(tried, replace(each, logps=leaf))
        change = "do not detach batch.logps, and use torch operations on it throughout"
        t.review.require(losses.requires_grad, tried, "losses without a graph", change)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf, allow_unused=True)
        t.review.require(gradient is not None, tried, "no path from the losses to batch.logps", change)
        bad = (~gradient.isfinite()).any(1).nonzero().flatten().tolist()
        empty = (each.mask.sum(-1) == 0).nonzero().flatten().tolist()
        hint = "; that row has no response tokens, so clamp its count to 1" if set(bad) & set(empty) else ""
        change = f"keep roots, logarithms and divisions away from points where their slope is infinite{hint}"
        t.review.require(not bad, tried, f"a gradient that is not finite in {first('row', bad)}", change)
        outside = (gradient * (1 - each.mask)).abs().max().item()
        change = "multiply by batch.mask before summing over tokens; a token outside it is none of the response"
        t.review.require(outside == 0, tried, f"a gradient outside the mask, up to {outside:g}", change)
        if each is batch:
            t.review.require(bool(gradient.any()), tried, "a gradient of 0 everywhere", "let the loss read batch.logps")


def gradient_is_the_derivative(t: Trial) -> None:
    """autograd against central differences, in float64; they disagree where ``detaches`` says so."""
    import torch

    batch = t.batch()
    names = ["logps"] if batch.entropy is None else ["logps", "entropy"]
    tried = f"torch.autograd.gradcheck in float64, through {' and '.join(f'batch.{name}' for name in names)}"
    tried += " and batch.parameters" if batch.parameters else ""
    leaves = [getattr(batch, name).clone().requires_grad_() for name in names]
    leaves += [value.clone().requires_grad_() for value in batch.parameters.values()]
    change = (
        "let the backward pass be that of the value: no detach, no `.data`, no rounding in between. Where a part is "
        'detached on purpose, declare detaches = True, or exempt "gradient_is_the_derivative"'
    )
    try:
        torch.autograd.gradcheck(losses_of(t, batch, names), tuple(leaves))
    except Exception as error:
        if not t.plugin.detaches:
            t.review.fail(tried, described(error).partition(" numerical:")[0], change, error)
        return
    change = "declare detaches = False, or detach what is to be held fixed"
    t.review.require(not t.plugin.detaches, tried, "the derivative of the value, though detaches is True", change)


def no_need_is_unused(t: Trial) -> None:
    """What is declared must matter: other values in its place give other losses."""
    batch, other = t.batch(), t.batch(seed=1)
    changed = otherwise(batch, other)
    before = t.loss("a batch", batch)
    if t.plugin.symmetric:
        tried, given = changed.pop("pairs")
        change = "declare symmetric = False, or do not read which of the two is chosen"
        t.review.require(agrees(before, t.loss(tried, given)), tried, "other losses, though symmetric is True", change)
    # guides and views, which are declared by methods; a loss that weighs tokens reads guides as it measures
    asked = set() if t.measures_guides else {name for name in changed if ": " in name}
    for name in sorted(asked | (t.plugin.wants & changed.keys() - ({"groups"} if t.weighs_tokens else set()))):
        tried, given = changed[name]
        change = f'take "{name}" out of `needs`: the engine pays for it (or use it)'
        change = change if name not in asked else f"do not ask for it in {name.partition(':')[0]}, or use it"
        same = agrees(before, t.loss(tried, given)) and not (name == "reference" and _reads_log_ratios(t))
        said = f'`needs` has "{name}"' if name not in asked else "the plugin asks for it"
        t.review.require(not same, tried, f"the same losses, though {said}", change)


CHECKS: tuple[Callable[[Trial], None], ...] = (
    declarations_are_known,
    folders_follow_from_options,
    views_are_texts,
    passages_are_expressions,
    companion_learns,
    parameters_have_first_values,
    needs_are_enough,
    one_finite_value_per_pair,
    same_twice,
    nothing_else_is_read,
    gradient_reaches_the_tokens,
    gradient_is_the_derivative,
    parameters_are_trained,
    padding_changes_nothing,
    order_changes_nothing,
    other_prompts_change_nothing,
    no_need_is_unused,
    shiftable_is_honest,
    weight_is_left_to_the_engine,
    *CHECKS_OF_ADVANTAGES,
)


def _compare(t: Trial, tried: str, batch: Batch, other: Batch, change: str, pairs: Tensor | None = None) -> None:
    before, after = t.loss("a batch", batch), t.loss(tried, other)
    expected = before if pairs is None else before[pairs]
    if not agrees(expected, after):
        furthest = (expected - after).abs().max().item()
        t.review.fail(tried, f"losses that differ by up to {furthest:.3g}", change)


def _reads_log_ratios(t: Trial) -> bool:
    """Whether a price of leaving the reference is part of the advantages."""
    if not t.grouped:
        return False
    given = made_up_round(t)
    before = advantages_of(t, "a round", given)
    return not agrees(before, advantages_of(t, "other log-ratios", given.with_other_reference()))


def _more(t: Trial) -> list[tuple[str, ...]]:
    """What could be declared beside: the fewest first."""
    missing = sorted(set(t.supplied) - t.plugin.wants)
    return [names for size in range(1, len(missing) + 1) for names in combinations(missing, size)]


def _works(t: Trial, extra: tuple[str, ...]) -> bool:
    try:
        batch = t.batch(extra=extra)
        t.plugin.loss(copied(t.told(batch)), plain_terms(batch))
    except Exception:
        return False
    return True
