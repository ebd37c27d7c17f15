"""Accuracy, calibration and agreement of a reward model, as the mathematics that they are."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moalign.errors import MoalignError
from moalign.reward_models import measures


def test_equal_scores_count_a_half():
    assert measures.correct([2.0, 0.0, -1e-9]).tolist() == [1.0, 0.5, 0.0]
    value, error = measures.accuracy([2.0, 0.0, -1.0, 3.0], [0, 1, 2, 3])
    assert value == 2.5 / 4
    assert error == pytest.approx(np.std([1, 0.5, 0, 1], ddof=1) / 2)


def test_turning_all_pairs_round_turns_accuracy_round():
    values, groups = np.random.default_rng(0).normal(size=50), list(range(50))
    there, back = measures.accuracy(values, groups), measures.accuracy(-values, groups)
    assert there[0] + back[0] == pytest.approx(1) and there[1] == pytest.approx(back[1])


def test_the_gain_over_a_rule_is_paired():
    """A rule that is right on the same pairs is no better and no worse, with certainty."""
    values = np.array([1.0, -1.0, 2.0, -0.5])
    assert measures.gain(values, 10 * values, [0, 1, 2, 3]) == (0.0, 0.0)
    assert measures.gain(values, -values, [0, 1, 2, 3])[0] == 0.0
    assert measures.gain([1.0, 1.0], [-1.0, 1.0], [0, 1])[0] == 0.5


def test_one_group_has_no_error():
    assert measures.accuracy([1.0, -1.0], ["q", "q"]) == (0.5, None)


def calibrated(confidences: list[float], of_each: int) -> np.ndarray:
    """Differences of which those with confidence c are put in the right order in just a share c of the pairs."""
    made = []
    for confidence in confidences:
        size = math.log(confidence / (1 - confidence))
        right = round(confidence * of_each)
        made += [size] * right + [-size] * (of_each - right)
    return np.array(made)


def test_calibrated_scores_have_no_calibration_error():
    assert measures.calibration_error(calibrated([0.55, 0.65, 0.8, 0.95], 100)) == pytest.approx(0, abs=1e-12)


def test_sampled_from_its_own_probabilities_the_error_vanishes():
    generator = np.random.default_rng(0)
    errors = []
    for number in (400, 40_000):
        size = generator.exponential(2.0, number)
        chosen = generator.random(number) < measures.sigmoid(size)
        errors.append(measures.calibration_error(np.where(chosen, size, -size)))
    assert errors[1] < 0.01 < errors[0]


def test_a_constant_predictor_is_calibrated_and_knows_nothing():
    """P is a half everywhere, and as no response is put first, each pair counts a half."""
    assert measures.calibration_error(np.zeros(7)) == 0
    assert measures.accuracy(np.zeros(7), list(range(7)))[0] == 0.5
    assert measures.log_loss(np.zeros(7)) == pytest.approx(math.log(2))


def test_certain_and_wrong_is_the_worst_that_calibration_can_be():
    assert measures.calibration_error(np.full(5, -50.0)) == pytest.approx(1)
    assert measures.calibration_error(np.full(5, 50.0)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("pairs", [1, 2, 3, 4])
def test_small_cases_by_enumeration(pairs):
    """All sign patterns of differences in three bins, against the sum written out bin by bin."""
    sizes = np.array([0.1, 1.0, 4.0, 1.05])[:pairs]
    for pattern in range(2**pairs):
        signs = np.array([1 if pattern >> place & 1 else -1 for place in range(pairs)])
        total = 0.0
        for low in range(10):
            inside = []
            for size, sign in zip(sizes, signs, strict=True):
                confidence = 1 / (1 + math.exp(-size))
                if 0.5 + low / 20 <= confidence < 0.5 + (low + 1) / 20:
                    inside.append((float(sign > 0), confidence))
            if inside:
                right, sure = (sum(each) / len(inside) for each in zip(*inside, strict=True))
                total += len(inside) / pairs * abs(right - sure)
        assert measures.calibration_error(signs * sizes) == pytest.approx(total, abs=1e-12)


def test_calibration_needs_pairs():
    with pytest.raises(MoalignError, match="no pairs"):
        measures.calibration_error([])


def test_the_fitted_slope_has_the_least_loss():
    generator = np.random.default_rng(1)
    size = generator.normal(size=500) ** 2
    values = np.where(generator.random(500) < measures.sigmoid(3 * size), size, -size)
    slope = measures.fitted_slope(values)
    assert slope == pytest.approx(3, rel=0.2)
    least = measures.log_loss(values, slope)
    assert all(measures.log_loss(values, slope * factor) > least for factor in (0.5, 0.9, 1.1, 2))
    # of data drawn from slope 1 of other units, the slope follows the units
    assert measures.fitted_slope(10 * values) == pytest.approx(slope / 10, rel=1e-6)


def test_a_slope_without_a_best_value_says_so():
    assert measures.fitted_slope([-1.0, -2.0, 1.0]) == 0  # worse than a coin: no positive slope is better than none
    assert measures.fitted_slope([1.0, 2.0], largest=1e3) == 500  # all right: the steeper the better
    assert measures.fitted_slope([0.0, 0.0]) == 0


def test_the_slope_of_a_pair_comes_of_other_groups():
    generator = np.random.default_rng(2)
    size = generator.normal(size=200) ** 2
    values = np.where(generator.random(200) < measures.sigmoid(size), size, -size)
    groups = [number // 2 for number in range(200)]
    slopes = measures.cross_fitted_slopes(values, groups)
    assert slopes is not None
    one, other = sorted(set(slopes.tolist()))
    assert (slopes[0::2] == slopes[1::2]).all()  # a group is in one half
    halves = [values[slopes == each] for each in (one, other)]
    assert sorted(measures.fitted_slope(each) for each in halves) == [one, other]
    assert measures.fitted_slope(halves[0]) == other  # and has the slope of the other half
    changed = values.copy()
    changed[slopes == one] *= 3  # which does not depend on its own pairs
    again = measures.cross_fitted_slopes(changed, groups)
    assert again is not None and (again[slopes == one] == one).all()
    assert again[slopes == other] == pytest.approx(other / 3)


def test_no_slope_is_made_up_where_no_slope_is_the_best():
    assert measures.cross_fitted_slopes([1.0, 2.0, 3.0, 4.0], [0, 1, 2, 3]) is None  # all in the right order
    assert measures.cross_fitted_slopes([1.0, -2.0], [0, 0]) is None  # a single group has no halves


def test_each_pair_may_have_a_slope_of_its_own():
    values, slopes = np.array([0.5, -1.0, 2.0]), np.array([2.0, 3.0, 0.5])
    assert measures.log_loss(values, slopes) == pytest.approx(measures.log_loss(values * slopes))
    assert measures.calibration_error(values, slopes) == pytest.approx(measures.calibration_error(values * slopes))
    assert measures.calibration_error(values, 0.0) == pytest.approx(abs(2 / 3 - 0.5))  # sure of nothing


def test_agreement_has_accuracy_on_its_diagonal():
    differences = [[1.0, -1.0], [2.0, 1.0], [-1.0, 0.0]]
    judges = [0, 0, 1]
    assert measures.agreement(differences, judges) == [[1.0, 0.5], [0.0, 0.5]]
    assert measures.agreement(differences, [0, 0, 0])[1] == [None, None]


def test_rank_correlation_knows_order_alone():
    scores = np.array([[1.0, 10.0, -1.0, 5.0], [2.0, 100.0, -2.0, 5.0], [3.0, 101.0, -30.0, 5.0]])
    table = measures.spearman(scores)
    assert table[0][:3] == pytest.approx([1, 1, -1])
    assert table[0][3] is None and table[3][3] is None
    tied = measures.spearman([[1.0, 1.0], [1.0, 2.0], [2.0, 3.0]])
    assert tied[0][1] == pytest.approx(math.sqrt(3) / 2)  # ranks 1.5, 1.5, 3 against 1, 2, 3


def test_the_deviation_of_one_member_is_not_known():
    assert measures.spread([0.7]) is None
    assert measures.spread([0.5, 0.7]) == pytest.approx(np.std([0.5, 0.7], ddof=1))
