"""Made-up rounds of sampled responses, and what a loss makes of them: an advantage for each response or each token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moalign.api import Batch, TokenAdvantages, Tokens
from moalign.testing import passages
from moalign.testing.batch import RESPONSES, rearranged
from moalign.testing.watched import copied, unchanged

if TYPE_CHECKING:
    from torch import Tensor

    from moalign.testing.objective import Trial


@dataclass(frozen=True)
class MadeUpRound:
    """What the engine hands over for a round; ``log_ratios`` for losses that weigh responses, ``tokens`` for others.

    ``greedy``: the greedy responses' signal, for a loss that needs it.
    """

    signal: Tensor
    groups: Tensor
    log_ratios: Tensor | None
    tokens: Tokens | None
    greedy: Tensor | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        last = {"log_ratios": self.log_ratios} if self.tokens is None else {"tokens": self.tokens}
        baseline = {} if self.greedy is None else {"greedy": self.greedy}
        return {"signal": self.signal, "groups": self.groups} | last | baseline

    def at(self, rows: Tensor) -> MadeUpRound:
        """These responses in this order."""
        ratios, greedy = (None if each is None else each[rows] for each in (self.log_ratios, self.greedy))
        tokens = _mapped(self.tokens, lambda each: each[rows])
        return MadeUpRound(self.signal[rows], self.groups[rows], ratios, tokens, greedy)

    def without_kl(self) -> MadeUpRound:
        """The policy is its reference."""
        ratios = None if self.log_ratios is None else self.log_ratios * 0
        tokens = self.tokens
        if tokens is not None and tokens.ref_logps is not None and tokens.old_logps is not None:
            tokens = replace(tokens, ref_logps=tokens.old_logps)
        return replace(self, log_ratios=ratios, tokens=tokens)

    def with_other_reference(self) -> MadeUpRound:
        ratios = None if self.log_ratios is None else self.log_ratios.flip(0) * 2
        tokens = self.tokens
        if tokens is not None and tokens.ref_logps is not None:
            tokens = replace(tokens, ref_logps=tokens.ref_logps.flip(0) * 2 * tokens.mask)
        return replace(self, log_ratios=ratios, tokens=tokens)


def made_up_round(t: Trial, batch: Batch | None = None) -> MadeUpRound:
    """3 responses to each prompt and 1 to the last one. ``batch``: of which its tokens are measured; None: the trial's.

    Responses to one prompt do not stand side by side, and the numbers of the prompts leave gaps.
    """
    import torch

    generator = torch.Generator().manual_seed(t.seed + 2)
    groups = torch.cat([torch.arange(t.prompts).repeat(RESPONSES) * 5 + 2, torch.tensor([1])])
    signal, log_ratios = torch.randn((2, len(groups)), generator=generator, dtype=torch.float64)
    if not t.weighs_tokens:
        greedy = torch.full_like(signal, 0.25) if "greedy" in t.plugin.wants else None
        return MadeUpRound(signal, groups, log_ratios if "reference" in t.plugin.wants else None, None, greedy)
    rows = torch.cat([torch.arange(t.prompts * RESPONSES).view(-1, RESPONSES).t().flatten(), torch.tensor([0])])
    tokens = tokens_of(t, t.batch() if batch is None else batch)
    return MadeUpRound(signal, groups, None, _mapped(tokens, lambda each: each[rows]))


def advantages_of(t: Trial, tried: str, given: MadeUpRound) -> Tensor:
    """What the plugin makes of a round, [N] or [N,T], 0 where there is no token. See ``asked``."""
    found = asked(t, tried, given)
    return found.advantages * given.tokens.mask if given.tokens is not None else found.advantages


def asked(t: Trial, tried: str, given: MadeUpRound) -> TokenAdvantages:
    """What the plugin returns for a round, with kind, shape and finiteness checked and the arguments watched."""
    arguments = copied(given.arguments)
    method = t.plugin.advantages if given.tokens is None else t.plugin.token_advantages
    change = "advantages must be found for every round of sampled responses"
    found: Any = t.review.answer(tried, change, method, *arguments.values())
    written = [name for name, value in given.arguments.items() if not unchanged(value, arguments[name])]
    change = "compute new tensors; write into none that was handed over (no in-place operations)"
    t.review.require(not written, tried, f"{', '.join(written)} changed during the call", change)
    if given.tokens is None:
        _require_numbers(t, tried, "advantages", found, given)
        return TokenAdvantages(found)
    change = "return a moalign.api.TokenAdvantages, with one number for each token of each response"
    t.review.require(isinstance(found, TokenAdvantages), tried, type(found).__name__, change)
    numbers = isinstance(found.figures, dict) and all(isinstance(each, int | float) for each in found.figures.values())
    t.review.require(numbers, tried, f"figures of {found.figures!r}", "give plain numbers by name as figures")
    for name, values in {"advantages": found.advantages, **found.known}.items():
        _require_numbers(t, tried, name, values, given)
    return found


def _require_numbers(t: Trial, tried: str, name: str, found: Any, given: MadeUpRound) -> None:
    import torch

    count, mask = len(given.signal), None if given.tokens is None else given.tokens.mask
    shape = (count,) if mask is None else tuple(mask.shape)
    good = isinstance(found, torch.Tensor) and tuple(found.shape) == shape and found.dtype == torch.float64
    what = f"{found.dtype} {list(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
    unit, like = ("response", "the signal is") if mask is None else ("token", "tokens.mask is")
    change = f"return one number for each {unit}, float64 {list(shape)} as {like}"
    t.review.require(good, f"{tried}, {count} responses", f"{name} of {what}", change)
    wrong = ~found.isfinite() if mask is None else (~found.isfinite() & (mask > 0)).any(1)
    bad = wrong.nonzero().flatten().tolist()
    subject = "the advantage" if name == "advantages" else name
    change = "guard divisions: rewards may all be equal, and a prompt may have a single response"
    t.review.require(not bad, tried, f"{subject} of response {bad[:1]} is not finite: {found.tolist()}", change)


# --- tokens ---------------------------------------------------------------------------------------------------------


def tokens_of(t: Trial, batch: Batch) -> Tokens:
    """The rows of the batch that have tokens as a round, the policy of the batch being the one that sampled."""
    import torch

    rows = (batch.mask.sum(-1) > 0).nonzero().flatten()
    own = rearranged(batch, rows, rows)
    own = replace(own, old_logps=own.logps, entropy=None, token_advantages=None, known={})
    needs = t.plugin.wants
    return Tokens(
        mask=own.mask.double(),
        ended=torch.arange(len(rows)) % 4 != 1,
        old_logps=own.logps.double() if "old_logps" in needs else None,
        ref_logps=own.ref_logps.double() if own.ref_logps is not None and "reference" in needs else None,
        measured={name: values.double() for name, values in _measured(t, own).items()},
        passages=passages.made_up(t, own.mask.double()),
    )


def _measured(t: Trial, batch: Batch) -> dict[str, Tensor]:
    import torch

    tried = "measuring the tokens of a round"
    change = "let `measure` read what `needs` declares, but advantages, which there are none of yet"
    given = copied(replace(batch, old_logps=None if "old_logps" not in t.plugin.wants else batch.old_logps))
    found: Any = t.review.answer(tried, change, t.plugin.measure, given)
    change = "return tensors by name, one finite number for each token: [N,T] and the dtype of batch.logps"
    t.review.require(isinstance(found, dict), tried, type(found).__name__, change)
    for name, values in found.items():
        good = (
            isinstance(values, torch.Tensor) and values.shape == batch.mask.shape and values.dtype == batch.mask.dtype
        )
        what = f"{values.dtype} {list(values.shape)}" if isinstance(values, torch.Tensor) else type(values).__name__
        t.review.require(good and bool(values[batch.mask > 0].isfinite().all()), tried, f"'{name}', {what}", change)
    return {name: values.detach() * batch.mask for name, values in found.items()}


def weighed(t: Trial, batch: Batch, signal: Tensor, parameters: dict[str, Tensor] | None = None) -> Batch:
    """The batch with advantages of its tokens and all that the loss then knows, as the engine makes them.

    ``signal`` [N]: of its rows. ``parameters``: as they were when the round was sampled, if they were others.
    """
    import torch

    before = batch if parameters is None else replace(batch, parameters=parameters)
    rows, tokens = (batch.mask.sum(-1) > 0).nonzero().flatten(), tokens_of(t, before)
    found = asked(t, "a round of responses", MadeUpRound(signal[rows], batch.groups[rows], None, tokens))

    def placed(values: Tensor) -> Tensor:
        whole = torch.zeros_like(batch.logps)
        whole[rows] = (values * tokens.mask).to(whole.dtype)
        return whole

    known = {name: placed(values) for name, values in {**tokens.measured, **found.known}.items()}
    return replace(batch, token_advantages=placed(found.advantages), known=known)


def _mapped(tokens: Tokens | None, change: Any) -> Any:
    """The same with each tensor changed."""
    if tokens is None:
        return None
    old, reference = (None if each is None else change(each) for each in (tokens.old_logps, tokens.ref_logps))
    measured, within = (
        {name: change(values) for name, values in known.items()} for known in (tokens.measured, tokens.passages)
    )
    return Tokens(change(tokens.mask), change(tokens.ended), old, reference, measured, tokens.number, within)
