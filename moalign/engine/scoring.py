"""Log-probabilities under the reference and under frozen adapters: computed once per sequence, and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moalign import lora, storage
from moalign.data.tokenise import Sequence as TokenSequence
from moalign.engine.layout import Layout
from moalign.engine.model import LanguageModel
from moalign.errors import CorruptFileError

SHARD_TOKENS = 2**20  # so many new values become a file: 4 MiB
DIGEST_BYTES = 20


@dataclass
class LogpCache:
    """Response log-probabilities of sequences under a fixed adapter (None: the bare base).

    A sequence is found again by its token ids, the base's weights, the adapter's checksum, device and threads. Its
    values are those of the first pass that it was in, padding and neighbours as they were, so that policy and
    reference agree bitwise at step 0; since every candidate meets the same passes in the same order, which pass that
    is does not depend on when a run was interrupted. With a ``directory`` the values outlive the process, in files of
    many sequences; damaged files count as missing.
    """

    model: LanguageModel
    directory: Path | None = None
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
        keys = [_digest(sequence) for sequence in sequences]
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

    def save(self) -> None:
        """Write what is not on disk yet."""
        for identity, new in self._unsaved.items():
            if self.directory is not None and new:
                names = hashlib.sha256(b"".join(new)).hexdigest()[:20]
                tensors = {
                    "keys": torch.from_numpy(np.frombuffer(b"".join(new), dtype=np.uint8).copy()),
                    "counts": torch.tensor([len(values) for values in new.values()]),
                    "logps": torch.cat(list(new.values())).cpu(),
                }
                storage.write_tensors(self._folder(identity) / f"{names}.safetensors", tensors)
        self._unsaved.clear()

    def _compute(self, layout: Layout, adapter: str | None) -> Tensor:
        with lora.active(self.model.policy, adapter):
            return self.model.response_logps(layout)

    def _of(self, identity: str) -> dict[bytes, Tensor]:
        """All that is known under this adapter; read from disk when it is first asked for."""
        if identity not in self._known:
            self._known[identity] = {}
            if self.directory is not None:
                for file in sorted(self._folder(identity).glob("*.safetensors")):
                    self._known[identity] |= _read(file, self.model.device)
        return self._known[identity]

    def _folder(self, identity: str) -> Path:
        assert self.directory is not None
        place = f"{self.model.fingerprint}/{identity}/{self.model.device}/{torch.get_num_threads()}"
        return self.directory / hashlib.sha256(place.encode()).hexdigest()[:40]


def _digest(sequence: TokenSequence) -> bytes:
    content = np.array([sequence.prompt_length, *sequence.ids], dtype="<i8").tobytes()
    return hashlib.sha256(content).digest()[:DIGEST_BYTES]


def _read(file: Path, device: torch.device) -> dict[bytes, Tensor]:
    """The values in a file, by content; none where it is damaged."""
    try:
        tensors = storage.read_tensors(file)
        keys, counts, logps = tensors["keys"].numpy().tobytes(), tensors["counts"].tolist(), tensors["logps"]
        parts = logps.to(device).split(counts)
        names = [keys[start : start + DIGEST_BYTES] for start in range(0, len(keys), DIGEST_BYTES)]
        return dict(zip(names, parts, strict=True))
    except (CorruptFileError, KeyError, RuntimeError, ValueError):
        return {}
