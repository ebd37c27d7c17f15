"""The reward `sequence-classification`, on tiny random classifiers, against forward passes by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import StopAfterCandidates, break_off_and_resume
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from sweeps import contents, small_config
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from moalign import registry
from moalign.api import DataError, ModelError, Sample
from moalign.sweeps import run
from moalign.sweeps.observe import Observer
from moalign.testing import check_reward
from moalign_plugins.rewards import _classifiers
from moalign_plugins.rewards.sequence_classification import SequenceClassification

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
TALK = ({"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Eh?"}, {"role": "user", "content": "W!"})
SAMPLES = [Sample("q: ", text) for text in ("a", "some more text", "b c", "", "another one")]


def make(path: Path, tokenizer_of: Path, padding: bool = True, **labels: Any) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id if padding else None,
        **labels,
    )
    LlamaForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def heads(tiny_model_path, tmp_path_factory) -> Path:
    labels = {0: "kind", 1: "true", 2: "brief"}
    return make(tmp_path_factory.mktemp("heads"), tiny_model_path, id2label=labels, label2id={"kind": 0})


@pytest.fixture(scope="module")
def single(tiny_model_path, tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("single"), tiny_model_path, padding=False, num_labels=1)


def by_hand(path: Path, *texts: str) -> list[list[float]]:
    """All logits of each text alone; one token for each character after <s>, if the tokenizer has one there."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), LlamaForSequenceClassification.from_pretrained(path).eval()
    rows = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
    with torch.no_grad():
        return [model(input_ids=row).logits[0].tolist() for row in rows]


def reward(path: Path, **options: Any) -> SequenceClassification:
    return SequenceClassification.model_validate({"path": str(path), "device": "cpu"} | options)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize(("head", "index"), [(0, 0), (2, 2), ("true", 1), ("brief", 2)])
def test_the_score_is_the_logit_of_the_head(heads, head, index, batch_size):
    expected = [row[index] for row in by_hand(heads, *("q: " + sample.response for sample in SAMPLES))]
    assert reward(heads, head=head, batch_size=batch_size).score(SAMPLES) == pytest.approx(expected, abs=1e-6)


def test_a_model_without_padding_scores_one_at_a_time(single):
    expected = [row[0] for row in by_hand(single, *("q: " + sample.response for sample in SAMPLES))]
    assert reward(single).score(SAMPLES) == pytest.approx(expected, abs=1e-6)


def test_ways_of_reading(single):
    sample = Sample("q: ", "yes")
    texts = {"text": "q: yes", "response": "yes", "conversation": "[user]q: [assistant]yes"}
    for read, text in texts.items():
        assert reward(single, read=read).score([sample]) == pytest.approx(by_hand(single, text)[0], abs=1e-6)
    talk = "[user]Why?[assistant]Eh?[user]W![assistant]yes"
    for read in ("text", "pair", "conversation"):
        assert reward(single, read=read).score([Sample(TALK, "yes")]) == pytest.approx(by_hand(single, talk)[0])
    assert reward(single, read="response").score([Sample(TALK, "yes")]) == pytest.approx(by_hand(single, "yes")[0])
    pair = AutoTokenizer.from_pretrained(single)("q: ", "yes")["input_ids"]
    model = LlamaForSequenceClassification.from_pretrained(single).eval()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([pair])).logits[0].tolist()
    assert reward(single, read="pair").score([sample]) == pytest.approx(expected, abs=1e-6)


def test_what_is_too_long(single):
    sample = Sample("abc", "defgh")
    assert reward(single, max_length=8).score([sample]) == pytest.approx(by_hand(single, "abcdefgh")[0], abs=1e-6)
    assert reward(single, max_length=4).score([sample, Sample("a", "b")])[0] is None
    for lose, kept in (("beginning", "efgh"), ("end", "abcd")):
        found = reward(single, max_length=4, lose=lose).score([sample])
        assert found == pytest.approx(by_hand(single, kept)[0], abs=1e-6)
    assert reward(single).score([Sample("", "x" * 65), Sample("", "x" * 64), Sample("", "")])[::2] == [None, None]


