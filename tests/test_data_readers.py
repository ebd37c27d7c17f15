"""Faults 2, 3, 5 and 7: what the shipped readers take, and what they refuse with file and line."""

import json
import math

import pytest
from pydantic import ValidationError
from test_data_tokenise import build

from moalign.data.loading import load_records, read_records
from moalign.data.pairing import labelled
from moalign.data.tokenise import Tokeniser
from moalign.errors import DataError
from moalign.types import Pair, Refusal
from moalign_plugins.readers.columns import Columns
from moalign_plugins.readers.preference import PreferenceRows
from moalign_plugins.readers.prompts import Prompts
from moalign_plugins.readers.qa_feedback import OFFERED, QAFeedback


def read(reader, rows, objectives=()):
    numbered = [("rows.jsonl", number, row) for number, row in enumerate(rows, 1)]
    return list(read_records(numbered, reader, objectives))


def only(reader, row, objectives=()):
    (item,) = read(reader, [row], objectives)
    return item


def refusal(reader, row, objectives=()):
    item = only(reader, row, objectives)
    assert isinstance(item, Refusal), item
    assert (item.file, item.line) == ("rows.jsonl", 1)
    return item.reason


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# --- preference -----------------------------------------------------------------------------------------------------


def test_preference_explicit_prompt():
    row = {"prompt": "Q", "chosen": "good", "rejected": "bad", "score_chosen": "8.5", "score_rejected": 2}
    record = only(PreferenceRows(), row, ["helpful"])
    assert (record.prompt, record.responses) == ("Q", ("good", "bad"))
    assert record.pairs == {"helpful": (Pair(0, 1, 1.0),)}
    assert record.scores == {"helpful": (8.5, 2.0)}
    assert (record.group, record.file, record.line) == ("Q", "rows.jsonl", 1)


@pytest.mark.parametrize(("given", "strength"), [({}, 1.0), ({"strength": None}, 1.0), ({"strength": "2.5"}, 2.5)])
def test_preference_strength(given, strength):
    row = {"prompt": "Q", "chosen": "good", "rejected": "bad"} | given
    assert only(PreferenceRows(), row, ["helpful"]).pairs == {"helpful": (Pair(0, 1, strength),)}


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("Is it blue?", " Yes.", " No."),
        ("The sky is", " blue.", " green."),
        ("ab", "c", "cd"),
        ("Human: hi\n\nAssistant: I d", "o", "on't"),
        ("Human: hi\n\nAssistant:", " \n", " -"),
    ],
)
def test_preference_implicit_prompt_as_trl(prompt, chosen, rejected):
    """What ``trl.data_utils.extract_prompt`` makes of the same two texts."""
    record = only(PreferenceRows(), {"chosen": prompt + chosen, "rejected": prompt + rejected})
    assert (record.prompt, record.responses) == (prompt, (chosen, rejected))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("Q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        {"chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")]},
        {"prompt": "Q", "chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")]},
        {"prompt": [user("Q")], "chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")]},
        {"prompt": [{**user("Q"), "tool_calls": None}], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        {"prompt": [user("Q")], "chosen": "good", "rejected": "bad"},
    ],
)
def test_preference_conversations(row):
    record = only(PreferenceRows(), row)
    assert record.prompt == (user("Q"),)
    assert record.responses == ("good", "bad")


