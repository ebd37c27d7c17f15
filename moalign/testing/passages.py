"""Whether a loss says soundly which passages of responses it weighs tokens by."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moalign.testing.review import short

if TYPE_CHECKING:
    from torch import Tensor

    from moalign.testing.objective import Trial


def expressions(t: Trial) -> dict[str, str]:
    """Those of the passages that the loss reads."""
    change = "return regular expressions by name, both text, from passages; an empty mapping where there are none"
    found: Any = t.review.answer("passages()", change, t.plugin.passages)
    good = isinstance(found, Mapping) and all(isinstance(text, str) for pair in found.items() for text in pair)
    t.review.require(good, "passages()", short(found), change)
    return dict(found)


def passages_are_expressions(t: Trial) -> None:
    """The same twice, each one that Python's ``re`` takes, and of a loss that weighs tokens."""
    found = expressions(t)
    same = found == expressions(t)
    t.review.require(same, "passages() twice", "other expressions", "let them follow from the options alone")
    for name, expression in found.items():
        change = "give a regular expression of Python's re; check an option that holds one with a validator"
        try:
            re.compile(expression)
        except re.error as error:
            t.review.fail("passages()", f"'{name}' is {expression!r}: {error}", change, error)
    change = 'declare "token_advantages" too: only `token_advantages` is told of passages'
    t.review.require(t.weighs_tokens or not found, "passages()", short(found), change)


def made_up(t: Trial, mask: Tensor) -> dict[str, Tensor]:
    """In each response matches of two tokens, and every third token in none; like the mask, [N,T] by name."""
    import torch

    rows, places = torch.arange(len(mask))[:, None], torch.arange(mask.shape[1])
    numbers = (1 + places // 2) * ((rows + places) % 3 != 0) * mask
    return {name: numbers.clone() for name in expressions(t)}
