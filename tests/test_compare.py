"""``moalign compare``: runs beside each other, and what cannot be compared."""

from __future__ import annotations

import json
import statistics

import pytest
from test_front_analysis import BASE, CONFIG, outcome
from typer.testing import CliRunner

from moalign import pareto, storage
from moalign.cli import app
from moalign.errors import MoalignError, RunError
from moalign.sweeps import front
from moalign.sweeps.comparison import compare

WEIGHTS = ((1, 0), (0.5, 0.5), (0, 1))


def run(shift, stderr=0.02, weights=WEIGHTS):
    """A front moved by so much in both objectives."""
    scores = ((1.0 + shift, shift), (0.6 + shift, 0.6 + shift), (shift, 1.0 + shift))
    events = [outcome(f"c{n}", w, s, stderr=stderr) for n, (w, s) in enumerate(zip(weights, scores, strict=True))]
    return front.compute(CONFIG, "generate", [BASE, *events], None)


RUNS = {"a": run(0.0), "b": run(0.01), "c": run(0.5)}


def test_measures_stand_by_run_with_their_spread():
    found = compare(RUNS)
    tables = [[list(point["scores"].values()) for point in each["points"]] for each in RUNS.values()]
    hypervolumes = [pareto.hypervolume(table, [0, 0]) for table in tables]
    assert [each["hypervolume"] for each in found["runs"]] == hypervolumes
    band = found["bands"]["hypervolume"]
    assert band["mean"] == pytest.approx(statistics.fmean(hypervolumes)) and band["highest"] == hypervolumes[2]
    assert band["deviation"] == pytest.approx(statistics.stdev(hypervolumes))
    assert [each["igd_plus"] for each in found["runs"]] == pytest.approx([2**0.5 * 0.5, 2**0.5 * 0.49, 0])
    assert found["attainment"]["best"] == [[0.5, 1.5], [1.1, 1.1], [1.5, 0.5]]
    assert found["attainment"]["worst"] == [[0.0, 1.0], [0.6, 0.6], [1.0, 0.0]]
    assert storage.canonical_json(found) == storage.canonical_json(compare(RUNS))


def test_what_chance_may_have_decided_is_told_apart_from_what_it_may_not():
    pairs = {tuple(pair["runs"]): pair for pair in compare(RUNS)["pairs"]}
    near, far = pairs["a", "b"], pairs["a", "c"]
    assert not near["differ"] and near["difference"] == pytest.approx(-0.01)
    assert near["stderr"] == pytest.approx(2**0.5 * 0.02)
    assert far["differ"] and all(point["differ"] for point in far["points"]) and len(far["points"]) == 3
    assert [point["ids"] for point in near["points"]] == [["c0", "c0"], ["c1", "c1"], ["c2", "c2"]]
    assert not any(point["differ"] for point in near["points"])
    (bare,) = compare({"a": run(0.0, stderr=None), "b": run(0.01)})["pairs"]
    assert bare["differ"] is None and bare["stderr"] is None
    (other,) = compare({"a": run(0.0), "b": run(0.0, weights=((1, 0), (0.4, 0.6), (0, 1)))})["pairs"]
    assert [point["ids"] for point in other["points"]] == [["c0", "c0"], ["c2", "c2"]]


def test_volumes_from_different_points_are_not_compared():
    moved = {"a": RUNS["a"], "b": RUNS["b"] | {"reference_point": {"harmless": 0.1, "helpful": 0.0}}}
    with pytest.raises(RunError, match=r"--reference harmless=0,helpful=0$"):
        compare(moved)
    assert compare(moved, {"harmless": 0.0, "helpful": 0.0})["runs"] == compare(
        {"a": RUNS["a"], "b": RUNS["b"]}
    )["runs"]  # fmt: skip
    with pytest.raises(RunError, match="--reference: nothing for helpful"):
        compare(moved, {"harmless": 0.0})


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(RunError, match="at least two"):
        compare({"a": RUNS["a"]})
    turned = RUNS["b"] | {
        "objectives": [{"name": "harmless", "direction": "min"}, {"name": "helpful", "direction": "max"}]
    }
    with pytest.raises(RunError, match=r"b has harmless \(min\), helpful \(max\); they must agree"):
        compare({"a": RUNS["a"], "b": turned})
    shares = RUNS["b"] | {"evaluation": front.EVALUATIONS["preference"]}
    with pytest.raises(RunError, match=r"of b: share of held-out pairs .*; of a: mean reward .*evaluate\.kind"):
        compare({"a": RUNS["a"], "b": shares})
    with pytest.raises(RunError, match="b: no candidate is finished"):
        compare({"a": RUNS["a"], "b": RUNS["b"] | {"points": []}})
    with pytest.raises(MoalignError, match="nan"):
        compare({"a": RUNS["a"], "b": RUNS["b"]}, {"harmless": float("nan"), "helpful": 0.0})


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in RUNS.items():
        (tmp_path / name).mkdir()
        storage.write_json(tmp_path / name / "front.json", content)
    return tmp_path


def test_the_command_needs_nothing_but_front_json(folders):
    printed = CliRunner().invoke(app, ["compare", "a", "b", "c"], env={"COLUMNS": "120"})
    assert printed.exit_code == 0, printed.output
    assert "c serves better than a: expected utility 0.500 ± 0.028 more, beyond chance" in printed.output
    assert "a serves" not in printed.output and "of 9 pairs of candidates for the same preference, 6" in printed.output
    done = CliRunner().invoke(app, ["compare", "a", "b", "--json", "--reference", "harmless=-1,helpful=-1"])
    found = json.loads(done.output)
    assert found["reference_point"] == {"harmless": -1.0, "helpful": -1.0} and len(found["runs"]) == 2
    again = CliRunner().invoke(app, ["compare", "a", "b"], env={"COLUMNS": "120"})
    assert "no two runs differ" in again.output


def test_the_picture_is_drawn_and_the_same_each_time(folders):
    pictures = []
    for _ in range(2):
        done = CliRunner().invoke(app, ["compare", "a", "b", "c", "--picture", "attained.png"])
        assert done.exit_code == 0, done.output
        pictures.append((folders / "attained.png").read_bytes())
    assert pictures[0] == pictures[1] and pictures[0].startswith(b"\x89PNG")
    done = CliRunner().invoke(app, ["compare", "a", "b", "--picture", "attained.svg"])
    assert "does not end in .png" in str(done.exception)
    for again in ("a", "./a", "b/../a", str(folders / "a")):
        done = CliRunner().invoke(app, ["compare", "a", again])
        assert "named twice" in str(done.exception), again
