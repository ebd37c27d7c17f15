"""The reward `trained-reward-model`: any form, all members, the same scores as in training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from judged_worlds import judged_config, write_judgements
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

import moalign
from moalign import config, registry, storage
from moalign.api import ConfigError, ModelError, Sample
from moalign.sweeps import callables
from moalign.sweeps.plan import prepare
from moalign_plugins.rewards.trained_reward_model import TrainedRewardModel

SAMPLES = [Sample("say 1:", text) for text in ("abc", "wxyzabc", "", "a", "za" * 60)]
ODD = ["", "  ", "a</s>b", "<s>a", "ab</s>", "za" * 48, "za" * 49 + "z", "za" * 50]


@pytest.fixture(scope="module", params=[{"name": "mixture"}, {"name": "implicit", "beta": 0.5}])
def directory(request, tiny_model_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param["name"])
    file = write_judgements(folder / "pairs.jsonl", prompts=12)
    objectives = {"letters": None}
    if request.param["name"] == "implicit":  # of one objective alone
        rows = [row for row in file.read_text().splitlines() if '"letters"' in row]
        file.write_text("\n".join(rows) + "\n")
    else:
        objectives["short"] = None
    train = {"steps": 5, "pairs_per_step": 6, "lr": 0.01}
    content = judged_config(
        tiny_model_path, file, objectives=objectives, reward_model=request.param, train=train, members=2
    )
    content["data"]["max_length"] = 100
    moalign.train_reward_model(content, folder / "out")
    return folder / "out"


def test_it_scores_as_the_engine_does(directory):
    expected = moalign.open_reward_model(directory).member_scores(SAMPLES)[:, :, 0]
    assert np.isnan(expected[:, [2, 4]]).all() and (expected[0, :2] != expected[1, :2]).all()
    for combine, combined in (("mean", expected.mean(0)), ("worst", expected.min(0))):
        options = {"path": str(directory), "head": "letters", "combine": combine, "batch_size": 2, "device": "cpu"}
        reward = registry.discover().build("reward", "trained-reward-model", options, "reward")
        found = np.array([np.nan if value is None else value for value in reward.score(SAMPLES)])
        assert found == pytest.approx(combined, abs=1e-4, nan_ok=True)


def scores_of(directory, samples, **options):
    reward = TrainedRewardModel.model_validate({"path": str(directory), "head": "letters", "device": "cpu"} | options)
    return np.array([np.nan if value is None else value for value in reward.score(samples)])


def test_what_training_refuses_is_not_scored_and_what_it_cuts_is_cut(directory):
    """Blank responses, special tokens inside, and prompts that are too long: one rule, whoever asks."""
    samples = [Sample(prompt, text) for prompt in ("say 1:", "b" * 200, "", "<s>say") for text in ("abc", *ODD)]
    expected = moalign.open_reward_model(directory).scores(samples)[:, 0]
    assert scores_of(directory, samples) == pytest.approx(expected, abs=1e-4, nan_ok=True)
    assert np.isnan(expected[1:5]).all() and np.isfinite(expected[[0, 5, 9]]).all()  # 9: its prompt was cut


def test_the_rewards_of_tokens_sum_to_the_score(directory):
    """Of the implicit form; a mixture has none."""
    opened = moalign.open_reward_model(directory)
    if directory.parent.name.startswith("mixture"):
        with pytest.raises(ConfigError, match="Mixture: this form has no rewards of single tokens"):
            opened.token_rewards(SAMPLES)
        return
    found, scores = opened.token_rewards(SAMPLES), opened.member_scores(SAMPLES)[:, :, 0]
    assert [rewards is None for rewards in found] == np.isnan(scores).any(0).tolist()
    for rewards, score, sample in zip(found, scores.T, SAMPLES, strict=True):
        if rewards is not None:
            assert rewards.shape == (2, len(sample.response) + 1) and (rewards != 0).all()
            assert rewards.sum(1) == pytest.approx(score, abs=1e-6)


def test_one_rule_and_one_default_however_the_members_are_asked(directory):
    """Of this reward, of `ensemble` and from Python: the same options, and the same refusals."""
    opened = moalign.open_reward_model(directory)
    for rule in ({}, {"combine": "mean"}, {"combine": "worst"}, {"combine": "uncertainty", "lam": 3.0}):
        expected = opened.reward("letters", **rule)(SAMPLES[:2])
        assert scores_of(directory, SAMPLES[:2], **rule) == pytest.approx(expected, abs=1e-4)
    assert [opened.reward("letters", **rule).pessimistic() for rule in ({}, {"combine": "worst"})] == [False, True]
    for wrong, reason in (
        ({"combine": "wosrt"}, "combine"),
        ({"combine": "worst", "lam": 1.0}, "lam has no effect with 'combine: worst'"),
        ({"lam": 1.0}, "lam has no effect with 'combine: mean'"),
        ({"combine": "uncertainty", "lam": -1.0}, "lam"),
        ({"combine": "uncertainty", "lam": float("nan")}, "lam"),
    ):
        with pytest.raises(ConfigError, match=reason):
            opened.reward("letters", **wrong)
        with pytest.raises(ValidationError, match=reason):
            TrainedRewardModel.model_validate({"path": str(directory), "head": "letters"} | wrong)


def test_doubt_is_never_added_where_less_is_better(directory, tmp_path):
    """A sweep negates what a reward of direction min says, after its members were combined."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "say 1:"}\n')
    found = registry.discover()
    opened = moalign.open_reward_model(directory)
    for rule in ({"combine": "worst"}, {"combine": "uncertainty"}, {"combine": "mean"}):
        choice = {"name": "trained-reward-model", "path": str(directory), "head": "letters"} | rule
        for direction in ("max", "min"):
            letters = {"reward": choice, "direction": direction}
            content = {
                "objectives": {"letters": letters, "brief": {"reward": "length"}},
                "data": {"path": str(prompts)},
            }
            content |= {"loss": "rloo", "rollouts": {}}
            settings = config.from_mapping(content)
            asked = {"letters": opened.reward("letters", **rule)}
            content["objectives"]["letters"] = {"direction": direction}
            without = config.from_mapping(content)
            given, installed = callables.chosen(without, asked), callables.installed(found, asked)
            for each, known in ((settings, found), (given, installed)):
                if direction == "min" and rule["combine"] != "mean":
                    with pytest.raises(ConfigError, match=r"objectives\.letters\.direction: min negates the scores"):
                        prepare(each, known)
                else:
                    assert prepare(each, known).rewards["letters"].pessimistic() == (rule["combine"] != "mean")