def test_preference_text_prompt_before_lone_replies():
    record = only(PreferenceRows(), {"prompt": "Q", "chosen": [assistant("good")], "rejected": [assistant("bad")]})
    assert (record.prompt, record.responses) == ("Q", ("good", "bad"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Q", "chosen": "x"}, "no column rejected"),
        ({"prompt": "Q"}, "no column chosen"),
        ({"prompt": "Q", "chosen": None, "rejected": "x"}, "chosen is neither text"),
        ({"prompt": 3, "chosen": "y", "rejected": "x"}, "prompt is neither text"),
        ({"prompt": "Q", "chosen": [], "rejected": "x"}, "chosen is neither text"),
        ({"chosen": "yes", "rejected": "no"}, "do not begin with the same text"),
        ({"chosen": "", "rejected": "no"}, "do not begin with the same text"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "same message"),
        ({"prompt": "Q", "chosen": "y", "rejected": [assistant("b")]}, "the other a conversation"),
        (
            {"chosen": [user("Q"), assistant("a"), user("?"), assistant("b")], "rejected": [user("Q"), assistant("c")]},
            "one assistant message",
        ),
        ({"prompt": "Q", "chosen": [{"role": "user"}], "rejected": [assistant("b")]}, "lacks role or content"),
        (
            {
                "prompt": "Q",
                "chosen": [{"role": "assistant", "content": [{"type": "image"}]}],
                "rejected": [assistant("b")],
            },
            "more than text",
        ),
        (
            {"prompt": "Q", "chosen": "y", "rejected": "x", "score_chosen": math.nan},
            "not a finite number: column 'score_chosen'",
        ),
        (
            {"prompt": "Q", "chosen": "y", "rejected": "x", "score_rejected": "inf"},
            "not a finite number: column 'score_rejected'",
        ),
        (
            {"prompt": "Q", "chosen": "y", "rejected": "x", "score_chosen": True},
            "not a finite number: column 'score_chosen'",
        ),
        ({"prompt": "Q", "chosen": "y", "rejected": "x", "strength": -1}, "out of its range: column 'strength'"),
        ({"prompt": "Q", "chosen": "y", "rejected": "x", "objective": 3}, "not a name"),
        ({"prompt": "Q\0", "chosen": "y", "rejected": "x"}, "NUL"),
        ({"prompt": "Q", "chosen": "y\ud800", "rejected": "x"}, "lone surrogate"),
        (
            {"prompt": [user("Q"), assistant("A")], "chosen": [assistant("x")], "rejected": [assistant("y")]},
            "ends with an assistant",
        ),
    ],
)
def test_preference_refuses(row, reason):
    assert reason in refusal(PreferenceRows(), row)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "chosen": "x", "rejected": "x"},
        {"chosen": "Q: x", "rejected": "Q: x"},
        {"chosen": [user("Q"), assistant("x")], "rejected": [user("Q"), assistant("x")]},
    ],
)
def test_preference_leaves_equal_responses_to_be_counted(row):
    record = only(PreferenceRows(), row)
    assert record.responses == ("x", "x")
    assert record.pairs == {"preference": (Pair(0, 1),)}


def test_preference_objective():
    row = {"prompt": "Q", "chosen": "y", "rejected": "x"}
    assert list(only(PreferenceRows(), row).pairs) == ["preference"]
    assert list(only(PreferenceRows(), row, ["helpful"]).pairs) == ["helpful"]
    assert list(only(PreferenceRows(objective="b"), row, ["a", "b"]).pairs) == ["b"]
    assert list(only(PreferenceRows(objective="b"), row | {"objective": "a"}, ["a", "b"]).pairs) == ["a"]
    assert "unknown objective: 'c'" in refusal(PreferenceRows(), row | {"objective": "c"}, ["a", "b"])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*set the reader's objective to one of a, b"):
        read(PreferenceRows(), [row], ["a", "b"])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*'c' is none of a, b"):
        read(PreferenceRows(objective="c"), [row], ["a", "b"])


# --- columns --------------------------------------------------------------------------------------------------------


def test_columns_scores_and_missing_values():
    reader = Columns(prompt="q", responses="answer", scores={"helpful": "h", "short": "s"})
    rows = [{"q": "Q", "answer": "A", "h": value, "s": 1} for value in (3, "4.5", "N/A", "", None, " n/a ")]
    assert [record.scores["helpful"] for record in read(reader, rows)] == [(3.0,), (4.5,), *[(None,)] * 4]


def test_columns_list_columns():
    reader = Columns(responses="answers", scores={"helpful": "h"})
    record = only(reader, {"prompt": "Q", "answers": ["a", "b", "c"], "h": ["1", None, 3]})
    assert record.responses == ("a", "b", "c")
    assert record.scores == {"helpful": (1.0, None, 3.0)}
    assert only(reader, {"prompt": "Q", "answers": ["a", "b"], "h": None}).scores == {"helpful": (None, None)}
    assert "number of scores differs" in refusal(reader, {"prompt": "Q", "answers": ["a", "b"], "h": [1]})
    assert "number of scores differs" in refusal(reader, {"prompt": "Q", "answers": ["a", "b"], "h": 1})


