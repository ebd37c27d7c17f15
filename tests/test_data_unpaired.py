"""TRL's unpaired rows: labels that become scores of 1 and 0."""

from __future__ import annotations

import pytest
from test_data_readers import assistant, only, read, refusal, user

from moalign.config import PluginChoice
from moalign.data.loading import choose_reader
from moalign.data.records import merge
from moalign.errors import DataError
from moalign.registry import discover
from moalign.sweeps.plan import readers_for
from moalign_plugins.readers.unpaired import UnpairedRows

ROW = {"prompt": "Q", "completion": "A", "label": True}


@pytest.mark.parametrize(("label", "score"), [(True, 1.0), (False, 0.0), ("false", 0.0), (1, 1.0), (None, None)])
def test_a_label_is_a_score(label, score):
    record = only(UnpairedRows(), ROW | {"label": label}, ["helpful"])
    assert (record.prompt, record.responses, record.pairs) == ("Q", ("A",), {})
    assert record.scores == {"helpful": (score,)}
    assert (record.group, record.file, record.line) == ("Q", "rows.jsonl", 1)


def test_conversations():
    record = only(UnpairedRows(), {"prompt": [user("Q")], "completion": [assistant("A")], "label": False})
    assert (record.prompt, record.responses) == ((user("Q"),), ("A",))
    assert record.scores == {"preference": (0.0,)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label": "maybe"}, "neither true nor false"),
        ({"prompt": ""}, "prompt is neither text nor a list of messages"),
        ({"completion": 3}, "completion is neither text nor a list of messages"),
        ({"completion": [user("A")]}, "a completion must be one assistant message: completion has user"),
        ({"objective": "rude"}, "unknown objective"),
    ],
)
def test_what_is_refused(change, reason):
    assert reason in refusal(UnpairedRows(), ROW | change, ["helpful"])


def test_labels_of_several_objectives_meet_on_one_response():
    rows = [ROW | {"objective": name, "label": name == "kind"} for name in ("kind", "short")]
    (record,) = merge(read(UnpairedRows(), rows, ["kind", "short"]))
    assert record.responses == ("A",) and record.scores == {"kind": (1.0,), "short": (0.0,)}
    with pytest.raises(DataError, match="does not say which objective judged it"):
        read(UnpairedRows(), [ROW], ["kind", "short"])
    (record,) = read(UnpairedRows(objective="short"), [ROW], ["kind", "short"])
    assert record.scores == {"short": (1.0,)}


def test_the_first_row_says_which_reader_it_is_for():
    readers = readers_for(PluginChoice(name="auto"), discover())
    assert choose_reader(("rows.jsonl", 1, ROW | {"objective": "kind"}), readers) == "unpaired"
