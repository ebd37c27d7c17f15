"""Whatever a file holds: sound records, refusals with file and line, or a DataError with file and line."""

import csv
import io
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_tokenise import build

from moalign.data.check import examine
from moalign.data.loading import load_records
from moalign.data.pairing import labelled
from moalign.data.records import fault_of
from moalign.data.tokenise import Tokeniser
from moalign.errors import DataError
from moalign.types import Record
from moalign_plugins.readers.columns import Columns
from moalign_plugins.readers.helpsteer import ATTRIBUTES, HelpSteer
from moalign_plugins.readers.hh_rlhf import HHRLHF
from moalign_plugins.readers.pku_saferlhf import PKUSafeRLHF
from moalign_plugins.readers.preference import PreferenceRows
from moalign_plugins.readers.qa_feedback import QAFeedback
from moalign_plugins.readers.rewardbench import RewardBench
from moalign_plugins.readers.stepwise import Stepwise
from moalign_plugins.readers.ultrafeedback import UltraFeedback

CASES = int(os.environ.get("MOALIGN_FUZZ_CASES", "200"))  # per test; the long run is started by hand
TOKENISER = Tokeniser.of(build())

ATOMS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 4)
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(
        ["N/A", "", " ", "tie", "a", "b", "1", "nan", "1e999", "\0", "\ud800", "</s>", "the sky", "Irrelevant"]
    )
)
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "assistant", "system", 3, None]), "content": ATOMS, "name": ATOMS}
)
VALUES = (
    ATOMS
    | st.lists(ATOMS, max_size=4)
    | st.lists(MESSAGE, max_size=3)
    | st.dictionaries(st.text(max_size=2), ATOMS, max_size=2)
)
TEXTS = st.sampled_from(["the sky is", "the sky is blue", "the sky is red", "", "yes"])


@st.composite
def row_of(draw, **right):
    """A row that is right, but for at most two values that are missing or anything."""
    row = draw(st.fixed_dictionaries(right))
    for key in draw(st.sampled_from([(), (), (0,), (0, 1)])):
        name = draw(st.sampled_from(sorted(right)))
        row.pop(name, None)
        if key or draw(st.booleans()):
            row[name] = draw(VALUES)
    return row


