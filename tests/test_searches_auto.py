"""The search of a silent configuration: by the number of objectives and the budget, said in one line."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
import yaml

from moalign import config, recipes, registry
from moalign.api import ConfigError, Preference, Round, Space
from moalign.sweeps.checks import doubt
from moalign.sweeps.plan import Plan, prepare
from moalign.testing import check_search
from moalign_plugins.searches.auto import Auto
from moalign_plugins.searches.grid import Grid
from moalign_plugins.searches.optimistic_linear_support import OptimisticLinearSupport
from moalign_plugins.searches.soup import Soup

TWO = Space(("harmless", "helpful"))


@pytest.mark.parametrize(
    ("space", "search", "reason"),
    [
        (Space(("helpful",)), Grid(points=1), "one objective: one candidate"),
        (TWO, OptimisticLinearSupport(points=11, mixes=11), "2 objectives: optimistic-linear-support"),
        (replace(TWO, budget=2.0), Soup(trained=2, points=11), "the budget pays 2.0 trainings: soup"),
        (replace(TWO, budget=9.0), OptimisticLinearSupport(points=11, mixes=11), "a budget of 9.0 trainings: optim"),
        (replace(TWO, conditioned=True, budget=1.0), Grid(points=11), "an even grid of preferences"),
        (replace(TWO, weighted_sums=False), Grid(points=11), "not trained for weighted sums"),
        (replace(TWO, weighted_sums=False, budget=5.9), Grid(points=5), "an even grid of preferences"),
        (replace(TWO, weighted_sums=False, budget=2.0), Soup(trained=2, points=11), "2.0 trainings: soup"),
        (TWO, OptimisticLinearSupport(points=11, mixes=11), "at most 11 trained and 11 mixed"),
        (replace(TWO, budget=1.97), Soup(trained=2, points=11), "the budget pays 1.9 trainings, and there are 2"),
        (Space(("a", "b", "c", "d")), OptimisticLinearSupport(points=20, mixes=20), "4 objectives"),
    ],
)
def test_what_it_chooses_and_says(space, search, reason):
    assert Auto().chosen(space) == search
    assert reason in Auto().reason(space)


def test_a_budget_in_the_searchs_place_or_mistyped_is_found():
    for options, said in (
        ({"bugdet": {"tokens": 5}}, "search.bugdet: unknown key; did you mean 'budget'?"),
        ({"tokens": 5}, "search.tokens: unknown key; known: budget, points"),
    ):
        content = {"objectives": {"a": None}, "data": {"path": "README.md"}, "search": options}
        with pytest.raises(ConfigError, match=re.escape(said)):
            prepare(config.from_mapping(content), registry.discover())


def test_points_are_its_only_option():
    assert Auto(points=5).chosen(TWO) == OptimisticLinearSupport(points=5, mixes=5)
    assert Auto(points=1).chosen(TWO).points == 2  # each objective alone


def test_what_the_budget_has_left_changes_nothing_of_the_choice():
    """Else a run would go on with another search half-way."""
    assert Auto().chosen(replace(TWO, budget=9.0, affordable=0.1)) == Auto().chosen(
        replace(TWO, budget=9.0, affordable=9.0)
    )


def test_a_configuration_without_a_search_gets_it():
    plan = prepare(
        config.from_mapping({"objectives": {"a": None, "b": None}, "data": {"path": "README.md"}}), registry.discover()
    )
    assert isinstance(plan.search, Auto)
    with_budget = {"objectives": {"a": None}, "search": {"budget": {"tokens": 5}}}
    assert config.from_mapping(with_budget).search.name == "auto"
    assert config.from_mapping(with_budget).search.options == {}


def planned(*changes: str) -> Plan:
    return prepare(
        config.from_mapping(yaml.safe_load(recipes.read("dynamic")), ("data.path=tiny-assistant", *changes)),
        registry.discover(),
    )


def test_who_follows_weighted_sums_is_told_where_there_are_none():
    """The combiner says so to the space, and to the user of a search that supposes them."""
    follows = "search=optimistic-linear-support"
    sums, other = planned(follows, "combine=linear"), planned(follows, "combine=log-sigmoid")
    assert sums.space.weighted_sums and doubt(sums) is None
    assert not other.space.weighted_sums
    assert re.search("'optimistic-linear-support' supposes.*'log-sigmoid' does not.*`grid`", doubt(other))
    chosen = planned("search=auto", "combine=log-sigmoid")
    assert doubt(chosen) is None and isinstance(chosen.search.chosen(chosen.space), Grid)
    one = "objectives={helpful: {reward: {name: tiny-assistant, objective: helpful}}}"
    alone = planned(follows, "combine=log-sigmoid", one, "evaluate.reference_point={helpful: 0}")
    assert doubt(alone) is None  # of one objective every sum is the same


def test_the_rules_that_declare_weighted_sums_make_them():
    """Of sampled responses, when the preference has settled: the order of what they say is that of the sums."""
    known = registry.discover()
    declared = {}
    for entry in known.of_kind("combiner"):
        with suppress(ConfigError):  # of rules that need options
            rule = known.build("combiner", entry.name, {}, "combine", None)
            declared[entry.name] = rule if rule.weighted_sums else None
    made = {name: rule for name, rule in declared.items() if rule is not None}
    assert set(made) == {"linear", "modpo", "lagrangian", "interior-point", "dynamic-hypervolume", "schedule"}
    assert {"chebyshev", "log-sigmoid", "worst-case"} <= set(declared)
    rewards = torch.rand(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    groups, weights = torch.arange(64) // 8, torch.tensor([0.3, 0.7], dtype=torch.float64)
    for name, rule in made.items():
        if "groups" in rule.accepts:
            state = rule.init(Preference("weights", {"a": 0.3, "b": 0.7}))
            for number in range(9):
                seen = Round(number, rewards, groups, rewards.mean(0), ("a", "b"))
                state = rule.observe(state, seen)
            found = rule.signal(rewards, weights.expand(64, 2), groups, state)
            torch.testing.assert_close(found, rewards @ weights, rtol=1e-12, atol=1e-12, msg=name)
        else:
            torch.testing.assert_close(rule.scalarise(rewards, weights), rewards @ weights, rtol=1e-12, atol=1e-12)


def test_it_keeps_the_contract_of_searches():
    check_search(Auto(), objectives=2)
