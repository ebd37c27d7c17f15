"""Made-up batches for the forms of reward models, and what every form must satisfy. Everything in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moalign.api import Batch, RewardModel

NAMES = ("helpful", "harmless", "brief")
ROWS, TOKENS, WIDTH = 7, 5, 4
PAIRS = ((0, 1), (2, 1), (3, 4), (5, 3), (4, 5))  # row 6 is in none

STATES = ("final", "context", "logps")


def moved(form: RewardModel, objectives: tuple[str, ...] = NAMES, seed: int = 0, by: float = 0.3) -> dict[str, Tensor]:
    """The form's parameters somewhere else than at their start, as training has them."""
    generator = torch.Generator().manual_seed(seed)
    first = form.parameters(WIDTH, objectives, generator)
    return {
        name: value.double() + by * torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in first.items()
    }


def made_up(form: RewardModel, objectives: tuple[str, ...] = NAMES, *, missing: bool = False, seed: int = 0) -> Batch:
    """What the form says it needs and nothing else; ``missing``: a score, and all scores of row 6, are unknown."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mask = (torch.arange(TOKENS) < torch.tensor([5, 3, 4, 1, 2, 5, 3])[:, None]).double()
    rewards, pairs = normal(ROWS, len(objectives)), torch.tensor(PAIRS)
    if any(field == "beta" for field in type(form).model_fields):
        rewards = (rewards > 0).double()  # outcomes
    if missing:
        rewards[1, 0] = rewards[6] = torch.nan
    final, context, logps, reference = normal(ROWS, WIDTH), normal(ROWS, WIDTH), normal(ROWS, TOKENS), normal(ROWS, 5)
    known: dict[str, Any] = {"final": final, "context": context, "rewards": rewards}
    supplied = {name: value for name, value in known.items() if name in form.needs}
    strength = torch.rand(len(pairs), generator=generator, dtype=torch.float64) + 0.5
    return Batch(
        logps=logps * mask if "logps" in form.needs else torch.zeros_like(mask),
        mask=mask,
        pairs=pairs if "pairs" in form.needs else pairs[:0],
        pair_objective=torch.arange(len(pairs) if "pairs" in form.needs else 0) % len(objectives),
        preference=torch.zeros(ROWS, len(objectives), dtype=torch.float64),
        strength=strength if "pairs" in form.needs else strength[:0],
        groups=torch.tensor([0, 0, 0, 1, 1, 1, 2]),
        ref_logps=reference * mask if "reference" in form.needs else None,
        parameters=moved(form, objectives),
        objectives=objectives,
        **supplied,
    )


def leaves(form: RewardModel, batch: Batch) -> dict[str, Tensor]:
    """What carries a gradient: the parameters by name, and the states or log-probabilities that the form reads."""
    read: dict[str, Tensor] = {
        name: getattr(batch, name) for name in ("final", "context", "logps") if name in form.needs
    }
    return {**batch.parameters, **read}


def with_leaves(batch: Batch, values: dict[str, Tensor]) -> Batch:
    states: dict[str, Any] = {name: values[name] for name in STATES if name in values}
    return replace(batch, parameters={name: values[name] for name in batch.parameters}, **states)


def gradients(form: RewardModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses, and the gradient of their sum in all leaves."""
    values = {name: value.clone().requires_grad_() for name, value in leaves(form, batch).items()}
    losses = form.loss(with_leaves(batch, values))
    found = torch.autograd.grad(losses.sum(), list(values.values()), allow_unused=True)
    zero = [
        torch.zeros_like(value) if grad is None else grad for value, grad in zip(values.values(), found, strict=True)
    ]
    return losses.detach(), dict(zip(values, zero, strict=True))


def check_form(form: RewardModel, objectives: tuple[str, ...] = NAMES, *, missing: bool = False) -> None:
    """One loss per pair or row, its gradient, no use of what is not needed, and the order of rows and pairs."""
    form.check(objectives)
    batch = made_up(form, objectives, missing=missing)
    units = len(PAIRS) if "pairs" in form.needs else ROWS
    losses, found = gradients(form, batch)
    assert losses.shape == (units,) and losses.isfinite().all()
    assert all(value.isfinite().all() for value in found.values())
    assert any(value.abs().sum() > 1e-3 for value in found.values())
    values = {name: value.clone().requires_grad_() for name, value in leaves(form, batch).items()}
    assert torch.autograd.gradcheck(
        lambda *given: form.loss(with_leaves(batch, dict(zip(values, given, strict=True)))), tuple(values.values())
    )
    check_order(form, batch)
    check_rows_alone(form, batch)
    first = form.parameters(WIDTH, objectives, torch.Generator().manual_seed(3))
    again = form.parameters(WIDTH, objectives, torch.Generator().manual_seed(3))
    assert all(value.dtype == torch.float32 and value.equal(again[name]) for name, value in first.items())
    assert all(form.lr_factor(name) > 0 for name in first)


def check_order(form: RewardModel, batch: Batch) -> None:
    """Rows and pairs in another order have the same losses and scores in that order."""
    generator = torch.Generator().manual_seed(1)
    rows, order = torch.randperm(ROWS, generator=generator), torch.randperm(len(batch.pairs), generator=generator)
    other = rearranged(batch, rows, order)
    expected = form.loss(batch)[order if "pairs" in form.needs else rows]
    torch.testing.assert_close(form.loss(other), expected, rtol=1e-12, atol=1e-12)
    scores = form.scores(batch)
    assert scores.shape == (ROWS, len(batch.objectives))
    torch.testing.assert_close(form.scores(other), scores[rows], rtol=1e-12, atol=1e-12, equal_nan=True)


def check_rows_alone(form: RewardModel, batch: Batch) -> None:
    """A row's scores do not depend on who else is in the batch, and head() is what they are, where there is one."""
    scores = form.scores(batch)
    for row in range(ROWS):
        alone = rearranged(batch, torch.tensor([row]), torch.tensor([], dtype=torch.long))
        torch.testing.assert_close(form.scores(alone)[0], scores[row], rtol=1e-12, atol=1e-12, equal_nan=True)
    head = form.head(batch.parameters)
    if head is not None:
        assert batch.final is not None
        torch.testing.assert_close(batch.final @ head.T, scores)


def rearranged(batch: Batch, rows: Tensor, order: Tensor) -> Batch:
    place = torch.full((len(batch.mask),), -1)
    place[rows] = torch.arange(len(rows))
    names = ("logps", "mask", "preference", "groups", "ref_logps", "rewards", "final", "context")
    of_rows = {name: getattr(batch, name) for name in names}
    changed: dict[str, Any] = {name: None if value is None else value[rows] for name, value in of_rows.items()}
    return replace(
        batch,
        pairs=place[batch.pairs[order]],
        pair_objective=batch.pair_objective[order],
        strength=batch.strength[order],
        **changed,
    )
