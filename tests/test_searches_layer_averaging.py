"""Averages with the base by blocks of layers: their means, the search around the best, and soups over the simplex."""

from __future__ import annotations

from math import fsum
from random import Random

import pytest
from made_up_policies import drive, ellipsoid, space
from pydantic import ValidationError

from moalign.sweeps import neighbours
from moalign.testing import check_search
from moalign_plugins.searches.layer_averaging import LayerAveraging
from moalign_plugins.searches.soup import Soup

SCALES = {1: (1.0,), 2: (1.0, 4.0), 3: (1.0, 2.0, 4.0), 5: (1.0, 1.5, 2.0, 2.5, 3.0)}
BEST = (0.9, 0.5, 0.7)  # shares of the blocks at which the averages below are best


def shares_of(candidate):
    (shares,) = candidate.shares.values()
    return shares


def blockwise(trained):
    """Averages of a candidate score what it does, less the squared distance of the shares from BEST."""

    def score(candidate, weights):
        if not candidate.mixed:
            return trained(candidate, weights)
        (source,) = candidate.shares
        distance = fsum((a - b) ** 2 for a, b in zip(shares_of(candidate), BEST, strict=True))
        return [weight - distance for weight in weights[source]]

    return score


def averages(search, objectives=2, score=None, **known):
    history, rounds = drive(search, space(objectives, **known), score or ellipsoid(SCALES[objectives]))
    return history, [[each for each in proposed if each.mixed] for proposed in rounds]


# --- the contract -----------------------------------------------------------------------------------------------------


def test_it_keeps_to_the_contract_of_searches():
    check_search(LayerAveraging(), objectives=3)
    check_search(LayerAveraging(blocks=2, base_shares=(0.3,), refine=2, averaged="extremes"), objectives=5)


@pytest.mark.parametrize("objectives", [2, 3, 5])
def test_a_history_cut_anywhere_is_gone_on_with_as_if_nothing_had_happened(objectives):
    search, where = LayerAveraging(refine=2), space(objectives, base=dict.fromkeys(space(objectives).objectives, 0.3))
    history, rounds = drive(search, where, blockwise(ellipsoid(SCALES[objectives])))
    assert len(rounds) == 4
    by_id, before = {outcome.id: outcome for outcome in history}, []
    for proposed in rounds:
        assert search.propose(where, tuple(before), Random(9)) == proposed
        ended = [by_id[candidate.id] for candidate in proposed[::2]][::-1]
        assert search.propose(where, (*before, *ended), Random(0)) == proposed[1::2]
        before += [by_id[candidate.id] for candidate in proposed]
    assert search.propose(where, tuple(Random(0).sample(before, len(before))), Random(0)) == []


# --- averages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2, 3, 7])
@pytest.mark.parametrize("base_shares", [(0.2, 0.4), (0.05, 0.5, 0.95), (1 / 3,)])
def test_the_mean_share_is_one_less_the_bases_and_none_leaves_zero_to_one(blocks, base_shares):
    search = LayerAveraging(blocks=blocks, base_shares=base_shares, refine=3, spread=1.0)
    _, rounds = averages(search)
    everything = [each for proposed in rounds for each in proposed]
    means = [fsum(shares_of(each)) / blocks for each in everything]
    assert all(min(abs(mean - (1 - base)) for base in base_shares) < 1e-11 for mean in means)
    assert all(0 <= share <= 1 for each in everything for share in shares_of(each))
    assert len({(*each.shares, shares_of(each)) for each in everything}) == len(everything) > 0
    assert all(len(shares_of(each)) == blocks for each in everything)
    for base in base_shares:
        assert any(shares_of(each) == (1 - base,) * blocks for each in everything)
    if blocks == 1:
        assert len(everything) == len({source for each in everything for source in each.shares}) * len(base_shares)
    else:  # with all of the spread, one block reaches a bound
        uneven = [shares_of(each) for each in rounds[1] if len(set(shares_of(each))) > 1]
        assert all(abs(max(shares) - 1) < 1e-9 or abs(min(shares)) < 1e-9 for shares in uneven)


def test_a_base_share_of_nothing_is_the_trained_candidate_itself_and_adds_no_average():
    for blocks in (1, 3):
        history, rounds = averages(LayerAveraging(base_shares=(0.0,), blocks=blocks, refine=2))
        assert rounds == [[]] and len(history) == 3
    both = averages(LayerAveraging(base_shares=(0.0, 0.2), refine=0))[1]
    assert both[1] == averages(LayerAveraging(base_shares=(0.2,), refine=0))[1][1]


def test_one_block_keeps_more_in_turn():
    search = LayerAveraging(base_shares=(0.4,), spread=0.5, refine=0)
    _, rounds = averages(search)
    first = [shares_of(each) for each in rounds[1] if "w-1.00-0.00" in each.shares]
    assert first == [(0.6, 0.6, 0.6), (0.8, 0.5, 0.5), (0.5, 0.8, 0.5), (0.5, 0.5, 0.8)]
    assert [each.id for each in rounds[1]][:4] == [
        f"average-0-base0.4000-{n}" for n in ("even", *(f"block{k}" for k in range(3)))
    ]


def test_an_average_stands_where_its_candidate_does_and_needs_no_training():
    history, rounds = averages(LayerAveraging(trained=6), objectives=3)
    preferences = {outcome.id: outcome.preference for outcome in history}
    everything = [each for proposed in rounds for each in proposed]
    assert {source for each in everything for source in each.shares} == {outcome.id for outcome in history[:6]}
    for each in everything:
        (source,) = each.shares
        assert each.mixed and not each.parents and each.preference == preferences[source]
    assert len(everything) <= 6 * (2 * 4 + 6)


