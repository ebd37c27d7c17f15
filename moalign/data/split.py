"""Training and held-out records: whole groups, chosen by a hash of seed and group."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from moalign.errors import ConfigError, DataError
from moalign.types import Record


def split(records: Sequence[Record], seed: int, share: float) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """(training, held-out). The order of the records plays no part, and a larger share contains a smaller one.

    ``share`` of the groups, rounded, is held out: at least one where ``share`` > 0, and never all of them.
    Raises ConfigError for a share outside [0, 1), DataError where a single group would have to be split.
    """
    if not (math.isfinite(share) and 0 <= share < 1):
        raise ConfigError(f"held-out share: must be at least 0 and below 1 (got {share!r})")
    groups = sorted({record.group for record in records}, key=lambda group: (_rank(seed, group), group))
    if share == 0 or not groups:
        return tuple(records), ()
    if len(groups) == 1:
        reason = "all records have one prompt, so none can be held out; add prompts, or give data.held_out_path"
        raise DataError(reason, file=records[0].file or None, line=records[0].line or None)
    held_out = set(groups[: min(max(round(share * len(groups)), 1), len(groups) - 1)])
    training = tuple(record for record in records if record.group not in held_out)
    return training, tuple(record for record in records if record.group in held_out)


def _rank(seed: int, group: str) -> bytes:
    return hashlib.sha256(f"{seed}:{group}".encode()).digest()
