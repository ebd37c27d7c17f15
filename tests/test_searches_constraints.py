"""Searches that go on from weights to thresholds: C-MORL and the epsilon-constraint method."""

from __future__ import annotations

import json
import math
from itertools import product
from random import Random

import numpy as np
import pytest
from interruptions import StopAfterCandidates
from sweeps import contents, small_config

from moalign import registry
from moalign.api import Candidate, ConfigError, Outcome, Preference, PreferenceError, Space, non_dominated, values
from moalign.storage import safe_name
from moalign.sweeps import run
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.testing import check_search
from moalign_plugins.searches._crowding import crowding_distance, loneliest
from moalign_plugins.searches.c_morl import CMORL
from moalign_plugins.searches.epsilon_constraint import EpsilonConstraint

NAMES = ("a", "b", "c", "d", "e")
SEARCHES = [
    CMORL(),
    CMORL(points=5, extended=2, rounds=3),
    EpsilonConstraint(),
    EpsilonConstraint(points=24, maximise="c"),
    EpsilonConstraint(points=14, warm_start="neighbour"),
]


def space(objectives=2, **known):
    return Space(NAMES[:objectives], steps=100, **known)


def done(id, scores, preference=None, kl=None, **more):
    named = dict(zip(NAMES, scores, strict=False))
    equal = Preference("weights", dict.fromkeys(named, 1 / len(named)))
    return Outcome(id, "done", preference or equal, scores=named, kl=kl, **more)


def solver(front):
    """What training would find: for weights or thresholds the best point of a finite front [n,M]."""

    def solve(candidate: Candidate) -> Outcome:
        names = NAMES[: front.shape[1]]
        wanted = np.array(candidate.preference.vector(names))
        if candidate.preference.kind == "weights":
            best = int((front @ wanted).argmax())
        else:
            bounded = ~np.isnan(wanted)
            short = np.maximum(wanted[bounded] - front[:, bounded] - 1e-12, 0).sum(1)
            best = int(np.lexsort((-front[:, ~bounded].sum(1), short))[0])
        return done(candidate.id, front[best].tolist(), candidate.preference, changes=candidate.changes)

    return solve


def driven(search, where, solve, history=()):
    """All rounds of the search to its end: the history, and what was proposed in each round."""
    history, rounds = list(history), []
    while proposed := search.propose(where, tuple(history), Random(0)):
        assert len(history) < 500
        rounds.append(proposed)
        history += [solve(candidate) for candidate in proposed]
    return history, rounds


def mixed_fates(solve):
    """Every third fails, every fourth is skipped."""
    count = iter(range(10**6))

    def fate(candidate):
        number = next(count)
        if number % 3 == 1:
            return Outcome(candidate.id, "failed", candidate.preference, error="made up")
        return Outcome(candidate.id, "skipped", candidate.preference) if number % 4 == 3 else solve(candidate)

    return fate


def sphere(objectives, shift=0.0):
    """A concave front, shifted into negative returns where that is asked for."""
    generator = np.random.default_rng(0)
    points = np.abs(generator.normal(size=(400, objectives)))
    return points / np.linalg.norm(points, axis=1, keepdims=True) - shift


def caved(points=1001):
    """A front whose inner points all lie below the line between its ends: no weights reach them."""
    first = np.linspace(0, 1, points)
    return np.stack([first, (1 - np.sqrt(first)) ** 2], axis=1)


# --- for all ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", SEARCHES, ids=repr)
def test_they_conform(search):
    named = getattr(search, "maximise", None) and {"maximise": "harmless"}  # one of the kit's own objectives
    check_search(search.model_copy(update=named or {}), objectives=3)


