"""Hyper-parameters by hypervolume: the best is found where it is known, and confirmed on seeds that chose nothing."""

from __future__ import annotations

from math import exp, log
from random import Random
from statistics import fmean
from typing import Any

import pytest
from pydantic import ValidationError
from sweeps import small_config, write_pairs

from moalign import registry
from moalign.api import ConfigError, Outcome, Space, hypervolume
from moalign.sweeps.plan import prepare
from moalign.testing import check_search
from moalign_plugins.searches.hyper_parameters import HyperParameters

NAMES = ("concise", "fluent", "harmless", "helpful", "polite")
RATES: dict[str, Any] = {"train.lr": {"low": 1e-5, "high": 1e-2, "log": True}}
BEST = 3e-4


def where(objectives=2, **more):
    names = NAMES[:objectives]
    return Space(names, steps=10, reference_point=dict.fromkeys(names, 0.0), seed=5, **more)


def world(candidate, space, noise=0.0):
    """A front whose size has its peak at a learning rate of 3e-4; each seed moves it by chance."""
    rate = candidate.changes.get("train.lr", 2e-3)
    size = exp(-(log(rate / BEST) ** 2) / 8) + noise * Random(f"{rate} {candidate.changes['seed']}").gauss(0, 1)
    return {name: size * (0.5 + value) for name, value in candidate.preference.values.items()}


def drive(search, space, world=world, fate=lambda candidate: "done"):
    history: list[Outcome] = []
    rounds = []
    while proposed := list(search.propose(space, tuple(history), Random(7))):
        rounds.append(proposed)
        for each in proposed:
            status = fate(each)
            found = world(each, space) if status == "done" else {}
            history.append(Outcome(each.id, status, each.preference, scores=found, changes=each.changes, tokens=1))
        assert len(rounds) < 9
    return rounds, history


@pytest.mark.parametrize(
    "search",
    [
        HyperParameters(space=RATES, configurations=3, seeds=1, held_out_seeds=1, points=4),
        HyperParameters(
            space=RATES | {"loss.beta": [0.1, 0.5], "model.lora.r": {"low": 1, "high": 8}},
            configurations=3,
            refine=2,
            confirm=2,
            points=4,
        ),
    ],
    ids=["one key", "three keys"],
)
def test_it_keeps_to_the_contract(search):
    check_search(search, objectives=3)


@pytest.mark.parametrize(
    ("space", "reason"),
    [
        (
            {"model.lora.r": {"low": 2, "high": 12}},
            "model.lora.r 12: .*; the configuration has room for 4",
        ),
        ({"loss.beta": {"low": -1.0, "high": 1.0}}, "loss.beta -1.0: changes that do not work"),
        ({"train.lr": [1e-3, "fast"]}, "train.lr fast: changes that do not work"),
    ],
)
@pytest.mark.parametrize("seed", [0, 3])
def test_what_a_range_cannot_have_is_found_before_anything_is_trained(tiny_model_path, tmp_path, space, reason, seed):
    search = {"name": "hyper-parameters", "space": space, "configurations": 1, "refine": 8}
    config = small_config(
        tiny_model_path,
        write_pairs(tmp_path / "pairs.jsonl"),
        search=search,
        seed=seed,
        evaluate={"reference_point": {"harmless": 0.0, "helpful": 0.0}},
    )
    with pytest.raises(ConfigError, match=f"search: 'hyper-parameters' may come to {reason}"):
        prepare(config, registry.discover())


@pytest.mark.parametrize("objectives", [1, 2, 3, 4, 5])
def test_the_best_learning_rate_is_confirmed_with_other_seeds_beside_the_defaults(objectives):
    search = HyperParameters(space=RATES, configurations=16, confirm=1, seeds=2, held_out_seeds=3, points=5)
    space = where(objectives)
    first, last = drive(search, space)[0]
    rates = {each.changes["train.lr"] for each in first}
    assert len(rates) == 16 and all(1e-5 <= rate <= 1e-2 for rate in rates)
    nearest = min(rates, key=lambda rate: abs(log(rate / BEST)))
    assert {each.changes.get("train.lr") for each in last} == {nearest, None}
    tuning, held_out = ({each.changes["seed"] for each in some} for some in (first, last))
    assert tuning == {5, 6} and held_out == {7, 8, 9}
    each_of = len({each.preference.vector(space.objectives) for each in first})
    assert len(first) == 16 * 2 * each_of and len(last) == 2 * 3 * each_of


