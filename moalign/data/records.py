"""What a record must be, whoever read it, and how records of one prompt are put together."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

from moalign.types import Message, Pair, Record

MOST_RESPONSES = 32  # of one merged record: pairs grow with the square
LARGEST = 1e30  # of a score or strength: differences and squares stay finite in the arithmetic that follows


def fault_of(record: Record, objectives: Collection[str] = ()) -> str | None:
    """Why the record cannot be used, or None. ``objectives``: the names it may speak of; empty: any.

    The part before the first ": " is the same for all records of one kind of fault, so that reasons can be counted.
    """
    if not isinstance(record.responses, tuple) or (not record.responses and (record.scores or record.pairs)):
        return "no responses"  # a prompt alone is sound: a policy can be asked it
    texts = [_prompt_fault(record.prompt), *(_text_fault(text, "a response") for text in record.responses)]
    named = [_name_fault(name, objectives) for name in (*record.scores, *record.pairs)]
    scores = [_score_fault(name, values, len(record.responses)) for name, values in record.scores.items()]
    pairs = [_pair_fault(name, pair, len(record.responses)) for name, pairs in record.pairs.items() for pair in pairs]
    return next((fault for fault in (*texts, *named, *scores, *pairs) if fault is not None), None)


def _prompt_fault(prompt: Any) -> str | None:
    if isinstance(prompt, str):
        return _text_fault(prompt, "the prompt")
    if not isinstance(prompt, tuple) or not prompt:
        return f"the prompt is neither text nor messages: {type(prompt).__name__}"
    for message in prompt:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            return "a message of the prompt lacks role or content"
        fault = next((f for value in message.values() if (f := _text_fault(value, "a message of the prompt"))), None)
        if fault:
            return fault
    if prompt[-1]["role"] == "assistant":
        return "the prompt ends with an assistant message"
    return None


def _text_fault(text: Any, what: str) -> str | None:
    if not isinstance(text, str):
        return f"{what} is not text: {type(text).__name__}"
    if "\0" in text:
        return f"{what} holds a NUL character"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return f"{what} holds a lone surrogate"
    return None


def _name_fault(name: str, objectives: Collection[str]) -> str | None:
    if objectives and name not in objectives:
        return f"unknown objective: {name!r}; the configuration has {', '.join(sorted(objectives))}"
    return None


def _score_fault(name: str, values: Sequence[Any], responses: int) -> str | None:
    if len(values) != responses:
        return f"number of scores differs from number of responses: {name!r} has {len(values)} for {responses}"
    for value in values:
        if value is not None and not (_is_number(value) and abs(value) <= LARGEST):
            return f"a score is not a finite number of at most {LARGEST:g}: {name!r} has {value!r}"
    return None


def _pair_fault(name: str, pair: Pair, responses: int) -> str | None:
    named = (pair.chosen, pair.rejected)
    if not all(type(index) is int and 0 <= index < responses for index in named):
        return f"a pair names a response that is not there: {name!r} has {named!r} of {responses}"
    if pair.chosen == pair.rejected:
        return f"a pair compares a response with itself: {name!r} has response {pair.chosen}"
    if not (_is_number(pair.strength) and 0 <= pair.strength <= LARGEST):
        return f"the strength of a pair is not a number from 0 to {LARGEST:g}: {name!r} has {pair.strength!r}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


# --- putting the records of one prompt together ---------------------------------------------------------------------


def merge(records: Iterable[Record]) -> list[Record]:
    """Join records of the same group and prompt, so that responses from different rows can be compared.

    A response that occurs twice becomes one, unless the two occurrences carry different scores. A record takes at
    most ``MOST_RESPONSES``; then the next one is begun. The order is that of first appearance.
    """
    merged: list[Record] = []
    place: dict[Any, int] = {}
    for record in records:
        key = (record.group, prompt_key(record.prompt))
        at = place.get(key)
        joined = _join(merged[at], record) if at is not None else None
        if joined is not None and at is not None:
            merged[at] = joined
        else:
            place[key] = len(merged)
            merged.append(record)
    return merged


def prompt_key(prompt: str | tuple[Message, ...]) -> str | tuple[tuple[tuple[str, str], ...], ...]:
    """A hashable form of a prompt; equal for equal prompts."""
    return prompt if isinstance(prompt, str) else tuple(tuple(sorted(message.items())) for message in prompt)


def _join(first: Record, second: Record) -> Record | None:
    """Both records as one, or None where that would be too large."""
    responses = list(first.responses)
    scores: dict[str, list[float | None]] = {name: list(values) for name, values in first.scores.items()}
    places: list[int] = []
    for index, text in enumerate(second.responses):
        own = {name: values[index] for name, values in second.scores.items()}
        at = _same_response(responses[: len(first.responses)], scores, text, own)
        if at is None or at in places:
            at = len(responses)
            responses.append(text)
            for values in scores.values():
                values.append(None)
        for name, value in own.items():
            column = scores.setdefault(name, [None] * len(responses))
            column[at] = column[at] if value is None else value
        places.append(at)
    if len(responses) > MOST_RESPONSES:
        return None
    pairs = {name: list(values) for name, values in first.pairs.items()}
    for name, judged in second.pairs.items():
        moved = [replace(pair, chosen=places[pair.chosen], rejected=places[pair.rejected]) for pair in judged]
        pairs.setdefault(name, []).extend(moved)
    return replace(
        first,
        responses=tuple(responses),
        scores={name: tuple(values) for name, values in scores.items()},
        pairs={name: tuple(values) for name, values in pairs.items()},
    )


def _same_response(
    responses: list[str], scores: Mapping[str, list[float | None]], text: str, own: Mapping[str, float | None]
) -> int | None:
    for at, known in enumerate(responses):
        if known == text and all(
            value is None or name not in scores or scores[name][at] in (None, value) for name, value in own.items()
        ):
            return at
    return None