@pytest.mark.parametrize("fates", [lambda solve: solve, mixed_fates], ids=["all succeed", "some fail or are skipped"])
@pytest.mark.parametrize("objectives", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("search", SEARCHES, ids=repr)
def test_a_history_cut_anywhere_is_gone_on_with_exactly(search, objectives, fates):
    """Cut in the middle of a proposal, what is missing of it is proposed, and nothing else."""
    if getattr(search, "maximise", None) not in (None, *NAMES[:objectives]):
        with pytest.raises(ConfigError, match=r"search.maximise: there is no objective 'c'; known: a"):
            search.propose(space(objectives), (), Random(0))
        return
    where = space(objectives, base=dict.fromkeys(NAMES[:objectives], 0.1), kl_price=0.1)
    history, rounds = driven(search, where, fates(solver(sphere(objectives))))
    proposed = [candidate for each in rounds for candidate in each]
    assert len({candidate.id for candidate in proposed}) == len(proposed)
    assert all(safe_name(candidate.id) for candidate in proposed)
    begin = 0
    for each in rounds:
        for cut in range(len(each)):
            again = search.propose(where, tuple(history[: begin + cut]), Random(cut))
            if getattr(search, "warm_start", None) is None:
                assert again == each[cut:]
            else:  # what ended meanwhile may be a better start, and the next ones may be begun
                assert [one.id for one in again][: len(each) - cut] == [one.id for one in each[cut:]]
        begin += len(each)
    assert search.propose(where, tuple(history), Random(1)) == []


@pytest.mark.parametrize("search", SEARCHES, ids=repr)
def test_where_nothing_succeeds_they_end_after_the_weights(search):
    for status in ("failed", "skipped"):
        history, rounds = driven(search, space(3), lambda each, s=status: Outcome(each.id, s, each.preference))
        assert len(rounds) == 1 and all(outcome.preference.kind == "weights" for outcome in history)


# --- crowding distance ------------------------------------------------------------------------------------------------


def test_crowding_distance_of_four_points_by_hand():
    """Ranges 10 and 8: the second has neighbours 3 and 5 apart, the third 9 and 6."""
    points = [(0.0, 8.0), (1.0, 6.0), (3.0, 3.0), (10.0, 0.0)]
    expected = [math.inf, 3 / 10 + 5 / 8, 9 / 10 + 6 / 8, math.inf]
    assert crowding_distance(points) == pytest.approx(expected, rel=1e-9)
    order = [2, 0, 3, 1]
    assert crowding_distance([points[at] for at in order]) == pytest.approx([expected[at] for at in order], rel=1e-9)
    assert loneliest(points, 4) == [0, 3, 2, 1] and loneliest(points, 2) == [0, 3]


def test_the_loneliest_are_not_dominated_and_differ_from_each_other_and_from_the_used():
    points = [(1.0, 6.0), (0.0, 8.0), (0.5, 5.0), (3.0, 3.0), (10.0, 0.0), (0.0, 8.0), (3.0, 3.0)]
    assert loneliest(points, 9) == [1, 4, 3, 0]
    assert loneliest(points, 9, used=[(10.0, 0.0), (3.0, 3.0)]) == [1, 0]
    assert loneliest([], 3) == crowding_distance([]) == []
    assert loneliest([(1.0, 1.0)] * 3, 3) == [0]
    assert loneliest([(1.0, 1.0), (1.0, 2.0), (0.0, 3.0)], 3) == [1, 2]


def test_crowding_distance_sums_over_objectives_and_leaves_out_what_is_constant():
    generator = np.random.default_rng(1)
    points = np.c_[generator.normal(size=(30, 3)), np.full(30, 7.0)]
    expected = np.zeros(30)
    for column in points.T[:3]:
        order = np.argsort(column)
        gaps = (column[order][2:] - column[order][:-2]) / np.ptp(column)
        expected[order] += [np.inf, *gaps, np.inf]
    assert crowding_distance(points.tolist()) == pytest.approx(expected.tolist(), rel=1e-7)


# --- C-MORL -----------------------------------------------------------------------------------------------------------


def test_the_grid_takes_its_share_of_the_steps_and_the_extensions_the_rest():
    for rounds, rest in ((1, 40), (2, 20), (3, 13)):
        search = CMORL(points=4, extended=2, rounds=rounds)
        _, (first, *others) = driven(search, space(2), solver(sphere(2)))
        assert [each.changes for each in first] == [{"train.steps": 60}] * 4 and not any(each.parents for each in first)
        assert len(others) <= rounds
        assert all(each.changes == {"train.steps": rest} for batch in others for each in batch)
    alone = driven(CMORL(), space(1), solver(sphere(1)))[1]
    assert len(alone) == 1 and [each.changes for each in alone[0]] == [{}]


@pytest.mark.parametrize("shift", [0.0, 5.0], ids=["positive returns", "negative returns"])
@pytest.mark.parametrize("objectives", [2, 3, 4, 5])
def test_every_start_keeps_to_its_own_levels_and_every_objective_is_extended_once(objectives, shift):
    where, search = space(objectives), CMORL(points=20, extended=3, slack=0.2)
    history, (first, second) = driven(search, where, solver(sphere(objectives, shift)))
    known = {outcome.id: outcome for outcome in history[: len(first)]}
    front = np.array([list(outcome.scores.values()) for outcome in known.values()])
    ranges = np.ptp(front[non_dominated(front)], axis=0)
    starts = list(dict.fromkeys(candidate.parents for candidate in second))
    assert len(second) == len(starts) * objectives == 3 * objectives
    pairs = []
    for candidate in second:
        levels, start = candidate.preference.values, known[candidate.parents[0]].scores
        (extended,) = set(where.objectives) - set(levels)
        pairs.append((candidate.parents, extended))
        assert candidate.preference.kind == "thresholds" and list(levels) == sorted(levels)
        for name, width in zip(where.objectives, ranges, strict=True):
            if name != extended:
                assert levels[name] < start[name]  # feasible from the start, whatever the sign
                assert levels[name] == pytest.approx(start[name] - 0.2 * width, abs=1e-12)
    assert len(set(pairs)) == len(pairs)


def ended(points=6, **more):
    """A history of the grid's candidates with these scores."""
    candidates = CMORL(points=points, **more).propose(space(2), (), Random(0))
    return [candidate.id for candidate in candidates]


def test_the_starts_are_the_most_crowded_out_and_dominated_ones_are_none():
    scores = [(0.0, 8.0), (10.0, 0.0), (1.0, 6.0), (3.0, 3.0), (2.0, 2.0), (1.0, 5.9)]
    history = [done(id, each) for id, each in zip(ended(), scores, strict=True)]
    proposed = CMORL(extended=3).propose(space(2), history, Random(0))
    ids = [outcome.id for outcome in history]
    assert [each.parents[0] for each in proposed] == [ids[at] for at in (0, 0, 1, 1, 3, 3)]
    assert [each.id for each in proposed[:2]] == ["extended-1-0-a", "extended-1-0-b"]
    assert proposed[0].preference.values == pytest.approx({"b": 8 - 0.1 * 8})
    assert proposed[-1].preference.values == pytest.approx({"a": 3 - 0.1 * 10})


def test_what_only_pays_more_kl_is_no_start_and_levels_are_scores_as_they_are():
    ids = ended(points=3)
    history = [done(ids[0], (1.0, 0.0), kl=0.0), done(ids[1], (0.0, 1.0), kl=0.0), done(ids[2], (1.2, 1.2), kl=10.0)]
    free = CMORL(points=3).propose(space(2), history, Random(0))
    assert {each.parents[0] for each in free} == {ids[2]}
    priced = CMORL(points=3).propose(space(2, kl_price=0.2), history, Random(0))
    assert {each.parents[0] for each in priced} == {ids[0], ids[1]}
    cheap = CMORL(points=3).propose(space(2, kl_price=0.01), history, Random(0))
    assert values(history[2], space(2, kl_price=0.01)) == pytest.approx((1.1, 1.1))
    # a single point has no range: what there is beside it has one
    assert cheap[0].preference.values == pytest.approx({"b": 1.2 - 0.1 * 1.2})


def test_one_policy_alone_has_its_range_from_the_base():
    ids = ended(points=2)
    history = [done(ids[0], (-1.0, -2.0)), Outcome(ids[1], "failed", Preference("weights", {"a": 0.0, "b": 1.0}))]
    first, second = CMORL(points=2).propose(space(2, base={"a": -3.0, "b": -2.5}), history, Random(0))
    assert first.preference.values == pytest.approx({"b": -2.05}) and second.preference.values == {"a": -1.2}
    assert first.parents == second.parents == (ids[0],)
    unknown = CMORL(points=2).propose(space(2), history, Random(0))
    assert [each.preference.values for each in unknown] == [{"b": -2.0}, {"a": -1.0}]


def test_a_later_round_starts_from_the_new_front_and_nowhere_twice():
    search, where = CMORL(points=4, extended=2, rounds=4), space(2)
    front = sphere(2)
    history, (_, *rounds) = driven(search, where, solver(front))
    scores = {outcome.id: tuple(outcome.scores.values()) for outcome in history}
    starts = [list(dict.fromkeys(scores[each.parents[0]] for each in batch)) for batch in rounds]
    assert len(rounds) > 1 and sum(map(len, starts)) == len({each for batch in starts for each in batch})
    later = {each.parents[0] for batch in rounds[1:] for each in batch}
    assert any(id.startswith("extended-") for id in later)


def test_what_nobody_proposed_is_a_start_like_others_and_changes_no_round_that_has_begun():
    ids = ended(points=2)
    history = [done(ids[0], (1.0, 0.0)), done("stranger", (0.7, 0.7)), done(ids[1], (0.0, 1.0))]
    history += [done("asked", (0.9, 0.9), kind="conditioned")]  # it has no adapter of its own
    proposed = CMORL(points=2).propose(space(2), history, Random(0))
    assert [each.parents[0] for each in proposed[::2]] == [ids[0], ids[1], "stranger"]
    begun = [*history, done(proposed[0].id, (1.1, 0.1)), done("late", (5.0, 5.0))]
    assert CMORL(points=2).propose(space(2), begun, Random(0)) == proposed[1:]


def test_extensions_find_what_weights_do_not():
    front = caved()
    history, (first, _) = driven(CMORL(points=6, extended=5, slack=0.5), space(2), solver(front))
    by_weights = {tuple(outcome.scores.values()) for outcome in history[: len(first)]}
    assert by_weights == {(0.0, 1.0), (1.0, 0.0)}
    inner = [outcome.scores["a"] for outcome in history[len(first) :] if 0 < outcome.scores["a"] < 1]
    assert inner and all(outcome.preference.kind == "thresholds" for outcome in history[len(first) :])


# --- epsilon-constraint -----------------------------------------------------------------------------------------------


def test_the_sweep_reaches_the_middle_of_a_front_where_weights_find_only_the_ends():
    front = caved()
    weights = [Candidate(f"w{at}", Preference("weights", {"a": at / 100, "b": 1 - at / 100})) for at in range(101)]
    assert {tuple(solver(front)(each).scores.values()) for each in weights} == {(0.0, 1.0), (1.0, 0.0)}
    history, (alone, sweep) = driven(EpsilonConstraint(points=11), space(2), solver(front))
    assert [each.preference.vector(("a", "b")) for each in alone] == [(1.0, 0.0), (0.0, 1.0)]
    assert [each.preference.values["b"] for each in sweep] == pytest.approx([at / 10 for at in range(1, 10)])
    found = np.array([[*outcome.scores.values()] for outcome in history[2:]])
    for level, (a, b) in zip(np.arange(1, 10) / 10, found, strict=True):
        feasible = front[front[:, 1] >= level - 1e-12]
        assert b >= level - 1e-12 and a == feasible[:, 0].max()
    assert len({tuple(each) for each in found.tolist()}) == 9 and ((found > 0) & (found < 1)).all()


@pytest.mark.parametrize("objectives", [2, 3, 4, 5])
@pytest.mark.parametrize("points", [5, 11, 40])
def test_the_grid_of_bounds_is_even_over_the_payoff_table_and_as_fine_as_the_points_pay(objectives, points):
    where = space(objectives)
    history, (_, *sweeps) = driven(EpsilonConstraint(points=points), where, solver(sphere(objectives, 2.0)))
    sweep = [candidate for each in sweeps for candidate in each]
    table = np.array([[*outcome.scores.values()] for outcome in history[:objectives]])[:, 1:]
    low, high = table.min(0), table.max(0)
    bounds = np.array([[*each.preference.values.values()] for each in sweep]).reshape(len(sweep), objectives - 1)
    shares = (bounds - low) / (high - low)
    others, left = objectives - 1, points - objectives
    n = max(n for n in range(1, left + 2) if n**others - 1 <= left)
    assert all(list(each.preference.values) == list(where.objectives[1:]) for each in sweep)
    if n > 1:
        expected = {each for each in product(range(n), repeat=others) if any(each)}
        found = shares * n
    else:  # not even two levels each
        found, expected = shares * 2, None
        assert len(sweep) == left and (np.diff(found.sum(1)) >= -1e-9).all()
    assert found == pytest.approx(found.round(), abs=1e-9)
    rounded = [tuple(map(int, each)) for each in found.round().tolist()]
    assert len(set(rounded)) == len(rounded) <= left
    assert expected is None or set(rounded) == expected


def test_another_objective_can_be_maximised():
    _, (_, sweep) = driven(EpsilonConstraint(points=6, maximise="b"), space(2), solver(sphere(2)))
    assert all(list(each.preference.values) == ["a"] for each in sweep) and len(sweep) == 4
    with pytest.raises(ConfigError, match=r"search.points: 2 points cannot hold .* at least 3"):
        EpsilonConstraint(points=2).propose(space(3), (), Random(0))


def alone_in(outcomes, objectives=2):
    """The history of the candidates for one objective alone, by their scores; None: it failed."""
    proposed = EpsilonConstraint().propose(space(objectives), (), Random(0))
    failed = [Outcome(each.id, "failed", each.preference, error="made up") for each in proposed]
    pairs = zip(proposed, outcomes, failed, strict=True)
    return [lost if scores is None else done(each.id, scores, each.preference) for each, scores, lost in pairs]


def levels(history, **known):
    proposed = EpsilonConstraint(points=6).propose(space(2, **known), history, Random(0))
    return [each.preference.values["b"] for each in proposed]


def test_the_base_stands_in_for_what_failed_and_without_it_there_is_no_range():
    assert levels(alone_in([(4.0, -10.0), (0.0, 0.0)])) == pytest.approx([-8.0, -6.0, -4.0, -2.0])
    assert levels(alone_in([(4.0, -10.0), (0.0, 0.0)]), base={"a": 0.0, "b": -99.0})[0] == pytest.approx(-8.0)
    assert levels(alone_in([None, (0.0, 0.0)]), base={"a": 0.0, "b": -5.0}) == pytest.approx([-4, -3, -2, -1])
    assert levels(alone_in([(4.0, -10.0), None]), base={"a": 0.0, "b": -5.0}) == pytest.approx([-9, -8, -7, -6])
    assert levels(alone_in([None, (0.0, 0.0)])) == levels(alone_in([None, None]), base={"a": 0.0, "b": -5.0}) == []
    assert levels(alone_in([(4.0, 1.0), (0.0, 1.0)])) == []  # no conflict at all


def test_an_objective_without_a_range_has_one_level():
    history = alone_in([(1.0, 0.0, 7.0), (0.0, 1.0, 7.0), (0.0, 0.0, 7.0)], objectives=3)
    proposed = EpsilonConstraint(points=11).propose(space(3), history, Random(0))
    assert [each.preference.values for each in proposed] == [{"b": pytest.approx(at / 3), "c": 7.0} for at in (1, 2)]


def test_a_warm_start_is_the_best_policy_that_keeps_to_the_bounds():
    search = EpsilonConstraint(points=6, warm_start="neighbour", warm_steps=0.3)
    history, rounds = driven(search, space(2, together=2), solver(sphere(2)))
    assert [len(each) for each in rounds] == [2, 2, 2]
    scores = {outcome.id: outcome.scores for outcome in history}
    sweep = [each for batch in rounds[1:] for each in batch]
    tightness = [each.preference.values["b"] for each in sweep]
    assert tightness == sorted(tightness, reverse=True)
    before = dict(list(scores.items())[:2])
    for batch in rounds[1:]:
        for each in batch:
            bound = each.preference.values["b"]
            keeping = [id for id, found in before.items() if found["b"] >= bound]
            assert each.changes == {"train.steps": 30}
            assert each.parents == (max(keeping, key=lambda id: before[id]["a"]),)
        before |= {each.id: scores[each.id] for each in batch}
    assert any(each.parents[0].startswith("bounded-") for each in sweep)


def test_without_a_policy_that_keeps_to_the_bounds_the_start_is_fresh_and_takes_all_steps():
    search = EpsilonConstraint(points=6, warm_start="neighbour")
    (first,) = search.propose(space(2, base={"a": 0.0, "b": 5.0}), alone_in([(1.0, 0.0), None]), Random(0))
    assert first.parents == () and first.changes == {} and first.preference.values["b"] == pytest.approx(4.0)


# --- in a run ---------------------------------------------------------------------------------------------------------


def settings(model, folder, combine, **search):
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"q{number}: "}) + "\n" for number in range(10)))
    return small_config(
        model,
        prompts,
        objectives={"brief": {"reward": "length"}, "wordy": {"reward": "length", "direction": "min"}},
        search=search,
        train={"steps": 5, "lr": 1e-2, "together": 2},
        rollouts={"rounds": 2, "samples": 3, "prompts": 4, "prompts_per_step": 2, "max_new_tokens": 5},
        loss={"name": "rloo"},
        combine=combine,
    )


