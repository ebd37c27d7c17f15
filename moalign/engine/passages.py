"""Which tokens of a sampled response stand in which passage of its text: an answer, a step of a solution."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moalign import door
from moalign.api import Objective
from moalign.errors import PluginError

Decode = Callable[[Sequence[int]], str]


def expressions_of(objective: Objective, candidate: str = "") -> dict[str, re.Pattern[str]]:
    """What the loss asks for, by name. Raises PluginError where it is no regular expression."""
    found: Any = door.call(objective, "passages", candidate=candidate)
    who = f"{door.origin(objective).who}, in passages"
    if not isinstance(found, Mapping) or not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise PluginError(f"{who}: it must return regular expressions by name, not {found!r}")
    try:
        return {name: re.compile(expression) for name, expression in found.items()}
    except re.error as error:
        raise PluginError(f"{who}: {error.pattern!r} is no regular expression: {error}") from None


def passages_of(ids: Sequence[int], decode: Decode, expression: re.Pattern[str]) -> NDArray[np.int64]:
    """[T], for each token the number of the match, from 1, in which it stands; 0: in none.

    The text of tokens is what ``decode`` adds to that of the tokens before. A match is its first group, where it has
    one. A token that reaches into two matches is of the first of them, one without text of its own (a part of a
    character, or a special token) of that in which the next character stands.
    """
    text = decode(ids)

    @cache
    def settled(count: int) -> int:
        """Characters that the first tokens have settled: what is decoded of a part of a character is undone later."""
        pairs = enumerate(zip(own := decode(ids[:count]), text, strict=False))
        return next((place for place, (mine, whole) in pairs if mine != whole), min(len(own), len(text)))

    def behind(place: int) -> int:
        return settled(place + 1)

    places = range(len(ids))
    found = np.zeros(len(ids), dtype=np.int64)
    for number, match in enumerate(expression.finditer(text), start=1):
        begin, end = match.span(1 if expression.groups else 0)
        if begin == end:  # nothing, or a group that took no part
            continue
        first = min(bisect_right(places, begin, key=behind), bisect_left(places, begin, key=settled))
        last = bisect_left(places, end, key=behind)
        own = found[first : last + 1]
        own[own == 0] = number
    return found
