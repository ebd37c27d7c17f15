"""Randomness as a function of (seed, what for): the same number in every process and after every resume."""

from __future__ import annotations

import hashlib


def derive(seed: int, *purpose: str | int) -> int:
    """A seed in [0, 2^63) for one purpose, such as ``derive(0, "dropout", candidate, step)``."""
    text = "/".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
