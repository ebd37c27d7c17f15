"""Published comparisons: PKU-SafeRLHF, HH-RLHF and RewardBench, each with its traps, on rows in that exact form."""

from __future__ import annotations

import pytest
from published import (
    assistant,
    hh,
    pku,
    rewardbench,
    rewardbench2,
    user,
)
from test_data_readers import only, read, refusal

from moalign.data.check import examine
from moalign.errors import DataError
from moalign.types import Pair, Refusal
from moalign_plugins.readers.hh_rlhf import HHRLHF
from moalign_plugins.readers.pku_saferlhf import PKUSafeRLHF
from moalign_plugins.readers.rewardbench import RewardBench

# --- PKU-SafeRLHF ---------------------------------------------------------------------------------------------------


def test_pku_judges_twice():
    record = only(PKUSafeRLHF(), pku())
    assert record.responses == ("With a pick.", "Ask its owner.")
    assert record.pairs == {"helpful": (Pair(0, 1),), "harmless": (Pair(1, 0),)}
    assert record.scores == {"safe": (0.0, 1.0)}
    (conflict,) = [each for each in examine([record]).conflicts if set(each.objectives) == {"helpful", "harmless"}]
    assert (conflict.both, conflict.disagree) == (1, 1)
    agreed = only(PKUSafeRLHF(), pku(better="1", safer=1.0, safe=("True", "false")) | {"safer_response_id": 0})
    assert agreed.pairs == {"helpful": (Pair(1, 0),), "harmless": (Pair(0, 1),)}


def test_pku_missing_judgements():
    assert only(PKUSafeRLHF(), pku(better=None)).pairs == {"harmless": (Pair(1, 0),)}
    empty = only(PKUSafeRLHF(), pku(None, "", (None, True)))
    assert (empty.pairs, empty.scores) == ({}, {"safe": (None, 1.0)})
    assert only(PKUSafeRLHF(names={"kind": "harmless"}), pku(), ["kind", "other"]).pairs == {"kind": (Pair(1, 0),)}


def test_pku_labels_that_contradict_the_judgement():
    reason = "the safer response is labelled unsafe, and the other one safe"
    assert refusal(PKUSafeRLHF(), pku(safer=0)) == reason
    assert only(PKUSafeRLHF(), pku(safer=0), ["helpful"]).pairs == {"helpful": (Pair(0, 1),)}
    assert only(PKUSafeRLHF(), pku(safer=0, safe=(False, False))).pairs["harmless"] == (Pair(0, 1),)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"better_response_id": 2}, "column 'better_response_id' does not name one of the responses: '2'"),
        ({"safer_response_id": -1}, "column 'safer_response_id' does not name one of the responses: '-1'"),
        ({"better_response_id": True}, "not a finite number: column 'better_response_id'"),
        ({"is_response_1_safe": "perhaps"}, "neither true nor false: column 'is_response_1_safe' has 'perhaps'"),
        ({"response_1": None}, "no text in column 'response_1'"),
    ],
)
def test_pku_refuses(changes, reason):
    assert refusal(PKUSafeRLHF(), pku() | changes).startswith(reason)


# --- HH-RLHF --------------------------------------------------------------------------------------------------------


def test_hh_dialogues():
    record = only(HHRLHF(), hh())
    assert record.prompt == (user("Hi."), assistant("Hello!"), user("How are you?"))
    assert record.responses == ("Fine, and you?", "Go away.")
    assert record.pairs == {"preference": (Pair(0, 1),)}
    text = only(HHRLHF(turns="text"), hh())
    assert text.prompt == "\n\nHuman: Hi.\n\nAssistant: Hello!\n\nHuman: How are you?\n\nAssistant:"
    assert text.responses == (" Fine, and you?", " Go away.")
    assert [text.prompt + each for each in text.responses] == list(hh().values())


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        # the rejected one asks something else
        (
            {**hh(), "rejected": hh(prefix="\n\nHuman: Ho.")["rejected"]},
            "chosen and rejected part before the last answer",
        ),
        # the chosen one goes on: the last answers are to different questions
        (hh(" Fine.\n\nHuman: Good.\n\nAssistant: Yes."), "chosen and rejected part before the last answer"),
        # the same number of turns, and an earlier answer that differs
        (
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
                "rejected": "\n\nHuman: a\n\nAssistant: B\n\nHuman: c\n\nAssistant: D",
            },
            "chosen and rejected part before the last answer",
        ),
        # a quoted mark makes two turns of one
        (hh(" He said:\n\nAssistant: I am."), "the turns do not alternate: turn 5 is the assistant's"),
        (hh(prefix="\n\nHuman: Explain\n\nHuman: hi"), "the turns do not alternate: turn 2 is the user's"),
        (hh(" Fine.\n\nHuman: Good."), "the last turn is the human's: column 'chosen'"),
        (hh(prefix="\n\nAssistant: Hello.\n\nHuman: Hi"), "the turns do not alternate: turn 1 is the assistant's"),
        (hh(prefix="Human: Hi"), "the text does not begin with a human turn: column 'chosen'"),
        (hh() | {"rejected": "Go away."}, "the text does not begin with a human turn: column 'rejected'"),
        (hh() | {"rejected": None}, "no text in column 'rejected'"),
        (hh() | {"objective": 3}, "the column objective is not a name: 3"),
    ],
)
@pytest.mark.parametrize("turns", ["messages", "text"])
def test_hh_refuses(row, reason, turns):
    assert refusal(HHRLHF(turns=turns), row) == reason