def test_columns_better():
    reader = Columns(responses=("a", "b"), better={"helpful": "h", "safe": "s"})
    row = {"prompt": "Q", "a": "one", "b": "two"}
    assert only(reader, row | {"h": 0, "s": "b"}).pairs == {"helpful": (Pair(0, 1),), "safe": (Pair(1, 0),)}
    assert only(reader, row | {"h": "1", "s": "tie"}).pairs == {"helpful": (Pair(1, 0),), "safe": (Pair(0, 1, 0.0),)}
    assert only(reader, row | {"h": None, "s": "N/A"}).pairs == {}
    for value in (2, -1, 0.5, "c", True, [0]):
        assert "column 'h'" in refusal(reader, row | {"h": value, "s": 0})
    best = only(Columns(responses="all", better={"helpful": "h"}), {"prompt": "Q", "all": ["a", "b", "c"], "h": 2})
    assert best.pairs == {"helpful": (Pair(2, 0), Pair(2, 1))}


def test_columns_signed_strength_with_ties():
    reader = Columns(responses=("a", "b"), strength={"helpful": "p"})
    row = {"prompt": "Q", "a": "one", "b": "two"}
    found = [only(reader, row | {"p": value}).pairs for value in (-3, "2", 0, None)]
    assert found == [
        {"helpful": (Pair(0, 1, 3.0),)},
        {"helpful": (Pair(1, 0, 2.0),)},
        {"helpful": (Pair(0, 1, 0.0),)},
        {},
    ]
    three = Columns(responses="all", strength={"helpful": "p"})
    assert "exactly two responses" in refusal(three, {"prompt": "Q", "all": ["a", "b", "c"], "p": 1})


@pytest.mark.parametrize("value", [math.nan, math.inf, "nan", "-inf", "1e999", True, "3,5", "1_000", {}, 10**400])
def test_columns_refuses_what_is_no_finite_number(value):
    reader = Columns(scores={"helpful": "h"})
    reason = refusal(reader, {"prompt": "Q", "response": "A", "h": value})
    assert reason.startswith("not a finite number: column 'h' has ")


def test_columns_refuses_bad_rows_and_maps():
    reader = Columns(scores={"helpful": "score_h"}, group="id")
    good = {"prompt": "Q", "response": "A", "score_h": 1, "id": 7}
    items = read(reader, [good, {"prompt": "Q"}, {"response": "A"}, good | {"response": 3}], ["helpful", "other"])
    assert [item.line for item in items] == [1, 2, 3, 4]
    assert items[0].group == "7"
    assert [getattr(item, "reason", None) for item in items] == [
        None,
        "no response in column 'response'",
        "no prompt in column 'prompt'",
        "a response is not text: columns response",
    ]
    with pytest.raises(DataError, match=r"rows\.jsonl:1: no row has a column 'score_h'; did you mean 'score_b'\?"):
        read(reader, [{"prompt": "Q", "response": "A", "score_b": 1, "id": 1}])
    with pytest.raises(DataError, match=r"names 'helpful', which is no objective; did you mean 'helpfull'\?"):
        read(reader, [good], ["helpfull"])
    with pytest.raises(ValidationError):
        Columns(responses=())
    with pytest.raises(ValidationError):
        Columns(respones="x")


# --- QA-FEEDBACK ----------------------------------------------------------------------------------------------------


def feedback_row(**changes):
    row = {
        "question": "Why?",
        "passages": [["Title", "First sentence.", "Second one."], ["Other", "Third."]],
        "gold": "Because.",
        **{f"prediction {i}": text for i, text in enumerate(["aaaa", "bb", "cccc ", "d"], 1)},
        "preference": [0, 1, 2, 1, 0, 2],
        "feedback": {
            "errors": [{"error type": "Irrelevant", "start": 0, "end": 1}, {"error type": "Unverifiable"}],
            "missing-info": [],
            "corrected-prediction": "aaa ",
        },
    }
    return row | changes


def test_qa_feedback_objectives():
    record = only(QAFeedback(), feedback_row())
    assert record.responses == ("aaaa", "bb", "cccc", "d", "aaa")
    assert record.group == "Why?"
    assert record.prompt == "First sentence. Second one.\n\nThird.\n\nQuestion: Why?\nAnswer:\n"
    expected = [(0, 1, 0.0), (0, 2, 1.0), (3, 0, 1.0), (1, 2, 1.0), (1, 3, 0.0), (3, 2, 1.0)]
    assert record.pairs["overall"] == tuple(Pair(*pair) for pair in expected)
    expected = [(1, 0, 2.0), (0, 2, 0.0), (3, 0, 3.0), (1, 2, 2.0), (3, 1, 1.0), (3, 2, 3.0)]
    assert record.pairs["conciseness"] == tuple(Pair(*pair) for pair in expected)
    assert record.pairs["relevance"] == record.pairs["factuality"] == (Pair(4, 0),)
    assert "completeness" not in record.pairs


