"""Rules for sampled responses without memory: identities, limits, and what they say of small cases by hand."""

from __future__ import annotations

from itertools import pairwise
from math import exp, inf, log

import pytest
import torch
from pydantic import ValidationError

from moalign.api import Batch, PluginError, Preference, PreferenceError
from moalign_plugins.combiners.chebyshev import Chebyshev
from moalign_plugins.combiners.gated import Gate, Gated
from moalign_plugins.combiners.gdpo import GDPO
from moalign_plugins.combiners.heron import HERON
from moalign_plugins.combiners.krc import KRC
from moalign_plugins.combiners.linear import Linear
from moalign_plugins.combiners.product import Product
from moalign_plugins.combiners.reward_robust import RewardRobust
from moalign_plugins.combiners.smooth_chebyshev import SmoothChebyshev
from moalign_plugins.combiners.uncertainty_weighted import UncertaintyWeighted
from moalign_plugins.combiners.worst_case import WorstCase
from moalign_plugins.objectives.rloo import RLOO

NAMES = ("a", "b", "c")
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def signal(rule, rewards, preference, groups=None):
    """Of one round, ``preference`` being weights in the order of NAMES, or a Preference."""
    rewards = tensor(rewards) if not isinstance(rewards, torch.Tensor) else rewards
    if not isinstance(preference, Preference):
        preference = Preference("weights", dict(zip(NAMES, preference, strict=False)))
    rule.check(preference)
    weights = tensor(preference.vector(tuple(preference.values))).expand_as(rewards)
    groups = torch.zeros(len(rewards), dtype=torch.int64) if groups is None else torch.tensor(groups)
    return rule.signal(rewards, weights, groups, rule.init(preference))


