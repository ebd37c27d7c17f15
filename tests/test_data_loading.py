"""From a file to sound records: choosing a reader, refusing what is unsound, joining rows of one prompt."""

import math

import pytest
from test_data_readers import feedback_row, read

from moalign.data.loading import choose_reader, load_records
from moalign.data.records import MOST_RESPONSES, fault_of, merge
from moalign.errors import DataError, PluginError
from moalign.types import Pair, Record, Refusal
from moalign_plugins.readers.columns import Columns
from moalign_plugins.readers.preference import PreferenceRows
from moalign_plugins.readers.qa_feedback import QAFeedback


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
    path.write_text('{"prompt": "Q", "chosen": "x", "rejected": 3}\n' * 3)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: all 3 .* rejected is neither text"):
        load_records(path, PreferenceRows())
    assert len(load_records(path, PreferenceRows(), allow_none=True).refusals) == 3
    path.write_text('{"prompt": "Q", "chosen": "x", "rejected": "y"}')
    assert len(load_records(path, PreferenceRows()).records) == 1  # one row is a file


def test_a_failing_reader_is_named_with_the_row():
    class Failing(PreferenceRows):
        def read(self, rows, objectives):
            for _file, line, _ in rows:
                yield 1 / (2 - line)

    with pytest.raises(
        PluginError, match=r"'Failing' of test_data_loading, in read at rows\.jsonl:1: TypeError: it yielded float"
    ):
        read(Failing(), [{}, {}])

    class Dividing(Failing):
        def read(self, rows, objectives):
            for _file, line, _ in rows:
                yield Refusal("f", line, str(1 / (2 - line)))

    with pytest.raises(
        PluginError, match=r"'Dividing' of test_data_loading, in read at rows\.jsonl:2: ZeroDivisionError"
    ):
        read(Dividing(), [{}, {}])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"responses": ()}, "no responses"),
        ({"responses": ["a", "b"]}, "no responses"),
        ({"responses": ("a", 3)}, "a response is not text: int"),
        ({"prompt": ({"role": "user"},)}, "lacks role or content"),
        ({"scores": {"x": (1.0,)}}, "number of scores differs from number of responses: 'x' has 1 for 2"),
        ({"scores": {"x": (1.0, math.nan)}}, "not a finite number"),
        ({"scores": {"x": (1.0, -1e300)}}, "not a finite number of at most 1e+30: 'x' has -1e+300"),
        ({"scores": {"x": (1.0, "2")}}, "not a finite number"),
        ({"scores": {"x": (1.0, True)}}, "not a finite number"),
        ({"scores": {"y": (1.0, 2.0)}}, "unknown objective: 'y'"),
        ({"pairs": {"x": (Pair(0, 2),)}}, "a response that is not there: 'x' has (0, 2) of 2"),
        ({"pairs": {"x": (Pair(-1, 1),)}}, "not there"),
        ({"pairs": {"x": (Pair(True, 0),)}}, "not there"),
        ({"pairs": {"x": (Pair(1, 1),)}}, "with itself"),
        ({"pairs": {"x": (Pair(0, 1, -1.0),)}}, "strength"),
        ({"pairs": {"x": (Pair(0, 1, math.nan),)}}, "strength"),
        ({"pairs": {"x": (Pair(0, 1, math.inf),)}}, "strength"),
    ],
)
def test_fault_of_a_record(changes, reason):
    sound = {"prompt": "Q", "responses": ("a", "b"), "scores": {"x": (1, None)}, "pairs": {"x": (Pair(0, 1, 0.0),)}}
    assert fault_of(Record(**sound), ["x"]) is None
    assert fault_of(Record("a prompt alone", ())) is None
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
