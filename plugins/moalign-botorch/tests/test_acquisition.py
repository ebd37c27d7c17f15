"""The acquisition against expected hypervolume improvement in closed form."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from made_up import candidate, outcome, space
from torch.distributions import Normal

from moalign_botorch.acquisition import improvement, promising
from moalign_botorch.simplex import NEAR, is_near
from moalign_botorch.surrogate import Measured, fit, measured


def expected_improvement(mean, sd, above):
    """E[max(y - above, 0)] of y ~ N(mean, sd^2): (mean - above) Phi(z) + sd phi(z)."""
    z = (mean - above) / sd
    normal = Normal(torch.zeros((), dtype=torch.float64), 1.0)
    return (mean - above) * normal.cdf(z) + sd * normal.log_prob(z).exp()


def expected_hypervolume_improvement(mean, sd, front, reference):
    """Of two independent objectives, [n]: a sum over the strips between the front's points, each a product.

    Above strip (a, b) of the first objective the front is at height h: the gain there is the part of (a, b) below y1,
    times max(y2 - h, 0), and the former is max(y1 - a, 0) - max(y1 - b, 0).
    """
    points = sorted(front)
    edges = [reference[0], *[x for x, _ in points], float("inf")]
    heights = [*[y for _, y in points], reference[1]]
    total = torch.zeros(len(mean), dtype=torch.float64)
    for (low, high), height in zip(pairwise(edges), heights, strict=True):
        width = expected_improvement(mean[:, 0], sd[:, 0], low)
        if high < float("inf"):
            width = width - expected_improvement(mean[:, 0], sd[:, 0], high)
        total += width * expected_improvement(mean[:, 1], sd[:, 1], height)
    return total


def line(shares):
    return measured(space(2), [outcome(candidate(share, 1 - share), (1, 1)) for share in shares])


@pytest.mark.parametrize("shares", [(0.5,), (0.1, 0.5, 0.8)], ids=["one point", "three points"])
def test_it_is_the_closed_form(shares):
    """Of one objective it would be expected improvement; of two, products of it. Values are exact, so that the front
    is known; the rest is the error of 4,096 quasi-random samples and the smooth maximum's."""
    data, reference = line(shares), (-0.2, -0.2)
    model = fit(data)
    at = torch.tensor([[0.0, 1.0], [0.25, 0.75], [0.33, 0.67], [0.65, 0.35], [0.95, 0.05]], dtype=torch.float64)
    with torch.no_grad():
        found = improvement(model, data.weights, reference, (), 4096, 1)(at[:, None])
        posterior = model.posterior(at)
        sd = posterior.variance.sqrt()
        expected = expected_hypervolume_improvement(posterior.mean, sd, data.values, reference)
    assert sd.min() > 0.01
    torch.testing.assert_close(found, expected.log(), rtol=0, atol=0.08)


def test_of_one_objective_alone_it_is_expected_improvement():
    """The second is 1 everywhere, to a thousandth: the gain is that height times the first's improvement.

    Only where the improvement is not tiny: far below the front the smooth maximum has a floor.
    """
    shares = (0.2, 0.4, 0.6)
    values = tuple((share, 1.0) for share in shares)
    weights = tuple((share, 1 - share) for share in shares)
    model = fit(Measured(weights, values, tuple((None, None) for _ in shares)))
    model.models[1].covar_module.lengthscale = 1e4  # no weights are far from those known
    at = torch.tensor([[0.7, 0.3], [0.9, 0.1]], dtype=torch.float64)
    with torch.no_grad():
        found = improvement(model, weights, (-1.0, 0.0), (), 4096, 2)(at[:, None])
        first, second = (each.posterior(at) for each in model.models)
        single = expected_improvement(first.mean[:, 0], first.variance.sqrt()[:, 0], 0.6)
    assert (second.mean - 1).abs().max() < 1e-3 and second.variance.max() < 1e-6
    assert single.min() > 0.03
    torch.testing.assert_close(found, single.log(), rtol=0, atol=0.01)


def test_pending_weights_promise_less():
    data = line((0.0, 0.3, 1.0))
    model, at = fit(data), torch.tensor([[[0.6, 0.4]]], dtype=torch.float64)
    with torch.no_grad():
        free, taken = (improvement(model, data.weights, (0, 0), p, 256, 3)(at).item() for p in ((), ((0.61, 0.39),)))
    assert taken < free - 1


def test_a_climb_ends_no_lower_than_it_began_and_not_at_what_is_known():
    data, pool = line((0.0, 0.4, 1.0)), [(0.2, 0.8), (0.55, 0.45), (0.9, 0.1)]
    model = fit(data)
    found = promising(model, data.weights, (-0.1, -0.1), data.weights, pool, 256, 2, 4)
    assert found is not None and not is_near(found, data.weights)
    at = torch.tensor([found, *pool], dtype=torch.float64)[:, None]
    with torch.no_grad():
        worth = improvement(model, data.weights, (-0.1, -0.1), (), 256, 4)(at)
    assert worth[0] >= worth[1:].max() - 1e-6
    near = [(0.4 + NEAR / 4, 0.6 - NEAR / 4)]
    assert promising(model, data.weights, (-0.1, -0.1), data.weights, near, 16, 2, 4) is None


def test_nothing_is_compiled(monkeypatch):
    """botorch would, with the machine's compiler, where there is one."""
    from botorch.acquisition.multi_objective import logei
    from torch.utils import cpp_extension

    asked = []
    monkeypatch.setattr(cpp_extension, "load", lambda **options: asked.append(options))
    monkeypatch.setattr(logei, "_load_attempted", False)
    data = line((0.1, 0.5, 0.8))
    improvement(fit(data), data.weights, (-0.2, -0.2), (), 16, 1)
    assert not asked and logei._C is None
