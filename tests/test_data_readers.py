"""Faults 2, 3, 5 and 7: what the shipped readers take, and what they refuse with file and line."""

import json
import math

import pytest
from moalign.data.loading import choose_reader, load_records, read_records
from moalign.data.records import MOST_RESPONSES, fault_of, merge
from moalign.errors import DataError, PluginError
from moalign.types import Pair, Record, Refusal
from moalign_plugins.readers.columns import Columns
from moalign_plugins.readers.preference import PreferenceRows
from moalign_plugins.readers.qa_feedback import QAFeedback
from pydantic import ValidationError


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
        ({"prompt": "Q", "chosen": "x", "rejected": "x"}, "chosen equals rejected"),
        ({"prompt": "Q", "chosen": "x"}, "no column rejected"),
        ({"prompt": "Q"}, "no column chosen"),
        ({"prompt": "Q", "chosen": None, "rejected": "x"}, "chosen is neither text"),
        ({"prompt": 3, "chosen": "y", "rejected": "x"}, "prompt is neither text"),
        ({"prompt": "Q", "chosen": [], "rejected": "x"}, "chosen is neither text"),
        ({"chosen": "yes", "rejected": "no"}, "do not begin with the same text"),
        ({"chosen": "", "rejected": "no"}, "do not begin with the same text"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "same message"),
        ({"prompt": "Q", "chosen": "y", "rejected": [assistant("b")]}, "the other a conversation"),
        ({"chosen": [user("Q"), assistant("a"), user("?"), assistant("b")], "rejected": [user("Q"), assistant("c")]}, "one assistant message"),
        ({"prompt": "Q", "chosen": [{"role": "user"}], "rejected": [assistant("b")]}, "lacks role or content"),
        ({"prompt": "Q", "chosen": [{"role": "assistant", "content": [{"type": "image"}]}], "rejected": [assistant("b")]}, "more than text"),
        ({"prompt": "Q", "chosen": "y", "rejected": "x", "score_chosen": math.nan}, "score_chosen is not a finite number"),
        ({"prompt": "Q", "chosen": "y", "rejected": "x", "score_rejected": "inf"}, "score_rejected is not a finite number"),
        ({"prompt": "Q", "chosen": "y", "rejected": "x", "score_chosen": True}, "score_chosen is not a finite number"),
        ({"prompt": "Q", "chosen": "y", "rejected": "x", "objective": 3}, "not a name"),
        ({"prompt": "Q\0", "chosen": "y", "rejected": "x"}, "NUL"),
        ({"prompt": "Q", "chosen": "y\ud800", "rejected": "x"}, "lone surrogate"),
        ({"prompt": [user("Q"), assistant("A")], "chosen": [assistant("x")], "rejected": [assistant("y")]}, "ends with an assistant"),
    ],
)
def test_preference_refuses(row, reason):
    assert reason in refusal(PreferenceRows(), row)


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
    assert found == [{"helpful": (Pair(0, 1, 3.0),)}, {"helpful": (Pair(1, 0, 2.0),)}, {"helpful": (Pair(0, 1, 0.0),)}, {}]
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
    [(0, ""), (14, ""), (15, "First sentence.\n\n"), (26, "First sentence. Second one.\n\n"), (31, "First sentence. Second one.\n\n")],
)
def test_qa_feedback_passages_are_cut_at_sentences(characters, expected):
    assert only(QAFeedback(passages=characters), feedback_row()).prompt == expected + "Question: Why?\nAnswer:\n"


def test_qa_feedback_correction_that_corrects_nothing_is_counted():
    feedback = feedback_row()["feedback"]
    for corrected, words in {" ": "is empty", "aaaa": "equals answer 1"}.items():
        row = feedback_row(feedback=feedback | {"corrected-prediction": corrected, "missing-info": [{}]})
        record, *refused = read(QAFeedback(), [row])
        assert set(record.pairs) == {"overall", "conciseness"}
        assert len(record.responses) == 4
        assert [words in item.reason for item in refused] == [True] * 3
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


# --- loading --------------------------------------------------------------------------------------------------------


def test_choosing_a_reader():
    readers = {"preference": PreferenceRows(), "columns": Columns(), "qa-feedback": QAFeedback()}
    assert choose_reader(("f", 1, {"prompt": "", "chosen": "", "rejected": ""}), readers) == "preference"
    assert choose_reader(("f", 1, feedback_row()), readers) == "qa-feedback"
    assert choose_reader(("f", 1, {"prompt": "", "response": ""}), readers) == "columns"
    with pytest.raises(DataError, match=r"f:1: no reader recognises the columns 'x', 'y'.*data\.reader"):
        choose_reader(("f", 1, {"x": 1, "y": 2}), readers)
    both = {"prompt": "", "response": "", "chosen": "", "rejected": ""}
    with pytest.raises(DataError, match=r"f:1: several readers .*\(preference, columns\)"):
        choose_reader(("f", 1, both), readers)