def test_the_number_format_is_that_of_training(directory, tmp_path):
    """Its record says which; another is taken only where it is asked for."""
    own = scores_of(directory, SAMPLES[:2])
    assert own.tolist() == scores_of(directory, SAMPLES[:2], dtype="float32").tolist()
    assert own.tolist() != scores_of(directory, SAMPLES[:2], dtype="bfloat16").tolist()


def copied(directory, folder):
    return Path(shutil.copytree(directory, folder / "copy"))


def sealed(copy):
    """With the manifest of what is there now, as if it had been written so."""
    (copy / "MANIFEST.json").unlink()
    storage.write_manifest(copy)
    return copy


def test_a_file_that_is_not_what_was_written_is_named(directory, tmp_path):
    copy = copied(directory, tmp_path)
    file = copy / "member-1" / "adapter" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ModelError, match=r"member-1/adapter/adapter_model\.safetensors: its content is not"):
        scores_of(copy, SAMPLES[:1])
    file.unlink()
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: is missing"):
        scores_of(copy, SAMPLES[:1])
    (copy / "MANIFEST.json").unlink()
    with pytest.raises(ModelError, match=r"MANIFEST\.json: is missing"):
        scores_of(copy, SAMPLES[:1])


def test_tensors_that_are_missing_or_unknown_are_named(directory, tmp_path):
    for number, (name, change) in enumerate(
        (
            ("adapter/adapter_model.safetensors", lambda tensors: dict(list(tensors.items())[1:])),
            ("adapter/adapter_model.safetensors", lambda tensors: tensors | {"foo": torch.zeros(2)}),
            ("head.safetensors", lambda tensors: tensors | {"foo": torch.zeros(2)}),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        file = copied(directory, folder) / "member-1" / name
        save_file(change(load_file(file)), file)
        with pytest.raises(ModelError, match=r"member-1.*tensors do not fit, first at"):
            scores_of(sealed(folder / "copy"), SAMPLES[:1])


def test_a_record_that_lacks_something_is_refused_before_anything_is_loaded(directory, tmp_path):
    copy = copied(directory, tmp_path)
    record = json.loads((copy / "reward_model.json").read_text())
    for change in ({"members": {}}, {"objectives": []}, {"members": ["a"]}, {"end_token_id": None}, {"base": None}):
        (copy / "reward_model.json").write_text(json.dumps(record | change))
        with pytest.raises(ValidationError, match=r"path\n.*reward_model\.json: (it has no|cannot be read)"):
            scores_of(sealed(copy), SAMPLES[:1])


def test_another_base_is_refused(directory, tiny_model_path, tmp_path):
    other = Path(shutil.copytree(tiny_model_path, tmp_path / "other"))
    assert np.isfinite(scores_of(directory, SAMPLES[:1], base=str(other))).all()
    tensors = load_file(other / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"trained on another base model than .*other/; name its directory with base"):
        TrainedRewardModel(path=str(directory), head="letters", base=f"{other}/", device="cpu").score(SAMPLES[:1])


def test_what_is_not_there_is_named(directory, tmp_path):
    options = {"path": str(directory), "head": "kind"}
    with pytest.raises(ConfigError, match=r"objectives\.letters\.reward\.head: no 'kind' of letters"):
        registry.discover().build("reward", "trained-reward-model", options, "objectives.letters.reward")
    if directory.parent.name.startswith("mixture"):
        with pytest.raises(ValidationError, match=r"head\n.*choose one of letters, short"):
            TrainedRewardModel(path=str(directory))
    with pytest.raises(ValidationError, match=r"no directory with a reward_model\.json"):
        TrainedRewardModel(path=str(tmp_path))
    with pytest.raises(ModelError, match="cannot be read as a reward model on"):
        TrainedRewardModel(path=str(directory), head="letters", base=str(tmp_path), device="cpu").score(SAMPLES[:1])
