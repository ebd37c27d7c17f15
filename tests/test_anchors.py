"""Whose adapters stand in for rewards where nothing else gives any: fully trained ones, of the candidate's own kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from interruptions import StopAfterCandidates, break_off_and_resume
from sweeps import small_config, write_pairs

from moalign import registry
from moalign.api import Candidate, Preference
from moalign.sweeps import anchors, run
from moalign.sweeps.candidate import job_of
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import Workshop, open_workshop

HALVING = {"name": "successive-halving", "points": 3, "rungs": 2}
STEPS = 6
HELPFUL = Preference("weights", {"harmless": 0.0, "helpful": 1.0})
BETWEEN = Preference("weights", {"harmless": 0.5, "helpful": 0.5})


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.fixture(scope="module")
def settings(tiny_model_path, pairs):
    return small_config(tiny_model_path, pairs, combine="modpo", search=HALVING)


@pytest.fixture(scope="module")
def made(settings, tmp_path_factory):
    """A whole run, and the workshop in which it could go on."""
    directory = tmp_path_factory.mktemp("halving") / "run"
    run.start(settings, directory, registry.discover(), Observer())
    plan = prepare(settings, registry.discover())
    workshop = open_workshop(plan, directory, Observer(), keep_cache=False)
    return directory, workshop, run._settled(plan, directory, workshop)


def rewards_of(candidate: Candidate, workshop: Workshop, history) -> set[str]:
    return {frozen.identity for frozen in job_of(candidate, workshop, history).margins_from.values()}


def test_a_search_that_begins_with_few_steps_gets_anchors_of_all_steps(settings, made):
    assert settings.train.steps == STEPS
    directory, workshop, history = made
    outcomes = {outcome.id: outcome for outcome in history}
    assert list(outcomes)[:2] == ["only-harmless", "only-helpful"]
    lines = {name: (directory / f"candidates/{name}/metrics.jsonl").read_text().splitlines() for name in outcomes}
    assert len(lines["only-helpful"]) == STEPS and len(lines["rung0-w-0.00-1.00"]) == STEPS // 3
    expected = {outcomes[name].checksum for name in ("only-harmless", "only-helpful")}
    for outcome in history:
        if outcome.preference == BETWEEN:
            again = Candidate(outcome.id, outcome.preference, changes=outcome.changes)
            assert rewards_of(again, workshop, history) == expected
    assert any(outcome.preference == BETWEEN for outcome in history)


def test_a_run_broken_off_behind_its_anchors_goes_on_to_the_same(settings, made, tmp_path):
    directory, _, _ = made
    break_off_and_resume(settings, tmp_path / "run", StopAfterCandidates(3))
    for file in sorted(directory.glob("candidates/*/adapter_model.safetensors")):
        assert (tmp_path / "run" / file.relative_to(directory)).read_bytes() == file.read_bytes(), file


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (Candidate("a", HELPFUL), True),
        (Candidate("a", HELPFUL, changes={"train.steps": STEPS}), True),
        (Candidate("a", HELPFUL, changes={"train.steps": STEPS - 1}), False),
        (Candidate("a", HELPFUL, changes={"loss.beta": 0.5}), True),
        (Candidate("a", BETWEEN), False),
        (Candidate("a", Preference("weights", {"harmless": 1.0, "helpful": 0.0})), False),
        (Candidate("a", HELPFUL, mixed=True), False),
    ],
)
def test_an_anchor_is_trained_for_the_objective_alone_and_to_the_end(made, one, expected):
    _, workshop, _ = made
    assert anchors.is_anchor(one, "helpful", workshop.plan) is expected
    added = anchors.missing(["helpful"], [one], workshop.plan)
    assert [each.id for each in added] == ([] if expected else ["only-helpful"])
    assert all(each.preference.values == HELPFUL.values for each in added)


def test_no_id_is_given_twice(made):
    _, workshop, _ = made
    taken = [Candidate("only-helpful", BETWEEN), Candidate("only-helpful-anchor", BETWEEN)]
    (added,) = anchors.missing(["helpful"], taken, workshop.plan)
    assert added.id == "only-helpful-anchor-anchor"


def test_a_configuration_that_is_tried_is_its_own_judge(made):
    """As a search for hyper-parameters needs it: each worth what it would reach if it were the configuration."""
    _, workshop, history = made
    outcomes = {outcome.id: outcome for outcome in history}
    plain = [outcomes["only-harmless"], outcomes["only-helpful"]]
    tried = {"loss.beta": 0.7, "seed": 3}
    own = [
        replace(outcomes[f"rung0-{name}"], changes=dict(reversed(tried.items())))
        for name in ("w-1.00-0.00", "w-0.00-1.00")
    ]
    for order in ([*plain, *own], [*own, *plain]):
        found = job_of(Candidate("tried", BETWEEN, changes=tried), workshop, order).margins_from.values()
        assert {(frozen.identity, frozen.beta) for frozen in found} == {(one.checksum, 0.7) for one in own}
        assert rewards_of(Candidate("plain", BETWEEN), workshop, order) == {one.checksum for one in plain}
    other = Candidate("other", BETWEEN, changes={"loss.beta": 0.2})
    assert rewards_of(other, workshop, [*plain, *own]) == {one.checksum for one in plain}  # the first there is


def test_those_of_one_configuration_are_let_go_and_their_places_used_again(made):
    _, workshop, history = made
    outcomes = {outcome.id: outcome for outcome in history}
    plain = [outcomes["only-harmless"], outcomes["only-helpful"]]
    own = [replace(outcomes["rung0-w-0.00-1.00"], changes={"seed": seed}) for seed in (1, 2)]
    anchors.release(workshop, history)
    rewards_of(Candidate("plain", BETWEEN), workshop, plain)
    for one in own:
        job_of(Candidate("tried", BETWEEN, changes=one.changes), workshop, [*plain, one])
        anchors.release(workshop, [*plain, one])
        held = {slot for slot in workshop.model.policy.peft_config if slot.startswith("frozen")}
        assert held == set(workshop.slots.values())
    assert set(workshop.slots) == {one.id for one in plain}