def test_all_rows_refused_is_an_error_that_says_the_first_reason(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Q", "chosen": "x", "rejected": "x"}\n' * 3)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: all 3 .* chosen equals rejected"):
        load_records(path, PreferenceRows())
    assert len(load_records(path, PreferenceRows(), allow_none=True).refusals) == 3
    path.write_text('{"prompt": "Q", "chosen": "x", "rejected": "y"}')
    assert len(load_records(path, PreferenceRows()).records) == 1  # one row is a file


def test_a_failing_reader_is_named_with_the_row():
    class Failing(PreferenceRows):
        def read(self, rows, objectives):
            for _file, line, _ in rows:
                yield 1 / (2 - line)

    with pytest.raises(PluginError, match=r"Failing failed at rows\.jsonl:1: TypeError: it yielded float"):
        read(Failing(), [{}, {}])

    class Dividing(Failing):
        def read(self, rows, objectives):
            for _file, line, _ in rows:
                yield Refusal("f", line, str(1 / (2 - line)))

    with pytest.raises(PluginError, match=r"Dividing failed at rows\.jsonl:2: ZeroDivisionError"):
        read(Dividing(), [{}, {}])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"responses": ()}, "no responses"),
        ({"responses": ("a", 3)}, "a response is not text: int"),
        ({"prompt": ({"role": "user"},)}, "lacks role or content"),
        ({"scores": {"x": (1.0,)}}, "number of scores differs from number of responses: 'x' has 1 for 2"),
        ({"scores": {"x": (1.0, math.nan)}}, "not a finite number"),
        ({"scores": {"x": (1.0, "2")}}, "not a finite number"),
        ({"scores": {"x": (1.0, True)}}, "not a finite number"),
        ({"scores": {"y": (1.0, 2.0)}}, "unknown objective: 'y'"),
        ({"pairs": {"x": (Pair(0, 2),)}}, "a response that is not there: 'x' has (0, 2) of 2"),
        ({"pairs": {"x": (Pair(-1, 1),)}}, "not there"),
        ({"pairs": {"x": (Pair(True, 0),)}}, "not there"),
        ({"pairs": {"x": (Pair(1, 1),)}}, "with itself"),
        ({"pairs": {"x": (Pair(0, 1, -1.0),)}}, "strength"),
        ({"pairs": {"x": (Pair(0, 1, math.nan),)}}, "strength"),
    ],
)
def test_fault_of_a_record(changes, reason):
    sound = {"prompt": "Q", "responses": ("a", "b"), "scores": {"x": (1, None)}, "pairs": {"x": (Pair(0, 1, 0.0),)}}
    assert fault_of(Record(**sound), ["x"]) is None
    assert reason in fault_of(Record(**sound | changes), ["x"])


def test_merge_joins_what_belongs_to_one_prompt():
    records = [
        Record("Q", ("a", "b"), {"h": (1.0, 2.0)}, {"h": (Pair(1, 0),)}, group="Q"),
        Record("R", ("a", "b"), group="R"),
        Record("Q", ("b", "c"), {"s": (5.0, 6.0)}, {"h": (Pair(0, 1),)}, group="Q"),
        Record("Q", ("a",), {"h": (9.0,)}, group="Q"),  # the same text with another score stays apart
        Record("Q", ("d", "d"), {}, {"h": (Pair(0, 1),)}, group="Q"),
    ]
    merged = merge(records)
    assert [record.group for record in merged] == ["Q", "R"]
    assert merged[0].responses == ("a", "b", "c", "a", "d", "d")
    assert merged[0].scores == {"h": (1.0, 2.0, None, 9.0, None, None), "s": (None, 5.0, 6.0, None, None, None)}
    assert merged[0].pairs == {"h": (Pair(1, 0), Pair(1, 2), Pair(4, 5))}
    assert all(fault_of(record) is None for record in merged)


def test_merge_is_bounded():
    records = [Record("Q", (str(i),), group="Q") for i in range(2 * MOST_RESPONSES + 1)]
    assert [len(record.responses) for record in merge(records)] == [MOST_RESPONSES, MOST_RESPONSES, 1]
