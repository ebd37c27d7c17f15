"""States of plugins that keep none themselves: plain data, which is stored between two calls and read again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from moalign.testing.review import Review, short

State = Mapping[str, Any]


def begun(review: Review, init: Callable[..., Any], *arguments: Any, tried: str = "init()") -> State:
    """The first state, checked to be plain data."""
    change = "return a mapping of plain data (text, numbers, lists, mappings, None) from init()"
    state: State = review.call(tried, change, init, *arguments)
    check_state(review, tried, state)
    return state


def check_state(review: Review, tried: str, state: Any) -> None:
    """Fail where JSON does not give it back as it was."""
    change = (
        "keep as state a mapping that JSON can hold: text as keys; text, finite numbers, lists, mappings, None; no "
        "tensors, no tuples"
    )
    plain = isinstance(state, Mapping) and through_json(state) == dict(state)
    review.require(plain, tried, f"the state {short(state)}", change)


def through_json(state: State) -> Any:
    """With its keys sorted, as a file may have them; None where it is no JSON."""
    try:
        return json.loads(json.dumps(dict(state), allow_nan=False, sort_keys=True))
    except (TypeError, ValueError):
        return None
