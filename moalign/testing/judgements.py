"""Made-up batches as the engine hands them to reward models, and how their losses move with their scores."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from moalign.api import Batch
from moalign.testing.batch import WIDTH, made_up

if TYPE_CHECKING:
    from torch import Tensor

STATES = ("final", "context", "logps")  # what carries a graph
OF_PAIRS = ("pairs", "pair_objective", "strength")


def judged(*, prompts: int, tokens: int, objectives: int, needs: Collection[str], seed: int, dtype: Any) -> Batch:
    """3 responses and 3 pairs per prompt, and one row more, without response tokens, that no pair names.

    Of what ``needs`` may name only that is there which it names; each has the same numbers whatever else is there.
    Rewards are between 0 and 1, some are NaN, and of row 1 and the last one all.
    """
    import torch

    batch = made_up(
        prompts=prompts,
        tokens=tokens,
        preference=[1 / objectives] * objectives,
        needs=frozenset(needs) & {"reference"},
        scored=False,
        seed=seed,
        dtype=dtype,
    )
    rows, generator = len(batch.logps), torch.Generator().manual_seed(seed + 1)
    final = torch.randn((rows, WIDTH), generator=generator, dtype=torch.float64).to(dtype)
    contexts = torch.randn((rows, WIDTH), generator=generator, dtype=torch.float64).to(dtype)
    rewards = torch.rand((rows, objectives), generator=generator, dtype=torch.float64).to(dtype)
    rewards[torch.rand(rewards.shape, generator=generator) < 0.25] = torch.nan
    rewards[[1, -1]] = torch.nan
    batch = replace(
        batch,
        final=final if "final" in needs else None,
        context=contexts[batch.groups] if "context" in needs else None,
        rewards=rewards if "rewards" in needs else None,
        logps=batch.logps if "logps" in needs else torch.zeros_like(batch.logps),
    )
    return batch if "pairs" in needs else without_pairs(batch)


def without_pairs(batch: Batch) -> Batch:
    return replace(batch, **{name: getattr(batch, name)[:0] for name in OF_PAIRS})


def unlabelled(batch: Batch) -> Batch:
    """As it is where responses are scored that nobody has judged."""
    return replace(without_pairs(batch), rewards=None)


def otherwise(batch: Batch, other: Batch) -> dict[str, tuple[str, Batch]]:
    """The batch with something else in place of each thing that a form may need, by its name in ``needs``."""
    names = {each.name: getattr(other, each.name) for each in fields(other)}
    swapped = replace(batch, pairs=batch.pairs.flip(1))
    return {
        "final": ("other last hidden states", replace(batch, final=names["final"])),
        "context": ("other hidden states at the prompts' ends", replace(batch, context=names["context"])),
        "pairs": ("chosen and rejected the other way round", swapped),
        "rewards": ("other rewards", replace(batch, rewards=names["rewards"])),
        "logps": ("other log-probabilities", replace(batch, logps=names["logps"] * batch.mask)),
        "reference": ("other log-probabilities under the base", replace(batch, ref_logps=names["ref_logps"])),
    }


def leaves_of(batch: Batch, needs: Collection[str]) -> dict[str, Tensor]:
    """What a gradient goes to, as tensors of their own, by the field that they stand in."""
    found = {name: getattr(batch, name) for name in STATES if name in needs}
    return {name: value.detach().clone().requires_grad_() for name, value in found.items()}


def standing_in(batch: Batch, leaves: dict[str, Tensor]) -> Batch:
    """The batch with these in the place of its own."""
    fields_of: dict[str, Any] = dict(leaves)
    return replace(batch, **fields_of)


def slopes(values: Tensor, leaves: dict[str, Tensor]) -> Tensor:
    """Of a value per row of the leaves, where each depends on its own row; [N,K], all leaves of a row side by side."""
    import torch

    found = torch.autograd.grad(values.sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
    rows = [
        (torch.zeros_like(leaf) if each is None else each).flatten(1)
        for each, leaf in zip(found, leaves.values(), strict=True)
    ]
    return torch.cat(rows, 1)


def raising(scores: Tensor, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """In which direction a row's states move so that one of its scores rises by 1, and no other: [N,M,K]; and [N,M],
    whether there is such a direction."""
    import torch

    jacobian = torch.stack([slopes(scores[:, place], leaves) for place in range(scores.shape[1])], 1)
    directions = torch.linalg.pinv(jacobian).transpose(1, 2)  # [N,M,K]
    reached = jacobian @ directions.transpose(1, 2)  # [N,M,M]
    same = torch.isclose(reached, torch.eye(scores.shape[1], dtype=reached.dtype), atol=1e-6)
    return directions, same.all(1)
