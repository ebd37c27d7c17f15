"""``samples.jsonl`` of a candidate or the untouched base: its responses to the held-out prompts, a line for each."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moalign import storage
from moalign.errors import CorruptFileError

if TYPE_CHECKING:
    from moalign.engine.evaluate import Evaluation

FILE = "samples.jsonl"
LARGEST = 1e100  # of rewards and log-ratios, whose squares are to be finite
AGAIN = "base samples"  # the event that says what they are where they were made again
BASE = "base"  # the folder of the untouched base in a run directory; candidates have theirs under candidates/


@dataclass(frozen=True)
class SampleLine:
    """What is read back of a response: its prompt as text, its rewards by objective, and log pi / pi_ref in nats.

    ``rewards``: without objectives that abstained; None where nothing scored it. ``log_ratio``: None if not measured.
    """

    prompt: str
    rewards: Mapping[str, float] | None
    log_ratio: float | None


def text_of(measured: Evaluation, prompts: Sequence[str], objectives: Sequence[str]) -> str:
    """The file's content. ``prompts``: as text, by the number that a response has of its prompt."""
    lines = []
    for place, rollout in enumerate(measured.samples):
        row: dict[str, Any] = {"prompt": prompts[rollout.prompt], "response": rollout.text, "ended": rollout.ended}
        if measured.rewards is not None:
            found = measured.rewards[place].tolist()
            row["rewards"] = {
                name: value for name, value in zip(objectives, found, strict=True) if math.isfinite(value)
            }
        if measured.log_ratios is not None:
            row["log_ratio"] = float(measured.log_ratios[place])
        lines.append(json.dumps(row, sort_keys=True) + "\n")
    return "".join(lines)


def of_base(events: Sequence[Mapping[str, Any]]) -> str | None:
    """SHA-256 of the untouched base's file, by a run's journal; None where none was kept."""
    said = [event.get("samples") for event in events if event["event"] in ("base", AGAIN)]
    return said[-1] if said else None


def read(folder: Path) -> list[SampleLine]:
    """The lines in the folder of a candidate or the base, in order.

    Raises RunError where the file is not there, CorruptFileError where a line is not one of a sample.
    """
    file = folder / FILE
    try:
        return [_line(storage.parse_json(line)) for line in storage.read_bytes(file).splitlines()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFileError(f"{file}: a line is not the sample that was written here") from error


def _line(row: Mapping[str, Any]) -> SampleLine:
    """Raises the built-in errors of whatever is not there, of another type, or larger than any that is written."""
    rewards, log_ratio = row.get("rewards"), row.get("log_ratio")
    known = None if rewards is None else {name: float(value) for name, value in rewards.items()}
    if not isinstance(row["prompt"], str):
        raise TypeError(row["prompt"])
    if not all(abs(value) < LARGEST for value in (*(known or {}).values(), float(log_ratio or 0.0))):
        raise ValueError(row)
    return SampleLine(row["prompt"], known, None if log_ratio is None else float(log_ratio))
