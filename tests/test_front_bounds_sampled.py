"""What a front says of itself from samples alone, held against enumeration: softmax policies over five replies."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.small_worlds import GRID, PRICE, World
from moalign import pareto
from moalign.sweeps import analysis, doubts, optima
from moalign.sweeps.analysis import Price
from moalign.sweeps.optima import Sampled

NAMES = ("harmless", "helpful")


def point(name, weights, own):
    found = own.about(weights, PRICE)
    value, error = found.bound
    return {
        "id": name,
        "kind": "trained",
        "tokens": 1,
        "changes": {},
        "preference": {"kind": "weights", "values": dict(zip(NAMES, weights.tolist(), strict=True))},
        "scores": dict(zip(NAMES, own.rewards.mean(0).tolist(), strict=True)),
        "stderr": {},
        "kl": float(own.log_ratios.mean()),
        "details": {"optimum": value, "optimum_stderr": error, "utility_stderr": found.reached},
    }


def stated(world, weights, policies):
    """The bounds in front.json, and what they would be if a candidate were as sure everywhere as at its own weights."""
    sampled = {str(place): world.sampled(policy) for place, policy in enumerate(policies)}
    points = [point(name, w, own) for (name, own), w in zip(sampled.items(), weights, strict=True)]
    sampled[None] = world.sampled(world.reference)
    base = dict(zip(NAMES, sampled[None].rewards.mean(0).tolist(), strict=True))
    front = {"objectives": [{"name": name} for name in NAMES], "points": points, "failed": []}
    corner = dict(zip(NAMES, world.values(world.reference).tolist(), strict=True))
    front |= {"base": {"scores": base, "stderr": {}}, "reference_point": corner}
    analysis.annotate(points, NAMES, base)
    most = optima.bounds(dict(zip(map(str, range(len(weights))), weights, strict=True)), sampled, PRICE)
    values = [[each["scores"][name] - PRICE * each["kl"] for name in NAMES] for each in points]
    careless = [[3 * each["details"]["utility_stderr"]] * len(GRID) for each in points]
    gap = pareto.gap(values, list(base.values()), weights, list(most.values()), careless)
    return analysis.analyse(front, Price(PRICE), most, sampled)["bounds"], gap


@pytest.mark.parametrize(("points", "strength"), [(2, 1.0), (2, 0.9), (5, 1.0), (11, 1.0), (3, 0.6)])
def test_the_share_is_at_least_what_is_said_though_only_samples_are_known(points, strength):
    weights = [np.array([share, 1 - share]) for share in np.linspace(0, 1, points)]
    tries, false, careless, claims, truths = 80 // points, 0, 0, [], []
    for seed in range(tries):
        world = World(seed)
        policies = [world.tilted(w, strength) for w in weights]
        found, gap = stated(world, weights, policies)
        shares = world.shares(policies)
        claims.append(found["front_share_at_least"])
        truths.append(shares.mean())
        wrong = claims[-1] > truths[-1] or found["front_share_worst_at_least"] > shares.min() + 1e-9
        false += wrong
        careless += gap.share > shares.mean() or gap.worst > shares.min() + 1e-9
    assert false <= 1, "three standard errors of the best point, of the base and of the bound, all at once"
    assert np.mean(claims) > 0.35 * np.mean(truths), "and it says something"
    if points == 2 and strength == 1.0:
        assert careless > false + 2, "the best policy for its weights is sure of these alone"


@pytest.mark.parametrize(("points", "least"), [(3, 0.3), (11, 0.5)])
def test_one_that_says_the_same_thing_to_everybody_makes_no_bound_false(points, least):
    weights = [np.array([share, 1 - share]) for share in np.linspace(0, 1, points)]
    claims = []
    for seed in range(10):
        world = World(100 + seed)
        policies = [world.tilted(w, 0.9) for w in weights]
        policies[points // 2] = world.collapsed()
        found, corner = stated(world, weights, policies)[0], world.values(world.reference)
        exact = pareto.hypervolume(world.front(100), corner)
        assert found["hypervolume_at_most"] >= exact
        assert found["front_share_at_least"] <= world.shares(policies).mean()
        claims.append(found["front_share_at_least"])
    assert np.mean(claims) > least, "and it says something"


def test_where_no_samples_are_kept_nothing_more_is_claimed():
    """The errors in the front bound those of any weighted sum."""
    world, weights = World(0), np.array([0.8, 0.2])
    own = world.sampled(world.tilted(weights, 0.7))
    measured = point("a", weights, own)
    measured["stderr"] = dict(zip(NAMES, (own.errors(np.eye(2), 0.0)).tolist(), strict=True))
    exact = doubts.of_point(measured, NAMES, GRID, PRICE, own)
    from_front = doubts.of_point(measured, NAMES, GRID, PRICE, None)
    assert (from_front >= exact - 1e-12).all()
    place = int(np.abs(GRID - weights).sum(1).argmin())
    assert from_front[place] == pytest.approx(exact[place], rel=1e-9), "for its own weights it is the same"
    del measured["details"]["utility_stderr"]
    measured["details"]["kl_stderr"] = float(Sampled(0 * own.rewards, own.log_ratios, own.prompts).errors(GRID, 1.0)[0])
    assert (doubts.of_point(measured, NAMES, GRID, PRICE, None) >= exact - 1e-12).all()
    untouched = world.sampled(world.reference)
    base = {"stderr": dict(zip(NAMES, untouched.errors(np.eye(2), 0.0).tolist(), strict=True))}
    sure = doubts.of_base(base, NAMES, GRID, untouched)
    assert (doubts.of_base(base, NAMES, GRID, None) >= sure - 1e-12).all() and (sure > 0).all()
