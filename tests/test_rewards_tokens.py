"""Prompt and response as rewards read them are what training makes of them, token for token, and cut as there."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from moalign.data.tokenise import Tokeniser, encode_record
from moalign.types import Record
from moalign_plugins.rewards._tokens import Joining

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TALK = ({"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Eh?"}, {"role": "user", "content": "W!"})
PROMPTS = ("q: ", "<s>q", "", "a longer prompt: ")
RESPONSES = ("yes", "", " \n", "a</s>b", "<s>a", "ab</s>", "</s>", "a long response of letters")


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "template"])
@pytest.mark.parametrize("limit", [2, 3, 4, 5, 8, 12, 20, 30, 64])
def test_they_are_those_of_training(tiny_model_path, template, limit):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    tokenizer.chat_template = template
    tokeniser = Tokeniser.of(tokenizer)
    joining = Joining(tokenizer, tokeniser.end_id, "here")
    for prompt in (*PROMPTS, TALK) if template else PROMPTS:
        for response in RESPONSES:
            (expected,) = encode_record(tokeniser, Record(prompt, (response,)), limit).sequences
            found = joining.ids(prompt, response, limit, "beginning")
            assert found == (None if expected is None else ([*expected.ids], expected.prompt_length))
