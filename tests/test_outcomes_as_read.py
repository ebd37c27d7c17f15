"""What an unbroken run hands on is what a resumed one reads."""

from __future__ import annotations

import json

from moalign.sweeps import outcomes
from moalign.types import Candidate, Outcome, Preference

NAMES = ("a", "b")
EQUAL = Preference("weights", {"a": 0.5, "b": 0.5})


def written(event):
    return json.loads(json.dumps(event, sort_keys=True))


def test_outcomes_and_candidates_are_as_the_journal_gives_them_back():
    outcome = Outcome(
        "o", "done", EQUAL, {"b": 1.0, "a": 2.0}, parents={"z": 0.5, "y": 0.5}, changes={"loss.x": (1, 2)}
    )
    read = outcomes.from_event(written(outcomes.to_event(outcome)), NAMES)
    found = outcomes.as_read(outcome, NAMES)
    assert found == read != outcome and list(found.parents) == ["y", "z"] and found.changes == {"loss.x": [1, 2]}
    candidate = Candidate("c", EQUAL, shares={"z": (0.5, 1.0), "y": 0.5}, changes={"train.steps": 3})
    again = outcomes.candidate_as_read(candidate, NAMES)
    assert again == outcomes.candidate_from(written(outcomes.candidate_to(candidate)), NAMES) == candidate
    assert list(again.shares) == ["y", "z"] and again.shares["z"] == (0.5, 1.0)
