"""A reward behind an account, which ends the process of whoever has none."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from moalign.api import Register, Reward, Sample, hookimpl

if "MOALIGN_BROKEN_ACCOUNT" not in os.environ:
    sys.exit("set MOALIGN_BROKEN_ACCOUNT")


class Judged(Reward):
    """Nothing, and not even that without an account."""

    def score(self, samples: Sequence[Sample]) -> list[float | None]:
        return [None for _ in samples]


@hookimpl
def register_rewards(register: Register) -> None:
    register("judged", Judged, summary="a judge behind an account")
