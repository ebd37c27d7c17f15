"""Every form of reward model, trained by the engine on rules that a tiny model can learn."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from judged_worlds import BAD, GOOD, judged_config, scored_config, write_judgements, write_scores
from pydantic import TypeAdapter, ValidationError

import moalign
from moalign import registry
from moalign.api import Sample
from moalign.errors import ConfigError, TrainingError
from moalign_plugins.rewards.trained_reward_model import TrainedRewardModel

FROM_PAIRS = [
    {"name": "bradley-terry", "head_lr": 3, "label_smoothing": 0.1, "margin": "strength", "centre": 0.01},
    {"name": "gaussian-pairs", "heads": 3, "head_lr": 3},
    {"name": "mixture", "components": 2, "head_lr": 3, "balance": 0.1},
]
FROM_SCORES = [
    {"name": "regression", "head_lr": 3, "scale": {"letters": 4.0}},
    {"name": "gaussian", "heads": 3, "head_lr": 3},
]
TESTED = {"implicit", "implicit-outcome", "features", *(each["name"] for each in FROM_PAIRS + FROM_SCORES)}


def test_every_form_is_found_and_trained_here():
    found = registry.discover()
    shipped = {each.name for each in found.entries if each.kind == "reward-model" and each.distribution == "moalign"}
    assert shipped == TESTED and not found.broken


def trained(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The report; the losses fell."""
    report = moalign.train_reward_model(content, folder / "out")
    for file in (folder / "out").glob("member-*/metrics.jsonl"):
        losses = [json.loads(line)["loss"] for line in file.read_text().splitlines()]
        assert sum(losses[-3:]) < 3 * losses[0]
    return report


def accuracy(report: dict[str, Any], objective: str) -> float:
    return TypeAdapter(float).validate_python(report["per_objective"][objective]["accuracy"]["value"])


@pytest.mark.parametrize("form", FROM_PAIRS, ids=lambda form: form["name"])
def test_forms_learn_from_pairs(tiny_model_path, tmp_path, form):
    file = write_judgements(tmp_path / "pairs.jsonl")
    report = trained(judged_config(tiny_model_path, file, reward_model=form, members=2), tmp_path)
    assert accuracy(report, "letters") > 0.9 and accuracy(report, "short") > 0.9


@pytest.mark.parametrize("form", FROM_SCORES, ids=lambda form: form["name"])
def test_forms_learn_from_scores_of_which_some_are_missing(tiny_model_path, tmp_path, form):
    file = write_scores(tmp_path / "scores.jsonl")
    steps = {"steps": 80, "pairs_per_step": 16, "lr": 0.005}
    report = trained(scored_config(tiny_model_path, file, reward_model=form, train=steps), tmp_path)
    assert accuracy(report, "letters") > 0.75 and accuracy(report, "short") > 0.75


def test_the_implicit_form_learns_from_pairs(tiny_model_path, tmp_path):
    file = write_judgements(tmp_path / "pairs.jsonl")
    rows = [row for row in file.read_text().splitlines() if '"letters"' in row]
    file.write_text("".join(row + "\n" for row in rows))
    choice = {"reward_model": {"name": "implicit", "beta": 0.5}, "objectives": {"letters": None}}
    report = trained(judged_config(tiny_model_path, file, **choice), tmp_path)
    assert accuracy(report, "letters") > 0.9


def test_the_implicit_form_learns_from_outcomes(tiny_model_path, tmp_path):
    file = write_scores(tmp_path / "scores.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row["letters"] = [None if share == 0.5 else int(share > 0.5) for share in row["letters"]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = scored_config(tiny_model_path, file, reward_model={"name": "implicit-outcome", "beta": 0.5})
    content["objectives"] = {"letters": None}
    content["data"]["reader"]["scores"] = {"letters": "letters"}
    content["train"] = {"steps": 30, "pairs_per_step": 16, "lr": 0.01}
    report = trained(content, tmp_path)
    assert accuracy(report, "letters") > 0.75


def test_a_form_of_features_learns_from_other_scores(tiny_model_path, tmp_path):
    """``good`` is judged by a weighted sum of two scores, and a tie of one of them does not matter."""
    rng, rows = Random(0), []
    for number in range(60):
        answers = ["".join(rng.choice(GOOD + BAD) for _ in range(rng.randint(2, 8))) for _ in range(2)]
        letters = [sum(letter in GOOD for letter in answer) / len(answer) for answer in answers]
        short = [-len(answer) / 8 for answer in answers]
        worth = [2 * one + other for one, other in zip(letters, short, strict=True)]
        better = int(worth[1] > worth[0])
        rows.append(
            {"prompt": f"say {number}:", "answers": answers, "letters": letters, "short": short, "good": better}
        )
    file = tmp_path / "features.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = scored_config(
        tiny_model_path,
        file,
        reward_model={"name": "features", "features": ["letters", "short"], "hidden": [4], "lr": 10},
        train={"steps": 40, "pairs_per_step": 16, "lr": 0.01},
    )
    content["objectives"] = {"good": None, "letters": None, "short": None}
    content["data"]["reader"]["better"] = {"good": "good"}
    report = trained(content, tmp_path)
    assert accuracy(report, "good") > 0.9
    judge, samples = moalign.open_reward_model(tmp_path / "out"), [Sample("say 1:", "a"), Sample("say 1:", "z")]
    scores = judge.scores(samples, rewards={"letters": [1.0, 0.0], "short": [-0.1, -0.1]})
    assert scores[0, 0] > scores[1, 0] and (scores[:, 1:] == 0).all()  # features are not learned
    for asked in (lambda: judge.scores(samples), lambda: judge.reward("good")):
        with pytest.raises(ConfigError, match="reads other scores"):
            asked()
    with pytest.raises(ConfigError, match=r"rewards\.letters: 1 scores for 2 samples"):
        judge.scores(samples, rewards={"letters": [1.0]})
    with pytest.raises(ValidationError, match="'features' reads other scores of a sample"):
        TrainedRewardModel(path=str(tmp_path / "out"), head="good")


@pytest.mark.parametrize(
    ("form", "error", "reason"),
    [
        ({"name": "implicit"}, ConfigError, "a model's log-ratio is one reward; there are 2: letters, short"),
        ({"name": "features", "features": ["kind"]}, ConfigError, r"reward_model\.features: no objective 'kind'"),
        ({"name": "regression", "scale": {"kind": 2.0}}, ConfigError, r"reward_model\.scale: no objective 'kind'"),
        ({"name": "features", "features": ["letters"]}, TrainingError, "member-0: .* no score for 'letters'"),
    ],
)
def test_what_does_not_fit_is_said(tiny_model_path, tmp_path, form, error, reason):
    file = write_judgements(tmp_path / "pairs.jsonl", prompts=8)
    with pytest.raises(error, match=reason):
        moalign.train_reward_model(judged_config(tiny_model_path, file, reward_model=form), tmp_path / "out")
    assert not (tmp_path / "out").exists()