def drawn(rows=40, objectives=3, seed=0):
    return torch.randn(rows, objectives, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the weighted sum, and before or after normalising --------------------------------------------------------------

CONCAVE = [[1.0, 0.0], [0.4, 0.4], [0.0, 1.0]]


def test_no_weighted_sum_picks_the_middle_of_a_concave_front_and_chebyshev_does():
    for share in torch.linspace(0, 1, 101).tolist():
        assert signal(Linear(), CONCAVE, (share, 1 - share)).argmax() != 1
    assert signal(Chebyshev(), CONCAVE, (0.5, 0.5)).argmax() == 1
    assert signal(SmoothChebyshev(temperature=0.01), CONCAVE, (0.5, 0.5)).argmax() == 1


def test_linear_follows_a_direction_with_a_negative_component():
    """DPA: the winner does not depend on the length of v, and v = (1, 0) is one objective."""
    rewards = drawn(objectives=2)
    down = Preference("direction", {"a": 0.8, "b": -0.6})
    found = signal(Linear(), rewards, down)
    torch.testing.assert_close(found, 0.8 * rewards[:, 0] - 0.6 * rewards[:, 1], **EXACT)
    assert found.argmax() == (3 * found).argmax()
    assert torch.equal(signal(Linear(), rewards, Preference("direction", {"a": 1.0, "b": 0.0})), rewards[:, 0])


GROUPS = [0, 0, 0, 0, 5, 5, 5, 5, 5, 9]


def standardised(values, eps):
    return (values - values.mean()) / (values.std() + eps)


@pytest.mark.parametrize("preference", [(0.2, 0.5, 0.3), Preference("direction", {"a": 0.6, "b": -0.8, "c": 0.0})])
def test_gdpo_is_the_sum_of_what_is_standardised_in_each_group(preference):
    rewards, rule = drawn(10), GDPO(eps=1e-3, whole_round=False)
    weights = preference if isinstance(preference, tuple) else tuple(preference.values.values())
    expected = torch.zeros(10, dtype=torch.float64)
    for rows in (slice(0, 4), slice(4, 9)):
        expected[rows] = sum(w * standardised(rewards[rows, k], 1e-3) for k, w in enumerate(weights))
    torch.testing.assert_close(signal(rule, rewards, preference, GROUPS), expected, **EXACT)  # and 0 for the one alone
    over_all = signal(GDPO(eps=1e-3), rewards, preference, GROUPS)
    torch.testing.assert_close(over_all, standardised(expected, 1e-3), **EXACT)


def test_the_unit_of_a_reward_matters_before_normalising_and_not_after():
    """X2: they do not commute. With linear, an objective in a unit a thousand times smaller takes over."""
    rewards = drawn(10)
    other = rewards * tensor([1000.0, 1.0, 1.0])
    weights = (0.2, 0.5, 0.3)
    before, after = (standardised(signal(Linear(), each, weights), 1e-9) for each in (rewards, other))
    assert (before - after).abs().max() > 0.1
    torch.testing.assert_close(after, standardised(rewards[:, 0], 1e-9), rtol=0, atol=0.02)
    one, thousand = (signal(GDPO(eps=1e-12), each, weights, GROUPS) for each in (rewards, other))
    torch.testing.assert_close(one, thousand, rtol=1e-9, atol=1e-9)


def test_gdpo_with_one_objective_is_a_standardised_reward_and_all_equal_is_0():
    rewards = drawn(5, 1)
    found = signal(GDPO(eps=1e-9, whole_round=False), rewards, (1.0,))
    torch.testing.assert_close(found, standardised(rewards[:, 0], 1e-9), **EXACT)
    assert torch.equal(signal(GDPO(), torch.full((4, 1), 0.1).double(), (1.0,)), torch.zeros(4).double())


# --- Chebyshev ------------------------------------------------------------------------------------------------------


def test_chebyshev_by_hand():
    rewards = [[0.9, 0.2, -7.0], [0.1, 0.8, 9.0]]
    expected = [-max(0.25 * 0.1, 0.75 * 0.8), -max(0.25 * 0.9, 0.75 * 0.2)]  # c has no weight
    torch.testing.assert_close(signal(Chebyshev(), rewards, (0.25, 0.75, 0.0)), tensor(expected), **EXACT)
    ideal = {"c": 9.0, "a": 1.0, "b": 2.0}
    expected = [-max(0.5 * 1.8, 0.5 * 16.0), -max(0.5 * 1.2, 0.0)]
    torch.testing.assert_close(signal(Chebyshev(ideal=ideal), rewards, (0, 0.5, 0.5)), tensor(expected), **EXACT)


def test_what_lacks_weight_does_not_cap_rewards_above_the_ideal():
    assert signal(Chebyshev(), [[3.0, 0.0]], (1.0, 0.0)).item() == 2.0


def test_smooth_chebyshev_between_its_limits():
    rewards, weights = drawn(), (0.2, 0.5, 0.3)
    hard = signal(Chebyshev(), rewards, weights)
    for temperature in (10.0, 1.0, 0.1, 1e-3):
        soft = signal(SmoothChebyshev(temperature=temperature), rewards, weights)
        assert (soft <= hard + 1e-12).all() and (soft >= hard - temperature * log(3) - 1e-12).all()
    torch.testing.assert_close(soft, hard, rtol=0, atol=1e-3 * log(3))
    wide = signal(SmoothChebyshev(temperature=1e5), rewards, weights) + 1e5 * log(3)
    shortfalls = tensor(weights) * (1 - rewards)
    torch.testing.assert_close(
        wide, -shortfalls.mean(1), rtol=0, atol=1e-4
    )  # of the order of spread ** 2 / temperature


def test_smooth_chebyshev_by_hand():
    found = signal(SmoothChebyshev(temperature=0.5), [[0.0, 0.5, 4.0]], (0.4, 0.6, 0.0))
    assert found.item() == pytest.approx(-0.5 * log(exp(0.4 / 0.5) + exp(0.3 / 0.5)), rel=1e-12)


def test_as_scored_pairs_it_is_a_difference_of_values():
    rewards = drawn(4, 2)
    pairs = torch.tensor([[0, 1], [3, 2]])
    batch = Batch(
        logps=torch.zeros(4, 1).double(),
        mask=torch.ones(4, 1).double(),
        pairs=pairs,
        pair_objective=torch.tensor([-1, -1]),
        preference=tensor([0.5, 0.5]).expand(4, 2),
        strength=torch.ones(2).double(),
        groups=torch.zeros(4, dtype=torch.int64),
        rewards=rewards,
    )
    values = signal(Chebyshev(), rewards, (0.5, 0.5))
    terms = Chebyshev().pair_terms(batch)
    torch.testing.assert_close(terms.difference, values[pairs[:, 0]] - values[pairs[:, 1]], **EXACT)
    with pytest.raises(PluginError, match="sampled responses only"):
        Chebyshev(ideal={"a": 1.0, "b": 1.0}).pair_terms(batch)


# --- ensembles ------------------------------------------------------------------------------------------------------

THIRDS = (1 / 3, 1 / 3, 1 / 3)


def test_worst_case_is_the_minimum_and_no_larger_than_the_mean():
    rewards = drawn()
    assert torch.equal(signal(WorstCase(), rewards, THIRDS), rewards.amin(1))
    assert (signal(WorstCase(), rewards, THIRDS) <= rewards.mean(1)).all()
    assert torch.equal(signal(WorstCase(), rewards, (0.5, 0.0, 0.5)), rewards[:, [0, 2]].amin(1))


@pytest.mark.parametrize("ddof", [0, 1])
def test_uncertainty_weighted_has_the_variance_with_its_divisor(ddof):
    rewards = drawn()
    found = signal(UncertaintyWeighted(lam=0.7, ddof=ddof), rewards, THIRDS)
    torch.testing.assert_close(found, rewards.mean(1) - 0.7 * rewards.var(1, correction=ddof), **EXACT)
    torch.testing.assert_close(signal(UncertaintyWeighted(lam=0, ddof=ddof), rewards, THIRDS), rewards.mean(1), **EXACT)
    pair = signal(UncertaintyWeighted(lam=0.7, ddof=ddof), rewards, (0.5, 0.5, 0.0))
    torch.testing.assert_close(pair, rewards[:, :2].mean(1) - 0.7 * rewards[:, :2].var(1, correction=ddof), **EXACT)


@pytest.mark.parametrize("rule", [WorstCase(), UncertaintyWeighted(lam=2.0, ddof=1), RewardRobust(nominal="a")])
def test_an_ensemble_of_one_is_its_reward(rule):
    rewards = drawn()
    torch.testing.assert_close(signal(rule, rewards, (1.0, 0.0, 0.0)), rewards[:, 0], **EXACT)


def test_reward_robust_between_nominal_and_worst():
    rewards = drawn()
    values = [signal(RewardRobust(nominal="b", alpha=alpha), rewards, THIRDS) for alpha in (0.0, 0.3, 0.6, 1.0)]
    assert torch.equal(values[0], rewards.amin(1)) and torch.equal(values[-1], rewards[:, 1])
    torch.testing.assert_close(values[1], 0.3 * rewards[:, 1] + 0.7 * rewards.amin(1), **EXACT)
    assert all((later >= earlier - 1e-12).all() for earlier, later in pairwise(values))
    equal = torch.full((2, 3), 0.7, dtype=torch.float64)
    torch.testing.assert_close(signal(RewardRobust(nominal="c"), equal, THIRDS), equal[:, 0], **EXACT)


# --- products, gates, ranks -----------------------------------------------------------------------------------------


def test_krc_is_a_geometric_mean_with_the_sign_of_the_worst():
    assert signal(KRC(), [[2.0, 2.0, 2.0]], THIRDS).item() == pytest.approx(2, rel=1e-12)
    assert signal(KRC(), [[1.0, 4.0, 2.0]], THIRDS).item() == pytest.approx(2, rel=1e-12)
    assert signal(KRC(), [[1.0, -4.0, 2.0]], THIRDS).item() == pytest.approx(-2, rel=1e-12)
    assert signal(KRC(), [[-1.0, -4.0, -2.0]], THIRDS).item() == pytest.approx(-2, rel=1e-12)
    assert signal(KRC(), [[5.0, 0.0, 2.0]], THIRDS).item() == 0
    assert signal(KRC(), [[3.0, 2.0, -9.0]], (0.25, 0.75, 0.0)).item() == pytest.approx(3**0.25 * 2**0.75, rel=1e-12)


def test_product_is_the_gain_times_the_factors():
    rule = Product(penalties=("b", "c"))
    rewards = tensor([[3.0, 0.5, 0.4], [3.0, 0.0, 1.0], [2.0, 1.0, 1.0]])
    found = signal(rule, rewards, THIRDS)
    torch.testing.assert_close(found, tensor([0.6, 0.0, 2.0]), **EXACT)
    torch.testing.assert_close(found[[0, 2]].log(), rewards[[0, 2]].log().sum(1), **EXACT)  # log-sum identity
    torch.testing.assert_close(signal(rule, rewards, (0.5, 0.5, 0.0))[0], tensor(1.5 * 3 * 0.5**1.5), **EXACT)
    torch.testing.assert_close(signal(rule, rewards, (1.0, 0.0, 0.0)), 3 * rewards[:, 0], **EXACT)
    torch.testing.assert_close(signal(rule, rewards, (0.0, 1 / 3, 2 / 3))[0], tensor(0.5 * 0.4**2), **EXACT)


@pytest.mark.parametrize(("rewards", "message"), [([3.0, 1.5], "a penalty is 1.5"), ([-1.0, 0.5], "the gain is -1")])
def test_product_refuses_what_would_make_a_violation_pay(rewards, message):
    with pytest.raises(PluginError, match=message):
        signal(Product(penalties=("b",)), [rewards], (0.5, 0.5))


def gates(**above):
    return Gated(gates=tuple(Gate(objective=name, above=value) for name, value in above.items()))


def test_a_shut_gate_hides_the_lower_rewards():
    rewards = tensor([[0.6, 0.9, 4.0], [0.5, 0.9, 4.0], [0.6, 0.1, 4.0], [0.4, 0.1, 8.0]])
    found = 3 * signal(gates(a=0.5, b=0.3), rewards, THIRDS)
    torch.testing.assert_close(found, tensor([5.5, 0.5, 0.7, 0.4]), **EXACT)  # 0.5 is not above 0.5
    moved = rewards + tensor([0.0, 0.0, 7.0])
    shut = 3 * signal(gates(a=0.5, b=0.3), moved, THIRDS)
    torch.testing.assert_close(shut[1:], found[1:], **EXACT)


def test_gates_that_are_always_open_make_a_weighted_sum():
    rewards, weights = drawn(), (0.2, 0.5, 0.3)
    linear = signal(Linear(), rewards, weights)
    torch.testing.assert_close(signal(gates(c=-1e9, a=-1e9), rewards, weights), linear, **EXACT)
    assert (signal(gates(c=0.0), rewards, weights) - linear).abs().max() > 0.1


def test_the_order_of_gates_is_their_priority():
    rewards = [[1.0, 0.0]]
    assert signal(gates(a=0.5, b=0.5), rewards, (0.5, 0.5)).item() == 0.5
    assert signal(gates(b=0.5, a=0.5), rewards, (0.5, 0.5)).item() == 0.0


def test_heron_lets_the_most_important_difference_decide():
    rewards = [[1.0, 0.0], [1.0, 5.0], [0.0, 9.0], [1.0, 5.0]]
    found = signal(HERON(), rewards, (0.7, 0.3))
    torch.testing.assert_close(found, tensor([(1 - 2) / 3, 2 / 3, -1.0, 2 / 3]), **EXACT)  # equal responses draw
    turned = signal(HERON(), rewards, (0.3, 0.7))
    assert turned.argmax() == 2 and turned.argmin() == 0
    assert torch.equal(signal(HERON(), rewards, (0.7, 0.3), [1, 2, 3, 4]), torch.zeros(4).double())


def test_heron_ignores_the_scale_of_an_objective_and_is_pairwise_comparison_for_one():
    rewards = drawn(12)
    weights, groups = (0.2, 0.5, 0.3), [0] * 5 + [1] * 7
    stretched = torch.stack([rewards[:, 0].exp(), rewards[:, 1] ** 3, 100 * rewards[:, 2]], 1)
    assert torch.equal(signal(HERON(), rewards, weights, groups), signal(HERON(), stretched, weights, groups))
    ranks = rewards[:5, 1].argsort().argsort().double()
    torch.testing.assert_close(signal(HERON(), rewards, (0, 1.0, 0), groups)[:5], (2 * ranks - 4) / 4, **EXACT)


def test_with_a_margin_comparisons_can_go_in_circles():
    """b beats a, c beats b, each by what the margin hides in the first objective, and a beats c there."""
    rewards = tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 2.0], [6.0, 1.0], [-4.0, 1.0]])
    groups = [0, 0, 0, 1, 1]
    found = signal(HERON(margin=0.5), rewards, (0.7, 0.3), groups)  # half the deviations: 1.80 and 0.35
    assert torch.equal(found, tensor([0.0, 0.0, 0.0, 1.0, -1.0]))
    assert torch.equal(signal(HERON(), rewards, (0.7, 0.3), groups), tensor([1.0, 0.0, -1.0, 1.0, -1.0]))


