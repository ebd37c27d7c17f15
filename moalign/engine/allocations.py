"""Bytes of tensors that come and go while a piece of code runs: on a GPU as torch's allocator counts them, on a CPU,
where torch keeps no such count, from every operation's results."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(Protocol):
    """``live``: bytes in use now, ``peak``: at most since the beginning or the last ``restart``. Both leave out what
    was in use before."""

    @property
    def live(self) -> int: ...

    @property
    def peak(self) -> int: ...

    def restart(self) -> None: ...


@contextmanager
def counted(device: torch.device) -> Iterator[Allocations]:
    """Count within the context. On a CPU what an operation needs for itself alone is not seen; its results are."""
    if device.type == "cuda":
        yield _OnGpu(device)
    else:
        with _Results() as results:
            yield results


class _OnGpu:
    def __init__(self, device: torch.device):
        self._device = device
        self._before = torch.cuda.memory_allocated(device)
        self.restart()

    @property
    def live(self) -> int:
        return torch.cuda.memory_allocated(self._device) - self._before

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) - self._before

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)


class _Results(TorchDispatchMode):
    """Follows each storage from the operation that made it to its end."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes: dict[int, int] = {}  # of each storage that lives, by its address
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {_storage(tensor)._cdata for tensor in _tensors((args, kwargs))}  # views, and what is written in place
        for tensor in _tensors(result):
            storage = _storage(tensor)
            if storage._cdata not in known and storage._cdata not in self._bytes:
                self._bytes[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, storage._cdata)
        return result

    def _freed(self, address: int) -> None:
        self.live -= self._bytes.pop(address)

    def restart(self) -> None:
        self.peak = self.live


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
