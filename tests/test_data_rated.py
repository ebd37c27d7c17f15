"""Published ratings: UltraFeedback, HelpSteer and stepwise labels, each with its traps, on rows in that exact form."""

from __future__ import annotations

import math

import pytest
from published import (
    assistant,
    binarized,
    completion,
    helpsteer,
    helpsteer2_preference,
    helpsteer3,
    stepwise,
    ultrafeedback,
    user,
)
from pydantic import ValidationError
from test_data_readers import only, read, refusal
from test_data_tokenise import build

from moalign.data.check import examine
from moalign.data.pairing import labelled
from moalign.data.records import merge
from moalign.data.tokenise import Tokeniser
from moalign.errors import DataError
from moalign.types import Pair
from moalign_plugins.readers.helpsteer import HelpSteer
from moalign_plugins.readers.stepwise import Stepwise
from moalign_plugins.readers.ultrafeedback import UltraFeedback

# --- UltraFeedback --------------------------------------------------------------------------------------------------


def test_ultrafeedback_ratings_are_text_and_may_be_missing():
    record = only(UltraFeedback(), ultrafeedback())
    assert record.prompt == record.group == "Why is the sky blue?"
    assert record.responses == ("Rayleigh scattering.", "It is blue.", "The sea is mirrored.")
    assert record.scores == {
        "instruction_following": (5.0, 2.0, 3.0),
        "honesty": (5.0, None, 4.0),
        "truthfulness": (5.0, 5.0, 1.0),
        "helpfulness": (4.0, 1.0, 2.0),
        "overall": (9.0, 3.0, 10.0),
        "fine-grained": (4.75, 2.6666667, 2.5),
    }
    assert record.pairs == {}


def test_ultrafeedback_only_what_is_asked_for():
    reader = UltraFeedback(names={"useful": "helpfulness"}, scale="10-90")
    assert only(reader, ultrafeedback(), ["honesty", "useful", "other"]).scores == {
        "honesty": (90.0, None, 70.0),
        "useful": (70.0, 10.0, 30.0),
    }
    ends = [completion("a", "1 5 3 N/A", 1.0, 1.0), completion("b", "1 5 3 N/A", 5.5, 5.0)]
    assert only(UltraFeedback(scale="10-90"), ultrafeedback(*ends)).scores == {
        "instruction_following": (10.0, 10.0),
        "honesty": (90.0, 90.0),
        "truthfulness": (50.0, 50.0),
        "helpfulness": (None, None),
        "overall": (10.0, 50.0),
        "fine-grained": (10.0, 90.0),
    }


def test_ultrafeedback_ten_that_should_be_one():
    """A 10 beside aspects of at most 2; the third completion of the row above has 2.5, and is nobody's fault."""
    row = ultrafeedback(completion("bad", "2 2 1 3", 10.0, 2.0), completion("good", "5 5 5 5", 10.0, 5.0))
    reason = refusal(UltraFeedback(), row)
    assert reason.partition(": ")[0] == "an overall score of 10 that should be 1"
    assert "its fine-grained score is 2;" in reason and "set the reader's tens to one, unknown or keep" in reason
    overall = [only(UltraFeedback(tens=tens), row).scores["overall"] for tens in ("keep", "unknown", "one")]
    assert overall == [(10.0, 10.0), (None, 10.0), (1.0, 10.0)]
    assert only(UltraFeedback(), row, ["helpfulness"]).scores == {"helpfulness": (3.0, 5.0)}  # it was not asked for
    assert only(UltraFeedback(), ultrafeedback(completion("?", "1 1 1 1", 10.0, None))).scores["overall"] == (10.0,)


