"""Rows whose labels the members doubt: each row is looked at by the head of its own objective."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest

from moalign.errors import DataError
from moalign.reward_models import doubts


@dataclass
class Lengths:
    """Two members; the head ``long`` prefers more letters, the head ``short`` fewer, and neither reads "?"."""

    objectives: tuple[str, ...] = ("long", "short")

    def member_scores(self, samples):
        rows = [[np.nan] * 2 if each.response == "?" else [len(each.response), -len(each.response)] for each in samples]
        scores = np.array(rows, dtype=np.float64).reshape(len(samples), 2)[:, : len(self.objectives)]
        return np.stack([scores, 2 * scores])


def written(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def pair(chosen, rejected, **more):
    return {"prompt": "q", "chosen": chosen, "rejected": rejected} | more


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_each_row_is_judged_by_the_head_of_its_objective(tmp_path):
    rows = [pair("aaaa", "a", objective="long"), pair("a", "aaaa", objective="short")] * 3
    rows += [pair("a", "aaaaaa", objective="long"), pair("aaaaaaa", "a", objective="short")]  # the wrong way round
    source, target = written(tmp_path / "pairs.jsonl", rows), tmp_path / "stronger.jsonl"
    found = doubts.rewrite(Lengths(), source, target, flip_share=1.0, soft_share=0.0)
    after = read(target)
    assert [row["strength_flipped"] for row in after] == [False] * 6 + [True] * 2
    assert [row["chosen"] for row in after[-2:]] == ["aaaaaa", "a"]
    assert [row["strength_mean"] for row in after] == pytest.approx([4.5] * 6 + [-7.5, -9.0])
    assert found.apart == {} and found.rows.tolist() == list(range(8))


def test_ties_unknown_objectives_and_what_cannot_be_scored_stay_as_they_are(tmp_path):
    rows = [
        pair("aa", "a", objective="kind"),
        pair("aa", "a", objective="long"),
        pair("aa", "a", objective="long", strength=0),
        pair("?", "a", objective="short"),
        pair("a", "aa", objective="short"),
    ]
    source, target = written(tmp_path / "pairs.jsonl", rows), tmp_path / "stronger.jsonl"
    found = doubts.rewrite(Lengths(), source, target, flip_share=1.0)
    after = read(target)
    assert [after[place] for place in (0, 2, 3)] == [rows[place] for place in (0, 2, 3)]
    assert [after[place]["strength_mean"] for place in (1, 4)] == [1.5, 1.5]
    assert found.rows.tolist() == [1, 4] and not found.treatment.flipped.any()
    expected = {"an objective without a head": 1, "a tie": 1, "a response that cannot be scored": 1}
    assert found.apart == expected


def test_a_row_without_an_objective_is_that_of_the_only_head_and_of_several_refused(tmp_path):
    source = written(tmp_path / "pairs.jsonl", [pair("aa", "a"), pair([{"role": "assistant", "content": "aaa"}], "a")])
    found = doubts.rewrite(Lengths(("long",)), source, tmp_path / "one.jsonl")
    assert 0 in found.rows and len(found.rows) + sum(found.apart.values()) == 2
    with pytest.raises(DataError, match="does not say which objective judged it"):
        doubts.rewrite(Lengths(), source, tmp_path / "two.jsonl")
    written(source, [pair("aa", "a", objective="kind")])
    with pytest.raises(DataError, match=r"no row can be looked at: .*an objective without a head"):
        doubts.rewrite(Lengths(), source, tmp_path / "three.jsonl")
    assert not (tmp_path / "three.jsonl").exists()
