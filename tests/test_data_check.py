"""The report on a data file."""

import io
import json

from rich.console import Console
from test_data_tokenise import build

from moalign.data.check import SHOWN, Conflict, ObjectiveCounts, examine, render
from moalign.data.tokenise import Tokeniser
from moalign.types import Pair, Record, Refusal

RECORDS = [
    Record(
        "Q one",
        ("aa", "b", ""),
        {"short": (2.0, 1.0, None), "flat": (5, 5, 5)},
        {"helpful": (Pair(0, 1), Pair(1, 2, 0.0)), "safe": (Pair(0, 1), Pair(2, 1))},
        group="one",
    ),
    Record("R", ("c", "dd"), {"helpful": (1.0, 3.0)}, {"helpful": (Pair(0, 1),), "safe": (Pair(1, 0),)}, group="two"),
    Record("S", ("e", "f"), {}, {"helpful": (Pair(0, 1),)}, group="three"),
    Record("S", ("f", "e"), {}, {"safe": (Pair(0, 1),)}, group="three"),
]
OBJECTIVES = ("helpful", "safe", "short", "flat")
REFUSALS = [Refusal("f.jsonl", i, f"not a number: {i}") for i in range(30)] + [
    Refusal("f.jsonl", 99, "chosen equals rejected")
]


def test_counts():
    report = examine(RECORDS, REFUSALS, OBJECTIVES, directions={"short": "min"})
    assert (report.records, report.groups, report.responses, report.empty_responses) == (4, 3, 9, 1)
    assert report.objectives == (
        ObjectiveCounts("helpful", scores=2, pairs=4, ties=1, unusable=1, contradicted=1),
        ObjectiveCounts("safe", scores=0, pairs=4, ties=0, unusable=1, contradicted=0),
        ObjectiveCounts("short", scores=2, pairs=1, ties=0, unusable=0, contradicted=0),
        ObjectiveCounts("flat", scores=3, pairs=3, ties=3, unusable=2, contradicted=0),
    )
    assert report.refused == {"not a number": 30, "chosen equals rejected": 1}
    assert report.first_refusals == tuple(REFUSALS[:SHOWN])
    assert report.warnings == ("flat: all 3 rewards are 5; it cannot tell responses apart",)


def test_conflicts_are_counted_across_rows_of_one_prompt():
    found = {
        conflict.objectives: conflict
        for conflict in examine(RECORDS, (), OBJECTIVES, directions={"short": "min"}).conflicts
    }
    # agree on (aa, b); a tie against a choice on (b, ""); disagree on (c, dd) and, in two rows, on (e, f)
    assert found["helpful", "safe"] == Conflict(("helpful", "safe"), both=4, disagree=2, tied=1)
    assert found["helpful", "short"] == Conflict(("helpful", "short"), both=1, disagree=1, tied=0)
    assert found["short", "flat"] == Conflict(("short", "flat"), both=1, disagree=0, tied=1)
    turned = {conflict.objectives: conflict for conflict in examine(RECORDS, (), OBJECTIVES).conflicts}
    assert turned["helpful", "short"].disagree == 0


def test_lengths():
    lengths = examine(RECORDS, tokeniser=Tokeniser.of(build("word-level"))).lengths
    assert lengths["prompt, characters"] == {"least": 1, "10 %": 1, "median": 1, "90 %": 5, "most": 5}
    assert lengths["response, characters"]["most"] == 2
    assert lengths["response, tokens"] == {"least": 2, "10 %": 2, "median": 2, "90 %": 2, "most": 2}
    assert "prompt, tokens" not in examine(RECORDS).lengths


def test_objectives_are_those_of_the_file_when_none_are_named():
    assert [counts.name for counts in examine(RECORDS).objectives] == ["flat", "helpful", "safe", "short"]


def test_json_and_console():
    report = examine(RECORDS, REFUSALS, OBJECTIVES)
    assert json.loads(json.dumps(report.to_dict()))["refused"]["not a number"] == 30
    console = Console(file=io.StringIO(), width=160)
    console.print(render(report))
    shown = console.file.getvalue()
    for words in (
        "4 records",
        "1 of them empty",
        "helpful / safe",
        "f.jsonl:0: not a number: 0",
        "and 11 more",
        "warning: flat",
    ):
        assert words in shown
    assert "f.jsonl:25" not in shown
    console.print(render(examine([], [Refusal("f", 1, "[red]no markup[/]")])))
    assert "[red]no markup[/]" in console.file.getvalue()