def test_heads_share_the_model_and_the_pass(heads, monkeypatch):
    asked = []
    computed = _classifiers.Classifier._computed
    monkeypatch.setattr(
        _classifiers.Classifier,
        "_computed",
        lambda self, *question: asked.append(question) or computed(self, *question),
    )
    _classifiers.classifier_of.cache_clear()
    kind, true = reward(heads, head="kind"), reward(heads, head="true")
    assert kind.score(SAMPLES) != true.score(SAMPLES)
    assert len(asked) == 1 and _classifiers.classifier_of.cache_info().currsize == 1
    true.score(SAMPLES[:2])
    assert len(asked) == 2


def test_it_conforms(heads):
    check_reward(reward(heads, head=1))


@pytest.mark.parametrize("head", [None, 3, -1, "kinder"])
def test_a_head_that_is_not_there_names_those_that_are(heads, head, tmp_path):
    """Before anything is loaded where config.json names them; the model itself knows how many it has otherwise."""
    with pytest.raises(ValidationError, match=r"head: .* of 0 \(kind\), 1 \(true\), 2 \(brief\)"):
        reward(heads, head=head)
    copy = Path(shutil.copytree(heads, tmp_path / "unnamed"))
    content = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({name: content[name] for name in content if "label" not in name}))
    asked = reward(copy, head=head)
    tensors = load_file(copy / "model.safetensors")
    save_file(tensors | {"score.weight": tensors["score.weight"][:2]}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"head: .* of 0 \(LABEL_0\), 1 \(LABEL_1\)"):
        asked.score(SAMPLES)


@pytest.mark.parametrize("left", [["score.bias"], ["gating.weight", "regression_layer.weight"]], ids=str)
def test_weights_beside_the_head_that_would_be_left_out_are_refused_by_name(heads, tmp_path, left, capfd):
    copy = Path(shutil.copytree(heads, tmp_path / "more"))
    tensors = load_file(copy / "model.safetensors")
    save_file(tensors | {name: torch.ones(3) for name in left}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"would not be those that were trained: {', '.join(left)} in them"):
        reward(copy, head="kind").score(SAMPLES[:1])
    said = "".join(capfd.readouterr())
    assert left[0] not in said and "LOAD REPORT" not in said
    save_file(tensors | {"lm_head.weight": torch.ones(3)}, copy / "model.safetensors", {"format": "pt"})
    _classifiers.classifier_of.cache_clear()
    assert reward(copy, head="kind").score(SAMPLES) == reward(heads, head="kind").score(SAMPLES)


def test_what_is_no_classifier_is_refused(tiny_model_path, tmp_path):
    with pytest.raises(ModelError, match=r"no trained sequence classifier, .* score\.weight"):
        reward(tiny_model_path).score(SAMPLES)
    with pytest.raises(ValidationError, match=r"no directory with a config\.json"):
        reward(tmp_path)


def test_weights_in_pickles_are_refused(single, tmp_path):
    copy = Path(shutil.copytree(single, tmp_path / "pickled"))
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        reward(copy).score(SAMPLES)


def test_a_conversation_that_the_template_refuses(single, tmp_path):
    copy = Path(shutil.copytree(single, tmp_path / "plain"))
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="chat template"):
        reward(copy).score([Sample(TALK, "yes")])


