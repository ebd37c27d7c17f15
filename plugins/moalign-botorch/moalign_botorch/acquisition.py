"""Which weights promise most: expected hypervolume improvement under noise, in logarithms, one point at a time."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moalign_botorch.simplex import Weights, is_near, rounded

if TYPE_CHECKING:
    from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
    from botorch.models import ModelListGP

_COARSE = {1: 0.0, 2: 0.0, 3: 0.0, 4: 1e-3}  # by objectives: of the volume, cells that are not split any more
_COARSER = 1e-2  # of five and more
_STEPS = 15  # of a climb; more gain less than the expectation's own error


def improvement(
    model: ModelListGP,
    trained: Sequence[Weights],
    reference: Sequence[float],
    pending: Sequence[Weights],
    samples: int,
    seed: int,
) -> qLogNoisyExpectedHypervolumeImprovement:
    """log E[gain in hypervolume] of arXiv 2105.08195 and 2310.20708 over what is trained, by quasi-Monte Carlo.

    The volume is cut into cells exactly for up to three objectives, for more but roughly (``_COARSE``), else it takes
    minutes. ``pending``: weights from which nothing more is to be expected; they count as if their values were there.
    """
    import torch
    from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
    from botorch.sampling.normal import SobolQMCNormalSampler

    _compile_nothing()
    return qLogNoisyExpectedHypervolumeImprovement(
        model=model,
        ref_point=list(reference),
        X_baseline=torch.tensor(list(trained), dtype=torch.float64),
        sampler=SobolQMCNormalSampler(torch.Size([samples]), seed=seed),
        prune_baseline=True,
        alpha=_COARSE.get(len(reference), _COARSER),
        X_pending=torch.tensor(list(pending), dtype=torch.float64) if pending else None,
    )


def _compile_nothing() -> None:
    """botorch would have a kernel of its own compiled at first use, if there is a compiler: half a minute, which a few
    dozen points never repay. And a run goes on by computing again what was proposed, so that must not depend on it."""
    from botorch.acquisition.multi_objective import logei

    logei._load_attempted = True  # it has no other switch


def promising(
    model: ModelListGP,
    trained: Sequence[Weights],
    reference: Sequence[float],
    known: Sequence[Weights],
    pool: Sequence[Weights],
    samples: int,
    restarts: int,
    seed: int,
) -> Weights | None:
    """The best weights that are not near any of ``known``; those of them that are not trained count as pending.

    Climbs begin at the best of ``pool``, which stand in for climbs that ended lower. None where all of it is near.
    """
    free = [point for point in pool if not is_near(point, known)]
    if not free:
        return None
    pending = [point for point in known if point not in trained]
    acquisition = improvement(model, trained, reference, pending, samples, seed)
    starts = _best_first(acquisition, free)[:restarts]
    found = _best_first(acquisition, [*_climbed(acquisition, starts), *starts])
    return next(point for point in found if not is_near(point, known))


def _best_first(acquisition: qLogNoisyExpectedHypervolumeImprovement, points: Sequence[Weights]) -> list[Weights]:
    import torch

    with torch.no_grad():
        worth = acquisition(torch.tensor(list(points), dtype=torch.float64)[:, None])
    order = sorted(range(len(points)), key=lambda i: -round(float(worth[i]), 9))
    return [points[i] for i in order]


def _climbed(acquisition: qLogNoisyExpectedHypervolumeImprovement, starts: Sequence[Weights]) -> list[Weights]:
    """Where the climbs from these weights end; nothing where the optimiser fails.

    On the simplex itself, by an equality: no objective is the one whose weight follows from the others'.
    """
    import torch
    from botorch.exceptions.errors import BotorchError, OptimizationGradientError
    from botorch.optim import optimize_acqf
    from linear_operator.utils.errors import NanError, NotPSDError

    objectives = len(starts[0])
    one = (torch.arange(objectives), torch.ones(objectives, dtype=torch.float64), 1.0)
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # of restarts that end early; the best of all counts
            points, _ = optimize_acqf(
                acquisition,
                bounds=torch.tensor([[0.0] * objectives, [1.0] * objectives], dtype=torch.float64),
                q=1,
                num_restarts=len(starts),
                batch_initial_conditions=torch.tensor(list(starts), dtype=torch.float64)[:, None],
                equality_constraints=[one],
                return_best_only=False,
                options={"maxiter": _STEPS},
            )
    except (BotorchError, NanError, NotPSDError, OptimizationGradientError) as error:
        warnings.warn(f"bayesian: the best weights drawn are used, not climbed from ({error})", RuntimeWarning, 2)
        return []
    return [rounded(point) for point in points[:, 0].tolist()]