def test_ultrafeedback_binarized_ties_and_missing_scores():
    record = only(UltraFeedback(), binarized())
    assert (record.prompt, record.responses) == ((user("Why?"),), ("Because.", "No idea."))
    assert (record.pairs, record.scores) == ({"overall": (Pair(0, 1, 2.5),)}, {"overall": (8.5, 6.0)})
    assert only(UltraFeedback(), binarized(7.0, 7.0)).pairs == {"overall": (Pair(0, 1, 0.0),)}
    half = only(UltraFeedback(), binarized(None, 7.0))
    assert (half.pairs, half.scores) == ({"overall": (Pair(0, 1, 1.0),)}, {"overall": (None, 7.0)})
    assert only(UltraFeedback(), binarized(None, None)).scores == {}
    assert list(only(UltraFeedback(), binarized(), ["quality"]).pairs) == ["quality"]
    with pytest.raises(DataError, match=r"rows\.jsonl:1: none of the objectives a, b .* such as \{a: overall\}"):
        read(UltraFeedback(), [binarized()], ["a", "b"])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (ultrafeedback(completion("a", "6 5 5 5", 9.0, 4.0)), "a number out of its range: column 'instruction_follow"),
        (ultrafeedback(completion("a", "five 5 5 5", 9.0, 4.0)), "not a finite number: column 'instruction_following"),
        (ultrafeedback(completion("a", "5 5 5 5", 11.0, 4.0)), "a number out of its range: column 'overall_score'"),
        (ultrafeedback(completion("a", "5 5 5 5", math.nan, 4.0)), "not a finite number: column 'overall_score'"),
        (ultrafeedback() | {"completions": []}, "the row has no completions"),
        (ultrafeedback() | {"completions": {"response": ["a"]}}, "no list in column 'completions'"),
        (ultrafeedback() | {"completions": "['a']"}, "a list in a table has to be JSON: column 'completions'"),
        (ultrafeedback({"model": "x"}), "no text in column 'response'"),
        (ultrafeedback({"response": "x", "annotations": {"honesty": "5"}}), "an annotation is not an object: honesty"),
        (ultrafeedback() | {"instruction": None}, "no text in column 'instruction'"),
        (binarized(6.0, 8.5), "the chosen response has the lower score: 6 against 8.5"),
        (binarized() | {"rejected": [user("Why?")]}, "a completion must be one assistant message: chosen has user, a"),
        (binarized() | {"chosen": [user("Other?"), assistant("a")]}, "a completion must be one assistant message"),
    ],
)
def test_ultrafeedback_refuses(row, reason):
    assert refusal(UltraFeedback(), row).startswith(reason)


# --- HelpSteer ------------------------------------------------------------------------------------------------------


def test_helpsteer_rows_of_a_prompt_are_put_together():
    rows = [
        helpsteer("c#", "A language.", (3, 4, 4, 2, 1)),
        helpsteer("Why?", "So.", ("2", None, "", "N/A", 0)),
        helpsteer("c#", "A note.", (0, 1, 3, 0, 0)),
    ]
    first, second = merge(read(HelpSteer(), rows, ["helpfulness", "verbosity", "correctness"]))
    assert first.responses == ("A language.", "A note.")
    assert first.scores == {"helpfulness": (3.0, 0.0), "verbosity": (1.0, 0.0), "correctness": (4.0, 1.0)}
    assert second.scores == {"helpfulness": (2.0,), "verbosity": (0.0,), "correctness": (None,)}


def test_helpsteer_scale_is_that_of_dpa():
    raw = only(HelpSteer(), helpsteer(ratings=(0, 1, 2, 3, 4)))
    scaled = only(HelpSteer(scale="10-90"), helpsteer(ratings=(0, 1, 2, 3, 4)))
    for name, (value,) in raw.scores.items():
        (there,) = scaled.scores[name]
        assert there == 20 * value + 10
        assert (there - 10) / 20 == value
    assert only(HelpSteer(scale="10-90"), helpsteer(ratings=(None,) * 5)).scores["helpfulness"] == (None,)


@pytest.mark.parametrize("form", [helpsteer2_preference, helpsteer3])
def test_helpsteer_signed_preference(form):
    """Below 0 the first is better; 0 is a tie, and is never made a choice."""
    found = [only(HelpSteer(), form(value)).pairs for value in (-3, "-1", 0, 2, None)]
    assert found == [
        {"preference": (Pair(0, 1, 3.0),)},
        {"preference": (Pair(0, 1, 1.0),)},
        {"preference": (Pair(0, 1, 0.0),)},
        {"preference": (Pair(1, 0, 2.0),)},
        {},
    ]
    assert math.copysign(1, only(HelpSteer(), form(0)).pairs["preference"][0].strength) == 1
    assert list(only(HelpSteer(names={"liked": "preference"}), form(1), ["liked", "short"]).pairs) == ["liked"]
    for value in (-100, 4, "better", True):  # -100: neither response is valid
        assert "column '" in refusal(HelpSteer(), form(value))


def test_a_tie_is_counted_and_never_trained_on():
    rows = [helpsteer2_preference(value) | {"prompt": f"Q{number}"} for number, value in enumerate((0, 2, 0, -1, 0))]
    dataset = labelled(read(HelpSteer(), rows), Tokeniser.of(build()), ["preference"])
    assert dataset.counts["dropped pair: tie for preference"] == 3
    assert dataset.strength.tolist() == [2.0, 1.0]
    chosen = [dataset.samples[pair[0]].response for pair in dataset.pairs]
    assert chosen == ["A note.", "A language."]


