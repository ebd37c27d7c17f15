"""Made-up batches as the engine hands them to losses and combiners, and the same ones padded, cut or rearranged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moalign.api import Batch, PairTerms

if TYPE_CHECKING:
    from torch import Tensor

RESPONSES = 3  # to each prompt
TOLERANCE = 1e-9  # of float64 sums in another order, relative
WIDTH = 4  # of a hidden state
ORDER = ((0, 1), (0, 2), (2, 1))  # the pairs of a prompt: they share rows
OF_TOKENS = ("logps", "mask", "ref_logps", "base_logps", "old_logps", "token_advantages", "entropy")
OF_ROWS = (*OF_TOKENS, "hidden", "rewards", "advantages", "preference", "groups", "final", "context", "mismatched")
OF_PAIRS = ("pair_objective", "strength", "margins")


def made_up(
    *,
    prompts: int,
    tokens: int,
    preference: Sequence[float],
    needs: frozenset[str],
    scored: bool,
    seed: int,
    dtype: Any,
    guides: Sequence[str] = (),
    views: Sequence[str] = (),
) -> Batch:
    """3 responses and 3 pairs per prompt, and one row more, without response tokens, that no pair names.

    ``needs``: "reference", "base", "margins", "rewards", "old_logps", "entropy", "hidden" and "mismatched" are supplied
    where they are in it, and only there; with "groups" every row has an advantage and is a pair with itself.
    ``scored``: pairs that no single objective judged. ``guides``: names of further frozen policies; ``views``: of
    further sequences of each pair, whose rows stand behind all others. The numbers are the same for every dtype, to its
    rounding.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    rows, objectives = prompts * RESPONSES, len(preference)
    pairs = torch.tensor([(g * RESPONSES + a, g * RESPONSES + b) for g in range(prompts) for a, b in ORDER])
    lengths = torch.randint(1, tokens + 1, (rows + 1 + len(views) * len(pairs),), generator=generator)
    lengths[0], lengths[rows] = tokens, 0
    mask = (torch.arange(tokens) < lengths[:, None]).to(dtype)
    shape = (len(lengths), tokens)
    logps = (-2 * torch.rand(shape, generator=generator, dtype=torch.float64)).to(dtype) * mask
    reference = (-2 * torch.rand(shape, generator=generator, dtype=torch.float64)).to(dtype) * mask
    rewards = torch.randn((len(lengths), objectives), generator=generator, dtype=torch.float64).to(dtype)
    if "groups" in needs:
        pairs = torch.arange(rows + 1)[:, None].repeat(1, 2)
    strength = 1 + torch.rand(len(pairs), generator=generator, dtype=torch.float64)
    nearby = (0.8 + 0.4 * torch.rand(shape, generator=generator, dtype=torch.float64)).to(dtype)
    advantages = torch.randn(len(lengths), generator=generator, dtype=torch.float64).to(dtype)
    hidden = torch.randn((*shape, WIDTH), generator=generator, dtype=torch.float64).to(dtype) * mask[:, :, None]
    entropy = (2 * torch.rand(shape, generator=generator, dtype=torch.float64)).to(dtype) * mask
    base = (-2 * torch.rand(shape, generator=generator, dtype=torch.float64)).to(dtype) * mask
    others = {name: -2 * torch.rand(shape, generator=generator, dtype=torch.float64) for name in guides}
    own = torch.arange(rows + 1, len(lengths)).reshape(len(views), len(pairs))
    return Batch(
        logps=logps,
        mask=mask,
        pairs=pairs,
        pair_objective=torch.full((len(pairs),), -1) if scored else torch.arange(len(pairs)) % objectives,
        preference=torch.tensor(preference, dtype=dtype).repeat(len(lengths), 1),
        strength=strength.to(dtype),
        groups=torch.cat([torch.arange(rows + 1) // RESPONSES, *[pairs[:, 0] // RESPONSES for _ in views]]),
        ref_logps=reference if "reference" in needs else None,
        rewards=rewards if needs & {"margins", "rewards"} else None,
        margins=rewards[pairs[:, 0]] - rewards[pairs[:, 1]] if "margins" in needs else None,
        advantages=advantages if "groups" in needs and "token_advantages" not in needs else None,
        old_logps=logps * nearby if "old_logps" in needs else None,
        entropy=entropy if "entropy" in needs else None,
        hidden=hidden if "hidden" in needs else None,
        mismatched=torch.full((len(lengths),), 0.3, dtype=dtype) if "mismatched" in needs else None,
        base_logps=base if "base" in needs else None,
        guides={name: values.to(dtype) * mask for name, values in others.items()},
        views=dict(zip(views, own, strict=True)),
    )


def plain_terms(batch: Batch) -> PairTerms:
    """Scale 1, margin 0, weight 1, and the difference of the weighted rewards where the batch has margins."""
    import torch

    ones = torch.ones_like(batch.strength)
    difference = None
    if batch.margins is not None:
        difference = (batch.margins * batch.preference[batch.pairs[:, 0]]).sum(-1)
    return PairTerms(ones, torch.zeros_like(ones), ones.clone(), difference)


def rearranged(batch: Batch, rows: Tensor, pairs: Tensor) -> Batch:
    """These rows and pairs in this order; the pairs' rows must be among the rows."""
    import torch

    place = torch.full((len(batch.logps),), -1)
    place[rows] = torch.arange(len(rows))
    changed: dict[str, Any] = {name: _at(getattr(batch, name), rows) for name in OF_ROWS}
    changed |= {name: _at(getattr(batch, name), pairs) for name in OF_PAIRS}
    for mapping in ("known", "guides"):
        changed[mapping] = {name: values[rows] for name, values in getattr(batch, mapping).items()}
    changed["views"] = {name: place[numbers[pairs]] for name, numbers in batch.views.items()}
    return replace(batch, pairs=place[batch.pairs[pairs]], **changed)


def rows_of(batch: Batch, pairs: Tensor) -> Tensor:
    """All rows that these pairs name, those of their views among them."""
    import torch

    return torch.cat([batch.pairs[pairs].flatten(), *[rows[pairs] for rows in batch.views.values()]]).unique()


def padded(batch: Batch, columns: int) -> Batch:
    """More columns without response tokens."""
    from torch.nn.functional import pad

    tensors: dict[str, Any] = {name: getattr(batch, name) for name in OF_TOKENS}
    wider: dict[str, Any] = {name: pad(value, (0, columns)) for name, value in tensors.items() if value is not None}
    wider["hidden"] = None if batch.hidden is None else pad(batch.hidden, (0, 0, 0, columns))
    for mapping in ("known", "guides"):
        wider[mapping] = {name: pad(values, (0, columns)) for name, values in getattr(batch, mapping).items()}
    return replace(batch, **wider)


def at_start(batch: Batch) -> Batch:
    """The policy is its reference, the base, and the one that sampled."""
    known = [name for name in ("ref_logps", "base_logps", "old_logps") if getattr(batch, name) is not None]
    start: dict[str, Any] = dict.fromkeys(known, batch.logps)
    return replace(batch, **start)


def swapped(batch: Batch) -> Batch:
    """Chosen and rejected change places, and with them the sign of the margins."""
    return replace(batch, pairs=batch.pairs.flip(1), margins=None if batch.margins is None else -batch.margins)


def _at(value: Tensor | None, index: Tensor) -> Tensor | None:
    return None if value is None else value[index]


def spoken(batch: Batch) -> Batch:
    """With distributions over 4 tokens, of which the first one's log-probability is that of the response token."""
    import torch

    rest = torch.tensor([0.3, -0.5, 1.1], dtype=batch.logps.dtype).log_softmax(0)

    def spread(logps: Tensor) -> Tensor:
        own = logps[batch.mask > 0][:, None].clamp(max=-1e-6)
        return torch.cat([own, torch.log(-torch.expm1(own)) + rest], 1)

    of = {"policy": batch.logps, **batch.guides}
    if batch.ref_logps is not None:
        of["reference"] = batch.ref_logps
    return replace(batch, distributions={name: spread(logps) for name, logps in of.items()})


def agrees(first: Tensor, second: Tensor) -> bool:
    """Whether they are the same, to float64 sums in another order."""
    import torch

    return first.shape == second.shape and bool(torch.isclose(first, second, rtol=TOLERANCE, atol=TOLERANCE).all())


def otherwise(batch: Batch, other: Batch) -> dict[str, tuple[str, Batch]]:
    """The batch with something else in place of what a loss may need, by its name in ``needs``: in words, and it."""
    masked = None if batch.ref_logps is None else (other.logps - 1) * batch.mask
    other_base = None if batch.base_logps is None else (other.logps - 1.5) * batch.mask
    older = None if batch.old_logps is None else batch.old_logps * 1.3
    weighed = None if other.token_advantages is None else (other.token_advantages + 1) * batch.mask
    hidden = None if batch.hidden is None else batch.hidden.flip(2)
    mismatched = None if batch.mismatched is None else batch.mismatched + 1
    guided = {name: (values - 1) * batch.mask for name, values in batch.guides.items()}
    moved = {name: rows.roll(1) for name, rows in batch.views.items()}
    found = {
        f"guides: {name}": (f"another guide '{name}'", replace(batch, guides={**batch.guides, name: values}))
        for name, values in guided.items()
    }
    found |= {
        f"views: {name}": (f"other rows of the view '{name}'", replace(batch, views={**batch.views, name: rows}))
        for name, rows in moved.items()
    }
    return found | {
        "reference": ("other log-probabilities under the reference", replace(batch, ref_logps=masked)),
        "base": ("other log-probabilities under the base", replace(batch, base_logps=other_base)),
        "margins": ("other margins and rewards", replace(batch, margins=other.margins, rewards=other.rewards)),
        "pairs": ("chosen and rejected the other way round", swapped(batch)),
        "groups": ("other advantages", replace(batch, advantages=other.advantages)),
        "old_logps": ("other log-probabilities under the policy that sampled", replace(batch, old_logps=older)),
        "entropy": ("other entropies", replace(batch, entropy=other.entropy)),
        "token_advantages": ("other advantages of the tokens", replace(batch, token_advantages=weighed)),
        "hidden": ("other hidden states", replace(batch, hidden=hidden)),
        "rewards": ("other rewards", replace(batch, rewards=other.rewards)),
        "mismatched": ("other log-ratios behind other prompts", replace(batch, mismatched=mismatched)),
    }
