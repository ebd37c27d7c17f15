"""What a written classifier reads: the tokens that training read, whatever the tokenizer has for padding."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from judged_worlds import judged_config, write_judgements
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import moalign
from moalign.api import Sample
from moalign.data.tokenise import Tokeniser
from moalign.reward_models import writing
from moalign_plugins.rewards.sequence_classification import SequenceClassification

TEXTS = ("Use soap!! Burn it!!", "No idea !!", "Wow!")


def byte_level(**special: str) -> Any:
    """As GPT-2 has it: every byte is an ordinary token, "!" the first of them; only those named are special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=[], show_progress=False)
    backend.train_from_iterator(["Use soap!! Burn it!! No idea !!"] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.mark.parametrize("pad", [None, "<end>"])
def test_no_ordinary_token_becomes_padding(tmp_path, pad):
    tokenizer = byte_level(eos_token="<end>", **({"pad_token": pad} if pad else {}))
    assert tokenizer.convert_ids_to_tokens(0) == "!"
    tokeniser = Tokeniser.of(tokenizer)
    assert writing.special_padding(tokeniser) is None and writing.padding(tokeniser) != tokeniser.end_id
    writing.written_tokenizer(tokeniser).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.pad_token is None and tokenizer.pad_token == pad  # nothing pads with the end; the trained one is left
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert again.decode(again(text)["input_ids"], skip_special_tokens=True) == text


def test_a_special_token_that_ends_nothing_becomes_padding(tmp_path):
    tokenizer = byte_level(eos_token="<end>", additional_special_tokens=["<spare>"])
    tokeniser = Tokeniser.of(tokenizer)
    assert writing.padding(tokeniser) == tokenizer.convert_tokens_to_ids("<spare>")
    written = writing.written_tokenizer(tokeniser)
    assert written.pad_token == "<spare>"
    assert [written(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_there_is_padding_whatever_ends_sequences():
    bare = SimpleNamespace(
        pad_token_id=None, unk_token_id=None, bos_token_id=None, all_special_ids=[0, 1], added_tokens_decoder={}
    )
    assert writing.padding(Tokeniser(bare, None, 0, 1, 0)) == 2


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    tokenizer = byte_level(eos_token="<end>", pad_token="<end>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def exclamations(file):
    rows = [{"prompt": f"say {n}!", "chosen": "Use soap!! Burn it!!", "rejected": "No idea !!"} for n in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def content(model, file, **changes):
    train = {"steps": 3, "pairs_per_step": 4, "lr": 0.01}
    return judged_config(model, file, objectives={"good": None}, train=train, **changes)


def test_a_classifier_with_a_byte_level_tokenizer_scores_as_trained(bytes_model, tmp_path):
    moalign.train_reward_model(content(bytes_model, exclamations(tmp_path / "pairs.jsonl")), tmp_path / "out")
    samples = [Sample("say 3!", text) for text in TEXTS]
    expected = moalign.open_reward_model(tmp_path / "out").scores(samples)[:, 0].tolist()
    found = SequenceClassification(path=str(tmp_path / "out" / "member-0"), device="cpu").score(samples)
    assert found == pytest.approx(expected, abs=1e-4)
    config = json.loads((tmp_path / "out" / "member-0" / "config.json").read_text())
    assert config["moalign"]["max_length"] == 512 and config["pad_token_id"] != config["moalign"]["end_token_id"]


def test_a_tokenizer_that_reads_differently_once_written_is_not_written(bytes_model, tmp_path, monkeypatch):
    def cut_at_exclamations(tokeniser):
        tokenizer = byte_level(eos_token="<end>")
        tokenizer.pad_token = "!"
        return tokenizer

    monkeypatch.setattr(writing, "written_tokenizer", cut_at_exclamations)
    moalign.train_reward_model(content(bytes_model, exclamations(tmp_path / "pairs.jsonl")), tmp_path / "out")
    member = json.loads((tmp_path / "out" / "reward_model.json").read_text())["members"]["member-0"]
    assert member["classifier"] is None and "in another way than in training" in member["why"]
    assert {file.name for file in (tmp_path / "out" / "member-0").iterdir()} == {
        "adapter",
        "head.safetensors",
        "metrics.jsonl",
    }


def test_what_was_trained_is_kept_where_it_cannot_be_measured(tiny_model_path, tmp_path, monkeypatch):
    from moalign.errors import RunError
    from moalign.reward_models import archive, reporting

    def fails(*_):
        raise RuntimeError("no memory is left")

    monkeypatch.setattr(reporting, "measure", fails)
    file = write_judgements(tmp_path / "pairs.jsonl", prompts=12)
    settings = judged_config(tiny_model_path, file, train={"steps": 2, "pairs_per_step": 4})
    with pytest.raises(RunError, match=r"out: trained and written, but not measured.*no memory is left"):
        moalign.train_reward_model(settings, tmp_path / "out")
    assert not (tmp_path / "out" / "report.json").exists()
    assert moalign.open_reward_model(tmp_path / "out").scores([Sample("say 1:", "abc")]).shape == (1, 2)
    with pytest.raises(RunError, match=r"without report\.json; it was not measured: no memory is left"):
        archive.read_report(tmp_path / "out")
