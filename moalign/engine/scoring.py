"""Log-probabilities under the reference and under frozen adapters: computed once per sequence, and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moalign import lora
from moalign.data.tokenise import Sequence as TokenSequence
from moalign.engine import shards
from moalign.engine.layout import Layout
from moalign.engine.lower import Copies
from moalign.engine.lower_cache import LowerCache
from moalign.engine.model import LanguageModel
from moalign.engine.passes import arrange
from moalign.engine.row_conditions import RowConditions, conditioned

SHARD_TOKENS = 2**20  # so many new values become a file: 4 MiB


@torch.no_grad()
def logps_under(
    model: LanguageModel,
    sequences: Sequence[TokenSequence],
    groups: Sequence[int],
    adapters: Sequence[str | None],
    look: Callable[[list[int], Layout, list[Tensor], Tensor], None] | None = None,
    conditions: RowConditions | None = None,
) -> list[list[NDArray[np.float32]]]:
    """Log-probabilities of the response tokens of each sequence, under each adapter (None: the base); a list for each.

    ``groups``: sequences with the same number begin with the same prompt and share a pass. All adapters meet the same
    passes, so that two with the same weights agree to the last bit. ``look`` is told of each pass: its sequences, how
    they lie, their log-probabilities [N,T] under each adapter, and their hidden states [S,D] under the last.
    ``conditions``: of the adapters for each sequence, the same for those of a group; the base has none.
    """
    of_group: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        of_group.setdefault(group, []).append(index)
    units = list(of_group.values())
    found: list[list[NDArray[np.float32]]] = [[np.empty(0, np.float32)] * len(sequences) for _ in adapters]
    for part in arrange([[sequences[index] for index in unit] for unit in units], model.packing):
        chosen = [index for unit in part.units for index in units[unit]]
        layout = model.lay_out([sequences[index] for index in chosen], part.rows)
        placed = []
        own = None if conditions is None else conditions.take([chosen[row[0]] for row in part.rows])
        for values, adapter in zip(found, adapters, strict=True):
            with conditioned(model, adapter, own):
                states = model.response_states(layout)
                placed.append(model.scores_of(states, layout).logps)
            scored = placed[-1].flatten().index_select(0, layout.target)
            for index, found_of in zip(chosen, scored.float().cpu().split(layout.counts), strict=True):
                values[index] = found_of.numpy()
        if look is not None:
            look(chosen, layout, placed, states)
    return found


@dataclass
class LogpCache:
    """Response log-probabilities of sequences under a fixed adapter (None: the bare base).

    A sequence is found again by its token ids, the base's weights, the adapter's checksum, device and threads. Its
    values are those of the first pass that it was in, padding and neighbours as they were, so that policy and
    reference agree bitwise at step 0; since every candidate meets the same passes in the same order, which pass that
    is does not depend on when a run was interrupted. With a ``directory`` the values outlive the process, in files of
    many sequences; damaged files count as missing. ``lower``: what the layers below the adapters compute, where it is
    kept as well.
    """

    model: LanguageModel
    directory: Path | None = None
    lower: LowerCache | None = None
    _known: dict[str, dict[bytes, Tensor]] = field(default_factory=dict)  # by adapter, then by content
    _unsaved: dict[str, dict[bytes, Tensor]] = field(default_factory=dict)

    def logps(
        self,
        sequences: Sequence[TokenSequence],
        layout: Layout,
        adapter: str | None,
        identity: str,
        *,
        keep: bool = True,
    ) -> Tensor:
        """[N,T] as ``layout`` places them. ``identity`` tells adapters apart (a checksum; "" for the base)."""
        if not keep:
            return self._compute(layout, adapter)
        known = self._of(identity)
        keys = [shards.key_of([sequence.prompt_length], sequence.ids) for sequence in sequences]
        missing = {key: index for index, key in reversed(list(enumerate(keys))) if key not in known}
        if missing:
            scored = self._compute(layout, adapter).flatten().index_select(0, layout.target).split(layout.counts)
            new = {key: scored[index].clone() for key, index in missing.items()}
            known |= new
            if self.directory is not None:
                self._unsaved.setdefault(identity, {}).update(new)
                if sum(map(len, self._unsaved[identity].values())) >= SHARD_TOKENS:
                    self.save()
        return layout.place(torch.cat([known[key] for key in keys]))

    def skipping(
        self, layout: Layout, copies: Copies | None = None, *, keep: bool = True
    ) -> AbstractContextManager[None]:
        """Within the context passes over this layout skip the layers below the adapters, where that is known."""
        return self.lower.skipping(layout, copies) if self.lower is not None and keep else nullcontext()

    def save(self) -> None:
        """Write what is not on disk yet."""
        for identity, new in self._unsaved.items():
            if self.directory is not None and new:
                shards.write(self._folder(identity), new)
        self._unsaved.clear()
        if self.lower is not None:
            self.lower.save()

    def _compute(self, layout: Layout, adapter: str | None) -> Tensor:
        with lora.active(self.model.policy, adapter):
            return self.model.response_logps(layout)

    def _of(self, identity: str) -> dict[bytes, Tensor]:
        """All that is known under this adapter; read from disk when it is first asked for."""
        if identity not in self._known:
            self._known[identity] = {}
            if self.directory is not None:
                for file in sorted(self._folder(identity).glob("*.safetensors")):
                    entries = shards.read(file)
                    self._known[identity] |= {key: value.to(self.model.device) for key, value in entries.items()}
        return self._known[identity]

    def _folder(self, identity: str) -> Path:
        assert self.directory is not None
        place = (self.model.fingerprint, identity, self.model.device, torch.get_num_threads())
        return shards.folder_of(self.directory, *place)
