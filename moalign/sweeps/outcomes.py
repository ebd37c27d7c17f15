"""Outcomes and candidates as journal events, there and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from moalign import preference
from moalign.types import Candidate, Outcome

GIVEN_UP = {"given_up": True}  # in the event of an outcome


def to_event(outcome: Outcome) -> dict[str, Any]:
    return {
        "event": "outcome",
        "id": outcome.id,
        "status": outcome.status,
        "preference": preference.to_json(outcome.preference),
        "scores": dict(outcome.scores),
        "stderr": dict(outcome.stderr),
        "kl": outcome.kl,
        "tokens": outcome.tokens,
        "checksum": outcome.checksum,
        "error": outcome.error,
        "details": dict(outcome.details),
        "kind": outcome.kind,
        "parents": dict(outcome.parents),
        "changes": dict(outcome.changes),
    }


def from_event(event: Mapping[str, Any], objectives: tuple[str, ...]) -> Outcome:
    return Outcome(
        id=event["id"],
        status=event["status"],
        preference=preference.from_json(event["preference"], objectives),
        scores=event["scores"],
        stderr=event["stderr"],
        kl=event["kl"],
        tokens=event["tokens"],
        checksum=event["checksum"],
        error=event["error"],
        details=event["details"],
        kind=event.get("kind", "trained"),
        parents=event.get("parents", {}),
        changes=event.get("changes", {}),
    )


def history(events: list[dict[str, Any]], objectives: tuple[str, ...]) -> list[Outcome]:
    """All outcomes in the order in which they were reached, among them what did not fit into the budget."""
    found = []
    for event in events:
        if event["event"] == "outcome":
            found.append(from_event(event, objectives))
        elif event["event"] == "proposed":
            found += [skipped(candidate_from(each, objectives)) for each in event.get("skipped", [])]
    return found


def proposal(candidates: list[dict[str, Any]], left_out: list[dict[str, Any]]) -> dict[str, Any]:
    """The event of a proposal, and of what of it the budget does not pay."""
    event: dict[str, Any] = {"event": "proposed", "candidates": candidates}
    return event | ({"skipped": left_out} if left_out else {})


def given_up(events: list[dict[str, Any]]) -> set[str]:
    """Candidates that took the process with them."""
    return {event["id"] for event in events if event["event"] == "outcome" and GIVEN_UP.items() <= event.items()}


def candidate_to(candidate: Candidate) -> dict[str, Any]:
    return {
        "id": candidate.id,
        "preference": preference.to_json(candidate.preference),
        "parents": list(candidate.parents),
        "mixed": candidate.mixed,
        "changes": dict(candidate.changes),
        "conditioned": candidate.conditioned,
        "shares": dict(candidate.shares),
    }


def candidate_from(event: Mapping[str, Any], objectives: tuple[str, ...]) -> Candidate:
    preferred = preference.from_json(event["preference"], objectives)
    return Candidate(
        id=event["id"],
        preference=preferred,
        parents=tuple(event["parents"]),
        mixed=event.get("mixed", False),
        changes=event.get("changes", {}),
        conditioned=event.get("conditioned", False),
        shares={name: _share(value) for name, value in event.get("shares", {}).items()},
    )


def _share(value: float | list[float]) -> float | tuple[float, ...]:
    return tuple(value) if isinstance(value, list) else value


def as_read(outcome: Outcome, objectives: tuple[str, ...]) -> Outcome:
    """As the journal gives it back, so that an unbroken run hands on what a resumed one does: dicts in the order of
    their keys, lists for tuples."""
    return from_event(_read(to_event(outcome)), objectives)


def candidate_as_read(candidate: Candidate, objectives: tuple[str, ...]) -> Candidate:
    """The same for a candidate."""
    return candidate_from(_read(candidate_to(candidate)), objectives)


def _read(event: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(event, sort_keys=True))


def failure(candidate: Candidate, error: str) -> Outcome:
    return _without_result(candidate, "failed", error)


def skipped(candidate: Candidate) -> Outcome:
    return _without_result(candidate, "skipped", "what is left of search.budget does not pay it")


def _without_result(candidate: Candidate, status: Literal["failed", "skipped"], reason: str) -> Outcome:
    return Outcome(
        id=candidate.id,
        status=status,
        preference=candidate.preference,
        error=reason,
        kind=candidate.kind,
        changes=candidate.changes,
    )
