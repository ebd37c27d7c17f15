"""Passages of a response's text, by its tokens: against the definition, for tokens smaller than a character too."""

from __future__ import annotations

import re
from random import Random

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moalign.api import Objective
from moalign.demo import make_checkpoint
from moalign.engine.passages import expressions_of, passages_of
from moalign.errors import PluginError


def bytewise() -> PreTrainedTokenizerFast:
    """Each byte is a token, and "xyz" is one too; <end> has no text."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: number for number, letter in enumerate(sorted(letters))} | {"xy": 256, "xyz": 257}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("x", "y"), ("xy", "z")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


TOKENIZER = bytewise()
END = TOKENIZER.eos_token_id


def decode(ids) -> str:
    return str(TOKENIZER.decode(list(ids), skip_special_tokens=True))


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def by_definition(ids: list[int], expression: str) -> list[int]:
    """From the bytes that each token brings, and those of each character."""
    text, chars = decode(ids), []
    for place, char in enumerate(text):
        chars += [place] * len(char.encode())
    sizes = [0 if token == END else 3 if token == 257 else 2 if token == 256 else 1 for token in ids]
    spans = [(m.span(1 if re.compile(expression).groups else 0)) for m in re.finditer(expression, text)]
    found, at = [], 0
    for size in sizes:
        own = set(chars[at : at + size] or chars[at : at + 1])  # a token without text stands with what comes next
        at += size
        inside = [n for n, (begin, end) in enumerate(spans, 1) if any(begin <= place < end for place in own)]
        found.append(inside[0] if inside else 0)
    return found


PATTERNS = [r"[0-9]+", r"(?s)<(.*?)>", r"é", r"xy(z)?", r"[^.]+\.", r"(q)|b+", "€+", r"\Z", "nowhere"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_tokens_stand_where_their_characters_do(pattern):
    """Random texts, with characters of several bytes, tokens of several characters and an end token here and there."""
    rng, hits = Random(0), 0
    for _ in range(40):
        pieces = [
            rng.choice(["a", "bb", "7", "42", "é", "€€", "xyz", "xy", "z<", ">", ".", " ", "q"]) for _ in range(12)
        ]
        ids = ids_of("".join(pieces))
        ids.insert(rng.randrange(len(ids)), END)
        ids.append(END)
        found = passages_of(ids, decode, re.compile(pattern))
        assert found.tolist() == by_definition(ids, pattern)
        hits += int((found > 0).any())
    assert hits >= 6 or pattern in (r"\Z", "nowhere")


def test_by_hand():
    ids = [*ids_of("no <1é> <xyzxy>"), END]
    # n o _ < 1 é é > _ < xyz xy > end
    assert passages_of(ids, decode, re.compile("<(.*?)>")).tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 2, 2, 0, 0]
    assert passages_of(ids, decode, re.compile("<.*?>")).tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 0, 2, 2, 2, 2, 0]
    assert passages_of(ids, decode, re.compile("y")).tolist()[-5:] == [0, 1, 2, 0, 0][:5]


def test_of_a_character_that_was_cut_the_first_part_stands_for_it():
    ids = ids_of("a€")[:-1]
    assert decode(ids) == "a\ufffd"
    assert passages_of(ids, decode, re.compile("\ufffd")).tolist() == [0, 1, 0]
    assert passages_of([], decode, re.compile("a")).tolist() == []


def test_the_assistants_tokens_stand_where_its_tokenizer_says():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_checkpoint.__file__.rpartition("/")[0] + "/tiny-assistant")
    text = "Talk to a friend about it. Sleep well, and do not worry. It will pass."
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    found = passages_of(
        encoded["input_ids"], lambda ids: tokenizer.decode(ids, skip_special_tokens=True), re.compile(r"[^.]+\.")
    )
    assert tokenizer.decode(encoded["input_ids"]) == text
    ends = [match.end() for match in re.finditer(r"\.", text)]
    expected = [1 + int(np.searchsorted(ends, begin, side="right")) for begin, _ in encoded["offset_mapping"]]
    assert found.tolist() == expected and set(expected) == {1, 2, 3}


class Named(Objective):
    given: object = None

    def passages(self):
        return self.given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "it must return regular expressions by name, not None"),
        ({"answer": 3}, "it must return regular expressions by name"),
        ({"answer": "(a"}, r"in passages: '\(a' is no regular expression: missing \)"),
    ],
)
def test_what_is_no_expression_names_the_plugin(given, message):
    with pytest.raises(PluginError, match=message):
        expressions_of(Named(given=given))
    assert expressions_of(Named(given={"answer": "a"}))["answer"].pattern == "a"
