"""Faults 3, 4, 8, 9, 10 over several tokenizer families: one BOS, the end trained, mask = completion exactly."""

import dataclasses
from functools import cache

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from moalign.data.pairing import labelled
from moalign.data.tokenise import Tokeniser, check_vocabulary, encode_record
from moalign.engine.layout import one_by_one
from moalign.errors import DataError, ModelError
from moalign.types import Pair, Record

CORPUS = [
    "ab ab ab ab",
    "the sky is blue",
    "Question: why is the sky blue? Answer: because",
    "user assistant yes no",
] * 4
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_BOS = "{{ bos_token }}" + CHATML.replace("<|im_end|>", "</s>")
PLAIN_END = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
REFUSING = "{{ raise_exception('roles must alternate') }}"
PARTS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[PAD]", "[UNK]"]


@cache
def core(family):
    if family == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=340,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=PARTS,
            show_progress=False,
        )
    elif family == "word-level":
        tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(special_tokens=PARTS, show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=PARTS, unk_token="[UNK]", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def build(family="byte-level", *, bos=True, adds_bos=False, pad="[PAD]", template=None, eos="</s>"):
    inner = Tokenizer.from_str(core(family))
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            special_tokens=[("<s>", inner.token_to_id("<s>")), ("</s>", inner.token_to_id("</s>"))],
        )
    special = {"bos_token": "<s>" if bos else None, "eos_token": eos, "pad_token": pad, "unk_token": "[UNK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **{k: v for k, v in special.items() if v is not None})
    tokenizer.chat_template = template
    return tokenizer


FAMILIES = ["byte-level", "word-level", "unigram"]
SHAPES = {
    "bos": {},
    "bos added by the post-processor": {"adds_bos": True},
    "no bos": {"bos": False},
    "pad is eos": {"pad": "</s>"},
    "no pad": {"pad": None},
    "template": {"template": CHATML, "eos": "<|im_end|>", "bos": False},
    "template that writes the bos": {"template": WITH_BOS, "adds_bos": True},
    "template that writes the bos twice": {"template": "{{ bos_token }}" + WITH_BOS},
    "template whose end is not the eos": {"template": CHATML},
    "template without an end": {"template": PLAIN_END},
}
RECORD = Record("why is the sky", ("because blue", "yes ab"), pairs={"x": (Pair(0, 1),)}, group="g")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_bos_the_end_trained_and_mask_is_the_completion(family, shape):
    tokenizer = build(family, **SHAPES[shape])
    tokeniser = Tokeniser.of(tokenizer)
    dataset = labelled([RECORD], tokeniser, ["x"])
    for sequence, text in zip(dataset.sequences, RECORD.responses, strict=True):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        completion = list(sequence.ids[sequence.prompt_length :])
        assert completion == [*expected, tokeniser.end_id]
        assert tokenizer.decode(completion[:-1]) == text
        if tokenizer.bos_token_id is not None and "bos_token" in (tokenizer.chat_template or "bos_token"):
            assert sequence.ids[0] == tokenizer.bos_token_id
        assert list(sequence.ids).count(tokenizer.bos_token_id) == (sequence.ids[0] == tokenizer.bos_token_id)
        assert completion.count(tokeniser.end_id) == 1
    layout = one_by_one(dataset.sequences, tokeniser.pad_id)
    scored = layout.labels.split(layout.counts)
    assert [tuple(labels.tolist()) for labels in scored] == [sequence.response for sequence in dataset.sequences]
    for row, sequence in enumerate(dataset.sequences):
        read = layout.input_ids[row].tolist()
        assert read[: len(sequence.ids) - 1] == list(sequence.ids[:-1])
        assert set(read[len(sequence.ids) - 1 :]) <= {tokeniser.pad_id}
        assert (layout.mask[row].nonzero()[:, 0] + 1).tolist() == list(range(len(sequence.prompt), len(sequence.ids)))


@pytest.mark.parametrize(
    ("shape", "starts_with_bos", "end"),
    [
        ("bos", True, "</s>"),
        ("bos added by the post-processor", True, "</s>"),
        ("no bos", False, "</s>"),
        ("template", False, "<|im_end|>"),
        ("template that writes the bos", True, "</s>"),
        ("template that writes the bos twice", True, "</s>"),
        ("template whose end is not the eos", False, "<|im_end|>"),
        ("template without an end", False, "</s>"),
    ],
)
def test_special_tokens_of_every_shape(shape, starts_with_bos, end):
    tokenizer = build(**SHAPES[shape])
    tokeniser = Tokeniser.of(tokenizer)
    assert tokeniser.end_id == tokenizer.convert_tokens_to_ids(end)
    bos = tokenizer.convert_tokens_to_ids("<s>")
    assert tokeniser.prompt("the sky").count(bos) == int(starts_with_bos)
    assert (tokeniser.prompt("the sky")[0] == bos) == starts_with_bos


def test_prompt_and_response_that_would_merge_are_joined_as_ids():
    tokenizer = build(bos=False)
    (merged,) = tokenizer("ab", add_special_tokens=False)["input_ids"]  # "ab" is one token
    record = Record("a", ("b", "c"), group="g")
    first, _ = encode_record(Tokeniser.of(tokenizer), record).sequences
    assert first.prompt_length == 1
    assert merged not in first.ids
    assert tokenizer.convert_ids_to_tokens(list(first.ids)) == ["a", "b", "</s>"]


def test_pretemplated_text_keeps_one_bos_and_one_end():
    tokenizer = build(adds_bos=True)
    record = Record("<s>the sky", ("blue</s>", "blue</s></s>", "blue</s> yes", "<s>blue"), group="g")
    encoded = encode_record(Tokeniser.of(tokenizer), record)
    for sequence in encoded.sequences[:2]:
        assert tokenizer.decode(list(sequence.ids)) == "<s>the sky" + "blue" + "</s>"
    assert encoded.reasons[2:] == ("the response holds a special token inside its text",) * 2


def test_template_may_return_anything():
    class Odd:
        chat_template, eos_token_id, bos_token_id, pad_token_id, all_special_ids = "x", 1, 0, None, [0, 1]

        def __init__(self, wrap):
            self.wrap, self.added_tokens_decoder = wrap, {}

        def apply_chat_template(self, messages, tokenize=True, add_generation_prompt=False):
            return self.wrap([0, 7, 8]) if tokenize else "".join(m["content"] for m in messages)

        def __call__(self, text, add_special_tokens=True, **_):
            return {"input_ids": [9] * len(text)}

    wraps = [
        list,
        lambda x: {"input_ids": x},
        lambda x: {"input_ids": [x]},
        np.array,
        lambda x: {"input_ids": np.array([x])},
    ]
    for wrap in wraps:
        ids = Tokeniser.of(Odd(wrap)).prompt("q")
        assert ids == (0, 7, 8)
        assert all(type(i) is int for i in ids)


def test_conversation_without_a_template_is_an_error_that_says_what_to_do():
    tokeniser = Tokeniser.of(build())
    with pytest.raises(ModelError, match="no chat template; set chat_template"):
        tokeniser.prompt(({"role": "user", "content": "hi"},))


def test_template_that_refuses_is_counted():
    tokenizer = build(template=CHATML)
    tokeniser = Tokeniser.of(tokenizer)
    tokenizer.chat_template = REFUSING
    encoded = encode_record(tokeniser, RECORD)
    assert encoded.sequences == (None, None)
    assert "roles must alternate" in encoded.reasons[0]


def test_missing_eos_and_pad():
    tokenizer = build(pad=None)
    assert Tokeniser.of(tokenizer).pad_id == tokenizer.eos_token_id
    tokenizer = build()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence token; set eos_token"):
        Tokeniser.of(tokenizer)


def test_vocabulary_larger_than_the_head():
    tokenizer = build()
    check_vocabulary(tokenizer, len(tokenizer))
    check_vocabulary(tokenizer, len(tokenizer) + 64)
    with pytest.raises(
        ModelError, match=f"ids up to {len(tokenizer) - 1}, but the model's output head has only 300 rows"
    ):
        check_vocabulary(tokenizer, 300)


# --- truncation -----------------------------------------------------------------------------------------------------

# word-level: every word is one token
LONG = Record(
    "the sky is blue why is the sky", ("because yes no", "because yes ab"), pairs={"x": (Pair(0, 1),)}, group="g"
)


def words(tokenizer, sequence):
    return tokenizer.decode(list(sequence.ids))


def test_prompt_is_cut_from_the_left_and_keeps_its_bos():
    tokenizer = build("word-level")
    encoded = encode_record(Tokeniser.of(tokenizer), LONG, max_length=8)
    assert [words(tokenizer, s) for s in encoded.sequences] == [
        "<s> is the sky because yes no </s>",
        "<s> is the sky because yes ab </s>",
    ]
    assert all(s.truncated and len(s.ids) == 8 and s.prompt_length == 4 for s in encoded.sequences)
    whole = encode_record(Tokeniser.of(tokenizer), LONG, max_length=13)
    assert whole == encode_record(Tokeniser.of(tokenizer), LONG)
    assert not any(s.truncated for s in whole.sequences)


def test_all_responses_keep_the_same_prompt():
    record = dataclasses.replace(LONG, responses=("yes", "because yes no ab", "yes " * 20))
    first, second, third = encode_record(Tokeniser.of(build("word-level")), record, max_length=9).sequences
    assert third is None
    assert first.prompt_length == second.prompt_length == 4
    assert first.ids[:4] == second.ids[:4]


def test_response_that_alone_does_not_fit_is_dropped():
    encoded = encode_record(Tokeniser.of(build("word-level")), LONG, max_length=5)
    assert encoded.reasons == ("response longer than max_length 5",) * 2
    fits = encode_record(Tokeniser.of(build("word-level")), LONG, max_length=6)
    assert fits.reasons == (None, None)


def test_prompt_that_fills_max_length_is_dropped_and_never_trained():
    tokeniser = Tokeniser.of(build("word-level"))
    encoded = encode_record(tokeniser, LONG, max_length=9, truncation="response")
    assert encoded.sequences == (None, None)
    assert encoded.reasons == ("the prompt fills max_length 9",) * 2
    with pytest.raises(DataError, match=r"no pair is left(.|\n)*2 x dropped response: the prompt fills max_length 9"):
        labelled([LONG], tokeniser, ["x"], max_length=9, truncation="response")


def test_equal_after_truncation_is_dropped_and_counted():
    tokeniser = Tokeniser.of(build("word-level"))
    short = dataclasses.replace(LONG, prompt="sky", group="h")
    dataset = labelled([LONG, short], tokeniser, ["x"], max_length=11, truncation="response")
    assert dataset.counts == {
        "dropped pair: chosen equals rejected after truncation": 1,
        "truncated response: its end was cut": 2,
    }
    assert len(dataset.pairs) == 1
    cut = encode_record(tokeniser, LONG, max_length=11, truncation="response").sequences[0]
    assert cut.truncated
    assert cut.ids[-1] != tokeniser.end_id  # what lost its end does not teach to stop


def test_nothing_is_cut_with_drop():
    encoded = encode_record(Tokeniser.of(build("word-level")), LONG, max_length=12, truncation="drop")
    assert encoded.reasons == ("longer than max_length 12",) * 2
    encoded = encode_record(Tokeniser.of(build("word-level")), LONG, max_length=13, truncation="drop")
    assert encoded.reasons == (None, None)


@pytest.mark.parametrize("shape", SHAPES)
def test_empty_completion_is_dropped_and_counted(shape):
    tokeniser = Tokeniser.of(build(**SHAPES[shape]))
    record = Record("why", ("", " \n", "yes", "no"), pairs={"x": (Pair(2, 0), Pair(2, 3))}, group="g")
    dataset = labelled([record], tokeniser, ["x"])
    assert dataset.counts == {
        "dropped pair: one of its responses was dropped": 1,
        "dropped response: empty completion": 2,
    }
    assert [sample.response for sample in dataset.samples] == ["yes", "no"]


def test_empty_prompt_needs_a_bos():
    record = dataclasses.replace(RECORD, prompt="")
    assert encode_record(Tokeniser.of(build()), record).sequences[0].prompt_length == 1
    assert encode_record(Tokeniser.of(build(bos=False)), record).reasons == ("empty prompt",) * 2
