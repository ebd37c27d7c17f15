"""What each objective's value is expected to be at weights that nobody trained, and how surely."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

from moalign.api import Outcome, Space, values

from moalign_botorch.simplex import Weights

if TYPE_CHECKING:
    from botorch.models import ModelListGP, SingleTaskGP
    from torch import Tensor

EXACT = 2e-6  # least variance of the noise, in variances of the values; below half of it gpytorch warns
LEAST_SPREAD = 1e-8  # of values that are standardised; the outcome transform leaves less as it is


@dataclass(frozen=True)
class Measured:
    """n finished candidates and M objectives. All larger is better.

    ``weights``    [n,M]
    ``values``     [n,M], what KL costs taken off
    ``variances``  [n,M], squared standard errors of the values; None where not known
    """

    weights: tuple[Weights, ...]
    values: tuple[tuple[float, ...], ...]
    variances: tuple[tuple[float | None, ...], ...]


def measured(space: Space, history: Sequence[Outcome]) -> Measured:
    """What the history says of weights, in an order of its own; without what failed, was skipped, or has no weights."""
    rows = []
    for outcome in history:
        known = outcome.status == "done" and all(name in outcome.scores for name in space.objectives)
        if known and outcome.preference.kind == "weights":
            found = values(outcome, space)
            if all(map(isfinite, found)):
                rows.append((outcome.preference.vector(space.objectives), outcome.id, found, _errors(outcome, space)))
    rows.sort(key=lambda row: row[:2])
    return Measured(tuple(r[0] for r in rows), tuple(r[2] for r in rows), tuple(r[3] for r in rows))


def _errors(outcome: Outcome, space: Space) -> tuple[float | None, ...]:
    """Variance of each value: of the score, and of the KL by its price, as if the two were independent."""
    of_kl = (space.kl_price * outcome.details.get("kl_stderr", 0.0)) ** 2
    errors = [outcome.stderr.get(name) for name in space.objectives]
    return tuple(None if error is None or not isfinite(error) else error**2 + of_kl for error in errors)


def fit(data: Measured) -> ModelListGP:
    """An independent Gaussian process per objective with noise of known variance, hyper-parameters at their mode.

    One whose fit fails stays at the mode of its prior, with a RuntimeWarning.
    """
    import torch
    from botorch.models import ModelListGP

    weights = torch.tensor(data.weights, dtype=torch.float64)
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*data.values, strict=True)]
    noises = [noise(column, known) for column, known in zip(columns, zip(*data.variances, strict=True), strict=True)]
    return ModelListGP(*[_fitted(weights, column, var) for column, var in zip(columns, noises, strict=True)])


def noise(column: Tensor, known: Sequence[float | None]) -> Tensor:
    """[n], variance of the noise of one objective's values [n].

    Where some are not known, the largest of the others stands for them; where none is, the values count as exact.
    """
    import torch

    largest = max((each for each in known if each is not None), default=0.0)
    spread = float(column.std()) if len(column) > 1 else 0.0
    least = EXACT * (spread**2 if spread >= LEAST_SPREAD else 1.0)
    filled = [largest if each is None else each for each in known]
    return torch.tensor(filled, dtype=torch.float64).clamp(min=least)


def _fitted(weights: Tensor, column: Tensor, variance: Tensor) -> SingleTaskGP:
    import torch
    from botorch.exceptions.errors import BotorchError, ModelFittingError
    from botorch.fit import fit_gpytorch_mll
    from gpytorch.mlls import ExactMarginalLogLikelihood
    from linear_operator.utils.errors import NanError, NotPSDError

    model = _process(weights, column, variance)
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # of attempts; what matters is raised
            fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        return model
    except (BotorchError, ModelFittingError, NanError, NotPSDError) as error:
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"bayesian: the fit failed, the prior's mode is used ({reason})", RuntimeWarning, stacklevel=2)
        return _process(weights, column, variance).eval()


def _process(weights: Tensor, column: Tensor, variance: Tensor) -> SingleTaskGP:
    from botorch.models import SingleTaskGP
    from botorch.models.transforms import Standardize

    return SingleTaskGP(
        weights, column[:, None], train_Yvar=variance[:, None], outcome_transform=Standardize(1, min_stdv=LEAST_SPREAD)
    )
