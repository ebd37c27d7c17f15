"""Made-up batches as the engine hands them to reward models."""

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


def judged(
    *,
    prompts: int,
    tokens: int,
    objectives: tuple[str, ...],
    needs: Collection[str],
    missing: bool,
    seed: int,
    dtype: Any,
) -> Batch:
    """3 responses and 3 pairs per prompt, and one row more, without response tokens, that no pair names.

    Of what ``needs`` may name only that is there which it names; each has the same numbers whatever else is there.
    Rewards are between 0 and 1. ``missing``: some of them are NaN, and of row 1 and the last one all.
    """
    import torch

    batch = made_up(
        prompts=prompts,
        tokens=tokens,
        preference=[1 / len(objectives)] * len(objectives),
        needs=frozenset(needs) & {"reference"},
        scored=False,
        seed=seed,
        dtype=dtype,
    )
    rows, generator = len(batch.logps), torch.Generator().manual_seed(seed + 1)
    final = torch.randn((rows, WIDTH), generator=generator, dtype=torch.float64).to(dtype)
    contexts = torch.randn((rows, WIDTH), generator=generator, dtype=torch.float64).to(dtype)
    rewards = torch.rand((rows, len(objectives)), generator=generator, dtype=torch.float64).to(dtype)
    if missing:
        rewards[torch.rand(rewards.shape, generator=generator) < 0.25] = torch.nan
        rewards[[1, -1]] = torch.nan
    batch = replace(
        batch,
        objectives=objectives,
        final=final if "final" in needs else None,
        context=contexts[batch.groups] if "context" in needs else None,
        rewards=rewards if "rewards" in needs else None,
        logps=batch.logps if "logps" in needs else torch.full_like(batch.logps, torch.nan),
    )
    return batch if "pairs" in needs else without_pairs(batch)


def without_pairs(batch: Batch) -> Batch:
    return replace(batch, **{name: getattr(batch, name)[:0] for name in OF_PAIRS})


def unlabelled(batch: Batch, *, rewards_are_labels: bool) -> Batch:
    """As it is where responses are scored that nobody has judged."""
    if batch.rewards is not None and rewards_are_labels:
        batch = replace(batch, rewards=batch.rewards * float("nan"))
    return without_pairs(batch)


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
