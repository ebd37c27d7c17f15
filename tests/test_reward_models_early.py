"""What is wrong is said before a reward model is trained, and what is damaged before its report is shown."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from judged_worlds import judged_config, scored_config, write_judgements, write_scores
from typer.testing import CliRunner

import moalign
from moalign.cli import app
from moalign.data.dataset import PairDataset
from moalign.data.tokenise import Sequence
from moalign.errors import ConfigError, CorruptFileError, PluginError, RunError, TrainingError
from moalign.reward_models import archive, training
from moalign.reward_models.rehearsal import telling_pairs, telling_rows
from moalign.sweeps.observe import Observer
from moalign.types import Sample
from moalign_plugins.reward_models.bradley_terry import BradleyTerry


def typed(*words: str) -> str:
    return CliRunner().invoke(app, ["reward-model", *words], catch_exceptions=False).stdout


@pytest.fixture
def untrained(monkeypatch):
    """Whoever trains fails."""

    def never(*_: Any) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(training, "train_members", never)


def test_rows_that_tell_have_the_ends_of_scores_and_every_way_to_lack_some():
    nan = np.nan
    rewards = np.array([[1.0, nan], [5.0, 2.0], [3.0, 2.5], [-4.0, nan], [nan, 7.0], [2.0, 3.0]])
    empty = tuple(Sequence((1, 2), 1) for _ in rewards)
    pairs = np.array([[0, 1], [2, 5], [3, 5], [4, 5]])
    dataset = PairDataset(
        objectives=("a", "b"),
        sequences=empty,
        samples=tuple(Sample("p", "r") for _ in rewards),
        pairs=pairs,
        pair_objective=np.array([0, 0, 1, 0]),
        strength=np.ones(4),
        rewards=rewards,
        groups=np.zeros(6, dtype=np.int64),
        counts={},
    )
    rows = telling_rows(dataset)
    assert {1, 3, 4} <= set(rows.tolist())  # the ends of both
    assert {tuple(np.isnan(rewards[row])) for row in rows} == {(False, False), (False, True), (True, False)}
    for column in range(2):
        assert np.isnan(rewards[rows, column]).any()
    assert telling_pairs(dataset).tolist() == [0, 2, 3]


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("method", "answer", "reason"),
    [
        ("head", torch.zeros(3, 5), r"in head: it must return \[2, \d+\] or None, not \[3, 5\]"),
        ("scores", torch.zeros(7), r"in scores: it must return one score per row and objective"),
    ],
)
def test_a_form_whose_answers_have_another_shape_is_refused_before_training(
    tiny_model_path, tmp_path, monkeypatch, method, answer, reason
):
    if method == "scores":  # the loss does not ask for it in public
        monkeypatch.setattr(BradleyTerry, "loss", lambda self, batch: batch.final[batch.pairs[:, 0]].sum(1))
    monkeypatch.setattr(BradleyTerry, method, lambda *_: answer)
    file = write_judgements(tmp_path / "pairs.jsonl", prompts=12)
    with pytest.raises(PluginError, match=reason):
        moalign.train_reward_model(judged_config(tiny_model_path, file), tmp_path / "out")


@pytest.mark.usefixtures("untrained")
def test_one_score_that_a_form_refuses_is_found_before_training(tiny_model_path, tmp_path):
    file = write_scores(tmp_path / "scores.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["letters"] = [7.0 if (number, place) == (20, 1) else 0.5 for place in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = scored_config(tiny_model_path, file, reward_model={"name": "implicit-outcome"})
    content |= {"objectives": {"letters": None}, "data": content["data"] | {"held_out": 0.1}, "seed": 1}
    content["data"]["reader"]["scores"] = {"letters": "letters"}
    with pytest.raises(TrainingError, match="a score of an outcome is not from 0"):
        moalign.train_reward_model(content, tmp_path / "out")


@pytest.mark.usefixtures("untrained")
def test_a_feature_that_one_held_out_response_lacks_is_found_before_training(tiny_model_path, tmp_path):
    rows = []
    for number in range(20):
        scores = {"kind": [0.1, 0.9], "good": [0.0, 1.0]}
        rows.append({"prompt": f"say {number}:", "answers": ["ab", "cd"], **scores})
    file, other = tmp_path / "train.jsonl", tmp_path / "other.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:16]))
    rows[-1]["kind"] = [0.1, None]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows[16:]))
    content = judged_config(tiny_model_path, file, reward_model={"name": "features", "features": ["kind"]})
    reader = {"name": "columns", "responses": "answers", "scores": {"kind": "kind", "good": "good"}}
    content |= {"objectives": {"kind": None, "good": None}}
    content["data"] = {"path": str(file), "held_out_path": str(other), "reader": reader}
    with pytest.raises(moalign.errors.MoalignError, match="no score for 'kind'"):
        moalign.train_reward_model(content, tmp_path / "out")


@pytest.fixture(scope="module")
def written(tiny_model_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    file = write_judgements(folder / "pairs.jsonl", prompts=12)
    content = judged_config(tiny_model_path, file, train={"steps": 2, "pairs_per_step": 4})
    (folder / "rm.yaml").write_text(yaml.safe_dump(content))
    moalign.train_reward_model(content, folder / "out")
    return folder


def copy_of(written, tmp_path):
    return shutil.copytree(written / "out", tmp_path / "copy")


def test_altered_numbers_are_not_shown(written, tmp_path):
    for name in ("report.json", "reward_model.json"):
        folder = copy_of(written, tmp_path)
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace('"format": 1', '"format": 2'))
        with pytest.raises(CorruptFileError, match=rf"{name}: its content is not what was written"):
            typed("report", str(folder))
        (folder / name).write_text("[]")
        with pytest.raises(CorruptFileError, match=name):
            typed("report", str(folder))
        shutil.rmtree(folder)


def test_a_report_needs_no_weights_to_be_shown(written, tmp_path):
    folder = copy_of(written, tmp_path)
    (folder / "member-0" / "model.safetensors").unlink()
    assert archive.read_report(folder) == json.loads((written / "out" / "report.json").read_text())


def test_a_report_that_is_missing_is_said_to_be(written, tmp_path):
    folder = copy_of(written, tmp_path)
    (folder / "report.json").unlink()
    with pytest.raises(CorruptFileError, match=r"report\.json: the manifest names it but it is missing"):
        typed("report", str(folder))
    with pytest.raises(RunError, match="nothing that `moalign reward-model train` wrote"):
        typed("report", str(tmp_path))


@pytest.mark.usefixtures("untrained")
def test_a_dry_run_refuses_a_directory_as_the_run_would(written):
    with pytest.raises(RunError, match="exists already; it is never overwritten"):
        typed("train", str(written / "rm.yaml"), "--dry-run", "--out", str(written / "out"))


@pytest.fixture(scope="module")
def short_sighted(tmp_path_factory, tiny_model_path):
    """The tiny model's tokenizer on a GPT-2 with 24 learned positions."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24, "vocab_size": len(tokenizer)}
    GPT2LMHeadModel(GPT2Config(**sizes, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_length_beyond_the_models_window_is_refused(short_sighted, tmp_path):
    file = write_judgements(tmp_path / "pairs.jsonl", prompts=12)
    content = judged_config(short_sighted, file)
    content["data"]["max_length"] = 40
    with pytest.raises(ConfigError, match=r"data\.max_length: 40 is more than the 24 tokens that .* takes"):
        moalign.train_reward_model(content, tmp_path / "out")


def test_where_no_length_is_stated_it_is_the_models(short_sighted, tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"say {n}: " * 9, "chosen": "ab", "rejected": "xy"} for n in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = judged_config(short_sighted, file, objectives={"good": None}, train={"steps": 1, "pairs_per_step": 2})
    said: list[str] = []

    class Listener(Observer):
        def on_training_start(self, counts, warnings, *_):
            said.extend(warnings)

    moalign.train_reward_model(content, tmp_path / "out", observer=Listener())
    assert any("takes 24 tokens, so data.max_length is 24 and longer texts are cut" in each for each in said)
    written = [tmp_path / "out" / "reward_model.json", tmp_path / "out" / "member-0" / "config.json"]
    record, config = (json.loads(each.read_text()) for each in written)
    assert record["config"]["data"]["max_length"] == config["moalign"]["max_length"] == 24
    assert np.isfinite(moalign.open_reward_model(tmp_path / "out").scores([Sample("say 1: " * 30, "ab")])).all()


def test_a_posterior_is_refused_since_none_is_kept(tiny_model_path, tmp_path):
    content = judged_config(tiny_model_path, write_judgements(tmp_path / "pairs.jsonl", prompts=4))
    content["train"]["posterior"] = 0.5
    with pytest.raises(ConfigError, match=r"train\.posterior: a reward model keeps no deviation of its weights"):
        moalign.train_reward_model(content, tmp_path / "out")
