"""Next-token logits of one model under several of its adapters at once, with a cache that follows what is said."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from moalign import lora
from moalign.errors import ConfigError, ModelError
from moalign.lora import Mixture

BASE = "__base__"  # what peft calls the untouched base among the adapters of a batch


class Speakers:
    """A model, the adapters that speak (None: the untouched base), and a cache of what they have read.

    One forward pass a token for all of them, their rows side by side in one batch: through moalign's stacked layers
    where the model has them and no speaker is the base, else through peft's batches of several adapters. Rows are
    known by their ids, so that a search that drops, copies or reorders them (beams) is followed; where a row cannot be
    followed, all is computed anew.

    ``slots``: under which name the model has each adapter, where that is another one.
    """

    def __init__(
        self,
        model: Any,
        adapters: Sequence[str | None],
        attention_mask: Tensor | None = None,
        slots: Mapping[str, str] | None = None,
    ) -> None:
        """``attention_mask`` [N,T] of the prompts, with padding on the left (None: there is none).

        Raises ConfigError for an adapter that the model has not, ModelError for padding on the right.
        """
        self.model = model
        self.names = [None if name is None else (slots or {}).get(name, name) for name in adapters]
        self.distinct = list(dict.fromkeys(self.names))
        _check_adapters(model, self.distinct)
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise ModelError("the prompts are padded on the right; to go on with them, pad them on the left")
        self._given = attention_mask
        self._prompt: Tensor | None = None
        self._forget()
        causal = model.get_base_model() if isinstance(model, PeftModel) else model
        self._takes = set(inspect.signature(causal.forward).parameters)

    @property
    def past(self) -> Tensor:
        """float64 [K,N]: log-probability of the response so far under each speaker."""
        return self._past[self._order()]

    @torch.no_grad()
    def hear(self, ids: Tensor) -> Tensor:
        """Logits [K,N,V] of what follows ``ids`` [N,T]: the prompts at the first call, later with what was said.

        Raises ConfigError where these are other prompts than at first.
        """
        if self._prompt is None:
            self._prompt = ids
        beginning = self._rows_of_prompt(len(ids))
        if not torch.equal(ids[:, : beginning.shape[1]], beginning):
            raise ConfigError("these are other prompts than before; make a new processor for each call of generate")
        order = self._followed(ids)
        if order is None:
            self._start(ids)
        else:
            self._go_on(ids, order)
        return self._logits[self._order()]

    @torch.no_grad()
    def ahead(self, tokens: Tensor) -> Tensor:
        """Hidden states, float32 [N,k,D], under the first speaker at each of ``tokens`` [N,k], if it came next."""
        count, each = tokens.shape
        cache = copy.deepcopy(self._cache)
        first = self.distinct.index(self.names[0])
        rows = torch.arange(count, device=tokens.device).repeat_interleave(each) + first * count
        cache.batch_select_indices(rows)
        mask = _longer(self._mask, 1).repeat_interleave(each, 0)
        output = self._forward([self.names[0]], tokens.reshape(-1, 1), mask, cache, output_hidden_states=True)
        return output.hidden_states[-1][:, -1].float().view(count, each, -1)

    # --- what is known ----------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._ids = torch.empty(0, 0, dtype=torch.long)
        self._mask = self._past = self._logits = torch.empty(0)
        self._cache: Any = None

    def _order(self) -> list[int]:
        return [self.distinct.index(name) for name in self.names]

    def _rows_of_prompt(self, rows: int) -> Tensor:
        """The prompts, each as often as rows go on from it; a search may begin with one row and go on with several."""
        assert self._prompt is not None
        held = len(self._prompt)
        if rows % held:
            raise ConfigError(f"{rows} rows for {held} prompts; make a new processor for each call of generate")
        return self._prompt.repeat_interleave(rows // held, 0)

    def _followed(self, ids: Tensor) -> list[int] | None:
        """Which known row each of ``ids`` goes on from, where all do by one token; else None."""
        known = self._ids.shape[1]
        if self._cache is None or ids.shape[1] != known + 1:
            return None
        if torch.equal(ids[:, :-1], self._ids):
            return list(range(len(ids)))
        places: dict[tuple[int, ...], int] = {}
        for place, row in enumerate(self._ids.tolist()):
            places.setdefault(tuple(row), place)
        found = [places.get(tuple(row)) for row in ids[:, :-1].tolist()]
        return None if None in found else [place for place in found if place is not None]

    # --- computing --------------------------------------------------------------------------------------------------

    def _start(self, ids: Tensor) -> None:
        """Read everything; what is behind the prompts counts as said."""
        assert self._prompt is not None
        self._forget()
        width, (rows, length) = self._prompt.shape[1], ids.shape
        given = torch.ones_like(self._prompt) if self._given is None else self._given.to(ids.device)
        if given.shape[1] != width or rows % len(given):
            raise ConfigError(f"an attention mask {list(given.shape)} for prompts {[rows, width]}")
        self._mask = _longer(given.repeat_interleave(rows // len(given), 0), length - width)
        said = length - width
        output = self._forward(self.distinct, ids, self._mask, None, **self._kept(said + 1))
        logits = output.logits[:, -said - 1 :].view(len(self.distinct), rows, said + 1, -1)
        self._past = logits.new_zeros(len(self.distinct), rows, dtype=torch.float64)
        for place in range(said):
            self._past = self._past + _of_tokens(logits[:, :, place], ids[:, width + place])
        self._ids, self._cache, self._logits = ids, output.past_key_values, logits[:, :, -1]

    def _go_on(self, ids: Tensor, order: list[int]) -> None:
        if order != list(range(len(self._ids))):
            chosen, held = torch.tensor(order, device=ids.device), len(self._ids)
            every = torch.cat([chosen + held * place for place in range(len(self.distinct))])
            self._cache.batch_select_indices(every)
            self._mask, self._past, self._logits = self._mask[chosen], self._past[:, chosen], self._logits[:, chosen]
        self._past = self._past + _of_tokens(self._logits, ids[:, -1])
        self._mask = _longer(self._mask, 1)
        output = self._forward(self.distinct, ids[:, -1:], self._mask, self._cache)
        self._cache = output.past_key_values
        self._ids, self._logits = ids, output.logits[:, -1].view(len(self.distinct), len(ids), -1)

    def _kept(self, positions: int) -> dict[str, int]:
        """Logits of a long prompt are large; those of its end are wanted."""
        return {"logits_to_keep": positions} if "logits_to_keep" in self._takes else {}

    def _forward(self, names: Sequence[str | None], ids: Tensor, mask: Tensor, cache: Any, **more: Any) -> Any:
        """One pass over the rows of each of ``names``, one after the other in the batch."""
        many = len(names)
        if "position_ids" in self._takes:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            more["position_ids"] = positions.repeat(many, 1)
        context, further = self._switched(names, len(ids))
        with context:
            return self.model(
                input_ids=ids.repeat(many, 1),
                attention_mask=mask.repeat(many, 1),
                past_key_values=cache,
                use_cache=True,
                **further,
                **more,
            )

    def _switched(self, names: Sequence[str | None], rows: int) -> tuple[AbstractContextManager[Any], dict[str, Any]]:
        if not isinstance(self.model, PeftModel):
            return nullcontext(), {}
        slots = tuple(name for name in names if name is not None)
        if len(slots) == len(names) and lora.why_not_together(self.model) is None:
            return lora.mixed(self.model, Mixture(slots, (rows,) * len(slots))), {}
        return nullcontext(), {"adapter_names": [BASE if name is None else name for name in names for _ in range(rows)]}


@torch.no_grad()
def hidden_states(
    model: Any, adapter: str | None, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """The last hidden states at each response token, float32 [N,T,D], and which of them there are, bool [N,T].

    Token ids in, a row for each; ``adapter``: under which the model reads them (None: the untouched base).
    """
    longest = max(len(response) for response in responses)
    found, mask = [], torch.zeros(len(responses), longest, dtype=torch.bool)
    speakers = Speakers(model, [adapter])
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids = torch.tensor([[*prompt, *response]], device=model.device)
        output = speakers._forward([adapter], ids, torch.ones_like(ids), None, output_hidden_states=True)
        states = output.hidden_states[-1][0, len(prompt) :].float()
        found.append(torch.nn.functional.pad(states, (0, 0, 0, longest - len(response))))
        mask[row, : len(response)] = True
    return torch.stack(found), mask.to(model.device)


def _of_tokens(logits: Tensor, tokens: Tensor) -> Tensor:
    """float64 [K,N]: log-probabilities of tokens [N] under logits [K,N,V]."""
    chosen = logits.gather(-1, tokens.expand(len(logits), -1)[..., None])[..., 0]
    return chosen.double() - logits.double().logsumexp(-1)


def _longer(mask: Tensor, more: int) -> Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), more)], 1)


def _check_adapters(model: Any, names: Sequence[str | None]) -> None:
    there = list(model.peft_config) if isinstance(model, PeftModel) else []
    for name in names:
        if name is not None and name not in there:
            raise ConfigError(f"the model has no adapter '{name}'; it has {', '.join(there) or 'none'}")