def test_hh_marks_that_are_none():
    """A name after a single line break, or without its colon, is text."""
    record = only(HHRLHF(), hh(" So:\nHuman: hi\n\nAssistants help.\n\nhuman: x", " No."))
    assert record.responses[0] == "So:\nHuman: hi\n\nAssistants help.\n\nhuman: x"


def test_hh_empty_and_equal_answers_are_counted():
    records = read(HHRLHF(), [hh(" ", " No."), hh("", " No."), hh(" Yes.", " Yes.")])
    assert [record.responses for record in records] == [("", "No."), ("", "No."), ("Yes.", "Yes.")]
    (counts,) = examine(records).objectives
    assert (counts.pairs, counts.unusable) == (3, 3)


@pytest.mark.parametrize(
    ("path", "objective"),
    [
        ("data/harmless-base/train.jsonl", "harmless"),
        ("helpful-online/test.jsonl", "helpful"),
        ("harmless-base/helpful-rejection-sampled/train.jsonl", "helpful"),
        ("here/helpful-base-train.jsonl", "helpful"),
    ],
)
def test_hh_objective_of_the_path(path, objective):
    for objectives in ((), ("harmless", "helpful")):
        (record,) = HHRLHF().read([(path, 1, hh())], objectives)
        assert list(record.pairs) == [objective]
    (named,) = HHRLHF(objective="kind").read([(path, 1, hh())], ("kind", "other"))
    assert list(named.pairs) == ["kind"]
    with pytest.raises(DataError, match=f"the path's objective '{objective}' is none of kind, other"):
        next(HHRLHF().read([(path, 1, hh())], ("kind", "other")))


def test_hh_joined_files_name_the_objective():
    rows = [hh() | {"objective": name} for name in ("harmless", "helpful", "other")]
    items = read(HHRLHF(), rows, ["harmless", "helpful"])
    assert [list(item.pairs) for item in items[:2]] == [["harmless"], ["helpful"]]
    assert isinstance(items[2], Refusal) and items[2].reason.startswith("unknown objective: 'other'")
    assert HHRLHF().recognises(rows[0])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*set the reader's objective to one of harmless, helpful"):
        read(HHRLHF(), [hh()], ["harmless", "helpful"])


# --- RewardBench ----------------------------------------------------------------------------------------------------


def test_rewardbench():
    record = only(RewardBench(), rewardbench())
    assert record.responses == ('["a", "b"]', "[none]")  # text that looks like a list is an answer
    assert record.pairs == {"preference": (Pair(0, 1),)}
    assert list(only(RewardBench(), rewardbench(), ["quality"]).pairs) == ["quality"]


def test_rewardbench_2_every_right_answer_beats_every_wrong_one():
    record = only(RewardBench(), rewardbench2())
    assert record.responses == ("Red.", "Pink.", "Brown.", "Grey.")
    assert record.pairs == {"preference": (Pair(0, 1), Pair(0, 2), Pair(0, 3))}
    ties = only(RewardBench(), rewardbench2("Ties", ("Red.", "Blue.", "Green."))).pairs["preference"]
    assert sorted((pair.chosen, pair.rejected) for pair in ties if pair.strength) == [
        (right, wrong) for right in range(3) for wrong in range(3, 6)
    ]
    assert [pair for pair in ties if not pair.strength] == [Pair(0, 1, 0.0), Pair(0, 2, 0.0), Pair(1, 2, 0.0)]


def test_rewardbench_by_subset():
    rows = [rewardbench("xstest-should-refuse"), rewardbench2("Precise IF"), rewardbench("hep-cpp")]
    assert [list(r.pairs) for r in read(RewardBench(by_subset=True), rows)] == [
        ["xstest-should-refuse"],
        ["precise-if"],
        ["hep-cpp"],
    ]
    named = RewardBench(by_subset=True, names={"safe": "xstest-should-refuse", "exact": "precise-if"})
    first, second, third = read(named, rows, ["exact", "safe"])
    assert (list(first.pairs), list(second.pairs)) == (["safe"], ["exact"])
    assert third.reason == "a subset that is no objective: 'hep-cpp'; the configuration has exact, safe"
    with pytest.raises(DataError, match="'exact', which is no objective"):
        read(named, rows, ["safe"])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (rewardbench() | {"chosen": ["a"]}, "no text in column 'chosen'"),
        (rewardbench() | {"subset": None}, "no text in column 'subset'"),
        (rewardbench2() | {"num_correct": 2}, "num_correct differs from the number of answers: 2 for 1"),
        (rewardbench2() | {"rejected": []}, "not a list of texts: column 'rejected'"),
        (rewardbench2() | {"rejected": ["a", None, "b"]}, "not a list of texts: column 'rejected'"),
        (rewardbench2() | {"chosen": "Red."}, "no list in column 'chosen'"),
    ],
)
def test_rewardbench_refuses(row, reason):
    assert refusal(RewardBench(), row) == reason
    assert refusal(RewardBench(by_subset=True), row) == reason
