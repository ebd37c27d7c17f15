"""Rules over the losses of labelled pairs, and over their gradients: limits, closed forms, two quadratic losses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moalign.api import Batch, Combiner, PluginError, Preference, Round, StepLosses
from moalign.engine.weighing import Weighing
from moalign.testing.batch import made_up
from moalign_plugins.combiners._gradients import OverGradients
from moalign_plugins.combiners._losses import OverLosses
from moalign_plugins.combiners.cagrad import CAGrad
from moalign_plugins.combiners.chebyshev import Chebyshev
from moalign_plugins.combiners.mgda import MGDA
from moalign_plugins.combiners.smooth_chebyshev import SmoothChebyshev
from moalign_plugins.combiners.upgrad import RIDGE, UPGrad
from moalign_plugins.combiners.worst_case import WorstCase

NAMES = ("a", "b", "c")
WEIGHTS = (0.5, 0.2, 0.3)


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def weights(values=WEIGHTS) -> Preference:
    return Preference("weights", dict(zip(NAMES, values, strict=False)))


def pairs_of(preference) -> Batch:
    needs = frozenset({"pairs", "margins"})
    return made_up(
        prompts=4, tokens=3, preference=list(preference), needs=needs, scored=False, seed=0, dtype=torch.float64
    )


# --- rules over losses ----------------------------------------------------------------------------------------------


def step(losses, preference=WEIGHTS, number: int = 0, gradients: Tensor | None = None, judged=None) -> StepLosses:
    count = len(preference)
    pairs = torch.tensor([3] * count if judged is None else [3 * int(each) for each in judged])
    gram = None if gradients is None else gradients @ gradients.T
    return StepLosses(number, tensor(losses), pairs, tensor(preference), NAMES[:count], gram)


def weights_at(rule: Combiner, *seen: StepLosses) -> list[float]:
    """What the rule says of the last of these steps."""
    names = seen[-1].objectives
    state = rule.init(Preference("weights", dict(zip(names, seen[-1].preference.tolist(), strict=True))))
    for each in seen:
        state = rule.observe_losses(state, each)
    found = rule.loss_weights(state)
    return [found[name] for name in names]


def test_chebyshev_follows_the_worst_weighted_loss_alone():
    assert weights_at(Chebyshev(), step([1.0, 2.0, 1.0])) == [0.5, 0.0, 0.0]
    assert weights_at(Chebyshev(), step([0.7, 2.0, 1.0])) == [0.0, 0.2, 0.0]
    assert weights_at(Chebyshev(ideal_loss={"a": 0.6, "b": 0.0, "c": 0.0}), step([1.0, 1.0, 1.0])) == [0.0, 0.0, 0.3]
    assert weights_at(Chebyshev(), step([1.0, 1.0], (0.5, 0.5))) == [0.25, 0.25]  # equal ones share it


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01])
def test_smooth_chebyshev_weighs_by_the_gradient_of_the_log_sum_exp(temperature):
    """Against central differences; the error is the third derivative (below 1/t^2) times the step's square."""
    rule, losses = SmoothChebyshev(temperature=temperature), [0.7, 0.9, 0.8]
    found = weights_at(rule, step(losses))

    def value(at):
        return temperature * (tensor(WEIGHTS) * tensor(at) / temperature).logsumexp(0)

    for place in range(3):
        h = 1e-4 * temperature
        moved = [[*losses[:place], losses[place] + sign * h, *losses[place + 1 :]] for sign in (1, -1)]
        slope = float(value(moved[0]) - value(moved[1])) / (2 * h)
        assert found[place] == pytest.approx(slope, abs=2e-8 / temperature)


