"""Ranking and preference accuracy, the implicit against an explicit reward: identities on random draws."""

from __future__ import annotations

import numpy as np
import pytest

from moalign.diagnostics import implicit, ranking
from moalign.diagnostics.ranking import PairLogps
from moalign.errors import MoalignError
from moalign.reward_models import measures

RNG = np.random.default_rng(0)
NUMBER = 500


def drawn() -> PairLogps:
    return PairLogps(
        RNG.normal(-20, 5, (NUMBER, 2)), RNG.normal(-20, 5, (NUMBER, 2)), RNG.integers(1, 30, (NUMBER, 2)).astype(float)
    )


def test_a_pair_is_ranked_rightly_exactly_where_its_loss_is_below_the_threshold():
    """log sigmoid is monotone, so the loss on d falls below its value at c where d > c, that is where m > 0."""
    for beta in (0.05, 0.1, 1.0):
        pairs = drawn()
        loss = np.logaddexp(0.0, -beta * pairs.differences)
        below = loss < ranking.loss_at_turn(pairs.reference_ranks, beta)
        apart = np.abs(pairs.ranks) > 1e-9
        assert (below == (pairs.ranks > 0))[apart].all() and apart.mean() > 0.99
        assert 0.2 < below.mean() < 0.8


def test_ranking_is_not_preference_and_they_differ_by_the_reference():
    pairs = drawn()
    np.testing.assert_allclose(pairs.ranks, pairs.differences + pairs.reference_ranks, atol=1e-12)
    assert ((pairs.ranks > 0) != (pairs.differences > 0)).mean() > 0.1


def test_the_reference_itself_has_the_references_accuracy_and_prefers_nothing():
    same = RNG.normal(-20, 5, (NUMBER, 2))
    pairs = PairLogps(same, same, np.ones((NUMBER, 2)))
    groups = list(range(NUMBER))
    assert measures.accuracy(pairs.ranks, groups) == measures.accuracy(pairs.reference_ranks, groups)
    assert measures.accuracy(pairs.differences, groups)[0] == 0.5


def test_a_uniform_reference_on_lengths_is_told_apart_by_the_mean_token():
    """Every token has log-probability -1: the shorter response is likelier, and by the mean token both are equal."""
    tokens = np.array([[5.0, 2.0], [3.0, 9.0]])
    pairs = PairLogps(-tokens, -tokens, tokens)
    assert measures.correct(pairs.ranks).tolist() == [0.0, 1.0]
    assert measures.correct(pairs.ranks_by_token).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("share", [0.6, 0.75, 0.95])
def test_the_idealised_policy_is_the_optimum_of_the_loss(beta, share):
    """The mean loss -p log s(beta d) - (1 - p) log s(-beta d) is stationary at d = log(p / (1 - p)) / beta."""
    reference = RNG.normal(0, 3, 20)
    d = ranking.idealised(reference, beta, share) - reference
    slope = -share * beta / (1 + np.exp(beta * d)) + (1 - share) * beta / (1 + np.exp(-beta * d))
    np.testing.assert_allclose(slope, 0, atol=1e-12 * max(1, beta))


def test_limits_of_the_idealised_ranking():
    reference = RNG.normal(0, 3, NUMBER)
    assert np.array_equal(ranking.idealised(reference, 1.0, 0.5), reference)  # nothing to learn
    assert (ranking.idealised(reference, 1.0, 1.0) == np.inf).all()  # certain
    assert (ranking.idealised(reference, 1e-4) > 0).all()  # no price of KL
    assert np.array_equal(ranking.idealised(reference, 1e6) > 0, reference > 0)  # nothing may move
    per_pair = np.where(reference > 0, 0.5, 1.0)
    assert (ranking.idealised(reference, 1.0, per_pair) > 0).all()
    by_beta = [(ranking.idealised(reference, beta) > 0).mean() for beta in ranking.BETAS]
    assert by_beta == sorted(by_beta, reverse=True) and by_beta[0] > by_beta[-1]


def test_what_is_no_beta_and_no_share_is_refused():
    for beta in (0.0, -1.0, float("nan")):
        with pytest.raises(MoalignError, match="beta"):
            ranking.idealised([0.0], beta)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(MoalignError, match="probability"):
            ranking.idealised([0.0], 1.0, share)


def test_no_band_of_ties_and_no_ratio_of_logarithms():
    """exp(0.01) is within 5 % of 1, and -10 / -11 is below 1: both rank the chosen response first all the same."""
    pairs = PairLogps(np.array([[-10.0, -10.01], [-10.0, -11.0]]), np.zeros((2, 2)), np.ones((2, 2)))
    assert measures.correct(pairs.ranks).tolist() == [1.0, 1.0]


def test_turned_pairs_are_those_the_reference_has_wrong():
    assert ranking.turned([1.0, -1.0, 1.0, 0.0], [-2.0, -2.0, 3.0, -1.0]) == (1, 3)


def test_the_rank_correlation_does_not_depend_on_which_response_is_first():
    one, other = RNG.normal(size=50), RNG.normal(size=50)
    signs = RNG.choice([-1.0, 1.0], 50)
    plain = implicit.rank_correlation(one, other)
    assert plain == pytest.approx(implicit.rank_correlation(signs * one, signs * other), abs=1e-12)
    assert implicit.rank_correlation(one, one**3) == pytest.approx(1)
    assert implicit.rank_correlation(one, -one) == pytest.approx(-1)
    assert implicit.rank_correlation(one, np.zeros(50)) is None and implicit.rank_correlation([1.0], [1.0]) is None
    with_gap = np.where(np.arange(50) == 3, np.nan, other)
    assert implicit.rank_correlation(one, with_gap) == pytest.approx(
        implicit.rank_correlation(np.delete(one, 3), np.delete(other, 3))
    )


def test_on_a_tabular_policy_the_implicit_reward_is_the_explicit_one():
    """pi = pi_ref exp(r / beta) / Z, enumerated: a is r / beta up to a number, so both order all pairs alike."""
    rewards, logits = RNG.normal(size=8), RNG.normal(size=8)
    reference = logits - np.logaddexp.reduce(logits)
    tilted = reference + rewards / 0.1
    policy = tilted - np.logaddexp.reduce(tilted)
    i, j = np.triu_indices(8, 1)
    pairs = PairLogps(np.stack([policy[i], policy[j]], 1), np.stack([reference[i], reference[j]], 1), np.ones((28, 2)))
    differences = rewards[i] - rewards[j]
    np.testing.assert_allclose(pairs.differences, differences / 0.1, atol=1e-10)
    assert implicit.rank_correlation(pairs.differences, differences) == pytest.approx(1)
