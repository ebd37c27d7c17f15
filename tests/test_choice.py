"""Choosing a point of a front: against enumeration, and what is said where there is none or chance decides."""

from __future__ import annotations

import json
import math
import subprocess

import numpy as np
import pytest
from command_line import moalign
from hypothesis import given, settings
from hypothesis import strategies as st

from moalign import pareto, storage
from moalign.errors import PreferenceError, RunError
from moalign.sweeps import choice

NAMES = ("harmless", "helpful", "length")


def front_of(scores, stderr=0.01, directions=("max", "max", "max"), reference=None):
    scores = np.asarray(scores, dtype=float)
    names = NAMES[: scores.shape[1]]
    kept = pareto.non_dominated(scores)
    points = [
        {
            "id": f"p{number}",
            "preference": {"kind": "weights", "values": dict.fromkeys(names, 1 / len(names)), "name": None},
            "scores": dict(zip(names, row, strict=True)),
            "stderr": {} if stderr is None else dict.fromkeys(names, stderr),
            "kl": 0.1,
            "kind": "trained",
            "tokens": 10,
            "details": {},
            "dominated": not keep,
        }
        for number, (row, keep) in enumerate(zip(scores.tolist(), kept.tolist(), strict=True))
    ]
    return {
        "objectives": [{"name": n, "direction": d} for n, d in zip(names, directions, strict=False)],
        "evaluation": "by hand",
        "reference_point": dict(zip(names, reference or [0.0] * len(names), strict=True)),
        "hypervolume": 0.0,
        "base": None,
        "points": points,
        "failed": [],
    }


def chosen(front, **asked):
    return choice.choose(front, choice.wish(front, **asked))


SQUARE = front_of([[1, 0], [0.9, 0.5], [0.88, 0.53], [0.5, 0.9], [0, 1], [0.4, 0.4]])

clouds = st.integers(0, 10_000).map(lambda seed: np.random.default_rng(seed).random((12, 3)).round(3))


@settings(max_examples=100, deadline=None)
@given(scores=clouds, bound=st.floats(0, 1), weights=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)))
def test_bounds_and_linear_criteria_against_enumeration_of_all_points(scores, bound, weights):
    """Also over the dominated points nothing better keeps the bound."""
    front = front_of(scores)
    total = math.fsum((*weights, 0.5))
    weights = {name: weight / total for name, weight in zip(NAMES, (*weights, 0.5), strict=True)}
    keeping = scores[scores[:, 0] >= bound]
    if not len(keeping):
        with pytest.raises(PreferenceError, match=f"harmless reaches {scores[:, 0].max():.4g}, not"):
            chosen(front, at_least={"harmless": bound}, maximise="helpful")
        return
    found = chosen(front, at_least={"harmless": bound}, maximise="helpful")
    assert found.value == keeping[:, 1].max() and found.stderr == 0.01
    found = chosen(front, at_least=f"harmless={bound!r}", best=weights)
    assert found.value == pytest.approx((keeping @ list(weights.values())).max(), abs=1e-12)
    assert found.stderr == pytest.approx(0.01 * math.hypot(*weights.values()))
    point = next(point for point in front["points"] if point["id"] == found.id)
    assert not point["dominated"] and point["scores"]["harmless"] >= bound


@settings(max_examples=50, deadline=None)
@given(scores=clouds, seed=st.integers(0, 100))
def test_scale_and_shift_of_an_objective_move_neither_knee_nor_ratio(scores, seed):
    rng = np.random.default_rng(seed)
    scale, shift = rng.uniform(0.1, 10, 3), rng.uniform(-5, 5, 3)
    front = front_of(scores)
    moved = front_of(scores * scale + shift, reference=shift.tolist())
    for asked in ({"knee": True}, {"nearest": {"harmless": 0.2, "helpful": 0.5, "length": 0.3}}):
        try:
            wanted = chosen(front, **asked)
        except PreferenceError as error:
            with pytest.raises(PreferenceError, match=str(error)[:20]):
                chosen(moved, **asked)
            continue
        found = chosen(moved, **asked)
        assert found.id == wanted.id and found.value == pytest.approx(wanted.value, abs=1e-9)


