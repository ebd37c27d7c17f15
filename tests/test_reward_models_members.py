"""What trained members are good for together: an ensemble that scores, and labels that they find to be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from judged_worlds import judged_config, write_judgements

import moalign
from moalign.api import Sample
from moalign.data import strength
from moalign_plugins.rewards.ensemble import Ensemble
from moalign_plugins.rewards.sequence_classification import SequenceClassification

WRONG = range(0, 40, 8)  # of 40 rows, labelled the wrong way round


@pytest.fixture(scope="module")
def trained(tiny_model_path, tmp_path_factory) -> tuple[Path, Path]:
    """The file with some wrong labels, and what three members learned from it."""
    folder = tmp_path_factory.mktemp("members")
    file = write_judgements(folder / "pairs.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines() if '"letters"' in line]
    rows = [strength.flipped(row) if number in WRONG else row for number, row in enumerate(rows)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = judged_config(tiny_model_path, file, objectives={"letters": None}, members=3)
    moalign.train_reward_model(content, folder / "out")
    return file, folder / "out"


def members(directory: Path) -> list[str]:
    return [str(directory / f"member-{number}") for number in range(3)]


def samples(file: Path) -> tuple[list[Sample], list[Sample]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    chosen, rejected = ([Sample(row["prompt"], row[side]) for row in rows] for side in ("chosen", "rejected"))
    return chosen, rejected


def test_the_ensemble_of_trained_members_is_their_scores_combined(trained):
    file, directory = trained
    asked = samples(file)[0]
    alone = [SequenceClassification(path=path, device="cpu").score(asked) for path in members(directory)]
    worst = Ensemble(paths=tuple(members(directory)), combine="worst", device="cpu").score(asked)
    assert worst == pytest.approx([min(row) for row in zip(*alone, strict=True)])
    assert len({tuple(row) for row in alone}) == 3


def test_the_members_find_the_wrong_labels_and_a_model_trains_on_what_is_rewritten(trained, tiny_model_path, tmp_path):
    file, directory = trained
    scores = []
    for path in members(directory):
        chosen, rejected = (SequenceClassification(path=path, device="cpu").score(side) for side in samples(file))
        scores.append([one - other for one, other in zip(chosen, rejected, strict=True)])
    target = tmp_path / "stronger.jsonl"
    found = strength.rewrite(file, target, strength.measured(scores), flip_share=len(WRONG) / 40, soft_share=0.2)
    flipped = [number for number, turned in enumerate(found.flipped) if turned]
    assert flipped == list(WRONG)
    right = [set(row["chosen"]) <= set("abcd") for row in map(json.loads, target.read_text().splitlines())]
    assert all(right)
    form = {"name": "bradley-terry", "head_lr": 3, "margin": "strength", "margin_scale": 0.1, "label_smoothing": 0.2}
    form["smooth_below"] = found.smooth_below
    content = judged_config(tiny_model_path, target, objectives={"letters": None}, reward_model=form)
    report = moalign.train_reward_model(content, tmp_path / "again")
    assert report["per_objective"]["letters"]["accuracy"]["value"] == 1.0
