"""What the frozen layers below the first adapter compute, kept: rows that come again need not pass them again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moalign.engine import shards
from moalign.engine.layout import Layout
from moalign.engine.lower import Copies, replaced

if TYPE_CHECKING:
    from moalign.engine.model import LanguageModel

SHARD_BYTES = 16 * 2**20  # so much that is new becomes a file, and no more than that waits in memory


@dataclass
class LowerCache:
    """Hidden states that reach the first layer with an adapter, row by row.

    A row is found again by its tokens, their positions and segments, under the base's weights, the number of layers
    below, type, device and threads. Its values are those of the first pass that it was in, as with ``LogpCache``: a
    pass skips the lower layers where all of its rows are known; else they run, and known rows keep their known values.
    So it does not matter to any bit when a run was interrupted, nor what it had written by then.

    Values go into files below ``directory`` (None: they stay in memory) and are read from there for each pass; what is
    damaged is computed anew. Rows are taken in until one would exceed ``limit`` bytes, and none after it.
    """

    model: LanguageModel
    directory: Path | None = None
    limit: int = 0
    skipped: int = 0  # passes that did not run the lower layers
    _written: dict[bytes, list[shards.Place]] = field(default_factory=dict)
    _unsaved: dict[bytes, Tensor] = field(default_factory=dict)
    _used: int = 0
    _waiting: int = 0
    _full: bool = False

    def __post_init__(self) -> None:
        if self.directory is not None:
            for file in sorted(self._folder().glob("*.safetensors")):
                self._used += self._index(file)

    @contextmanager
    def skipping(self, layout: Layout, copies: Copies | None = None) -> Iterator[None]:
        """Within the context all passes are over this layout, or over one row of each kind in it (``lower.copied``).

        Enter it before ``copied``. The backward pass belongs in it too.
        """
        rows = _Rows(self, layout, copies)
        with replaced(self.model.lower, self.model.upper[0], rows.known, rows.states):
            yield

    def get(self, key: bytes) -> Tensor | None:
        """[length,D] on the CPU."""
        if key in self._unsaved:
            return self._unsaved[key]
        loaded = (place.load(key) for place in self._written.get(key, ()))
        return next((value for value in loaded if value is not None), None)

    def add(self, key: bytes, value: Tensor) -> None:
        """Take in what ``get`` does not find, [length,D] on the CPU, as far as there is room."""
        if key not in self._written:  # else it is damaged, and has its room already
            size = value.nbytes + shards.ENTRY_BYTES
            self._full = self._full or self._used + size > self.limit
            if self._full:
                return
            self._used += size
        self._unsaved[key] = value.clone()
        self._waiting += value.nbytes
        if self.directory is not None and self._waiting >= SHARD_BYTES:
            self.save()

    def save(self) -> None:
        """Write what is not on disk yet. Raises RunError."""
        if self.directory is not None and self._unsaved:
            self._index(shards.write(self._folder(), self._unsaved))
            self._unsaved.clear()
            self._waiting = 0

    def _index(self, file: Path) -> int:
        """Know what is in a file, and how many bytes that is."""
        found = shards.places(file)
        for key, place in found.items():
            self._written.setdefault(key, []).append(place)
        return sum(place.nbytes + shards.ENTRY_BYTES for place in found.values())

    def _folder(self) -> Path:
        assert self.directory is not None
        model = self.model
        attention = getattr(model.base.config, "_attn_implementation", None)
        place = (model.fingerprint, len(model.lower), model.dtype, attention, model.device, torch.get_num_threads())
        return shards.folder_of(self.directory, *place)


class _Rows:
    """The rows of one layout: what is known of them is looked up when the first layer asks, and then stays."""

    def __init__(self, cache: LowerCache, layout: Layout, copies: Copies | None):
        self.cache, self.layout = cache, layout
        self.rows = list(range(len(layout.input_ids))) if copies is None else copies.first.tolist()
        self.keys: list[bytes] = []
        self.found: list[Tensor | None] = []
        self.all_known = False
        self.placed: Tensor | None = None

    def known(self) -> bool:
        if not self.keys:
            self.keys = _keys(self.layout, self.rows)
            self.found = [self.cache.get(key) for key in self.keys]
            self.all_known = all(value is not None for value in self.found)
            self.cache.skipped += self.all_known
        return self.all_known

    def states(self, hidden: Tensor) -> Tensor:
        """[B,L,D]: known rows as they are known, the others as ``hidden`` has them, 0 at padding."""
        if self.placed is None:
            placed = torch.zeros(hidden.shape, dtype=hidden.dtype)
            new: dict[bytes, Tensor] = {}
            # detached: with gradient checkpointing embeddings ask for gradients that nobody needs
            computed = placed if self.known() else hidden.detach().cpu()
            for place, (row, key, value) in enumerate(zip(self.rows, self.keys, self.found, strict=True)):
                length = self.layout.lengths[row]
                if value is None:
                    value = new.setdefault(key, computed[place, :length])
                placed[place, :length] = value
            for key, value in new.items():
                self.cache.add(key, value)
            self.placed = placed.to(hidden.device)
        return self.placed


def _keys(layout: Layout, rows: Sequence[int]) -> list[bytes]:
    parts = [part for part in (layout.input_ids, layout.position_ids, layout.segments) if part is not None]
    arrays = [part.cpu().numpy() for part in parts]
    return [shards.key_of(*(array[row, : layout.lengths[row]] for array in arrays)) for row in rows]