def test_a_run_extends_from_its_own_policies_and_resumed_is_the_unbroken_one(tiny_model_path, tmp_path):
    config = settings(tiny_model_path, tmp_path, "interior-point", name="c-morl", points=2, extended=1)
    front = run.start(config, tmp_path / "unbroken", registry.discover(), Observer())
    points = {point["id"]: point for point in front["points"]}
    assert list(points) == ["w-1.00-0.00", "w-0.00-1.00", "extended-1-0-brief", "extended-1-0-wordy"]
    start = points["extended-1-0-brief"]["parents"]
    assert len(start) == 1 and set(start) <= {"w-1.00-0.00", "w-0.00-1.00"}
    folders = tmp_path / "unbroken" / "candidates"
    rows = [json.loads(line) for line in (folders / "extended-1-0-brief" / "metrics.jsonl").read_text().splitlines()]
    level = points["extended-1-0-brief"]["preference"]["values"]["wordy"]
    assert len(rows) == 2
    for row in rows:
        slack = row["combine/slack/wordy"]
        assert slack == pytest.approx(row["wordy/reward"] - level)
        assert row["combine/multipliers/wordy"] == pytest.approx(1 / (20 * max(slack, 1e-3)))
    again = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        run.start(config, again, registry.discover(), StopAfterCandidates(3))  # between the two extensions
    run.resume(again, registry.discover(), Observer())
    assert contents(again) == contents(tmp_path / "unbroken")


def test_a_combiner_that_keeps_no_thresholds_is_found_before_anything_is_trained(tiny_model_path, tmp_path):
    for name in ("c-morl", "epsilon-constraint"):
        with pytest.raises(PreferenceError, match=rf"search '{name}', later: combiner 'linear' has no meaning for"):
            prepare(settings(tiny_model_path, tmp_path, "linear", name=name), registry.discover())
        for combine in ("interior-point", "lagrangian"):
            plan = prepare(settings(tiny_model_path, tmp_path, combine, name=name), registry.discover())
            assert plan.propose(())[0].preference.kind == "weights"


def test_a_conditioned_model_is_told_no_thresholds(tiny_model_path, tmp_path):
    config = settings(tiny_model_path, tmp_path, "interior-point", name="epsilon-constraint")
    config = config.model_copy(update={"condition": config.combine.model_copy(update={"name": "soup"})})
    with pytest.raises(PreferenceError, match="knows weights and directions, no thresholds"):
        prepare(config, registry.discover())