def test_smooth_chebyshev_goes_to_chebyshev_and_to_the_weighted_shares():
    sharp, hard = SmoothChebyshev(temperature=1e-4), Chebyshev()
    for losses in ([1.0, 2.0, 1.0], [0.7, 2.0, 1.0], [0.3, 0.4, 2.0]):
        assert weights_at(sharp, step(losses)) == pytest.approx(weights_at(hard, step(losses)), abs=1e-12)
    flat = weights_at(SmoothChebyshev(temperature=1e6), step([1.0, 2.0, 3.0]))
    assert flat == pytest.approx([w / 3 for w in WEIGHTS], rel=1e-5)
    equal = weights_at(SmoothChebyshev(temperature=0.1), step([0.6, 0.6], (0.5, 0.5)))
    assert equal == pytest.approx([0.25, 0.25], abs=1e-15)


def test_worst_case_is_chebyshev_without_the_weights():
    third = (1 / 3, 1 / 3, 1 / 3)
    assert weights_at(WorstCase(), step([0.3, 0.4, 0.2], third)) == [0.0, 1.0, 0.0]
    scaled = weights_at(Chebyshev(), step([0.3, 0.4, 0.2], third))
    assert [3 * value for value in scaled] == pytest.approx([0.0, 1.0, 0.0])


RULES_OVER_LOSSES = [Chebyshev(), SmoothChebyshev(), WorstCase()]


@pytest.mark.parametrize("rule", RULES_OVER_LOSSES, ids=repr)
def test_an_objective_that_judged_no_pair_of_the_step_is_left_out(rule):
    half = (0.5, 0.5, 0.0)
    found = weights_at(rule, step([9.0, math.nan, 9.0], half, judged=(True, False, True)))
    assert found[0] > 0 and found[1:] == [0.0, 0.0]
    assert weights_at(rule, step([math.nan] * 3, half, judged=(False, False, True))) == [0.0, 0.0, 0.0]


def test_memory_weighs_by_a_running_mean_that_outlasts_a_step_without_pairs():
    rule = WorstCase(memory=0.75)
    first, second = step([1.0, 0.5], (0.5, 0.5)), step([0.0, 0.6], (0.5, 0.5), 1)
    assert weights_at(rule, first, second) == [1.0, 0.0]  # 0.75 beside 0.525
    assert weights_at(WorstCase(), first, second) == [0.0, 1.0]
    missing = step([math.nan, 0.6], (0.5, 0.5), 1, judged=(False, True))
    third = step([0.5, 0.9], (0.5, 0.5), 2)
    # 0.75 1.0 + 0.25 0.5 = 0.875; 0.75 (0.75 0.5 + 0.25 0.6) + 0.25 0.9 = 0.61875
    assert weights_at(rule, first, missing, third) == [1.0, 0.0]
    state = rule.init(weights((0.5, 0.5)))
    for each in (first, missing, third):
        state = rule.observe_losses(state, each)
    assert state["losses"] == pytest.approx({"a": 0.875, "b": 0.61875})


# --- two quadratic losses, whose Pareto set is the segment between their minima ---------------------------------------

ENDS = tensor([[0.0, 0.0], [1.0, 0.0]])
START = tensor([0.4, 0.5])


def quadratic(at: Tensor) -> tuple[list[float], Tensor]:
    """|x - end_k|^2 / 2 and the gradients."""
    away = at - ENDS
    return (away.square().sum(1) / 2).tolist(), away


def descend(rule: Combiner, preference, steps: int, rate: float) -> list[Tensor]:
    path, state = [START], rule.init(weights(preference))
    for number in range(steps):
        losses, gradients = quadratic(path[-1])
        state = rule.observe_losses(state, step(losses, preference, number, gradients))
        found = rule.loss_weights(state)
        direction = tensor([found[name] for name in NAMES[:2]]) @ gradients
        path.append(path[-1] - rate * direction)
    return path


