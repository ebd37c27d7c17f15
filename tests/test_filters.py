"""Filters of sampled responses: what each keeps, what becomes of weights in the loss, and whole runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moalign.api import Kept, Sampled
from moalign.diagnostics.filters import agreement, r_squared
from moalign.testing import check_filter
from moalign_plugins.filters import reward_threshold
from moalign_plugins.filters.accuracy_band import AccuracyBand
from moalign_plugins.filters.best import Best
from moalign_plugins.filters.best_random import BestRandom
from moalign_plugins.filters.best_worst import BestWorst
from moalign_plugins.filters.margin import Margin
from moalign_plugins.filters.reward_threshold import RewardThreshold

EVERY = [
    *(Best(), Best(keep=3), BestRandom(), BestRandom(resampled=True), BestWorst(), BestWorst(resampled=True)),
    *(AccuracyBand(right=0.0), AccuracyBand(objective="objective_0", right=0.5, low=0, high=1)),
    *(RewardThreshold(threshold=-0.5), RewardThreshold(right_by="objective_1", right=0.0, wanted=2)),
    *(RewardThreshold(right_by="objective_1", right=0.0, grid=(-1, 1, 0.1)), Margin(gap=0.5, least=0.1)),
]


def sampled(signal, groups=None, texts=None, **rewards) -> Sampled:
    count = len(signal)
    columns = {name: torch.tensor(values, dtype=torch.float64) for name, values in rewards.items()}
    values = torch.tensor(signal, dtype=torch.float64)
    return Sampled(
        number=0,
        signal=values,
        rewards=torch.stack([*columns.values()], 1) if columns else values[:, None],
        groups=torch.tensor([0] * count if groups is None else groups),
        lengths=torch.full((count,), 4),
        ended=torch.ones(count, dtype=torch.bool),
        texts=tuple(map(str, range(count))) if texts is None else tuple(texts),
        objectives=tuple(columns) or ("r",),
    )


def noise(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(kept: Kept) -> list[int]:
    return kept.weights.nonzero().squeeze(1).tolist()


# two prompts, of which one has better responses throughout
SIGNAL, GROUPS = [3.0, 1.0, 2.0, 13.0, 14.0, 11.0, 12.0, 0.0], [5, 5, 5, 2, 2, 2, 2, 5]


@pytest.mark.parametrize("plugin", EVERY, ids=repr)
def test_it_conforms(plugin):
    check_filter(plugin)


@pytest.mark.parametrize(
    ("plugin", "kept"),
    [(Best(), [0, 4]), (Best(keep=2), [0, 2, 3, 4]), (Best(keep=9), list(range(8))), (BestWorst(), [0, 4, 5, 7])],
    ids=repr,
)
def test_both_ends_are_those_of_each_prompt(plugin, kept):
    found = plugin.keep_responses(sampled(SIGNAL, GROUPS), noise())
    assert rows(found) == kept and set(found.weights.tolist()) <= {0.0, 1.0}
    assert all(bool(reason) == (row not in kept) for row, reason in enumerate(found.reasons))


def test_of_equal_responses_the_first_is_the_best_and_the_last_the_worst():
    assert rows(Best().keep_responses(sampled([1.0, 1.0, 0.0]), noise())) == [0]
    assert rows(BestWorst().keep_responses(sampled([1.0, 1.0, 1.0]), noise())) == [0, 2]
    assert rows(BestWorst().keep_responses(sampled([1.0]), noise())) == [0]


def test_one_of_the_others_is_as_likely_as_another():
    about, counts = sampled([*SIGNAL[:3], 0.0], [1] * 4), torch.zeros(4, dtype=torch.float64)
    for seed in range(900):
        kept = BestRandom().keep_responses(about, noise(seed)).weights
        assert kept[0] == 1 and kept.sum() == 2
        counts += kept
    # 900 draws from three: a standard deviation of sqrt(900 * 2 / 9) = 14
    assert (counts[1:] - 300).abs().max() < 4.5 * math.sqrt(200)


@pytest.mark.parametrize(
    ("plugin", "shares"),
    [
        (BestWorst(resampled=True), [1, 0, 0, 0, 0, 0, 1]),
        (BestRandom(resampled=True), [0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]),
        (BestRandom(resampled=True, best=0.7, others=0.2), [0.7, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2]),
    ],
    ids=repr,
)
def test_draws_have_the_frequencies_of_the_paper(plugin, shares):
    about, counts = sampled([6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]), torch.zeros(7, dtype=torch.float64)
    for seed in range(300):
        kept = plugin.keep_responses(about, noise(seed))
        assert kept.weights.sum() == 7  # as many as there are
        counts += kept.weights
    expected = 2100 * torch.tensor(shares, dtype=torch.float64) / sum(shares)
    deviation = (expected * (1 - expected / 2100)).sqrt()
    assert ((counts - expected).abs() <= 4.5 * deviation).all()


def test_prompts_within_the_band_are_kept_whole_with_both_bounds():
    groups = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    about = sampled([0.0] * 12, groups, right=[1.0, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1], other=[0.0] * 12)
    kept = AccuracyBand(objective="right", low=0.25, high=0.75).keep_responses(about, noise())
    assert rows(kept) == list(range(8)) and set(kept.reasons[8:]) == {"too easy"}
    kept = AccuracyBand(objective="right", low=0.3, high=0.9).keep_responses(about, noise())
    assert rows(kept) == [4, 5, 6, 7]
    assert kept.reasons == ("too hard",) * 4 + ("",) * 4 + ("too easy",) * 4
    none = AccuracyBand(objective="other")
    assert rows(none.keep_responses(about, noise())) == []


def test_balance_is_one_where_all_are_right_and_enough():
    def score(right, groups, wanted=8):
        kept = torch.ones(len(right), dtype=torch.bool)
        return reward_threshold.balance(kept, torch.tensor(right), torch.tensor(groups), wanted)

    assert score([True] * 8, [3] * 8) == 1.0
    assert score([True] * 24, [3] * 8 + [1] * 16) == 1.0
    assert score([True] * 4, [0] * 4) == 0.5  # pure, and too few
    assert score([True] * 8 + [False] * 8, [0] * 16) == 0.5  # enough, and half of them wrong
    assert score([True] * 8 + [False], [0] * 8 + [1]) == 0.5  # a prompt with none right counts


def test_the_sweep_finds_the_planted_threshold():
    """Right responses have 0.2 and more but for two, wrong ones less but for one; the score knows the trade."""
    rng = np.random.default_rng(1)
    judged = np.concatenate([rng.uniform(0.2, 0.9, 40), rng.uniform(-0.9, 0.19, 60)])
    right = np.concatenate([np.ones(40), np.zeros(60)])
    about = sampled([0.0] * 100, [row % 5 for row in range(100)], judge=judged.tolist(), exact=right.tolist())
    for grid, close in [((-1, 1, 0.01), 0.011), (None, 1e-12)]:
        plugin = RewardThreshold(objective="judge", right_by="exact", grid=grid)
        kept = plugin.keep_responses(about, noise())
        assert kept.figures["balance"] == 1.0  # 8 right ones to each of 5 prompts, and nothing else
        assert judged[40:].max() < kept.figures["threshold"] <= judged[:40].min() + 1e-12
        assert rows(kept) == list(range(40)) and set(kept.reasons[40:]) == {"below the threshold"}
        lowest = judged[:40].min() if grid is None else judged[40:].max()
        assert kept.figures["threshold"] == pytest.approx(lowest, abs=close)


def test_the_exact_sweep_is_as_good_as_any_threshold():
    rng = np.random.default_rng(2)
    judged, right = rng.normal(size=30).round(1), rng.random(30) < 0.5
    about = sampled(judged.tolist(), [row % 3 for row in range(30)], judge=judged.tolist(), exact=right.astype(float))
    found = RewardThreshold(right_by="exact", wanted=4).keep_responses(about, noise()).figures["balance"]
    scores = [
        reward_threshold.balance(about.signal >= each, torch.tensor(right), about.groups, 4)
        for each in np.linspace(-4, 4, 801)
    ]
    assert found == pytest.approx(max(scores), abs=1e-12)


def test_a_repeated_response_is_kept_once():
    about = sampled([1.0, 1.0, 1.0, 0.0], [0, 0, 1, 1], texts=["a", "a", "a", "b"])
    kept = RewardThreshold(threshold=0.5).keep_responses(about, noise())
    assert kept.reasons == ("", "repeated", "", "below the threshold")


def test_pairs_with_a_clear_difference_and_a_good_winner():
    about, pairs = sampled([6.0, 5.0, 4.0, 1.0]), torch.tensor([[0, 2], [0, 1], [2, 3], [1, 3]])
    kept = Margin(gap=2, least=5).keep_pairs(about, pairs, noise())
    assert kept.weights.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert kept.reasons == ("", "too close", "chosen too poor", "")
    assert Margin(gap=2).keep_pairs(about, pairs, noise()).weights.tolist() == [1.0, 0.0, 1.0, 1.0]


def test_a_proxy_that_errs_in_the_middle_prefers_both_ends():
    """40 prompts with 9 responses: the best and the worst by the proxy are so in truth, what lies between is noise."""
    generator = noise(7)
    proxy = torch.linspace(1, -1, 9, dtype=torch.float64).repeat(40)
    middle = torch.arange(9).repeat(40).remainder(8) != 0
    gold = torch.where(middle, torch.randn(360, generator=generator, dtype=torch.float64), proxy)
    gold = gold + 0.05 * torch.randn(360, generator=generator, dtype=torch.float64)
    about = sampled(proxy.tolist(), [row // 9 for row in range(360)])
    found = agreement({"one": Best(keep=9), "random": BestRandom(), "ends": BestWorst()}, about, gold)
    assert next(iter(found)) == "ends" and found["ends"] > 0.99 > 0.6 > found["random"]
    alone = agreement({"best": Best(), "ends": BestWorst()}, about, gold)
    assert math.isnan(alone["best"]) and list(alone) == ["ends", "best"]  # the proxy is the same for all of them


def test_r_squared_is_that_of_the_best_line_and_weights_repeat():
    rng = np.random.default_rng(3)
    proxy, gold, times = rng.normal(size=12), rng.normal(size=12), rng.integers(0, 3, 12)
    x, y = np.repeat(proxy, times), np.repeat(gold, times)
    residuals = y - np.polyval(np.polyfit(x, y, 1), x)
    expected = 1 - residuals.var() / y.var()
    assert r_squared(*map(torch.tensor, (proxy, gold, times))) == pytest.approx(expected, rel=1e-9)
