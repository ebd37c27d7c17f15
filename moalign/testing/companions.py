"""Whether the loss of a second adapter is one that the engine can train beside the plugin's own."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moalign.api import Objective
from moalign.testing.batch import OF_TOKENS, agrees, padded, plain_terms
from moalign.testing.review import short
from moalign.testing.rounds import weighed
from moalign.testing.watched import copied

if TYPE_CHECKING:
    from moalign.api import Batch
    from moalign.testing.objective import Trial

NAME = "companion"
SUPPLIED = {"groups", "reference"}


def companion_of(t: Trial) -> Objective | None:
    """The loss, if there is one."""
    tried, change = "companion()", "return a moalign.api.Objective, or None where there is no second adapter"
    found: Any = t.review.answer(tried, change, t.plugin.companion)
    t.review.require(found is None or isinstance(found, Objective), tried, short(found), change)
    return found


def companion_learns(t: Trial) -> None:
    """One finite loss per response of what its batch has, with a gradient at the response tokens alone."""
    import torch

    found = companion_of(t)
    if found is None:
        return
    change = 'declare "token_advantages" too: only `measure` is told what the companion says'
    t.review.require(t.weighs_tokens, "companion()", short(found), change)
    wants = found.wants
    change = 'let it need "groups", or "reference" too: it is trained on the responses of this loss'
    t.review.require("groups" in wants and wants <= SUPPLIED, "companion()", f"it needs {sorted(wants)}", change)
    factor = t.review.call(f"lr_factor('{NAME}')", "return a number", t.plugin.lr_factor, NAME)
    good = isinstance(factor, int | float) and 0 <= factor < math.inf
    t.review.require(good, f"lr_factor('{NAME}')", f"{factor!r}", "return a finite number, not below 0")
    given = t.batch(torch.float32, extra=["reference"])
    shares = torch.rand(len(given.groups), generator=torch.Generator().manual_seed(t.seed), dtype=torch.float64)
    known = weighed(t, given, shares.round(decimals=1)).known
    nothing: Any = dict.fromkeys(("advantages", "token_advantages", "old_logps", "hidden", "entropy", "rewards"))
    reference = given.ref_logps if "reference" in wants else None
    batch = replace(given, **nothing, ref_logps=reference, known=known, parameters={}, guides={})
    tried = "the companion's loss, of responses with rewards from 0 to 1"
    leaf = batch.logps.clone().requires_grad_()
    change = "let it read what `known` of this loss says, and log-probabilities, and nothing else"
    losses: Any = t.review.answer(tried, change, found.loss, replace(copied(batch), logps=leaf), plain_terms(batch))
    kind = f"{losses.dtype} {list(losses.shape)}" if isinstance(losses, torch.Tensor) else type(losses).__name__
    right = isinstance(losses, torch.Tensor) and losses.shape == given.groups.shape and losses.dtype == leaf.dtype
    t.review.require(right, tried, kind, "return one loss per response, [N], in the dtype of batch.logps")
    t.review.require(bool(losses.isfinite().all()), tried, f"{losses.tolist()}", "guard divisions and logarithms")
    change = "let the loss read batch.logps, where batch.mask is 1 and nowhere else"
    t.review.require(losses.requires_grad, tried, "a loss without a graph", change)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf, allow_unused=True)
    some = gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())
    t.review.require(some, tried, "no gradient at batch.logps, or one that is not finite", change)
    outside = (gradient * (1 - batch.mask)).abs().max().item()
    t.review.require(outside == 0, tried, f"a gradient outside the mask, up to {outside:g}", change)
    moved = _two_columns_on(batch)
    later = t.review.call(tried, change, found.loss, copied(moved), plain_terms(batch))
    change = "find a response's tokens by batch.mask: they need not begin in the first column"
    t.review.require(agrees(losses.detach().double(), later.double()), "two columns in front", "other losses", change)


def _two_columns_on(batch: Batch) -> Batch:
    """The same responses behind two columns without response tokens."""
    wider = padded(batch, 2)
    own: Any = {name: getattr(wider, name) for name in OF_TOKENS}
    own = {name: values.roll(2, 1) for name, values in own.items() if values is not None}
    return replace(wider, **own, known={name: values.roll(2, 1) for name, values in wider.known.items()})