CONVERSATION = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXTS}), max_size=3
)
REPLY = st.fixed_dictionaries({"role": st.just("assistant"), "content": TEXTS}).map(lambda message: [message])
SCORES = {
    "score_chosen": st.floats(0, 10),
    "score_rejected": st.floats(0, 10),
    "strength": st.floats(0, 3),
    "objective": st.sampled_from(["x", "y", "z"]),
}
PREFERENCE = (
    row_of(prompt=TEXTS, chosen=TEXTS, rejected=TEXTS, **SCORES)
    | row_of(chosen=TEXTS, rejected=TEXTS)
    | row_of(prompt=CONVERSATION, chosen=REPLY, rejected=REPLY, **SCORES)
    | row_of(prompt=TEXTS, chosen=CONVERSATION, rejected=CONVERSATION)
)
TABLE = row_of(
    prompt=TEXTS,
    a=TEXTS,
    b=TEXTS,
    score_a=st.floats(0, 10),
    score_b=st.sampled_from(["3", "N/A"]),
    better=st.sampled_from([0, 1, "a", "b", "tie"]),
    strength=st.integers(-3, 3),
    id=st.integers(0, 3),
)
ERROR = st.fixed_dictionaries({"error type": st.sampled_from(["Irrelevant", "Unverifiable"])})
FEEDBACK = row_of(
    **{
        "errors": st.lists(ERROR, max_size=2),
        "missing-info": st.lists(ERROR, max_size=1),
        "corrected-prediction": TEXTS,
    }
)
QA = row_of(
    question=TEXTS,
    passages=st.lists(st.lists(TEXTS, max_size=3), max_size=2),
    preference=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    feedback=FEEDBACK,
    **{f"prediction {i}": TEXTS for i in range(1, 5)},
)
RATING = st.sampled_from(["1", "3", "5", "N/A"])
ULTRAFEEDBACK = row_of(
    instruction=TEXTS,
    completions=st.lists(
        row_of(
            response=TEXTS,
            annotations=row_of(**{name: row_of(Rating=RATING) for name in ("honesty", "helpfulness")}),
            overall_score=st.sampled_from([1.0, 7.5, 10.0]),
            **{"fine-grained_score": st.floats(1, 5)},
        ),
        max_size=4,
    ),
) | row_of(
    prompt=TEXTS,
    prompt_id=TEXTS,
    chosen=CONVERSATION,
    rejected=CONVERSATION,
    score_chosen=st.floats(1, 10),
    score_rejected=st.floats(1, 10),
)
TURNS = TEXTS | st.sampled_from(["a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc", "a\n<extra_id_1>User\nc"])
STRENGTH = st.integers(-3, 3)
HELPSTEER = (
    row_of(prompt=TURNS, response=TEXTS, **{name: st.integers(0, 4) for name in ATTRIBUTES})
    | row_of(prompt=TURNS, response_1=TEXTS, response_2=TEXTS, preference_strength=STRENGTH)
    | row_of(context=CONVERSATION, response1=TEXTS, response2=TEXTS, overall_preference=STRENGTH)
)
PKU = row_of(
    prompt=TEXTS,
    response_0=TEXTS,
    response_1=TEXTS,
    is_response_0_safe=st.booleans(),
    is_response_1_safe=st.booleans(),
    better_response_id=st.integers(0, 1),
    safer_response_id=st.integers(0, 1),
)
DIALOGUE = st.lists(
    st.tuples(st.sampled_from(["\n\nHuman:", "\n\nAssistant:"]), TEXTS).map("".join), min_size=1, max_size=4
).map("".join)
ANSWERED = TEXTS.map(lambda answer: f"\n\nHuman: hi\n\nAssistant: {answer}")
HH = row_of(chosen=ANSWERED, rejected=ANSWERED, objective=st.sampled_from(["x", "y", ""])) | row_of(
    chosen=DIALOGUE, rejected=DIALOGUE
)
SUBSET = st.sampled_from(["Ties", "x", "Precise IF", ""])
REWARDBENCH = row_of(
    prompt=TEXTS, chosen=TEXTS, chosen_model=TEXTS, rejected=TEXTS, rejected_model=TEXTS, subset=SUBSET, id=TEXTS
) | row_of(
    prompt=TEXTS,
    chosen=st.lists(TEXTS, max_size=3),
    rejected=st.lists(TEXTS, max_size=3),
    num_correct=st.integers(0, 3),
    num_incorrect=st.integers(0, 3),
    subset=SUBSET,
    id=TEXTS,
)
STEPWISE = row_of(prompt=TEXTS, completions=st.lists(TEXTS, max_size=3), labels=st.lists(st.booleans(), max_size=3))
COLUMNS = Columns(
    responses=("a", "b"),
    scores={"x": ("score_a", "score_b")},
    better={"y": "better"},
    strength={"x": "strength"},
    group="id",
)
READERS = {
    "preference": (PreferenceRows(), PREFERENCE, ()),
    "preference for one objective": (PreferenceRows(objective="x"), PREFERENCE, ("x", "y")),
    "columns": (COLUMNS, TABLE, ("x", "y")),
    "qa-feedback": (QAFeedback(passages=20), QA, ()),
    "ultrafeedback": (UltraFeedback(tens="one"), ULTRAFEEDBACK, ()),
    "ultrafeedback for two": (UltraFeedback(names={"x": "overall"}, scale="10-90"), ULTRAFEEDBACK, ("x", "honesty")),
    "helpsteer": (HelpSteer(), HELPSTEER, ()),
    "pku-saferlhf": (PKUSafeRLHF(), PKU, ()),
    "hh-rlhf": (HHRLHF(turns="text"), HH, ()),
    "hh-rlhf, messages": (HHRLHF(), HH, ("x",)),
    "rewardbench": (RewardBench(), REWARDBENCH, ()),
    "rewardbench by subset": (RewardBench(by_subset=True), REWARDBENCH, ("x", "ties")),
    "stepwise": (Stepwise(), STEPWISE, ()),
}