def test_the_knee_of_a_circle_is_its_middle_and_a_line_has_none():
    angles = np.linspace(0, math.pi / 2, 11)
    found = chosen(front_of(np.column_stack([np.cos(angles), np.sin(angles)])), knee=True)
    assert found.id == "p5" and found.value == pytest.approx(1 - math.sqrt(0.5))
    sphere = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.7, 0.7, 0.1), (0.6, 0.6, 0.6)]
    found = chosen(front_of(sphere), knee=True)
    assert found.id == "p4" and found.value == pytest.approx(0.8 / math.sqrt(3))
    line = np.linspace(0, 1, 5)
    with pytest.raises(PreferenceError, match="no knee"):
        chosen(front_of(np.column_stack([line, 1 - line])), knee=True)
    with pytest.raises(PreferenceError, match="three points"):
        chosen(front_of([[0, 1], [1, 0]]), knee=True)


def test_the_nearest_to_a_direction_is_the_smallest_angle():
    points = [(math.cos(math.radians(a)), math.sin(math.radians(a))) for a in (0, 20, 50, 90)]
    for degrees, id, distance in ((0, "p0", 0), (36, "p2", 14), (34, "p1", 14), (89, "p3", 1)):
        radians = math.radians(degrees)
        found = chosen(front_of(points), nearest={"harmless": math.cos(radians), "helpful": math.sin(radians)})
        assert found.id == id and found.value == pytest.approx(-math.radians(distance), abs=1e-9)
        assert found.stderr == pytest.approx(0.01)  # of an angle on the unit circle: the error across
    assert chosen(front_of(points), nearest="harmless=0.6, helpful=0.4").id == "p1"  # weights: 33.7 degrees
    assert chosen(front_of(points), nearest="harmless=0.8, helpful=-0.6").id == "p0"
    with pytest.raises(PreferenceError, match=r"add up to 1\.2 .* length 0\.894427"):
        chosen(front_of(points), nearest="harmless=0.4, helpful=0.8")
    with pytest.raises(PreferenceError, match="differs from the reference point"):
        chosen(front_of([[0, 0]]), nearest="harmless=1, helpful=0")


def test_what_chance_may_have_decided_is_said():
    found = chosen(SQUARE, at_least="harmless=0.89", maximise="helpful")
    assert (found.id, found.alike, found.met, found.of) == ("p1", (), 2, 5)
    assert found.reason == "the highest helpful among the 2 of 5 on the front with harmless at least 0.89"
    assert found.notes == (
        "its harmless is 0.01 ± 0.01 above 0.89, which may be chance",
        "p2 would be better and misses harmless by 0.01 ± 0.01, which may be chance",
    )
    close = chosen(SQUARE, best="harmless=0.5,helpful=0.5")
    assert (close.id, close.alike) == ("p2", ("p1", "p3"))  # 0.705 against 0.7 and 0.7, with errors of 0.007
    assert chosen(SQUARE, maximise="helpful").alike == ()  # 1 against 0.9, 7 standard errors of the difference
    exact = chosen(front_of([[1, 0], [0, 1], [0, 1]], stderr=None), maximise="helpful")
    assert (exact.id, exact.alike, exact.stderr) == ("p1", ("p2",), None)  # they are equal
    assert exact.notes == ("the scores have no standard errors, so nothing is said about chance",)


def test_errors_of_the_difference_decide_who_is_alike():
    for gap, alike in ((1.95, ("p1",)), (1.97, ())):
        front = front_of([[0, 1], [1, 1 - gap * 0.01 * math.sqrt(2)]])
        assert chosen(front, maximise="helpful").alike == alike


def test_what_cannot_be_reached_is_said_with_what_can():
    for bounds, message in (
        ("harmless=1.5", "harmless reaches 1, not 1.5 (p0)"),
        ("harmless=0.9,helpful=0.8", "harmless reaches 0.5, not 0.9, with helpful at least 0.8 (p3); helpful reaches"),
        ("harmless=1.00000004", "harmless reaches 1, not 1.00000004 (p0)"),
        ("harmless=2,helpful=3", "harmless alone reaches 1, wanted is 2; helpful alone reaches 1, wanted is 3"),
    ):
        with pytest.raises(PreferenceError) as caught:
            chosen(SQUARE, at_least=bounds, maximise="helpful")
        assert message in str(caught.value)