def test_a_sweep_on_two_heads_interrupted_and_resumed_is_the_unbroken_one(heads, tiny_model_path, tmp_path):
    """Scores of padded batches depend on the batch in their last bits, so what is asked must not depend on the past."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"q{number}: "}) + "\n" for number in range(8)))
    choice = {"name": "sequence-classification", "path": str(heads), "device": "cpu", "batch_size": 3}
    settings = small_config(
        tiny_model_path,
        prompts,
        objectives={name: {"reward": choice | {"head": name}} for name in ("kind", "true")},
        search={"name": "grid", "points": 3},
        train={"steps": 4, "lr": 1e-2, "together": 1},
        loss="rloo",
        rollouts={"rounds": 2, "samples": 3, "prompts": 4, "prompts_per_step": 2, "max_new_tokens": 5},
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert len(run.start(settings, whole, registry.discover(), Observer())["points"]) == 3
    resumed = break_off_and_resume(settings, cut, StopAfterCandidates())
    assert contents(resumed) == contents(whole)


def armo(heads: Path, to: Path, **further: torch.Tensor) -> Path:
    """The same classifier in the form of ArmoRM: heads under another name, and a network that mixes them."""
    copy = Path(shutil.copytree(heads, to))
    tensors = load_file(copy / "model.safetensors")
    tensors["regression_layer.weight"] = tensors.pop("score.weight")
    tensors |= {"gating.layers.0.weight": torch.ones(4, 32), "reward_transform_matrix": torch.eye(3)}
    save_file(tensors | further, copy / "model.safetensors", {"format": "pt"})
    return copy


def test_each_head_of_a_model_in_the_form_of_armorm_is_asked_for_itself(heads, tmp_path):
    copy = armo(heads, tmp_path / "armo")
    for head in (0, "true"):
        expected = SequenceClassification(path=str(heads), head=head, device="cpu").score(SAMPLES)
        assert SequenceClassification(path=str(copy), head=head, device="cpu").score(SAMPLES) == expected


def test_how_many_heads_there_are_the_weights_say(heads, tmp_path):
    """A configuration of ArmoRM's kind need not name them."""
    copy = armo(heads, tmp_path / "armo")
    settings = json.loads((copy / "config.json").read_text())
    number = len(settings.pop("id2label"))
    settings.pop("label2id", None)
    (copy / "config.json").write_text(json.dumps(settings))
    expected = SequenceClassification(path=str(heads), head=number - 1, device="cpu").score(SAMPLES)
    assert SequenceClassification(path=str(copy), head=number - 1, device="cpu").score(SAMPLES) == expected


def test_weights_that_nobody_knows_are_refused_by_name(heads, tmp_path):
    copy = armo(heads, tmp_path / "armo", **{"another.weight": torch.ones(2)})
    with pytest.raises(ModelError, match=r"its logits would not be those that were trained: another\.weight in them"):
        SequenceClassification(path=str(copy), head="kind").score(SAMPLES[:1])


def test_tokens_are_those_that_training_joins(heads):
    """Whatever the text reads like: prompt through the template, response, and the end token; cut at the beginning."""
    from moalign.data.tokenise import Tokeniser

    tokenizer = AutoTokenizer.from_pretrained(heads)
    tokeniser = Tokeniser.of(tokenizer)
    model = LlamaForSequenceClassification.from_pretrained(heads).eval()
    for prompt, answer in (("q: ", "some text"), (TALK, "well")):
        ids = [*tokeniser.prompt(prompt), *tokeniser.response(answer)]
        assert ids[-1] == tokenizer.eos_token_id
        for limit in (None, len(ids) - 1):
            read = SequenceClassification(
                path=str(heads), head="true", read="tokens", max_length=limit, lose="beginning", device="cpu"
            )
            cut = ids if limit is None else ids[1:]  # no token that begins a text: the template writes none
            expected = model(input_ids=torch.tensor([cut])).logits[0, 1].item()
            assert read.score([Sample(prompt, answer)]) == pytest.approx([expected], abs=1e-5)


def test_a_classifier_of_moalign_reads_as_it_was_trained_by_itself(heads, tmp_path):
    """Its config.json says that it reads tokens, what ends them and how many: long prompts lose their beginning."""
    copy = Path(shutil.copytree(heads, tmp_path / "trained"))
    content = json.loads((copy / "config.json").read_text())
    end = AutoTokenizer.from_pretrained(heads).eos_token_id
    content["moalign"] = {"read": "tokens", "end_token_id": end, "max_length": 20}
    (copy / "config.json").write_text(json.dumps(content))
    samples = [Sample(prompt, text) for prompt in ("q: ", "a long prompt " * 3) for text in ("yes", "", " ", "b" * 30)]
    samples.append(Sample("q: ", "a</s>b"))
    asked = reward(heads, head="kind", read="tokens", max_length=20, lose="beginning").score(samples)
    assert reward(copy, head="kind").score(samples) == asked
    assert [score is None for score in asked] == [False, True, True, True] * 2 + [True]
    uncut = reward(heads, head="kind", read="tokens").score(samples[4:5])
    assert asked[4] != uncut[0] and reward(copy, head="kind", max_length=60).score(samples[4:5]) == uncut
