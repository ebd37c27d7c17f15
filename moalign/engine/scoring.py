"""Log-probabilities under the reference and under frozen adapters, computed once per batch content and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moalign import lora, storage
from moalign.engine.model import LanguageModel
from moalign.errors import CorruptFileError


@dataclass
class LogpCache:
    """Response log-probabilities of rows under a fixed adapter (None: the bare base), by content hash.

    The key covers token ids, labels, padding, base weights and adapter, so nothing stale can be found; the unit is the
    padded batch, because a sum in another batch shape rounds differently and policy and reference must agree bitwise
    at step 0. With a ``directory`` the values outlive the process; damaged files are computed anew.
    """

    model: LanguageModel
    directory: Path | None = None
    _memory: dict[str, Tensor] = field(default_factory=dict)

    def logps(self, rows: Mapping[str, Tensor], adapter: str | None, identity: str, *, keep: bool = True) -> Tensor:
        """[N, L-1] on the model's device. ``identity`` tells adapters apart (a checksum; "" for the base)."""
        key = self._key(rows, identity)
        if key in self._memory:
            return self._memory[key].clone()  # a plugin that writes into its batch must not write in here
        file = None if self.directory is None or not keep else self.directory / f"{key}.safetensors"
        values = self._from_disk(file)
        if values is None:
            with lora.active(self.model.policy, adapter):
                values = self.model.response_logps(rows)
            if file is not None:
                storage.write_tensors(file, {"logps": values.cpu()})
        values = values.to(self.model.device)
        if keep:
            self._memory[key] = values.clone()
        return values

    def _from_disk(self, file: Path | None) -> Tensor | None:
        if file is None or not file.exists():
            return None
        try:
            return storage.read_tensors(file)["logps"]
        except (CorruptFileError, KeyError):
            return None

    def _key(self, rows: Mapping[str, Tensor], identity: str) -> str:
        place = f"{self.model.device}/{torch.get_num_threads()}"
        digest = hashlib.sha256(f"{self.model.fingerprint}/{identity}/{place}".encode())
        for name in ("input_ids", "attention_mask", "labels"):
            tensor = rows[name].cpu().contiguous()
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:40]
