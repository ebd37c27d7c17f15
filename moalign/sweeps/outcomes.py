"""Outcomes and candidates as journal events, there and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    """All outcomes in the order in which they were reached."""
    return [from_event(event, objectives) for event in events if event["event"] == "outcome"]


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
    )


def failure(candidate: Candidate, error: str) -> Outcome:
    return Outcome(
        id=candidate.id,
        status="failed",
        preference=candidate.preference,
        error=error,
        kind=candidate.kind,
        changes=candidate.changes,
    )
