"""The shipped rewards that are rules: what they say to the letter."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from moalign.api import DataError, Sample
from moalign.testing import check_reward
from moalign_plugins.rewards.exact_answer import ExactAnswer
from moalign_plugins.rewards.format import Format
from moalign_plugins.rewards.length import Length
from moalign_plugins.rewards.regex import Regex

TALK = ({"role": "user", "content": "Why?"},)


def scores(reward, *responses, prompt="q"):
    return reward.score([Sample(prompt, response) for response in responses])


def test_length():
    assert scores(Length(), "", "one", " two  words\n") == [0.0, -1.0, -2.0]
    assert scores(Length(free=2), "a", "a b", "a b c d") == [0.0, 0.0, -2.0]
    assert scores(Length(target=2), "", "a b", "a b c d e") == [-2.0, 0.0, -3.0]
    assert scores(Length(target=2, free=1), "", "a", "a b c", "a b c d") == [-1.0, 0.0, 0.0, -1.0]


def test_regex():
    assert scores(Regex(pattern="[0-9]+"), "it is 7", "none") == [1.0, 0.0]
    assert scores(Regex(pattern="[0-9]+", where="whole", unmatched=-1), "it is 7", " 7\n", "") == [-1.0, 1.0, -1.0]
    assert scores(Regex(pattern="(?i)^so", matched=3), "Soap", "also") == [3.0, 0.0]
    with pytest.raises(ValidationError, match="not a regular expression: missing"):
        Regex(pattern="(")


def test_format_of_sections():
    reward = Format(sections=("<think>", "</think>", "<answer>", "</answer>"))
    whole = "<think>so</think> <answer>7</answer>"
    assert scores(reward, whole, "", "<think></think>", "<answer></answer>") == [1.0, 0.0, 0.5, 0.5]
    assert scores(reward, "</answer><answer></think><think>") == [0.25], "only those in their order"
    assert scores(Format(sections=("a", "a")), "a", "aa") == [0.5, 1.0]


def test_format_of_json():
    reward = Format(keys=("a", "b"))
    assert scores(reward, '{"a": 1, "b": null}', '{"a": 1}', '{"c": 1}', "[]", "so: {}") == [1.0, 0.5, 0.0, 0.0, 0.0]
    assert scores(Format(keys=()), "{}", "[]", "[" * 100_000) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("options", [{}, {"sections": ["a"], "keys": ["b"]}, {"sections": []}, {"sections": [""]}])
def test_format_needs_one_of_both(options):
    with pytest.raises(ValidationError, match="sections"):
        Format(**options)


@pytest.fixture
def answers(tmp_path):
    def written(*rows: object) -> str:
        file = tmp_path / "answers.jsonl"
        file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(file)

    return written


def test_exact_answer(answers):
    path = answers({"prompt": "sum?", "answer": "1,000"}, "", {"prompt": TALK, "answer": ["Because.", "42"]})
    reward = ExactAnswer(path=path)
    assert scores(reward, "1000", " 1,000.00 ", "+1000.", "1001", "one", prompt="sum?") == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert scores(reward, "because", " BECAUSE. ", "042", "-42", prompt=TALK) == [1.0, 1.0, 1.0, 0.0]
    assert scores(reward, "1000", prompt="another?") == [None]
    marked = ExactAnswer(path=path, extract=r"= (\S+)", right=2, wrong=-1)
    assert scores(marked, "2 = 2, 5 = 1000", "1000", "= 1", prompt="sum?") == [2.0, -1.0, -1.0]
    check_reward(reward, samples=[Sample("sum?", "1000"), Sample("sum?", "5"), Sample(TALK, "42")])


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("12,34", "1234", False),  # no number with thousands
        ("-0", "0", True),
        ("0.50", "0.5", True),
        ("1.000", "1000", False),
        ("１０", "10", True),  # noqa: RUF001
        ("1e3", "1000", False),
        ("New  York.", "new york", True),
        ("", ".", True),
    ],
)
def test_what_is_the_same_answer(answers, one, other, same):
    reward = ExactAnswer(path=answers({"prompt": "q", "answer": one}))
    assert scores(reward, other) == [float(same)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "with prompt and answer"),
        ("[]", "with prompt and answer"),
        ('{"prompt": "b"}', "with prompt and answer"),
        ({"prompt": "b", "answer": 7}, "is a text"),
        ({"prompt": "b", "answer": []}, "is a text"),
        ({"prompt": "a", "answer": "2"}, "has an answer already"),
    ],
)
def test_a_bad_row_is_named(answers, row, message):
    path = answers({"prompt": "a", "answer": "1"}, row)
    with pytest.raises(DataError, match=rf"answers\.jsonl:2: .*{message}"):
        scores(ExactAnswer(path=path), "1")


def test_a_file_that_changes_is_read_again(answers):
    import os

    reward = ExactAnswer(path=answers({"prompt": "q", "answer": "1"}))
    assert scores(reward, "2") == [0.0]
    os.utime(answers({"prompt": "q", "answer": "2"}), ns=(1, 1))
    assert scores(reward, "2") == [1.0]


@pytest.mark.parametrize("options", [{"path": "nowhere"}, {"extract": "a"}, {"extract": "("}, {"extract": "(a)(b)"}])
def test_exact_answer_refuses(answers, options):
    with pytest.raises(ValidationError):
        ExactAnswer(**({"path": answers({"prompt": "q", "answer": "1"})} | options))
