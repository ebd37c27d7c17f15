"""``moalign plugins doctor``: every distribution examined in a process of its own; what is wrong and how to mend it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from typing import Any

from rich.console import Console

from moalign import registry
from moalign.api import ENTRY_POINT_GROUP
from moalign.commands import plugin_guard
from moalign.commands.plugin_shadows import shadowed_distributions

SERIOUS = ("broken", "faulty")
OWN = "moalign"
DO_WITHOUT = "tell its author; until then {}={} leaves it out"


@dataclass(frozen=True)
class Finding:
    """Something about a distribution or one of its plugins. ``broken`` and ``faulty`` ones are errors.

    ``what``: broken (not loaded), faulty (loaded, and does not do what it should), conflict, shadowed, disabled,
    unchecked (the conformance kit did not run).
    """

    what: str
    distribution: str
    version: str
    about: str
    reason: str
    cure: str = ""


@dataclass(frozen=True)
class Report:
    """What ``doctor`` found: how many plugins each distribution brought, how many the kit passed, and the findings.

    ``loaded``: distributions whose plugins were only loaded.
    """

    plugins: Mapping[str, int] = field(default_factory=dict)
    passed: Mapping[str, int] = field(default_factory=dict)
    loaded: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def broken(self) -> bool:
        return any(finding.what in SERIOUS for finding in self.findings)


def examine(deadline: float, everything: bool = False) -> Report:
    """Examine all that is installed and not disabled. Nothing of it is imported into this process.

    ``everything``: run the conformance kit on moalign's own plugins, too, which its tests do and which takes minutes.
    """
    installed = {registry.origin(point) for point in metadata.entry_points(group=ENTRY_POINT_GROUP)}
    plugins: dict[str, int] = {}
    passed: dict[str, int] = {}
    findings: list[Finding] = []
    loaded: list[str] = []
    claims: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for distribution, version in sorted(installed):
        reason = registry.reason_to_leave_out(distribution)
        if reason:
            findings.append(Finding("disabled", distribution, version, "", reason))
            continue
        thorough, who = everything or distribution != OWN, f"{distribution} {version}"
        events = plugin_guard.examine(distribution, deadline, kit=thorough)
        loaded += [] if thorough else [who]
        plugins[who] = sum(event["event"] == "entry" for event in events)
        passed[who] = sum(event["event"] == "passed" for event in events)
        findings += [found for event in events for found in _finding(event, distribution, version)]
        for event in events:
            if event["event"] == "entry":
                claims.setdefault((event["kind"], event["name"]), []).append((distribution, version))
    findings += _conflicts(claims)
    for shadow in shadowed_distributions():
        findings.append(Finding("shadowed", shadow.name, shadow.version, "", shadow.reason))
    return Report(plugins, passed, tuple(loaded), tuple(findings))


def show(report: Report, as_json: bool) -> bool:
    """Print the report; whether something is broken."""
    if as_json:
        print(json.dumps(asdict(report) | {"broken": report.broken}, indent=2))
        return report.broken
    console = Console()
    for who, count in report.plugins.items():
        counts = f"{count} plugin{'' if count == 1 else 's'}, {report.passed[who]} passed the conformance kit"
        if who in report.loaded:
            counts = f"{count} plugins, loaded; --all runs the conformance kit on them, as moalign's own tests do"
        console.print(f"{who}: {counts}", markup=False, highlight=False)
    colours = {"broken": "red", "faulty": "red", "conflict": "yellow", "shadowed": "yellow"}
    for finding in sorted(_merged(report.findings), key=lambda finding: (finding.what not in SERIOUS, finding.what)):
        console.print(f"\n{finding.what:<10}", style=colours.get(finding.what, "dim"), end="")
        subject = " ".join(filter(None, (finding.distribution, finding.version, finding.about)))
        lines = [f"{subject}: {finding.reason}", *([f"          to mend it: {finding.cure}"] if finding.cure else [])]
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True, end="")
    serious = sum(finding.what in SERIOUS for finding in report.findings)
    verdict = f"{serious} to mend" if serious else "nothing is broken"
    console.print("\n" if report.findings else "", end="")
    console.print(verdict, style="red" if serious else "green")
    return report.broken


def _merged(findings: Iterable[Finding]) -> list[Finding]:
    """Findings that differ only in the plugin they are about, as one."""
    groups: dict[Finding, list[str]] = {}
    for finding in findings:
        groups.setdefault(replace(finding, about=""), []).append(finding.about)
    return [replace(finding, about=", ".join(abouts)) for finding, abouts in groups.items()]


def _finding(event: Mapping[str, Any], distribution: str, version: str) -> Iterable[Finding]:
    without = DO_WITHOUT.format(registry.DISABLE_VARIABLE, ":".join(filter(None, (distribution, event.get("name")))))
    match event["event"]:
        case "broken":
            about = f"(entry point '{event['entry_point']}')"
            yield Finding("broken", distribution, version, about, event["reason"], event["cure"])
        case "died":
            where = f", at {event['where']}" if event["where"] else ""
            reason = f"{event['doing']} {event['how']}{where}; what comes after it was not looked at"
            yield Finding("broken", distribution, version, "", reason, without)
        case "faulty":
            yield Finding("faulty", distribution, version, event["plugin"], event["reason"], without)
        case "unchecked":
            yield Finding("unchecked", distribution, version, event["plugin"], event["reason"])


def _conflicts(claims: Mapping[tuple[str, str], list[tuple[str, str]]]) -> Iterable[Finding]:
    for (kind, name), owners in claims.items():
        for distribution, version in owners if len(owners) > 1 else ():
            others = " and ".join(" ".join(owner) for owner in owners if owner != (distribution, version))
            cure = f"write '{distribution}:{name}' in the configuration, or leave out one of the distributions"
            yield Finding("conflict", distribution, version, f"{kind} '{name}'", f"also claimed by {others}", cure)
