"""The reward `trained-reward-model`: any form, all members, the same scores as in training."""

from __future__ import annotations

import numpy as np
import pytest
from judged_worlds import judged_config, write_judgements
from pydantic import ValidationError

import moalign
from moalign import registry
from moalign.api import ModelError, Sample
from moalign_plugins.rewards.trained_reward_model import TrainedRewardModel

SAMPLES = [Sample("say 1:", text) for text in ("abc", "wxyzabc", "", "a", "za" * 60)]


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


def test_what_is_not_there_is_named(directory, tmp_path):
    with pytest.raises(ModelError, match="head: no 'kind' of letters"):
        TrainedRewardModel(path=str(directory), head="kind", device="cpu").score(SAMPLES[:1])
    with pytest.raises(ValidationError, match=r"no directory with a reward_model\.json"):
        TrainedRewardModel(path=str(tmp_path))
    with pytest.raises(ModelError, match="cannot be read as a reward model on"):
        TrainedRewardModel(path=str(directory), head="letters", base=str(tmp_path), device="cpu").score(SAMPLES[:1])