@pytest.mark.parametrize("preference", [(0.5, 0.5), (0.8, 0.2)])
def test_smooth_chebyshev_ends_where_weighted_losses_are_equal(preference):
    """sqrt(w_1) x = sqrt(w_2) (1 - x); at the minimum of the smooth one both are within t log of the ratio of p_k."""
    temperature = 1e-2
    x, y = descend(SmoothChebyshev(temperature=temperature), preference, 300, 0.1)[-1].tolist()
    roots = [math.sqrt(w) for w in preference]
    exact = roots[1] / sum(roots)
    # p_1 w_1 x = p_2 w_2 (1 - x), so that w_1 L_1 - w_2 L_2 = t log(w_2 (1 - x) / (w_1 x))
    shift = preference[0] * x**2 / 2 - preference[1] * (1 - x) ** 2 / 2
    assert shift == pytest.approx(temperature * math.log(preference[1] * (1 - x) / (preference[0] * x)), abs=1e-5)
    assert abs(y) < 1e-3 and x == pytest.approx(exact, abs=5 * temperature)


def installed(kind: type[Combiner]) -> None:
    for module in kind.requires:
        pytest.importorskip(module)


@pytest.mark.parametrize("kind", [MGDA, UPGrad])
@pytest.mark.parametrize("preference", [(0.5, 0.5), (0.7, 0.3)])
def test_no_loss_rises_on_the_way_to_the_pareto_set(kind: type[OverGradients], preference):
    """<d, g_k> >= 0 and a rate below the inverse curvature: neither rises but for the solver's ridge."""
    installed(kind)
    path = descend(kind(), preference, 200, 0.1)
    losses = tensor([quadratic(at)[0] for at in path])
    assert (losses.diff(dim=0) <= 2 * RIDGE).all()
    assert (losses[0] - losses[-1] > 0.05).all()
    x, y = path[-1].tolist()
    assert abs(y) < 1e-3 and 0 < x < 1  # on the segment, and no further
    plain = [START]
    for _ in range(200):
        plain.append(plain[-1] - 0.1 * tensor(preference) @ quadratic(plain[-1])[1])
    rising = tensor([quadratic(at)[0] for at in plain]).diff(dim=0)
    assert preference == (0.5, 0.5) or (rising > 1e-6).any()  # as the weighted sum lets one do


def test_mgda_stops_on_the_pareto_set():
    at = tensor([0.3, 0.0])
    losses, gradients = quadratic(at)
    found = tensor(weights_at(MGDA(), step(losses, (0.5, 0.5), gradients=gradients)))
    assert (found @ gradients).norm() < 1e-12 and (found > 0).all()


@pytest.mark.parametrize("radius", [0.0, 0.5])
def test_cagrad_ends_at_the_minimum_of_the_weighted_sum(radius):
    installed(CAGrad)
    preference = (0.7, 0.3)
    end = descend(CAGrad(radius=radius), preference, 80, 0.2)[-1]
    torch.testing.assert_close(end, tensor([0.3, 0.0]), rtol=0, atol=2e-2)