# --- what is refused ------------------------------------------------------------------------------------------------

WEIGHTS = Preference("weights", {"a": 0.4, "b": 0.6})
DIRECTION = Preference("direction", {"a": 0.8, "b": -0.6})
THRESHOLDS = Preference("thresholds", {"a": 0.5})
RULES = [Chebyshev(), SmoothChebyshev(), WorstCase(), UncertaintyWeighted(), RewardRobust(nominal="a"), KRC()]
RULES += [Product(penalties=("a",)), gates(a=0.0), HERON()]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_directions_and_thresholds_name_the_rule_to_take(rule):
    with pytest.raises(PreferenceError, match=r"direction \(a 0.8, b -0.6\).*'linear' and 'gdpo' follow directions"):
        rule.check(DIRECTION)
    with pytest.raises(
        PreferenceError, match=r"thresholds \(a >= 0.5\).*'lagrangian' and 'interior-point' keep thresholds"
    ):
        rule.check(THRESHOLDS)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (WorstCase(), "which count alike"),
        (UncertaintyWeighted(), "which count alike"),
        (RewardRobust(nominal="c"), "which count alike"),
        (Product(penalties=("c",)), "penalties: there is no objective 'c'; known: a, b"),
        (gates(c=1.0), "gates: there is no objective 'c'"),
        (Chebyshev(ideal={"a": 1.0}), "ideal: nothing is said of b"),
        (Chebyshev(ideal={"a": 1.0, "b": 1.0, "c": 1.0}), "ideal: there is no objective 'c'"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_preferences_and_options_that_do_not_go_together_are_refused(rule, message):
    with pytest.raises(PreferenceError, match=message):
        rule.check(WEIGHTS)
    with pytest.raises(PreferenceError, match="'gdpo' has no meaning for thresholds"):
        GDPO().check(THRESHOLDS)
    with pytest.raises(PreferenceError, match="nominal: there is no objective 'c'"):
        RewardRobust(nominal="c").check(Preference("weights", {"a": 0.5, "b": 0.5}))


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (SmoothChebyshev, {"temperature": 0}),
        (Chebyshev, {"ideal": inf}),
        (GDPO, {"eps": 0}),
        (UncertaintyWeighted, {"ddof": 2}),
        (RewardRobust, {}),
        (Product, {"penalties": ()}),
        (Gated, {"gates": []}),
        (Gated, {"gates": [{"objective": "a", "above": 1.0, "below": 2.0}]}),
        (HERON, {"margin": -1}),
    ],
)
def test_options_without_a_meaning_are_refused(rule, options):
    with pytest.raises(ValidationError):
        rule.model_validate(options)


def test_the_baseline_of_a_loss_undoes_a_shift_of_the_signal_and_not_its_rule():
    """Through RLOO, in one group: Chebyshev shifted by its ideal is the same, worst-case and linear are not."""
    rewards = drawn(6, 2)
    groups = torch.zeros(6, dtype=torch.int64)
    loss = RLOO(beta=0.0)
    nothing = torch.zeros(6, dtype=torch.float64)
    one, other = (
        loss.advantages(signal(Chebyshev(ideal=ideal), rewards, (0.5, 0.5)), groups, nothing) for ideal in (5.0, 9.0)
    )
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert (one - loss.advantages(signal(Linear(), rewards, (0.5, 0.5)), groups, nothing)).abs().max() > 0.01


def test_heron_compares_each_group_for_its_own_preference():
    """Groups asked for different preferences get what each gets alone."""
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    wanted = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9]], dtype=torch.float64)
    groups = torch.tensor([0, 0, 1, 1])
    together = HERON().signal(rewards, wanted, groups, {})
    assert together.tolist() == [1.0, -1.0, -1.0, 1.0]
    for group in (0, 1):
        rows = groups == group
        alone = HERON().signal(rewards[rows], wanted[rows], groups[rows], {})
        assert torch.equal(alone, together[rows])