def test_helpsteer_conversations():
    assert only(HelpSteer(), helpsteer3()).prompt == (user("Sort it."), assistant("How?"), user("By size."))
    prompt = "Hi\n<extra_id_1>Assistant\nHello.\n\nWell?\n<extra_id_1>User\nWhy?"
    asked = helpsteer(prompt)
    assert only(HelpSteer(), asked).prompt == (user("Hi"), assistant("Hello.\n\nWell?"), user("Why?"))
    assert only(HelpSteer(turns="text"), asked).prompt == prompt
    assert only(HelpSteer(), helpsteer("Hi\nAssistant\nHello.")).prompt == "Hi\nAssistant\nHello."


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (helpsteer(ratings=(5, 1, 1, 1, 1)), "a number out of its range: column 'helpfulness' has 5, not from 0 to 4"),
        (helpsteer(ratings=("good", 1, 1, 1, 1)), "not a finite number: column 'helpfulness'"),
        (helpsteer() | {"response": None}, "no text in column 'response'"),
        (helpsteer("a\n<extra_id_1>User\nb"), "the turns do not alternate: turn 2 is the user's"),
        (helpsteer("a\n<extra_id_1>Assistant\nb"), "the prompt ends with an assistant message"),
        (helpsteer("a <extra_id_1> b"), "a mark <extra_id_1> in the prompt"),
        (helpsteer3() | {"context": "Sort it."}, "no list in column 'context'"),
        (helpsteer3() | {"context": [{"role": "user"}]}, "a message of context lacks role or content"),
        (helpsteer3() | {"context": [user("a"), assistant("b")]}, "the prompt ends with an assistant message"),
    ],
)
def test_helpsteer_refuses(row, reason):
    assert refusal(HelpSteer(), row).startswith(reason)


def test_helpsteer_names_that_are_not_there():
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .* has 'helpfulnes', which .*; did you mean 'helpfulness'\?"):
        read(HelpSteer(names={"x": "helpfulnes"}), [helpsteer()])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .* has 'helpfull', which is no objective; did you mean 'help"):
        read(HelpSteer(names={"helpfull": "helpfulness"}), [helpsteer()], ["helpful", "short"])
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1: none of the objectives helpful, short .* offers helpfulness, "
    ):
        read(HelpSteer(), [helpsteer()], ["helpful", "short"])
    with pytest.raises(ValidationError):
        HelpSteer(scale="0-100")


# --- stepwise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "share", "product", "least", "before"),
    [
        ((True, True, False), 2 / 3, 0.0, 0.0, 2 / 3),
        ((True, False, True), 2 / 3, 0.0, 0.0, 1 / 3),
        ((False, True, True), 2 / 3, 0.0, 0.0, 0.0),
        ((True, True, True), 1.0, 1.0, 1.0, 1.0),
        ((1, 0), 0.5, 0.0, 0.0, 0.5),
        ((0.5, 0.25, "1"), 1.75 / 3, 0.125, 0.25, 1 / 3),
    ],
)
def test_stepwise_scores(labels, share, product, least, before):
    record = only(Stepwise(), stepwise(labels))
    assert record.scores == {"share": (share,), "product": (product,), "least": (least,), "before-error": (before,)}
    assert record.responses == ("\n".join(stepwise(labels)["completions"]),)


def test_stepwise_names_and_separator():
    reader = Stepwise(names={"correct": "product", "far": "before-error"}, separator=" ")
    record = only(reader, stepwise(), ["correct", "far"])
    assert record.scores == {"correct": (0.0,), "far": (2 / 3,)}
    assert record.responses == ("Step 1: 2 + 2 = 4. Step 2: 4 + 4 = 8. Step 3: 8 + 8 = 17.",)
    with pytest.raises(DataError, match=r"none of the objectives correct .* share, product, least, before-error; say"):
        read(Stepwise(), [stepwise()], ["correct"])


def test_stepwise_missing_label_leaves_the_scores_unknown():
    scores = only(Stepwise(), stepwise((True, None, True))).scores
    assert set(scores) == {"share", "product", "least", "before-error"} and set(scores.values()) == {(None,)}


def test_stepwise_solutions_of_a_prompt_are_compared():
    rows = [stepwise((True, True, True)), stepwise((True, True)), stepwise((False,))]
    (record,) = merge(read(Stepwise(), rows, ["product"]))
    assert len(record.responses) == 3
    (counts,) = examine([record]).objectives
    assert (counts.scores, counts.pairs, counts.ties) == (3, 3, 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"labels": [True]}, "number of labels differs from number of steps: 1 for 3"),
        ({"labels": [True, True, -1]}, "a number out of its range: column 'labels' has -1, not from 0 to 1"),
        ({"labels": [True, True, "+"]}, "not a finite number: column 'labels' has '+'"),
        ({"labels": "[True, True, False]"}, "a list in a table has to be JSON: column 'labels'"),
        ({"completions": []}, "a step is empty or not text"),
        ({"completions": ["a", " ", "b"]}, "a step is empty or not text"),
        ({"completions": "a"}, "no list in column 'completions'"),
        ({"prompt": None}, "no text in column 'prompt'"),
    ],
)
def test_stepwise_refuses(changes, reason):
    assert refusal(Stepwise(), stepwise() | changes) == reason
