"""Proxies have the correlation that is stated, each way is a configuration, and what is measured is what it says."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from benchmarks import overoptimisation, overoptimisation_tables
from benchmarks.overoptimisation import Request, ways
from benchmarks.proxies import MEMBERS, Proxies, proxies
from moalign import registry
from moalign.demo import grammar
from moalign.diagnostics.proxies import least_gain
from moalign.sweeps import callables
from moalign.sweeps.plan import prepare
from moalign.types import Sample

PROMPTS = grammar.HELD_OUT_PROMPTS[:2]


@pytest.fixture(scope="module")
def made() -> Proxies:
    return proxies(0.7, 3, PROMPTS)


def test_every_proxy_has_the_stated_correlation_and_the_gold_rewards_deviation(made):
    for member in range(MEMBERS):
        assert made.correlation(member) == pytest.approx(0.7, abs=1e-12)
        assert made.deviation(made.members[member]) == pytest.approx(made.deviation(made.gold), rel=1e-12)


def test_a_perfect_proxy_is_the_gold_reward():
    one = proxies(1.0, 0, PROMPTS)
    assert torch.equal(one.members, one.gold.expand(MEMBERS, -1, -1))


def test_what_members_overrate_differs_but_for_what_they_share(made):
    assert len(set(made.overrated)) == MEMBERS + 1
    errors = [each - 0.7 * made.gold for each in made.members]
    hack = torch.tensor([all(part in reply for part in made.overrated[0]) for reply in grammar.replies(PROMPTS[0])])
    for error in errors:  # all of them overrate the first pair
        assert error[0, :-1][hack].mean() > error[0, :-1][~hack].mean()


def test_scores_of_responses_are_those_of_the_table(made):
    replies = grammar.replies(PROMPTS[0])
    samples = [Sample(PROMPTS[0], text) for text in (replies[7], "no such reply")]
    assert made.score(2, samples) == [float(made.members[2, 1, 7]), float(made.members[2, 0, -1])]


@pytest.mark.parametrize("way", list(ways()["ways"]))
def test_what_it_compares_is_a_configuration_and_its_rewards_are_of_the_proxies(way, made):
    request = Request(way, seed=1, steps=10)
    rewards = request.rewards(made)
    settings = request.settings()
    plan = prepare(settings, callables.installed(registry.discover(), rewards))
    assert len(plan.propose(())) == 1 and set(settings.objective_names) == set(rewards)
    samples = [Sample(PROMPTS[0], text) for text in grammar.replies(PROMPTS[0])[:5]]
    each = [made.score(member, samples) for member in range(MEMBERS)]
    found = rewards["quality"](samples)
    kind = ways()["ways"][way]["rewards"]
    expected = {
        "single": each[0],
        "two": each[0],
        "mean": [sum(scores) / MEMBERS for scores in zip(*each, strict=True)],
        "worst": [min(scores) for scores in zip(*each, strict=True)],
    }
    if kind == "uncertainty":
        assert all(one < mean for one, mean in zip(found, expected["mean"], strict=True))
    else:
        assert found == pytest.approx(expected[kind], abs=1e-15)


def test_figures_are_those_of_the_policy_and_the_bound_of_the_correlation_holds(made):
    """arXiv 2403.03185, for policies that the proxy leads astray as well."""
    nothing = overoptimisation.figures(made, made.base)
    assert [nothing[name] for name in ("gold", "proxy", "kl", "chi2")] == [0.0] * 4
    line = overoptimisation.optima(made, made.members[0])
    golds = [look["gold"] for look in line]
    assert golds[0] > 0 and any(after < before for before, after in pairwise(golds))  # it rises, and falls
    deviation = made.deviation(made.gold)
    for look in line:
        least = least_gain(0.7, look["proxy"] / deviation, math.sqrt(look["chi2"]))
        assert look["gold"] / deviation >= least - 1e-9 and look["chi2"] >= look["kl"] >= 0
    best = overoptimisation.optima(made, made.gold)
    assert [look["gold"] for look in best] == sorted(look["gold"] for look in best)


def test_a_training_is_measured_along_the_way_and_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(overoptimisation, "proxies", lambda rho, seed: proxies(rho, seed, PROMPTS))
    small = ("rollouts.prompts=2", "rollouts.prompts_per_step=2", "rollouts.samples=2")
    results = []
    for way in ("nothing", "gated", "PAR"):
        request = Request(way, 0, steps=4, number_of_looks=2, further=small)
        results.append(request.identity | overoptimisation.reached(request))
    assert [look["step"] for look in results[0]["looks"]] == [2, 4]
    table = overoptimisation_tables.tables_of({"results": results})[0]
    assert [row[0] for row in table.rows] == ["nothing", "gated", "PAR"] and "0.7" in table.title
    overoptimisation_tables.draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
