"""The search as a function of the history: rounds, their replay, and what stays as it was."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from math import dist
from random import Random

import numpy as np
import pytest
import torch
from made_up import NAMES, candidate, driven, outcome, space
from moalign.api import ConfigError, Outcome, Preference
from moalign.testing import check_search

from moalign_botorch.bayesian import Bayesian
from moalign_botorch.simplex import NEAR, rounded

QUICK = {"samples": 8, "raw": 16, "restarts": 1}
MODELLED = {**QUICK, "initial": 0}  # the first history below is all that is needed before


def vectors(candidates):
    return [tuple(each.preference.values.values()) for each in candidates]


def first(objectives=2, stderr=0.02):
    """The history after the first proposal."""
    corners = [candidate(*[float(i == j) for j in range(objectives)]) for i in range(objectives)]
    inner = [candidate(*rounded([1.0 + (i == j) for j in range(objectives)])) for i in range(objectives)]
    return tuple(outcome(each, [1.0] * objectives, stderr) for each in corners + inner)


def test_conformance():
    check_search(Bayesian(points=4, initial=1, batch=1, samples=4, raw=8, restarts=1), objectives=2)


def test_first_each_objective_alone_and_weights_between_that_fill_the_space():
    proposed = Bayesian(initial=3).propose(space(3), (), Random(0))
    points = vectors(proposed)
    assert points[:3] == [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert points[3] == (0.333334, 0.333333, 0.333333)  # the farthest from the three
    assert len(points) == 6 and min(dist(a, b) for a in points for b in points if a != b) > 0.3
    assert all(each.parents == () and each.changes == {} for each in proposed)


def test_what_is_known_already_is_not_asked_for_again():
    anchor = outcome(candidate(1.0, 0.0, id="only-concise"), (1, 1))
    failed = Outcome("x", "failed", Preference("weights", {NAMES[0]: 0.5, NAMES[1]: 0.5}))
    points = vectors(Bayesian(initial=1).propose(space(2), (anchor, failed), Random(0)))
    assert len(points) == 2 and points[0] == (0, 1)
    assert min(dist(points[1], known) for known in [(1, 0), (0, 1), (0.5, 0.5)]) > 0.2


def test_fewer_points_than_objectives_are_refused():
    with pytest.raises(ConfigError, match="search.points: 2 cannot hold one candidate per objective"):
        Bayesian(points=2).propose(space(3), (), Random(0))


@pytest.mark.parametrize("batch", [None, 2])
def test_a_batch_is_as_many_as_one_pass_holds_or_as_the_option_says(batch):
    proposed = Bayesian(batch=batch, **MODELLED).propose(space(2, together=3), first(), Random(0))
    assert len(proposed) == (batch or 3)
    points = vectors(proposed) + vectors(first())
    assert all(dist(a, b) >= NEAR for i, a in enumerate(points) for b in points[:i])
    for point in points:
        assert sum(round(weight * 10**6) for weight in point) == 10**6 and abs(sum(point) - 1) <= 1e-12


def test_an_interrupted_round_is_proposed_again_as_it_was():
    """Also where outcomes came in another order, and one pass holds another number by then."""
    search = Bayesian(points=9, initial=1, **QUICK)
    history = tuple(outcome(each, (1, 2)) for each in search.propose(space(2), (), Random(1)))
    whole = search.propose(space(2, together=3), history, Random(1))
    assert len(whole) == 3
    for part in (whole[:1], whole[1:], [whole[2], whole[0]]):
        half = history + tuple(outcome(each, (1, 2)) for each in part)
        missing = search.propose(space(2, together=1), half, Random(1))
        assert missing == [each for each in whole if each not in part]
    shuffled = history[::-1] + tuple(outcome(each, (1, 2)) for each in part)
    assert search.propose(space(2), shuffled, Random(1)) == [whole[1]]


def test_another_process_proposes_the_same():
    """Also one with other hashes and another number of threads."""
    code = (
        "from random import Random; from test_bayesian import *;"
        "print(repr(vectors(Bayesian(**MODELLED).propose(space(2), first(), Random(4)))))"
    )
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "2"}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ | environment
    )
    assert found.returncode == 0, found.stderr
    here = vectors(Bayesian(**MODELLED).propose(space(2), first(), Random(4)))
    assert found.stdout.strip() == repr(here)


def test_listing_the_plugin_imports_neither_botorch_nor_torch(tmp_path):
    """As it is installed: a folder on the path that has its metadata."""
    info = tmp_path / "moalign_botorch-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moalign-botorch\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[moalign]\nbotorch = moalign_botorch\n")
    code = (
        "import sys\nfrom moalign.cli import app\nfrom typer.testing import CliRunner\n"
        "result = CliRunner().invoke(app, ['plugins', 'list', '--kind', 'search'])\n"
        "print(result.output, result.exit_code)\n"
        "print('imported:', *sorted({'botorch', 'gpytorch', 'torch'} & set(sys.modules)))"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), *sys.path]))
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": path}
    )
    assert found.returncode == 0, found.stderr
    assert "bayesian" in found.stdout and "moalign-botorch 0.1.0" in found.stdout
    assert found.stdout.splitlines()[-1].strip() == "imported:"


def test_global_generators_stay_as_they_were():
    def state():
        numpy = np.random.get_state()
        seen = (numpy[1].tolist(), numpy[2])
        return (random.getstate(), seen, torch.get_rng_state().tolist(), torch.get_default_dtype())

    torch.manual_seed(17)
    before = state()
    proposed = Bayesian(**MODELLED).propose(space(2), first(), Random(0))
    assert state() == before
    torch.manual_seed(18)
    np.random.seed(3)
    assert Bayesian(**MODELLED).propose(space(2), first(), Random(0)) == proposed


@pytest.mark.parametrize("fails", [False, True])
def test_a_proposal_takes_one_thread_and_leaves_as_many_as_there_were(monkeypatch, fails):
    def watched(*arguments):
        seen.append(torch.get_num_threads())
        if fails:
            raise ValueError("made up")

    seen, threads = [], torch.get_num_threads()
    monkeypatch.setattr("moalign_botorch.bayesian.promising", watched)
    try:
        torch.set_num_threads(2)
        with pytest.raises(ValueError, match="made up") if fails else nullcontext():
            Bayesian(**MODELLED).propose(space(2), first(), Random(0))
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_where_a_candidate_failed_nothing_more_is_expected():
    search = Bayesian(points=20, **MODELLED)
    (best,) = search.propose(space(2), first(), Random(0))
    failed = Outcome(best.id, "failed", best.preference, error="boom")
    (other,) = search.propose(space(2), (*first(), failed), Random(0))
    assert other.id != best.id and dist(*vectors([best, other])) > 10 * NEAR


def test_too_little_data_is_answered_with_weights_that_fill_the_space():
    failed = [replace(each, status="failed", scores={}) for each in first(3)[2:]]
    history = (*first(3)[:2], *failed)
    (point,) = vectors(Bayesian(**MODELLED).propose(space(3), history, Random(0)))
    assert min(dist(point, known) for known in vectors(history)) > 0.2


def test_warm_starts_begin_at_the_nearest_that_was_trained():
    where = replace(space(2), steps=200)
    search = Bayesian(warm_start="neighbour", warm_steps=0.1, **MODELLED)
    assert all(each.parents == () for each in search.propose(where, (), Random(0)))
    mixed = replace(outcome(candidate(0.45, 0.55), (1, 1)), kind="mixed")
    (proposed,) = search.propose(where, (*first(), mixed), Random(0))
    trained = {each.id: dist(*vectors([each, proposed])) for each in first()}
    assert proposed.parents == (min(trained, key=trained.__getitem__),)
    assert proposed.changes == {"train.steps": 20}


def test_the_search_is_over_when_the_budget_does_not_pay_another():
    search = Bayesian(**QUICK)
    begun = tuple(outcome(each, (1, 1)) for each in search.propose(space(2), (), Random(0)))
    assert search.propose(replace(space(2), affordable=0.9), begun, Random(0)) == []
    assert search.propose(replace(space(2), affordable=1.0), begun, Random(0)) != []
    assert search.propose(replace(space(2), affordable=0.4, conditioned=True), begun, Random(0)) != [], "asking is free"


@pytest.mark.parametrize("point", [(1.0, 1.0, 1.0), (0.2, -1e-9, 0.8), (1e-7, 1e-7, 1.0), (3.0, 5.0, 7.0)])
def test_rounded_weights_add_up_to_a_million_millionths(point):
    found = rounded(point)
    assert sum(round(each * 10**6) for each in found) == 10**6 and min(found) >= 0
    whole = sum(max(0.0, each) for each in point)
    assert all(abs(each - max(0.0, was) / whole) <= 1e-6 for each, was in zip(found, point, strict=True))


def test_five_objectives():
    history = driven(Bayesian(points=7, initial=1, **QUICK), space(5), (1.0, 2.0, 1.0, 0.5, 1.0), stderr=0.05)
    points = [tuple(each.preference.values.values()) for each in history]
    assert len(points) == 7 and all(dist(a, b) >= NEAR for i, a in enumerate(points) for b in points[:i])