def test_objectives_to_be_minimised_are_bounded_in_either_unit():
    front = front_of([[1, 0, -40], [0.5, 0.5, -20], [0.2, 0.9, -10]], directions=("max", "max", "min"))
    for asked in ({"at_most": "length=20"}, {"at_least": "length=-20"}, {"at_most": {"length": 20.0}}):
        assert chosen(front, maximise="harmless", **asked).id == "p1"
    assert chosen(front, at_most="length=30", at_least="helpful=0.6").id == "p2"  # one has no bound: it is maximised
    assert chosen(front, maximise="length").id == "p2"
    with pytest.raises(PreferenceError, match=r"length are negated, --at-most bounds them in their own units"):
        chosen(front, at_least="length=20", maximise="harmless")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "nothing decides"),
        ({"at_least": "harmles=1"}, "did you mean 'harmless'?"),
        ({"maximise": "helpfull"}, "did you mean 'helpful'?"),
        ({"maximise": "helpful=2,harmless"}, "there is no objective 'helpful=2,harmless'"),
        ({"at_least": {}}, "nothing decides"),
        ({"nearest": {}}, "add up to 0"),
        ({"at_least": "harmless=much"}, "not a number"),
        ({"at_least": "harmless>=0.5"}, "not of the form name=number"),
        ({"at_least": "harmless=nan"}, "not a finite number"),
        ({"at_least": "harmless=0.1,harmless=0.2"}, "twice"),
        ({"at_most": "harmless=0.5"}, "write --at-least"),
        ({"maximise": "helpful", "knee": True}, "exclude each other"),
        ({"best": "harmless=0.5"}, "add up to 0.5"),
        ({"best": "harmless>=0.5"}, "are no weights"),
    ],
)
def test_what_means_nothing_is_refused(asked, message):
    with pytest.raises(PreferenceError, match=message):
        choice.wish(SQUARE, **asked)


@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(0.5), np.int64(0), "1/2", 0.5])
def test_any_number_will_do(number):
    found = choice.wish(SQUARE, at_least={"harmless": number}, maximise="helpful")
    assert found.at_least == {"harmless": pytest.approx(0.0 if number == 0 else 0.5)}
    with pytest.raises(PreferenceError, match="'True' is not a number"):
        choice.wish(SQUARE, at_least={"harmless": True}, maximise="helpful")


def test_an_empty_front_says_why():
    front = SQUARE | {"points": [], "failed": [{"id": "p0", "error": "boom"}]}
    with pytest.raises(RunError, match=r"no points; the first of 1 that failed: boom"):
        choice.choose(front, choice.Wish(maximise="helpful"))
    with pytest.raises(RunError, match="no points; none is finished yet"):
        choice.choose(front | {"failed": []}, choice.Wish(maximise="helpful"))


# --- the command ----------------------------------------------------------------------------------------------------


def select(*arguments: object) -> subprocess.CompletedProcess[str]:
    return moalign("select", *arguments)


@pytest.fixture
def directory(tmp_path):
    """A folder with front.json alone."""
    storage.write_json(tmp_path / "front.json", SQUARE)
    return tmp_path


def test_the_command_needs_front_json_alone(directory):
    done = select(directory, "--at-least", "harmless=0.89", "--maximise", "helpful")
    assert done.returncode == 0, done.stderr
    assert "→ p1" in done.stdout and "p0" not in done.stdout
    assert "p1: the highest helpful among the 2 of 5 on the front with harmless at least 0.89\n" in done.stdout
    assert "p2 would be better and misses harmless by 0.01 ± 0.01" in done.stdout
    done = select(directory, "--best", "harmless=0.5,helpful=0.5", "--json")
    found = json.loads(done.stdout)
    assert (found["id"], found["alike"]) == ("p2", ["p1", "p3"])
    assert found["point"]["scores"] == {"harmless": 0.88, "helpful": 0.53}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--at-least", "harmless=0.9", "--at-least", "helpful=0.8", "--knee"), "with helpful at least 0.8"),
        (("--maximise", "helpfull"), "did you mean 'helpful'?"),
        ((), "nothing decides among the points"),
    ],
)
def test_the_command_refuses_with_2(directory, arguments, message):
    done = select(directory, *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_front_that_is_none_is_named(tmp_path):
    done = select(tmp_path, "--knee")
    assert done.returncode == 2 and "not a run directory" in done.stderr
    storage.write_json(tmp_path / "front.json", SQUARE | {"points": [{"id": "../p"}]})
    done = select(tmp_path, "--knee")
    assert done.returncode == 1 and "front.json: points.0" in done.stderr