@st.composite
def damaged(draw, content):
    """The bytes with some of them removed, changed or put in."""
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        at = draw(st.integers(0, len(content)))
        cut = draw(st.sampled_from([0, 1, 3, len(content)]))
        content = (
            content[:at]
            + draw(st.binary(max_size=3) | st.sampled_from([b"\0", b"\xff", b'"', b"\n", b"NaN"]))
            + content[at + cut :]
        )
    return content


def holds(path, reader, objectives):
    """Load the file; whatever comes out is placed, sound, and can be reported on and trained on."""
    try:
        loaded = load_records(path, reader, objectives)
    except DataError as error:
        assert error.file == str(path)
        assert error.line >= 1
        assert str(error).startswith(f"{path}:{error.line}: ")
        return
    for item in (*loaded.records, *loaded.refusals):
        assert item.file == str(path)
        assert item.line >= 1
    for record in loaded.records:
        assert isinstance(record, Record)
        assert fault_of(record, objectives) is None
        assert record.group or record.prompt == ""
    report = examine(loaded.records, loaded.refusals, objectives)
    assert json.dumps(report.to_dict(), allow_nan=False)
    plain = [record for record in loaded.records if isinstance(record.prompt, str)]
    names = [counts.name for counts in report.objectives]
    try:
        dataset = labelled(plain, TOKENISER, names, max_length=40)
    except DataError as error:
        assert str(error).startswith("no pair is left to train on")
        return
    for chosen, rejected in dataset.pairs:
        assert dataset.sequences[chosen].ids != dataset.sequences[rejected].ids
        assert dataset.sequences[chosen].prompt_length < len(dataset.sequences[chosen].ids) <= 40


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
@settings(max_examples=CASES, deadline=None)
def test_jsonl(tmp_path_factory, name, data):
    reader, rows, objectives = READERS[name]
    lines = [json.dumps(row) for row in data.draw(st.lists(rows, max_size=4))]
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(data.draw(damaged("\n".join(lines).encode())))
    holds(path, reader, objectives)


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
@settings(max_examples=CASES // 2, deadline=None)
def test_json(tmp_path_factory, name, data):
    reader, rows, objectives = READERS[name]
    content = data.draw(st.lists(rows, max_size=4))
    whole = data.draw(st.sampled_from([content, {"data": content}, {"a": 1, "data": content, "b": []}]))
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    path.write_bytes(data.draw(damaged(json.dumps(whole).encode())))
    holds(path, reader, objectives)


@given(data=st.data())
@settings(max_examples=CASES, deadline=None)
def test_csv(tmp_path_factory, data):
    reader, rows, objectives = READERS["columns"]
    text = io.StringIO()
    names = ["prompt", "a", "b", "score_a", "score_b", "better", "strength", "id"]
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(data.draw(st.lists(rows, max_size=4)))
    path = tmp_path_factory.getbasetemp() / "fuzz.csv"
    path.write_bytes(data.draw(damaged(text.getvalue().encode(errors="surrogatepass"))))
    holds(path, reader, objectives)


@given(content=st.binary(max_size=40), suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet"]))
@settings(max_examples=CASES, deadline=None)
def test_any_bytes(tmp_path_factory, content, suffix):
    path = tmp_path_factory.getbasetemp() / f"bytes{suffix}"
    path.write_bytes(content)
    holds(path, PreferenceRows(), ())
