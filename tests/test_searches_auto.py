"""The search of a silent configuration: by the number of objectives and the budget, said in one line."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moalign import config, registry
from moalign.api import Space
from moalign.sweeps.plan import prepare
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
        (Space(("a", "b", "c", "d")), OptimisticLinearSupport(points=20, mixes=20), "4 objectives"),
    ],
)
def test_what_it_chooses_and_says(space, search, reason):
    assert Auto().chosen(space) == search
    assert reason in Auto().reason(space)


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


def test_it_keeps_the_contract_of_searches():
    check_search(Auto(), objectives=2)
