"""Whether the response matches a regular expression."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from moalign.api import Reward, Sample
from moalign_plugins._expressions import Expression

REGISTRATION = {
    "name": "regex",
    "class": "Regex",
    "summary": "one score where the response matches a regular expression, another where not",
}


class Regex(Reward):
    """``matched`` or ``unmatched``, by Python's ``re`` with its inline flags, such as (?i) and (?s)."""

    pattern: Expression
    where: Literal["anywhere", "whole"] = "anywhere"
    """whole: all of the response, white space around it apart"""
    matched: float = 1.0
    unmatched: float = 0.0

    def score(self, samples: Sequence[Sample]) -> list[float | None]:
        expression = re.compile(self.pattern)
        if self.where == "whole":
            found = [expression.fullmatch(sample.response.strip()) for sample in samples]
        else:
            found = [expression.search(sample.response) for sample in samples]
        return [self.unmatched if match is None else self.matched for match in found]