@pytest.mark.parametrize("kind", [MGDA, UPGrad, CAGrad])
def test_gradients_of_losses_are_weighed_as_those_of_rewards(kind: type[OverGradients]):
    installed(kind)
    gradients = torch.randn(3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    state = kind().init(weights())
    seen = Round(
        0, torch.zeros(1, 3), torch.zeros(1), torch.zeros(3, dtype=torch.float64), NAMES, gradients @ gradients.T
    )
    expected = list(kind().observe(state, seen)["weights"].values())
    assert weights_at(kind(), step([1.0, 1.0, 1.0], gradients=gradients)) == expected
    pair = weights_at(kind(), step([1.0, 1.0], (0.625, 0.375), gradients=gradients[[0, 2]]))
    gradients[1] = 0.0
    found = weights_at(kind(), step([1.0, math.nan, 1.0], (0.5, 0.2, 0.3), gradients=gradients, judged=(1, 0, 1)))
    assert found[1] == 0 and (kind is not UPGrad or found[0] > 0)
    ratio = found[0] * pair[1], found[2] * pair[0]
    assert ratio[0] == pytest.approx(ratio[1], abs=1e-6)  # as if the two were all, whatever their weights' sum


@pytest.mark.parametrize("rule", [*RULES_OVER_LOSSES, MGDA(), UPGrad()], ids=repr)
def test_labelled_pairs_are_seen_as_they_are(rule: OverLosses | OverGradients):
    batch = pairs_of((0.5, 0.0, 0.5))
    terms = rule.pair_terms(replace(batch, margins=None, rewards=None))
    assert (terms.scale == 1).all() and (terms.margin == 0).all()
    assert torch.equal(terms.weight, (batch.pair_objective != 1).double())
    nobody = replace(batch, pair_objective=batch.pair_objective.where(batch.pair_objective > 0, -1), rewards=None)
    with pytest.raises(PluginError):
        rule.pair_terms(nobody)


# --- what the engine makes of them ----------------------------------------------------------------------------------


class Told(Combiner):
    """Weighs the losses as it is told."""

    accepts = frozenset({"labelled"})
    weighs_losses = True
    needs_gram = True
    says: Any = None

    def observe_losses(self, state, seen):
        gram = seen.gram.tolist()
        return {"gram": gram, "losses": seen.losses.nan_to_num(-1).tolist(), "pairs": seen.pairs.tolist()}

    def loss_weights(self, state):
        return self.says


def settled(rule: Combiner, of_each: dict[int, list[Tensor]]) -> tuple[Weighing, list[torch.nn.Parameter], Any]:
    """After a step in which each objective left these gradients of two parameters, one the adapter's, in two passes."""
    made = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))]
    for parameter in made:
        parameter.grad = torch.zeros_like(parameter)
    weighing = Weighing(rule, weights((0.5, 0.5)), NAMES[:2], "w")
    weighing.begin()
    for judge, gradients in of_each.items():
        for part in (0.25, 0.75):
            for parameter, gradient in zip(made, gradients, strict=True):
                assert parameter.grad is not None
                parameter.grad += part * gradient
            weighing.keep(judge, part * (1.0 + judge), made)
    return weighing, made, weighing.settle(0, made, 1)


def test_a_step_follows_the_weighted_sum_of_the_objectives_gradients():
    first, second = [torch.tensor([1.0, 2.0]), torch.ones(3)], [torch.tensor([4.0, -1.0]), -torch.ones(3)]
    weighing, made, problem = settled(Told(says={"a": 0.5, "b": 2.0}), {0: first, 1: second})
    assert problem is None and weighing.minimised == pytest.approx(0.5 * 1 + 2 * 2)
    for parameter, one, other in zip(made, first, second, strict=True):
        torch.testing.assert_close(parameter.grad, 0.5 * one + 2 * other)
    assert weighing.state["gram"] == [[5.0, 2.0], [2.0, 17.0]]  # of the adapter's alone
    assert weighing.state["losses"] == [1.0, 2.0]
    weighing, made, problem = settled(Told(says={"a": 0.5, "b": 2.0}), {1: second})
    assert weighing.state["gram"] == [[0.0, 0.0], [0.0, 17.0]] and weighing.state["losses"] == [-1.0, 2.0]
    torch.testing.assert_close(made[0].grad, 2 * second[0])


def test_a_gradient_that_is_not_finite_is_the_problem_of_the_step_and_no_news_to_the_rule():
    weighing, made, problem = settled(
        Told(says={"a": 0.5, "b": 2.0}), {0: [torch.tensor([1.0, torch.inf]), torch.ones(3)]}
    )
    assert problem == "gradient of the loss of a is not finite" and weighing.state == {}
    assert (made[0].grad == 0).all()


@pytest.mark.parametrize(
    "said", [None, {"a": 1.0}, {"a": 1.0, "b": -0.1}, {"a": math.nan, "b": 1.0}, {"a": True, "b": 1.0}], ids=str
)
def test_weights_that_are_none_are_the_plugins_error(said):
    with pytest.raises(PluginError, match=r"Told.*in loss_weights: .* number that is not below 0 for each of a, b"):
        settled(Told(says=said), {0: [torch.ones(2), torch.ones(3)]})