def test_a_refinement_comes_nearer():
    kept = {}
    for refine in (0, 12):
        search = HyperParameters(space=RATES, configurations=4, refine=refine, seeds=1, points=2)
        rounds, _ = drive(search, where())
        assert len(rounds) == (3 if refine else 2)
        (kept[refine],) = {each.changes["train.lr"] for each in rounds[-1] if "train.lr" in each.changes}
    assert abs(log(kept[12] / BEST)) < abs(log(kept[0] / BEST))
    assert 1e-5 <= kept[12] <= 1e-2


def test_the_score_is_the_mean_hypervolume_over_the_seeds_by_the_definition():
    """With noise that makes the seeds disagree, the confirmed ones are those an independent computation ranks first."""
    search = HyperParameters(space=RATES, configurations=9, confirm=3, seeds=3, points=3)
    space = where()
    rounds, history = drive(search, space, lambda *given: world(*given, noise=0.3))
    scores: dict[float, float] = {}
    for rate in {each.changes["train.lr"] for each in rounds[0]}:
        volumes = []
        for seed in (5, 6, 7):
            rows = [tuple(one.scores.values()) for one in history if one.changes == {"train.lr": rate, "seed": seed}]
            assert len(rows) == 3
            volumes.append(hypervolume(rows, (0.0, 0.0)))
        scores[rate] = fmean(volumes)
    best = sorted(scores, key=lambda rate: -scores[rate])[:3]
    assert {each.changes.get("train.lr") for each in rounds[1]} == {*best, None}


def test_what_is_missing_counts_as_missing():
    """A configuration that loses one of its two seeds is worth half; one that loses all is never confirmed."""
    search = HyperParameters(space={"train.lr": [1e-4, 3e-4]}, configurations=8, seeds=2, points=3)
    space = where()
    for status in ("failed", "skipped"):

        def fate(each, status=status):
            return status if each.changes.get("train.lr") == 3e-4 and each.changes["seed"] == 6 else "done"

        rounds, _ = drive(search, space, fate=fate)
        assert {each.changes.get("train.lr") for each in rounds[1]} == {1e-4, None}
        rounds, _ = drive(search, space, fate=lambda each, s=status: s)
        assert len(rounds) == 1


def test_configurations_that_say_the_same_are_tried_once():
    search = HyperParameters(space={"model.lora.r": {"low": 2, "high": 4}}, configurations=40, seeds=1, points=2)
    (first, _), _ = drive(search, where(), lambda each, space: dict.fromkeys(space.objectives, 1.0))
    ranks = [each.changes["model.lora.r"] for each in first]
    assert sorted(set(ranks)) == [2, 3, 4] and len(ranks) == 6 and all(type(rank) is int for rank in ranks)


def test_a_price_of_kl_lowers_what_a_configuration_is_worth():
    search = HyperParameters(space={"loss.beta": [0.1, 0.9]}, configurations=8, seeds=1, points=2)

    def confirmed(price):
        space, history = where(kl_price=price), []
        first = list(search.propose(space, (), Random(0)))
        for each in first:
            small = each.changes["loss.beta"] == 0.9
            found = dict.fromkeys(space.objectives, 0.8 if small else 1.0)
            kl = 0.0 if small else 10.0
            history.append(Outcome(each.id, "done", each.preference, scores=found, kl=kl, changes=each.changes))
        again = search.propose(space, history, Random(0))
        return {each.changes["loss.beta"] for each in again if "loss.beta" in each.changes}

    assert confirmed(0.0) == {0.1} and confirmed(0.05) == {0.9}


def test_without_a_reference_point_nothing_can_be_compared():
    search = HyperParameters(space=RATES, configurations=2, seeds=1, points=2)
    space = Space(NAMES[:2], steps=10)
    first = search.propose(space, (), Random(0))
    history = [Outcome(each.id, "done", each.preference, world(each, space), changes=each.changes) for each in first]
    with pytest.raises(ConfigError, match=r"set evaluate\.reference_point"):
        search.propose(space, history, Random(0))


@pytest.mark.parametrize(
    ("space", "reason"),
    [
        ({}, "at least 1"),
        ({"train.lr": []}, "train.lr: the list is empty"),
        ({"train.lr": {"low": 1.0, "high": 1.0}}, "must be below high"),
        ({"train.lr": {"low": 0.0, "high": 1.0, "log": True}}, "must be above 0"),
        ({"model.lora.r": {"low": 1.5, "high": 4}}, "model.lora.r: low and high must be whole numbers"),
        ({"seed": [1, 2]}, "seed: it is no hyper-parameter"),
    ],
)
def test_spaces_that_make_no_sense_are_refused(space, reason):
    with pytest.raises(ValidationError, match=reason):
        HyperParameters(space=space)
