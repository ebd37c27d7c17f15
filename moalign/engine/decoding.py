"""Decoding with a cache: each distinct prompt is computed once for all responses to it, and rows that ended leave.

Rows of several policies stand in one batch, as in training.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moalign import lora
from moalign.engine.row_conditions import RowConditions, in_front
from moalign.lora import Mixture

if TYPE_CHECKING:
    from moalign.engine.model import LanguageModel

KEPT = 0.75  # rows leave once fewer than this share of those in the batch go on; moving a cache has its price too
LEAST_NOISE = 2.0**-25  # half the step of the generator, which may return 0
CACHES = ("past_key_values", "cache_params")  # what models call a cache that rows can be selected from

Choose = Callable[[Tensor, int, Tensor], Tensor]


@torch.no_grad()
def decode(
    model: LanguageModel,
    adapters: Sequence[str | None],
    prompts: Sequence[tuple[int, ...]],
    choose: Choose,
    most: int,
    ends: Collection[int],
    conditions: RowConditions | None = None,
    of: Sequence[int] | None = None,
) -> list[list[list[int]]]:
    """At most ``most`` token ids per adapter and prompt; what stands behind one of ``ends`` means nothing.

    Several adapters must be slots. ``choose(scores [n,V], position, rows [n])`` gives the next token of each row that
    goes on, [n]; ``rows`` are their numbers, adapter by adapter and prompt by prompt within each. ``conditions``: of
    the one adapter, ``of`` saying which of them each prompt has (None: all the first).

    Raises whatever a model raises whose cache does not let rows be selected; see ``probe.why_not_cached``.
    """
    told = [0] * len(prompts) if conditions is None or of is None else of
    questions = list(zip(prompts, told, strict=True))
    first = {question: row for row, question in reversed(list(enumerate(questions)))}
    distinct = [prompts[row] for row in sorted(first.values())]
    place = {question: index for index, question in enumerate(dict.fromkeys(questions))}
    follows = torch.tensor([place[question] for question in questions])
    every = torch.cat([follows + len(distinct) * number for number in range(len(adapters))]).to(model.device)
    ids, mask = padded(distinct, model.pad_id)
    own = None if conditions is None else conditions.take([questions[row][1] for row in sorted(first.values())])
    with _Batch.open(model, adapters, own) as batch:
        scores = batch.first(ids, mask).index_select(0, every)
        batch.select(every)
        rows = torch.arange(len(every), device=model.device)
        ended = torch.zeros_like(rows, dtype=torch.bool)
        last = torch.tensor(sorted(ends), device=model.device)
        said = torch.full((len(rows), most), model.pad_id, device=model.device)
        for position in range(most):
            tokens = choose(scores, position, rows)
            said[rows, position] = tokens
            ended |= torch.isin(tokens, last)
            left = len(ended) - int(ended.sum())
            if not left or position == most - 1:
                break
            if left < KEPT * len(ended):
                kept = (~ended).nonzero().squeeze(1)
                rows, ended, tokens = (each.index_select(0, kept) for each in (rows, ended, tokens))
                batch.select(kept)
            owners = torch.bincount(rows // len(prompts), minlength=len(adapters)).tolist()
            scores = batch.next(tokens.masked_fill(ended, model.pad_id), owners)
    responses = said.tolist()
    return [responses[start : start + len(prompts)] for start in range(0, len(responses), len(prompts))]


def gumbel(*shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise on the generator's device: the largest of scores with such noise is a sample of their softmax."""
    noise = torch.empty(*shape, device=generator.device, dtype=dtype)
    return noise.exponential_(generator=generator).clamp_min_(LEAST_NOISE).log_().neg_()


def padded(prompts: Sequence[tuple[int, ...]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids with padding on the left, [P,W], and the mask of what is none."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


@dataclass
class _Batch:
    """The rows under way: what they have seen (mask [n,W]), where they are (positions [n,1]), their cache, and what
    else conditions them."""

    model: LanguageModel
    adapters: Sequence[str | None]
    takes: frozenset[str]
    mask: Tensor = field(default_factory=lambda: torch.empty(0))
    positions: Tensor = field(default_factory=lambda: torch.empty(0))
    cache: Any = None
    conditions: RowConditions | None = None

    @classmethod
    @contextmanager
    def open(
        cls, model: LanguageModel, adapters: Sequence[str | None], conditions: RowConditions | None = None
    ) -> Iterator[_Batch]:
        gated = conditions is not None and conditions.gates is not None
        with lora.active(model.policy, adapters[0]) if len(adapters) == 1 and not gated else nullcontext():
            takes = frozenset(inspect.signature(model.base.forward).parameters)
            yield cls(model, adapters, takes, conditions=conditions)

    def first(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The scores behind the prompts, [K*P,V], of each adapter's."""
        times, device = len(self.adapters), self.model.device
        self.mask = mask.repeat(times, 1).to(device)
        positions = self.mask.cumsum(-1).sub(1).clamp(min=0)
        self.positions = positions[:, -1:]
        with in_front(self.model.base, self.conditions, ids.shape[1] - mask.sum(-1)):
            scores = self._scores(ids.repeat(times, 1).to(device), positions, [len(ids)] * times)
        self.conditions = None if self.conditions is None else self.conditions.behind_prompt()
        return scores

    def next(self, tokens: Tensor, owners: Sequence[int]) -> Tensor:
        """The scores behind one more token of each row, [n,V]; ``owners``: how many rows each adapter has."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        self.positions = self.positions + 1
        return self._scores(tokens[:, None], self.positions, owners)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, each as often as it is named."""
        self.cache.reorder_cache(rows)
        self.mask, self.positions = self.mask.index_select(0, rows), self.positions.index_select(0, rows)
        self.conditions = None if self.conditions is None else self.conditions.take(rows)

    def _scores(self, ids: Tensor, positions: Tensor, owners: Sequence[int]) -> Tensor:
        name = next((name for name in CACHES if name in self.takes), None)
        if name is None:
            raise ValueError(f"the model takes no {' and no '.join(CACHES)}")
        offered = {"position_ids": positions, "logits_to_keep": 1, "attention_mask": self.mask, name: self.cache}
        with self._owned(owners):
            taken = {key: value for key, value in offered.items() if key in self.takes}
            output = self.model.base(input_ids=ids, use_cache=True, **taken)
        self.cache = output[name]
        return output.logits[:, -1].float()

    def _owned(self, owners: Sequence[int]) -> Any:
        if self.conditions is not None and self.conditions.gates is not None:
            return lora.under(self.model.policy, self.adapters[0], self.conditions.gates)
        if len(self.adapters) == 1:
            return nullcontext()
        there = [(slot, rows) for slot, rows in zip(self.adapters, owners, strict=True) if rows]
        slots = tuple(slot for slot, _ in there if slot is not None)
        return lora.mixed(self.model.policy, Mixture(slots, tuple(rows for _, rows in there)))