def test_qa_feedback_only_what_is_asked_for():
    record = only(QAFeedback(), feedback_row(), ["overall", "brand-new"])
    assert list(record.pairs) == ["overall"]
    assert len(record.responses) == 4
    with pytest.raises(DataError, match=r"rows\.jsonl:1: none of the objectives helpful .* offers overall, relevance"):
        read(QAFeedback(), [feedback_row()], ["helpful"])


@pytest.mark.parametrize(
    ("characters", "expected"),
    [
        (0, ""),
        (14, ""),
        (15, "First sentence.\n\n"),
        (26, "First sentence. Second one.\n\n"),
        (31, "First sentence. Second one.\n\n"),
    ],
)
def test_qa_feedback_passages_are_cut_at_sentences(characters, expected):
    assert only(QAFeedback(passages=characters), feedback_row()).prompt == expected + "Question: Why?\nAnswer:\n"


def test_qa_feedback_correction_that_corrects_nothing_is_counted():
    feedback = feedback_row()["feedback"] | {"missing-info": [{}]}
    for corrected, reason in {
        " ": "dropped pair: one of its responses was dropped",
        "aaaa": "dropped pair: chosen equals rejected",
    }.items():
        record = only(QAFeedback(), feedback_row(feedback=feedback | {"corrected-prediction": corrected}))
        dataset = labelled([record], Tokeniser.of(build()), OFFERED)
        assert dataset.counts[reason] == 3
        assert set(dataset.pair_objective) == {OFFERED.index("overall"), OFFERED.index("conciseness")}
    flawless = feedback_row(feedback={"errors": [], "missing-info": [], "corrected-prediction": ""})
    assert set(only(QAFeedback(), flawless).pairs) == {"overall", "conciseness"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"preference": [0, 1, 2]}, "6 comparisons"),
        ({"preference": [0, 1, 2, 1, 0, 3]}, "none of 0, 1 and 2: '3'"),
        ({"preference": [0, 1, 2, 1, 0, True]}, "none of 0, 1 and 2"),
        ({"prediction 2": None}, "no text under 'prediction 2'"),
        ({"question": 5}, "no text under 'question'"),
        ({"passages": "text"}, "passages is not a list"),
        ({"passages": [["a", 3]]}, "a passage is not a list of sentences"),
        ({"feedback": None}, "lacks its lists"),
        ({"feedback": {"errors": [{"error type": ["x"]}], "missing-info": []}}, "unknown error type"),
    ],
)
def test_qa_feedback_refuses(changes, reason):
    assert reason in refusal(QAFeedback(), feedback_row(**changes))


def test_qa_feedback_file(tmp_path):
    path = tmp_path / "feedback.json"
    rows = [feedback_row(question=f"Q{i}?", preference=[i % 3] * 6) for i in range(9)]
    path.write_text(json.dumps(rows))
    loaded = load_records(path, QAFeedback())
    strengths = [pair.strength for record in loaded.records for pair in record.pairs["overall"]]
    firsts = [pair.chosen < pair.rejected for r in loaded.records for pair in r.pairs["overall"] if pair.strength]
    assert (strengths.count(0.0), firsts.count(True), firsts.count(False)) == (18, 18, 18)
    assert loaded.refusals == ()


# --- prompts alone --------------------------------------------------------------------------------------------------


def test_prompts_alone():
    assert Prompts().recognises({"prompt": "q"})
    assert not Prompts().recognises({"prompt": "q", "chosen": "a", "rejected": "b"})
    assert only(Prompts(), {"prompt": "q"}).responses == ()
    assert only(Prompts(column="ask"), {"ask": [user("q")], "other": 3}).prompt == (user("q"),)
    for bad in ({"prompt": ""}, {"prompt": None}, {"prompt": 3}, {"prompt": []}, {}):
        assert refusal(Prompts(), bad) == "no prompt in column 'prompt'"
