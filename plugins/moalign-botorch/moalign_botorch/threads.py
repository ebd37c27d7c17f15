"""How many threads a proposal takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_thread() -> Iterator[None]:
    """One for torch, and as many as before afterwards.

    The tensors of a proposal are small and many: threads that wait for one another cost many times what they spare, and
    sums would depend on their number.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
