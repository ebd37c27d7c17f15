"""The Gaussian processes: what the history gives them, and what noise means to them."""

from __future__ import annotations

import warnings

import pytest
import torch
from made_up import NAMES, candidate, outcome, space
from moalign.api import Outcome, Preference, Space
from pytest import approx

from moalign_botorch import surrogate
from moalign_botorch.bayesian import reference_point
from moalign_botorch.surrogate import EXACT, Measured, fit, measured, noise

SHARES = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0)


def posterior(data, model=None):
    with torch.no_grad():
        found = (model or fit(data)).posterior(torch.tensor(data.weights, dtype=torch.float64))
    return found.mean, found.variance


def data(error):
    """A straight line but for one point that lies 1 too high, and has this standard error; the others 0.01."""
    values = [(share + (share == 0.45), 1 - share) for share in SHARES]
    errors = [(error**2 if share == 0.45 else 1e-4, 1e-4) for share in SHARES]
    return Measured(tuple((share, 1 - share) for share in SHARES), tuple(values), tuple(errors))


def test_a_value_with_a_large_error_is_not_interpolated():
    at = SHARES.index(0.45)
    noisy, sure = posterior(data(1.0)), posterior(data(0.01))
    assert noisy[0][at, 0].item() == approx(0.45, abs=0.1)  # where the others say
    assert sure[0][at, 0].item() == approx(1.45, abs=0.1)  # where it is
    assert noisy[1][at, 0] < 0.1  # by the others: far surer than the value itself, whose variance is 1


def test_the_posterior_is_the_closed_form():
    """Prior mean m, kernel k, noise S: m + k (k + S)^-1 (y - m) and k - k (k + S)^-1 k, of values in deviations of
    theirs. Nowhere is it less sure than the value measured there."""
    given = data(0.3)
    model = fit(given)
    found = posterior(given, model)
    weights, values, variances = (
        torch.tensor(each, dtype=torch.float64) for each in (given.weights, given.values, given.variances)
    )
    for column, single in enumerate(model.models):
        deviation, centre = values[:, column].std(), values[:, column].mean()
        scaled = (values[:, column] - centre) / deviation
        with torch.no_grad():
            kernel, prior = single.covar_module(weights).to_dense(), single.mean_module(weights)
        weighted = torch.linalg.solve(kernel + (variances[:, column] / deviation**2).diag(), kernel)
        mean = prior + weighted.T @ (scaled - prior)
        variance = (kernel - kernel @ weighted).diag()
        torch.testing.assert_close(found[0][:, column], centre + deviation * mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found[1][:, column], deviation**2 * variance, rtol=1e-5, atol=1e-8)
    assert (found[1] <= variances + 1e-9).all()


def test_exact_values_are_interpolated():
    exact = data(0.0)
    exact = Measured(exact.weights, exact.values, tuple((None, None) for _ in exact.weights))
    mean, variance = posterior(exact)
    expected = torch.tensor(exact.values, dtype=torch.float64)
    torch.testing.assert_close(mean, expected, rtol=0, atol=5e-3)
    assert variance.max() < 1e-4


def test_what_is_not_known_has_the_largest_error_that_is():
    column = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    assert noise(column, (0.04, None, 0.01)).tolist() == [0.04, 0.04, 0.01]
    assert noise(column, (None, None, None)).tolist() == approx([EXACT * column.var().item()] * 3)
    same = torch.ones(3, dtype=torch.float64)
    assert noise(same, (None, 0.0, None)).tolist() == [EXACT] * 3


def test_values_pay_for_kl_and_so_do_their_errors():
    names = NAMES[:2]
    where = Space(names, kl_price=0.1)
    weights = Preference("weights", {names[0]: 0.5, names[1]: 0.5})
    done = Outcome("a", "done", weights, dict(zip(names, (1.0, 2.0), strict=True)), {names[0]: 0.3}, kl=4.0)
    found = measured(where, [done, Outcome("b", "failed", weights), Outcome("c", "skipped", weights)])
    assert found.weights == ((0.5, 0.5),) and found.values[0] == approx((0.6, 1.6))
    assert found.variances == ((approx(0.09), None),)
    (variance, _) = measured(where, [Outcome(**{**_fields(done), "details": {"kl_stderr": 4.0}})]).variances[0]
    assert variance == approx(0.09 + 0.16)


def _fields(done: Outcome):
    return {name: getattr(done, name) for name in ("id", "status", "preference", "scores", "stderr", "kl")}


def test_other_preferences_are_left_out_and_the_order_of_the_history_does_not_matter():
    bound = Outcome("t", "done", Preference("thresholds", {NAMES[0]: 0.5}), dict.fromkeys(NAMES[:2], 1.0))
    some = [outcome(candidate(share, 1 - share), (1, 1)) for share in SHARES]
    assert measured(space(2), [bound, *some]) == measured(space(2), some[::-1])
    assert len(measured(space(2), some).weights) == len(SHARES)


def test_the_reference_point_is_the_spaces_or_below_the_worst():
    found = measured(space(2), [outcome(candidate(share, 1 - share), (1, 2)) for share in SHARES])
    assert reference_point(found, space(2, reference=-0.3)) == (-0.3, -0.3)
    assert reference_point(found, Space(NAMES[:2])) == approx((-0.1, -0.2))


def test_a_fit_that_fails_is_said_and_leaves_the_prior(monkeypatch):
    from botorch.exceptions.errors import ModelFittingError

    def fails(mll):
        mll.model.covar_module.lengthscale = 123.0
        raise ModelFittingError("no")

    monkeypatch.setattr("botorch.fit.fit_gpytorch_mll", fails)
    with pytest.warns(RuntimeWarning, match="the fit failed, the prior's mode is used"):
        model = fit(data(0.1))
    fresh = surrogate._process(*[torch.ones(2, 2, dtype=torch.float64), *2 * [torch.ones(2, dtype=torch.float64)]])
    torch.testing.assert_close(model.models[0].covar_module.lengthscale, fresh.covar_module.lengthscale)


def test_equal_values_everywhere_are_taken():
    flat = Measured(data(0.1).weights, tuple((2.0, 2.0) for _ in SHARES), tuple((None, None) for _ in SHARES))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        mean, _ = posterior(flat)
    torch.testing.assert_close(mean, torch.full_like(mean, 2.0), rtol=0, atol=1e-6)
