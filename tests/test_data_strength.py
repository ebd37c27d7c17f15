"""How strongly several reward models prefer the chosen response, and the pairs rewritten by that."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reward_forms import made_up
from torch.nn.functional import logsigmoid

from moalign.data import strength
from moalign.data.rows import read_rows
from moalign.errors import DataError, RunError
from moalign_plugins.readers.preference import PreferenceRows
from moalign_plugins.reward_models.bradley_terry import BradleyTerry

MEANS = st.lists(st.floats(-100, 100), min_size=1, max_size=40)
SHARES = st.floats(0, 1)
ROW = {"prompt": "Q", "chosen": "good", "rejected": "bad", "score_chosen": 8, "score_rejected": 2, "id": 7}


def test_mean_and_deviation_are_over_the_reward_models():
    found = strength.measured([[1.0, -2.0], [3.0, -2.0]])
    assert found.mean.tolist() == [2.0, -2.0] and found.deviation.tolist() == [1.0, 0.0]
    one = strength.measured([[1.0, -2.0]])
    assert one.mean.tolist() == [1.0, -2.0] and one.deviation.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("wrong", [[], [[]], [1.0, 2.0], [[1.0, float("nan")]], [[1.0, float("inf")]]])
def test_what_is_no_table_of_differences_is_refused(wrong):
    with pytest.raises(DataError, match=r"differences of K|pair 1"):
        strength.measured(wrong)


def test_the_lowest_are_flipped_the_next_are_weak_and_the_others_have_their_mean():
    means = [3.0, -4.0, 0.5, -0.2, 1.0, 2.0, -5.0, 6.0, 0.1, 1.5]
    found = strength.treated(means, flip_share=0.2, soft_share=0.3)
    assert np.flatnonzero(found.flipped).tolist() == [1, 6]
    expected = [3.0, 4.0, 0.5, strength.LEAST, 1.0, 2.0, 5.0, 6.0, 0.1, 1.5]
    assert found.strength.tolist() == expected
    assert found.smooth_below == 1.0  # -0.2, 0.1 and 0.5 are weak
    assert strength.counts(found) == {"flipped": 2, "weak": 3, "with a margin": 7}


@given(MEANS, SHARES, SHARES)
def test_every_pair_keeps_a_judgement(means, flip_share, soft_share):
    found = strength.treated(means, flip_share, soft_share)
    assert (found.strength > 0).all() and found.smooth_below > strength.LEAST
    assert found.flipped.sum() <= flip_share * len(means) and (np.array(means)[found.flipped] < 0).all()
    turned = np.where(found.flipped, -np.array(means), means)
    hard = found.strength >= found.smooth_below
    assert (found.strength[hard] == turned[hard]).all()
    assert (turned[~hard] < found.smooth_below).all()
    if soft_share == 1:
        assert not hard.any()


@given(MEANS)
def test_without_shares_only_what_is_not_positive_is_weak(means):
    found = strength.treated(means, 0.0, 0.0)
    assert not found.flipped.any()
    assert ((found.strength < found.smooth_below) == (np.array(means) <= strength.LEAST)).all()


def test_labels_that_the_reward_models_share_are_never_flipped():
    assert not strength.treated([1.0, 2.0, 3.0], flip_share=1.0).flipped.any()
    with pytest.raises(DataError, match="shares are from 0 to 1"):
        strength.treated([1.0], flip_share=-0.1)


@pytest.mark.parametrize(
    "row", [ROW, {"chosen": "a", "rejected": "b"}, {"chosen": 1, "rejected": 2, "score_chosen": 3}]
)
def test_flipped_twice_is_the_same_row(row):
    once = strength.flipped(row)
    assert (once["chosen"], once["rejected"]) == (row["rejected"], row["chosen"])
    assert once.get("score_rejected") == row.get("score_chosen")
    assert strength.flipped(once) == row and once != row


def test_a_file_is_rewritten_and_read_back(tmp_path):
    source, target = tmp_path / "pairs.jsonl", tmp_path / "stronger.jsonl"
    rows = [{"prompt": f"q{number}", "chosen": f"yes {number}", "rejected": "no"} for number in range(10)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    means = [3.0, -4.0, 0.5, -0.2, 1.0, 2.0, -5.0, 6.0, 0.1, 1.5]
    measured = strength.measured([np.array(means) - 1, np.array(means) + 1])
    found = strength.rewrite(source, target, measured, 0.2, 0.3)
    written = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["strength_mean"] for row in written] == pytest.approx(means)
    assert all(row["strength_deviation"] == pytest.approx(1) for row in written)
    assert [row["strength_flipped"] for row in written] == found.flipped.tolist()
    for before, after, turned in zip(rows, written, found.flipped, strict=True):
        kept = {key: after[key] for key in before}
        assert kept == (strength.flipped(before) if turned else before)
    records = list(PreferenceRows(objective="good").read(read_rows(target), ["good"]))
    assert [record.pairs["good"][0].strength for record in records] == pytest.approx(found.strength)
    assert records[1].responses == ("no", "yes 1") and records[0].responses == ("yes 0", "no")


def test_what_is_not_rewritten(tmp_path):
    source, target = tmp_path / "pairs.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(ROW) + "\n")
    with pytest.raises(DataError, match="it has 1 rows, and there are differences of 2"):
        strength.rewrite(source, target, strength.measured([[1.0, 2.0]]))
    for row, reason in (({"chosen": "a"}, "without chosen and rejected"), (ROW | {"strength": 2}, "strength already")):
        source.write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError, match=rf"pairs\.jsonl:1: .*{reason}"):
            strength.rewrite(source, target, strength.measured([[1.0]]))
    assert not target.exists()
    source.write_text(json.dumps(ROW) + "\n")
    strength.rewrite(source, target, strength.measured([[1.0]]))
    with pytest.raises(RunError, match="exists already"):
        strength.rewrite(source, target, strength.measured([[1.0]]))


def test_bradley_terry_trains_on_it_as_the_paper_does():
    """Weak pairs with smoothed labels, the others with their mean as a margin inside the sigmoid, in float32."""
    found = strength.treated([2.0, 0.3, -0.1, -4.0, 1.0], flip_share=0.2, soft_share=0.4)
    form = BradleyTerry(margin="strength", label_smoothing=0.2, smooth_below=found.smooth_below)
    batch = replace(made_up(form), strength=torch.tensor(found.strength, dtype=torch.float32))
    scores, judged = form.scores(batch), batch.pair_objective
    difference = scores[batch.pairs[:, 0], judged] - scores[batch.pairs[:, 1], judged]
    expected = -logsigmoid(difference - torch.tensor([2.0, 0.0, 0.0, 4.0, 1.0]))
    smoothed = -0.9 * logsigmoid(difference) - 0.1 * logsigmoid(-difference)
    expected[1:3] = smoothed[1:3]
    torch.testing.assert_close(form.loss(batch), expected)
