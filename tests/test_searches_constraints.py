"""Searches that go on from weights to thresholds: C-MORL and the epsilon-constraint method."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from random import Random

import numpy as np
import pytest
from interruptions import StopAfterCandidates, break_off_and_resume
from made_up_fronts import NAMES, caved, done, driven, solver, space, sphere
from sweeps import contents, small_config

from moalign import registry
from moalign.api import Candidate, ConfigError, Outcome, Preference, PreferenceError
from moalign.storage import safe_name
from moalign.sweeps import conditions, run
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.testing import check_search
from moalign_plugins.searches.c_morl import CMORL
from moalign_plugins.searches.epsilon_constraint import EpsilonConstraint
from moalign_plugins.searches.grid import Grid

SEARCHES = [
    CMORL(),
    CMORL(points=5, extended=2, rounds=3),
    EpsilonConstraint(),
    EpsilonConstraint(points=24, maximise="c"),
    EpsilonConstraint(points=14, warm_start="neighbour"),
]


def mixed_fates(solve):
    """Every third fails, every fourth is skipped."""
    count = iter(range(10**6))

    def fate(candidate):
        number = next(count)
        if number % 3 == 1:
            return Outcome(candidate.id, "failed", candidate.preference, error="made up")
        return Outcome(candidate.id, "skipped", candidate.preference) if number % 4 == 3 else solve(candidate)

    return fate


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
    with pytest.raises(ConfigError, match=r"search.points: 2 cannot hold .* at least 3"):
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
    resumed = break_off_and_resume(config, again, StopAfterCandidates(3))  # between the two extensions
    assert contents(resumed) == contents(tmp_path / "unbroken")


def test_a_combiner_that_keeps_no_thresholds_is_found_before_anything_is_trained(tiny_model_path, tmp_path):
    for name in ("c-morl", "epsilon-constraint"):
        with pytest.raises(
            PreferenceError,
            match=rf"search '{name}' comes to thresholds later, and combiner 'linear' has no meaning for",
        ):
            prepare(settings(tiny_model_path, tmp_path, "linear", name=name), registry.discover())
        for combine in ("interior-point", "lagrangian"):
            plan = prepare(settings(tiny_model_path, tmp_path, combine, name=name), registry.discover())
            assert plan.propose(())[0].preference.kind == "weights"


@pytest.mark.parametrize("name", ["c-morl", "epsilon-constraint"])
def test_accuracies_are_no_thresholds_for_rewards(tiny_model_path, tmp_path, name):
    sampled = settings(tiny_model_path, tmp_path, "lagrangian", name=name)
    by_accuracy = sampled.model_copy(update={"evaluate": sampled.evaluate.model_copy(update={"kind": "preference"})})
    with pytest.raises(ConfigError, match=rf"search '{name}' takes thresholds from what `evaluate` measures.*rollouts"):
        prepare(by_accuracy, registry.discover())


def test_a_conditioned_model_is_told_no_thresholds(tiny_model_path, tmp_path):
    class Later(Grid):
        later_kinds = frozenset({"thresholds"})

    config = settings(tiny_model_path, tmp_path, "interior-point", name="grid")
    plan = prepare(config.model_copy(update={"condition": None}), registry.discover())
    plan.check_later()
    conditioned = config.model_copy(update={"condition": config.combine.model_copy(update={"name": "soup"})})
    made = replace(plan, config=conditioned, conditioner=conditions.conditioner_of(conditioned, registry.discover()))
    with pytest.raises(PreferenceError, match="knows weights and directions, no thresholds"):
        replace(made, search=Later()).check_later()
