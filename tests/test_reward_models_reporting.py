"""What a report claims of probabilities and errors, and what it leaves out because nobody can know it."""

from __future__ import annotations

import json
from random import Random

import pytest
from judged_worlds import judged_config, write_judgements

import moalign
from moalign.report import judged
from moalign_plugins.reward_models.bradley_terry import BradleyTerry
from moalign_plugins.reward_models.gaussian_pairs import GaussianPairs
from moalign_plugins.reward_models.implicit import ImplicitFromPairs
from moalign_plugins.reward_models.mixture import Mixture
from moalign_plugins.reward_models.regression import Regression


def test_forms_say_whether_differences_are_log_odds():
    for form in (BradleyTerry(), BradleyTerry(centre=0.1), ImplicitFromPairs(), Mixture(components=1)):
        assert form.log_odds
    for other in (
        BradleyTerry(margin="strength"),
        BradleyTerry(label_smoothing=0.1),
        ImplicitFromPairs(label_smoothing=0.1),
        Mixture(components=2),
        GaussianPairs(),
        Regression(),
    ):
        assert not other.log_odds


def noisy(file):
    """A quarter of the labels is wrong, whatever a model learns."""
    rng = Random(0)
    rows = []
    for number in range(80):
        pair = ["abcd", "wxyz"] if rng.random() < 0.75 else ["wxyz", "abcd"]
        rows.append({"prompt": f"say {number}:", "chosen": pair[0], "rejected": pair[1]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def reported(model, file, folder, **changes):
    settings = {"objectives": {"good": None}, "train": {"steps": 10, "pairs_per_step": 16, "lr": 0.003}}
    content = judged_config(model, file, **settings) | changes
    content["data"] = {"path": str(file), "held_out": 0.5}
    return moalign.train_reward_model(content, folder / "out")


def test_a_form_with_another_probability_gets_slopes_of_the_other_half(tiny_model_path, tmp_path):
    form = {"name": "gaussian-pairs", "heads": 1, "head_lr": 3}
    report = reported(tiny_model_path, noisy(tmp_path / "pairs.jsonl"), tmp_path, reward_model=form)
    found = report["per_objective"]["good"]
    assert "no log-odds" in report["probability"] and len(found["slopes"]) == 2
    assert all(0 < slope < 1e4 for slope in found["slopes"])
    assert found["calibration_error"] < 0.25


def test_log_odds_need_no_slope(tiny_model_path, tmp_path):
    report = reported(tiny_model_path, noisy(tmp_path / "pairs.jsonl"), tmp_path)
    assert report["per_objective"]["good"]["slopes"] is None
    assert report["probability"].startswith("P(chosen > rejected) = sigmoid(d)")
    assert report["per_objective"]["good"]["calibration_error"] is not None


def test_calibration_is_left_out_where_no_pair_is_in_the_wrong_order(tiny_model_path, tmp_path):
    file = write_judgements(tmp_path / "pairs.jsonl")
    rows = [row for row in file.read_text().splitlines() if '"letters"' in row]
    file.write_text("".join(row + "\n" for row in rows))
    form = {"name": "gaussian-pairs", "heads": 1, "head_lr": 3}
    steps = {"steps": 25, "pairs_per_step": 16, "lr": 0.01}
    report = reported(tiny_model_path, file, tmp_path, reward_model=form, objectives={"letters": None}, train=steps)
    found = report["per_objective"]["letters"]
    assert found["accuracy"]["value"] == 1
    assert found["slopes"] is found["calibration_error"] is found["log_loss"] is None
    (table,) = judged.tables(report)
    assert list(table.columns[-1].cells) == ["-"]


def test_few_groups_have_no_standard_error(tiny_model_path, tmp_path):
    file = write_judgements(tmp_path / "pairs.jsonl", prompts=12)
    train = {"steps": 2, "pairs_per_step": 4}
    report = moalign.train_reward_model(judged_config(tiny_model_path, file, train=train), tmp_path / "out")
    for found in report["per_objective"].values():
        figures = [found["accuracy"], found["gain"], *found["baselines"].values()]
        assert found["groups"] == 3 and [figure["stderr"] for figure in figures] == [None] * 4
    assert judged.with_error({"value": 0.5, "stderr": None}) == "0.500±-"
    assert judged.with_error({"value": 0.5, "stderr": 0.25}) == "0.500±0.250"
    assert "fewer than 5 groups" in judged.notes(report)[0]


@pytest.mark.parametrize("stops", [True, False])
def test_the_report_says_that_these_pairs_chose_the_weights(tiny_model_path, tmp_path, stops):
    file = write_judgements(tmp_path / "pairs.jsonl", prompts=12)
    train = {"steps": 4, "pairs_per_step": 4} | ({"early_stop": {"every": 2, "patience": 1}} if stops else {})
    report = moalign.train_reward_model(judged_config(tiny_model_path, file, train=train), tmp_path / "out")
    assert any("they chose the weights" in note for note in judged.notes(report)) is stops
