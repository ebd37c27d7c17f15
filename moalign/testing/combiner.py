"""Whether a rule that turns many objectives into one signal keeps to the contract of ``moalign.api.Combiner``."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from moalign.api import Batch, Combiner, Preference
from moalign.testing import combiner_losses, combiner_rounds
from moalign.testing.batch import swapped
from moalign.testing.combiner_trial import NAMES, Trial, judged_by, shown, total_weight
from moalign.testing.review import Review, described, run
from moalign.testing.watched import changed_fields, copied

if TYPE_CHECKING:
    from torch import Tensor


def check_combiner(
    plugin: Combiner,
    *,
    objectives: int = 4,
    prompts: int = 3,
    tokens: int = 4,
    seed: int = 0,
    exempt: Collection[str] = (),
) -> None:
    """Check a rule for 1 to ``objectives`` (at most 8) objectives on made-up batches and rewards.

    Equal weights must be accepted for every number of objectives, or by a rule for sampled responses thresholds of the
    first one; other preferences may be refused with a PreferenceError. ``exempt``: names of checks to leave out. Raises
    ConformanceError.
    """
    import torch  # noqa: F401  (so that the watch over random states sees torch's)

    trial = Trial(Review("combiner", plugin), plugin, min(objectives, len(NAMES)), prompts, tokens, seed)
    run(CHECKS, trial, exempt)


def declarations_are_known(t: Trial) -> None:
    """``accepts`` and ``needs`` name what the engine knows."""
    tried, accepts = "reading the class attributes", set(t.plugin.accepts)
    change = 'accepts holds one or more of "labelled", "scored" and "groups"'
    known = {"labelled", "scored", "groups"}
    t.review.require(bool(accepts) and accepts <= known, tried, f"accepts is {accepts}", change)
    for name in (
        "weighs_judges",
        "monotone",
        "weighted_sums",
        "pointwise",
        "needs_gram",
        "weighs_losses",
        "merges_judges",
        "reads_levels",
    ):
        value = getattr(t.plugin, name)
        t.review.require(isinstance(value, bool), tried, f"{name} is {value!r}", f"declare {name} as True or False")
    apart = not (t.plugin.weighs_losses and t.plugin.merges_judges)
    change = "declare one of them: a pair that is judged by several belongs to the loss of none"
    t.review.require(apart, tried, "weighs_losses and merges_judges are both True", change)
    low, high = t.plugin.reward_range
    t.review.require(low < high, tried, f"reward_range is {(low, high)}", "give the smallest and the largest reward")


def weights_are_accepted(t: Trial) -> None:
    """Equal weights for every number of objectives; whatever is refused is refused with a PreferenceError."""
    keeps_thresholds = "groups" in t.plugin.accepts and t.accepts(Preference("thresholds", {NAMES[0]: 0.5}))
    for count in range(1, 1 if keeps_thresholds else t.objectives + 1):
        equal = Preference("weights", dict.fromkeys(NAMES[:count], 1 / count))
        change = "give the rule a meaning for equal weights of any number of objectives; every run can ask for them"
        t.review.require(t.accepts(equal), f"check() with {shown(equal)}", "PreferenceError", change)
    for preference, _ in t.preferences():
        tried = f"needs() with {shown(preference)}"
        found = t.review.call(tried, "return a frozenset", t.plugin.needs, preference)
        good = isinstance(found, frozenset) and found <= {"margins"}
        t.review.require(good, tried, repr(found), 'return frozenset() or frozenset({"margins"})')


def needs_are_enough(t: Trial) -> None:
    """What is not declared is not there; where it happens to be there, it changes none of the terms that are read."""
    if "labelled" not in t.plugin.accepts:
        return
    for preference, _ in t.preferences():
        if t.plugin.needs(preference) or False not in t.kinds(preference):
            continue
        tried = f"labelled pairs without margins, which needs() does not ask for with {shown(preference)}"
        with_margins = t.batch(preference, scored=False, margins=True)
        change = 'return frozenset({"margins"}) from needs() for this preference'
        try:
            without = t.plugin.pair_terms(copied(t.batch(preference, scored=False)))
        except Exception as error:
            if not _works(t, with_margins):
                change = "find out why it raises; with margins it does so too"
            t.review.fail(tried, described(error), change, error)
        more = t.terms("labelled pairs with margins that nobody asked for", with_margins)
        differing = [name for name in changed_fields(without, more) if name != "difference"]
        t.review.require(not differing, tried, f"with margins there, {', '.join(differing)} would be another", change)


def one_finite_number_per_pair(t: Trial) -> None:
    """Scale, margin and weight of labelled and scored pairs, in float32 and float64, twice the same."""
    import torch

    for preference, _ in t.preferences():
        for scored in t.kinds(preference):
            tried = f"{'scored' if scored else 'labelled'} pairs with {shown(preference)}"
            batch = t.batch(preference, scored, dtype=torch.float32)
            first, second = t.terms(tried, batch), t.terms(tried, batch)
            change = "make the terms a function of the batch: no state of its own, no unseeded generator"
            differing = changed_fields(first, second)
            t.review.require(not differing, f"{tried}, twice", f"another {', '.join(differing)}", change)


def margins_are_used(t: Trial) -> None:
    """Where margins are asked for, other margins give other terms."""
    for preference, _ in t.preferences():
        if not t.plugin.needs(preference):
            continue
        differing = []
        for scored in t.kinds(preference):
            batch = t.batch(preference, scored)
            assert batch.margins is not None and batch.rewards is not None
            other = replace(batch, margins=batch.margins * 1.5 + 1, rewards=batch.rewards * 1.5)
            differing += changed_fields(t.terms("a batch", batch), t.terms("the same with other margins", other))
        tried = f"other margins with {shown(preference)}"
        change = "return frozenset() from needs() for this preference: margins can cost a run of every objective alone"
        t.review.require(bool(differing), tried, "the same terms, though needs() asks for margins", change)


def reads_levels_is_honest(t: Trial) -> None:
    """A number added to the rewards of all responses to a prompt changes terms of labelled pairs where ``reads_levels``
    is declared, and nowhere else."""
    import torch

    for preference, _ in t.preferences():
        if not t.plugin.needs(preference) or False not in t.kinds(preference):
            continue
        batch = t.batch(preference, scored=False)
        assert batch.rewards is not None
        added = torch.randn((int(batch.groups.max()) + 1, 1), generator=torch.Generator().manual_seed(t.seed))
        tried = f"a number added to the rewards of each prompt's responses, with {shown(preference)}"
        before = t.terms("labelled pairs", batch)
        after = t.terms(tried, replace(batch, rewards=batch.rewards + added[batch.groups].to(batch.rewards)))
        names = ("scale", "margin", "weight", "reversed")
        same = all(_agrees(getattr(before, name), getattr(after, name)) for name in names)
        if t.plugin.reads_levels:
            change = "declare reads_levels = False: differences are enough, and log-ratios may then be the rewards"
            t.review.require(not same, tried, "the same terms, though reads_levels is True", change)
        else:
            change = "declare reads_levels = True, or read batch.margins: of an implicit reward nothing else is known"
            t.review.require(same, tried, "other terms, though reads_levels is False", change)


def unknown_without_weight_is_ignored(t: Trial) -> None:
    """A reward that carries no weight may be unknown, and changes nothing."""
    import torch

    for preference, vector in t.preferences():
        idle = torch.tensor(vector) == 0
        if not bool(idle.any()):
            continue
        what = f"NaN for the rewards without weight in {shown(preference)}"
        change = "leave out what carries no weight before multiplying: 0 * NaN is NaN"
        rewards = _rewards(t, len(vector))
        if t.scalarises:
            weights = torch.tensor(vector, dtype=torch.float64)
            known = t.scalar("scalarise", rewards, weights)
            value = t.scalar("scalarise", rewards.masked_fill(idle, torch.nan), weights)
            t.review.require(_agrees(known, value), f"scalarise with {what}", f"{value.tolist()[:3]}", change)
        for scored in t.kinds(preference):
            batch = t.batch(preference, scored, margins=True)
            assert batch.margins is not None and batch.rewards is not None
            unknown = replace(
                batch,
                margins=batch.margins.masked_fill(idle, torch.nan),
                rewards=batch.rewards.masked_fill(idle, torch.nan),
            )
            t.terms(f"pair_terms with {what}", unknown)


def unknown_with_weight_is_said(t: Trial) -> None:
    """NaN where a reward that carries weight is unknown, or an error; never a number."""
    import torch

    for preference, vector in t.preferences() if t.scalarises else ():
        for index in (index for index, value in enumerate(vector) if value != 0):
            tried = f"scalarise with NaN for a reward that carries weight, {shown(preference)}"
            rewards = _rewards(t, len(vector))
            rewards[:, index] = torch.nan
            try:
                value = t.plugin.scalarise(rewards, torch.tensor(vector, dtype=torch.float64))
            except Exception:
                continue
            change = "let NaN through, or raise: a number here stands for a reward that nobody knows"
            t.review.require(bool(value.isnan().all()), tried, f"{value.tolist()[:3]}", change)


def scalarise_broadcasts(t: Trial) -> None:
    """[..., M] and [..., M] -> [...], every entry as it would be alone."""
    import torch

    for _, vector in t.preferences() if t.scalarises else ():
        weights, rewards = torch.tensor(vector, dtype=torch.float64), _rewards(t, len(vector))
        count = len(vector)
        alone = torch.stack([t.scalar(f"scalarise [{count}], [{count}]", row, weights) for row in rewards])
        shapes = [(rewards, weights), (rewards[None], weights.expand(2, 1, count)), (rewards, weights.expand(5, count))]
        for first, second in shapes:
            tried = f"scalarise {list(first.shape)}, {list(second.shape)}"
            value = t.scalar(tried, first, second)
            change = "reduce over the last dimension and let torch broadcast the others; mix no rows"
            good = _agrees(alone.expand(value.shape), value)
            t.review.require(good, tried, "other values than row by row", change)


def more_reward_is_never_worse(t: Trial) -> None:
    """Non-negative weights: raising one reward never lowers the result, raising all that carry weight raises it.

    Of rules that declare ``monotone``.
    """
    import torch

    for preference, vector in t.preferences() if t.scalarises else ():
        if preference.kind != "weights" or not t.plugin.monotone:
            continue
        weights, rewards = torch.tensor(vector, dtype=torch.float64), _rewards(t, len(vector))
        before = t.scalar("scalarise", rewards, weights)
        change = "let the result grow with every reward that carries weight: scores are larger-is-better"
        for index in range(len(vector)):
            step = torch.zeros(len(vector), dtype=torch.float64)
            step[index] = 0.5
            tried = f"scalarise with a larger reward of objective {index}, {shown(preference)}"
            worse = t.scalar(tried, rewards + step, weights) < before - 1e-9 * before.abs()
            t.review.require(not bool(worse.any()), tried, "a smaller result", change)
        tried = f"scalarise with all rewards larger by 1/2, {shown(preference)}"
        better = t.scalar(tried, rewards + 0.5, weights) > before
        t.review.require(bool(better.all()), tried, "a result that is not larger", change)


def order_of_objectives_changes_nothing(t: Trial) -> None:
    """Objectives in another order, with their preference, rewards and labels."""
    import torch

    change = "treat all objectives alike; what sets one apart is the preference, never its position"
    for preference, vector in t.preferences():
        names = list(preference.values)
        order = torch.arange(len(names)).roll(1)
        weights, rewards = torch.tensor(vector, dtype=torch.float64), _rewards(t, len(vector))
        tried = f"the objectives in another order, {shown(preference)}"
        if t.scalarises:
            before = t.scalar(tried, rewards, weights)
            after = t.scalar(tried, rewards[:, order], weights[order])
            t.review.require(_agrees(before, after), tried, "another result of scalarise", change)
        for scored in t.kinds(preference):
            batch = t.batch(preference, scored)
            terms, permuted = t.terms(tried, batch), t.terms(tried, _reordered(batch, order))
            for name in changed_fields(terms, permuted):
                same = _agrees(getattr(terms, name), getattr(permuted, name))
                t.review.require(same, tried, f"another {name}", change)


def a_wanted_objective_teaches(t: Trial) -> None:
    """With all weight on one objective the pairs that it judged count: their weight and scale are not 0.

    Of rules that decide pairs of several judges, some of them.
    """
    if "labelled" not in t.plugin.accepts:
        return
    for preference, vector in t.preferences():
        if preference.kind != "weights" or vector.count(0) != len(vector) - 1:
            continue
        batch = t.batch(preference, scored=False)
        tried = f"labelled pairs with {shown(preference)}"
        terms, own = t.terms(tried, batch), judged_by(batch)[:, vector.index(1.0)]
        for name, value in (("weight", total_weight(terms)), ("scale", terms.scale)):
            change = "let a pair count that the only wanted objective judged, or nothing is learned from it"
            counting = value[own] != 0
            taught = bool(
                counting.any() if t.plugin.merges_judges else counting.all()
            )  # a rule may leave ties undecided
            t.review.require(taught, tried, f"{name} 0 for its own pairs", change)


def weighs_judges_is_honest(t: Trial) -> None:
    """Pairs judged by an objective without weight have weight 0, or have not, as ``weighs_judges`` says."""
    if "labelled" not in t.plugin.accepts:
        return
    idle: list[float] = []
    for preference, vector in t.preferences():
        if False not in t.kinds(preference):
            continue
        batch = t.batch(preference, scored=False)
        without = ~(judged_by(batch) & (batch.preference[0] != 0)).any(1)
        if len(vector) > 1 and bool(without.any()):
            idle += total_weight(t.terms(f"labelled pairs with {shown(preference)}", batch))[without].tolist()
    tried = "pairs judged by an objective without weight"
    if t.plugin.weighs_judges:
        change = "give them weight 0, or declare weighs_judges = False: the engine leaves such pairs out"
        t.review.require(not any(idle), tried, f"weight {max(idle, default=0):g}, though weighs_judges is True", change)
    elif idle:
        change = "declare weighs_judges = True, so that such pairs take no place in a step"
        t.review.require(any(idle), tried, "weight 0 for all of them, though weighs_judges is False", change)


def the_other_way_round_is_the_same(t: Trial) -> None:
    """Pairs of several judges have no better response: with the two changed over, weights change over with them."""
    if not (t.plugin.merges_judges and "labelled" in t.plugin.accepts):
        return
    change = "let weight and reversed follow from what the judges prefer, not from which response stands first"
    for preference, _ in t.preferences():
        batch = t.batch(preference, scored=False)
        assert batch.preferred is not None
        tried = f"labelled pairs the other way round, {shown(preference)}"
        before, after = t.terms(tried, batch), t.terms(tried, replace(swapped(batch), preferred=1 - batch.preferred))
        other = 0 * before.weight if before.reversed is None else before.reversed
        against = 0 * after.weight if after.reversed is None else after.reversed
        same = _agrees(before.weight, against) and _agrees(other, after.weight)
        t.review.require(same, tried, "other weights than those changed over", change)
        same = _agrees(before.scale, after.scale) and _agrees(before.margin, -after.margin)
        change = "keep the scale, and give the margin the other sign"
        t.review.require(same, tried, "another scale or margin", change)


CHECKS: tuple[Callable[[Trial], None], ...] = (
    declarations_are_known,
    weights_are_accepted,
    needs_are_enough,
    one_finite_number_per_pair,
    margins_are_used,
    reads_levels_is_honest,
    scalarise_broadcasts,
    unknown_without_weight_is_ignored,
    unknown_with_weight_is_said,
    more_reward_is_never_worse,
    order_of_objectives_changes_nothing,
    a_wanted_objective_teaches,
    weighs_judges_is_honest,
    the_other_way_round_is_the_same,
    *combiner_losses.CHECKS,
    *combiner_rounds.CHECKS,
)


def _rewards(t: Trial, objectives: int) -> Tensor:
    """[5, M], of both signs."""
    import torch

    generator = torch.Generator().manual_seed(t.seed)
    return torch.randn((5, objectives), generator=generator, dtype=torch.float64)


def _reordered(batch: Batch, order: Tensor) -> Batch:
    place = order.argsort()
    return replace(
        batch,
        preference=batch.preference[:, order],
        pair_objective=place[batch.pair_objective] if bool((batch.pair_objective >= 0).all()) else batch.pair_objective,
        preferred=None if batch.preferred is None else batch.preferred[:, order],
        margins=None if batch.margins is None else batch.margins[:, order],
        rewards=None if batch.rewards is None else batch.rewards[:, order],
    )


def _agrees(first: Tensor | None, second: Tensor | None) -> bool:
    import torch

    if first is None or second is None:
        return first is second
    tolerance = 1e-9 if first.dtype == second.dtype == torch.float64 else 1e-5
    return bool(torch.isclose(first, second, rtol=tolerance, atol=tolerance).all())


def _works(t: Trial, batch: Batch) -> bool:
    try:
        t.plugin.pair_terms(copied(batch))
    except Exception:
        return False
    return True