def test_dominated_and_failed_candidates_are_not_averaged():
    def score(candidate, weights):
        points = {(1.0, 0.0): (0.5, 0.0), (0.0, 1.0): (0.0, 1.0), (0.5, 0.5): (0.6, 0.5)}
        return points[tuple(candidate.preference.values.values())]

    def sources(averaged, fails=lambda _: "done"):
        _, rounds = drive(LayerAveraging(averaged=averaged, refine=0), space(2), score, fails=fails)
        return {source for proposed in rounds[1:] for each in proposed for source in each.shares}

    assert sources("front") == {"w-0.00-1.00", "w-0.50-0.50"} == sources("extremes")
    assert sources("front", lambda c: "failed" if c.id == "w-0.50-0.50" else "done") == {"w-1.00-0.00", "w-0.00-1.00"}
    assert sources("front", lambda _: "skipped") == set()
    middle = averages(LayerAveraging(averaged="extremes", refine=0))[1]
    assert {source for each in middle[1] for source in each.shares} == {"w-1.00-0.00", "w-0.00-1.00"}
    assert len({source for each in averages(LayerAveraging(refine=0))[1][1] for source in each.shares}) == 3


# --- the search around the best ---------------------------------------------------------------------------------------


def test_each_round_goes_on_around_the_best_and_comes_nearer_to_the_optimum():
    history, rounds = averages(LayerAveraging(base_shares=(0.3,), refine=4), score=blockwise(ellipsoid(SCALES[2])))
    assert len(rounds) == 6

    def distance(candidate):
        return fsum((a - b) ** 2 for a, b in zip(shares_of(candidate), BEST, strict=True))

    for source in (outcome.id for outcome in history[:3]):
        nearest = [min(distance(each) for each in proposed if source in each.shares) for proposed in rounds[1:]]
        assert min(nearest[1:]) < 0.3 * nearest[0]
        tried = [each for each in rounds[1] if source in each.shares]
        best = min(tried, key=distance)
        assert shares_of(best) == pytest.approx((0.85, 0.625, 0.625))
        around = [shares_of(each) for each in rounds[2] if source in each.shares]
        assert (0.925, 0.5875, 0.5875) in around and (0.8125, 0.7, 0.5875) in around
        assert len(around) == 6


def test_the_tax_is_what_lies_below_the_base():
    """One average wins more for its preference, another pays no tax: that one where the base is known."""

    def score(candidate, weights):
        if not candidate.mixed:
            return candidate.preference.values.values()
        even = len(set(shares_of(candidate))) == 1
        return (0.8, 0.4) if even else (0.9, 0.1)

    search = LayerAveraging(trained=2, blocks=2, base_shares=(0.2,))
    for base, centre in (({}, (0.9, 0.7)), ({"concise": 0.0, "harmless": 0.4}, (0.8, 0.8))):
        _, rounds = averages(search, score=score, base=base)
        around = [shares_of(each) for each in rounds[2] if "w-1.00-0.00" in each.shares]
        steps = {round(abs(a - b), 9) for shares in around for a, b in zip(shares, centre, strict=True)}
        assert steps == {0.05}, (base, around)


def test_averages_that_fail_are_not_gone_on_from():
    def even_only(candidate):
        return "failed" if candidate.mixed and len(set(shares_of(candidate))) > 1 else "done"

    search = LayerAveraging(base_shares=(0.3,))
    _, rounds = drive(search, space(2), blockwise(ellipsoid(SCALES[2])), fails=even_only)
    assert {round(max(shares_of(each)) - 0.7, 9) for each in rounds[2]} == {0.075, 0.0375}
    _, rounds = drive(
        search, space(2), blockwise(ellipsoid(SCALES[2])), fails=lambda c: "failed" if c.mixed else "done"
    )
    assert len(rounds) == 2


def test_options_that_mean_nothing_are_refused():
    for options, message in (
        ({"base_shares": [1.0]}, "1 is the base itself"),
        ({"base_shares": [-0.1]}, "from 0 to below 1"),
        ({"base_shares": []}, "1 to 20 numbers"),
        ({"base_shares": [float("nan")]}, "finite number"),
        ({"base_shares": [0.2, 0.20001]}, "told apart by four digits"),
        ({"blocks": 0}, "greater than or equal to 1"),
        ({"spread": 0}, "greater than 0"),
        ({"averaged": "all"}, "front"),
    ):
        with pytest.raises(ValidationError, match=message):
            LayerAveraging(**options)


# --- soups ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objectives", "points"), [(2, 11), (3, 21), (4, 20), (5, 35)])
def test_with_each_objective_alone_trained_a_soup_covers_the_simplex_by_the_weights_themselves(objectives, points):
    """Rewarded soups: the shares of the one-hot adapters are the weights that the mix stands at."""
    where = space(objectives)
    search = Soup(trained=objectives, points=points)
    history, (trained, mixed) = drive(search, where, lambda candidate, weights: candidate.preference.values.values())
    assert len(trained) == objectives and len(mixed) == points - objectives
    for candidate in mixed:
        shares = neighbours.shares(candidate.preference, where.objectives, history[:objectives])
        weights = [candidate.preference.values[name] for name in where.objectives]
        assert [shares.get(each.id, 0.0) for each in trained] == pytest.approx(weights, abs=1e-9)
