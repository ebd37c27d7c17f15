"""Computed tensors on disk, found again by content: files of many entries, and damage counts as absence.

An entry is a key and a tensor whose first dimension is its own. A file has four tensors: ``keys``, ``counts`` (first
dimensions), ``checksums`` and ``values`` (all entries, one after the other). Its whole content has a checksum, for
those who read all of it, and so has each entry, for those who read one of many.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moalign import storage
from moalign.errors import CorruptFileError, RunError

KEY_BYTES = 20
CHECKSUM_BYTES = 32
ENTRY_BYTES = 1024  # more than an entry takes beside its values, a file's header counted to its first entry
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def key_of(*content: Any) -> bytes:
    """A name for these numbers, which tells apart how they are divided."""
    digest = hashlib.sha256()
    for part in content:
        array = np.asarray(part, dtype="<i8")
        digest.update(len(array).to_bytes(8, "little") + array.tobytes())
    return digest.digest()[:KEY_BYTES]


def folder_of(directory: Path, *place: object) -> Path:
    """The folder of what was computed under these circumstances: weights, device, threads and the like."""
    return directory / hashlib.sha256("/".join(map(str, place)).encode()).hexdigest()[:40]


def write(folder: Path, entries: Mapping[bytes, Tensor]) -> Path:
    """One file of these entries, of one type and equal beyond the first dimension. Raises RunError (disk full, ...)."""
    values = {key: value.detach().cpu().contiguous() for key, value in entries.items()}
    file = folder / f"{hashlib.sha256(b''.join(values)).hexdigest()[:20]}.safetensors"
    checksums = b"".join(_checksum(key, value) for key, value in values.items())
    tensors = {
        "keys": torch.from_numpy(np.frombuffer(b"".join(values), dtype=np.uint8).copy()),
        "counts": torch.tensor([len(value) for value in values.values()]),
        "checksums": torch.from_numpy(np.frombuffer(checksums, dtype=np.uint8).copy()),
        "values": torch.cat(list(values.values())),
    }
    storage.write_tensors(file, tensors)
    return file


def read(file: Path) -> dict[bytes, Tensor]:
    """All entries of a file, on the CPU; none where a bit of it is not what was written."""
    try:
        tensors = storage.read_tensors(file)
        parts = tensors["values"].split(tensors["counts"].tolist())
        return dict(zip(_cut(tensors["keys"].numpy().tobytes(), KEY_BYTES), parts, strict=True))
    except (CorruptFileError, KeyError, RuntimeError, ValueError):
        return {}


@dataclass(frozen=True)
class Place:
    """Where an entry lies: ``shape`` numbers of ``dtype`` from byte ``offset`` on."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    checksum: bytes

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def load(self, key: bytes) -> Tensor | None:
        """The entry, on the CPU; None where its bytes are not those that were written."""
        data = bytearray(self.nbytes)
        try:
            with self.file.open("rb", buffering=0) as opened:
                opened.seek(self.offset)
                if not data or opened.readinto(data) != len(data):
                    return None
        except OSError:
            return None
        value = torch.frombuffer(data, dtype=self.dtype).view(self.shape)
        return value if _checksum(key, value) == self.checksum else None


def places(file: Path) -> dict[bytes, Place]:
    """Where the entries of a file lie, without reading them; none where its tables make no sense.

    Nothing else is verified here: whatever is wrong in the tables, ``Place.load`` finds no entry for it.
    """
    try:
        with file.open("rb") as opened:
            size, length = os.fstat(opened.fileno()).st_size, int.from_bytes(opened.read(8), "little")
            if length > size:
                return {}
            header = storage.parse_json(opened.read(length))
            tables = {}
            for name in ("keys", "counts", "checksums"):
                start, end = header[name]["data_offsets"]
                opened.seek(8 + length + start)
                tables[name] = opened.read(min(end, size) - start)
        values = header["values"]
        dtype, beyond = _TYPES[values["dtype"]], tuple(values["shape"][1:])
        offset, found = 8 + length + values["data_offsets"][0], {}
        counts = np.frombuffer(tables["counts"], dtype="<i8").tolist()
        keys, checksums = _cut(tables["keys"], KEY_BYTES), _cut(tables["checksums"], CHECKSUM_BYTES)
        for key, count, checksum in zip(keys, counts, checksums, strict=True):
            place = Place(file, offset, (count, *beyond), dtype, checksum)
            if count < 0 or offset + place.nbytes > size:
                break
            found[key] = place
            offset += place.nbytes
        return found
    except (OSError, RunError, KeyError, TypeError, ValueError, RecursionError):
        return {}


def _checksum(key: bytes, value: Tensor) -> bytes:
    """Over the key too, so that an entry under another's name is none."""
    digest = hashlib.sha256(key + f"{value.dtype}{tuple(value.shape)}".encode())
    digest.update(value.view(torch.uint8).numpy().data)
    return digest.digest()


def _cut(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]
