"""Every form of a preference is read as it was meant, and everything else is refused with its reason."""

import json
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moalign import preference
from moalign.errors import PreferenceError
from moalign.types import Preference

TWO = ("helpful", "harmless")
THREE = ("helpful", "harmless", "concise")


def weights(*values: float, name: str | None = None, objectives: tuple[str, ...] = TWO) -> Preference:
    return Preference("weights", dict(zip(objectives, values, strict=True)), name)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"helpful": 0.7, "harmless": 0.3}, weights(0.7, 0.3)),
        ({"harmless": 0.3, "helpful": 0.7}, weights(0.7, 0.3)),
        ({"weights": {"helpful": 0.7, "harmless": 0.3}}, weights(0.7, 0.3)),
        ({"helpful": "1/3", "harmless": " 2 / 3 "}, weights(1 / 3, 2 / 3)),
        ({"helpful": 1}, weights(1, 0)),
        ({"helpful": 1, "harmless": -0.0}, weights(1, 0)),
        ({"helpful": "1e0", "harmless": "0"}, weights(1, 0)),
        ("helpful=0.7,harmless=0.3", weights(0.7, 0.3)),
        (" harmless = 3/10 , helpful= 0.7 ", weights(0.7, 0.3)),
        ("helpful=0.7 harmless=0.3", weights(0.7, 0.3)),
        ("helpful=1", weights(1, 0)),
        ("helpful", weights(1, 0, name="helpful")),
        ("harmless", weights(0, 1, name="harmless")),
        ("equal", weights(0.5, 0.5, name="equal")),
        (
            {"direction": {"helpful": 0.6, "harmless": -0.8}},
            Preference("direction", {"helpful": 0.6, "harmless": -0.8}),
        ),
        ({"direction": {"harmless": -1}}, Preference("direction", {"helpful": 0.0, "harmless": -1.0})),
        ({"angle": 0}, Preference("direction", {"helpful": 1.0, "harmless": 0.0})),
        ({"angle": 90}, Preference("direction", {"helpful": 0.0, "harmless": 1.0})),
        ({"angle": "-90"}, Preference("direction", {"helpful": 0.0, "harmless": -1.0})),
        ({"thresholds": {"harmless": 0.8}}, Preference("thresholds", {"harmless": 0.8})),
        ("harmless>=0.8", Preference("thresholds", {"harmless": 0.8})),
        ("harmless >= -8/10", Preference("thresholds", {"harmless": -0.8})),
        ("mine", weights(0.9, 0.1, name="mine")),
    ],
)
def test_forms(value, expected):
    found = preference.parse(value, TWO, {"mine": weights(0.9, 0.1)})
    assert found == expected
    assert list(found.values) == [name for name in TWO if name in found.values], "in the order of the objectives"
    assert all(math.copysign(1, number) > 0 or number < 0 for number in found.values.values()), "no negative zero"


def test_angle_is_cosine_and_sine():
    found = preference.parse({"angle": 30}, TWO)
    assert found.kind == "direction"
    assert found.vector(TWO) == pytest.approx((math.sqrt(3) / 2, 0.5), abs=1e-15)


def test_numbers_are_used_as_they_were_written():
    """A sum within the tolerance is accepted and not renormalised."""
    written = {"helpful": 0.333333, "harmless": 0.333333, "concise": 0.333334}
    assert preference.parse(written, THREE).values == written
    assert preference.parse({"helpful": 0.7 + 9e-7, "harmless": 0.3}, TWO).values["helpful"] == 0.7 + 9e-7


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"helpful": 0.7}, r"add up to 0\.7, not 1.*write helpful=1 "),
        ({"helpful": 0.7, "harmless": 0.7}, r"add up to 1\.4.*helpful=0\.5, harmless=0\.5"),
        ({"helpful": 0.7, "harmless": 0.3 + 1.1e-6}, "add up to"),
        ({"helpful": 1.5, "harmless": -0.5}, r"'harmless' is negative \(-0\.5\).*direction"),
        ({"helpful": math.nan, "harmless": 0.5}, r"preference\.helpful: nan is not a finite"),
        ({"helpful": math.inf}, "not a finite"),
        ({"helpful": 1e308, "harmless": 1e308}, "not a finite"),
        ({"helpful": "nan"}, "not a finite"),
        ({"helpful": "1e999"}, "not a finite"),
        ({"helpful": 10**400}, "not a number"),
        ({"helpful": True}, "True is not a number"),
        ({"helpful": None}, "None is not a number"),
        ({"helpful": [1]}, "not a number"),
        ({"helpful": "much"}, "'much' is not a number"),
        ({"helpful": "1/0"}, "'1/0' is not a number"),
        ({"helpful": "1/2/3"}, "not a number"),
        ({"helpfull": 1.0}, "no objective 'helpfull'; did you mean 'helpful'"),
        ({"zzz": 1.0}, "no objective 'zzz'; known: helpful, harmless"),
        ({3: 1.0}, "no objective '3'"),
        ({}, "empty"),
        ("", "empty"),
        ("  ", "empty"),
        ({"helpful": 0, "harmless": 0}, "all weights are 0"),
        ("helpful=0.5,helpful=0.5", "'helpful' stands there twice"),
        ("helpful=0.5,,harmless=0.5", "'' is not of the form"),
        ("helpful=,harmless=1", "not of the form"),
        ("=1", "not of the form"),
        ("helpful=1=2", "not of the form"),
        ("helpful=0.5,harmless", "'harmless' is not of the form"),
        ("helpful=0.5,harmless>=0.5", "weights .* and thresholds"),
        ("harmless<=0.5", "only = and >="),
        ("harmless>0.5", "only = and >="),
        ("harmless>=high", "not a number"),
        ("harmless>=0.5,helpful>=0.5", "every objective has a threshold"),
        ({"thresholds": {"harmless": 0.5, "helpful": 0.5}}, r"preference\.thresholds: every objective"),
        ({"thresholds": {}}, "not a mapping"),
        ({"direction": {"helpful": 1, "harmless": 1}}, r"length 1\.41421356.*helpful=0\.707106781, harmless=0\.7071"),
        ({"direction": {"helpful": 0, "harmless": 0}}, "all components are 0"),
        ({"direction": [1, 0]}, "not a mapping"),
        ({"direction": {"helpful": 1}, "angle": 3}, "'direction' must stand alone"),
        ({"angle": "steep"}, r"preference\.angle: 'steep' is not a number"),
        ("helpfu", "no preset and no objective; did you mean 'helpful'"),
        ("equall", "did you mean 'equal'"),
        ("myne", "did you mean 'mine'"),
        (0.5, "neither a name nor a mapping"),
        (None, "neither"),
        (["helpful"], "neither"),
        (weights(0.5, 0.6), r"add up to 1\.1"),
        (Preference("weights", {"other": 1.0}), "no objective 'other'"),
    ],
)
def test_refusals_give_the_reason(value, reason):
    with pytest.raises(PreferenceError, match=reason):
        preference.parse(value, TWO, {"mine": weights(0.9, 0.1)})


def test_errors_name_the_place():
    with pytest.raises(PreferenceError, match=r"^search\.points\[2\]\.helpful: "):
        preference.parse({"helpful": "x"}, TWO, where="search.points[2]")


def test_an_angle_needs_two_objectives():
    with pytest.raises(PreferenceError, match="exactly two objectives, there are 3"):
        preference.parse({"angle": 30}, THREE)
    with pytest.raises(PreferenceError, match="no objectives"):
        preference.parse("equal", ())


@pytest.mark.parametrize("name", ["helpful", "equal"])
def test_a_preset_with_a_taken_name_is_refused_when_used(name):
    with pytest.raises(PreferenceError, match="rename the preset"):
        preference.parse(name, TWO, {name: weights(0.9, 0.1)})


def test_an_objective_may_be_called_like_a_form():
    assert preference.parse({"angle": 0.5, "direction": 0.5}, ("angle", "direction")).kind == "weights"


def test_the_vector_that_an_error_suggests_is_accepted():
    for value in ({"helpful": 1, "harmless": 1, "concise": 1}, {"helpful": 0.1, "harmless": 0.7, "concise": 1e-7}):
        with pytest.raises(PreferenceError) as caught:
            preference.parse(value, THREE)
        suggestion = str(caught.value).split("write ")[1].removesuffix(" if that is meant")
        assert preference.parse(suggestion, THREE).kind == "weights"


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=6).filter(any))
def test_exact_fractions_are_always_accepted_in_every_form_and_come_back(parts):
    objectives = tuple(f"o{i}" for i in range(len(parts)))
    fractions = {name: str(Fraction(part, sum(parts))) for name, part in zip(objectives, parts, strict=True)}
    found = preference.parse(fractions, objectives)
    assert found.vector(objectives) == tuple(float(Fraction(text)) for text in fractions.values())
    line = ",".join(f"{name}={text}" for name, text in reversed(fractions.items()))
    assert preference.parse(line, objectives) == found
    assert preference.from_json(json.loads(json.dumps(preference.to_json(found))), objectives) == found
    assert preference.is_one_hot(found) == (sum(part > 0 for part in parts) == 1)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text("helpfulrms=>,/0.12 "),
        lambda inner: st.dictionaries(st.sampled_from([*TWO, "direction", "angle", "thresholds", "x"]), inner),
    )
)
def test_anything_else_is_refused_with_a_preference_error_and_nothing_else(value):
    try:
        found = preference.parse(value, TWO)
    except PreferenceError:
        return
    numbers = list(found.values.values())
    assert all(math.isfinite(number) for number in numbers)
    if found.kind == "weights":
        assert min(numbers) >= 0 and abs(math.fsum(numbers) - 1) <= preference.TOLERANCE
    if found.kind == "direction":
        assert abs(math.hypot(*numbers) - 1) <= preference.TOLERANCE


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        {"kind": "weights", "values": {"helpful": 1.0}},
        {"kind": "weights", "values": {"helpful": 1.0}, "name": None, "more": 1},
        {"kind": "wish", "values": {"helpful": 1.0}, "name": None},
        {"kind": ["weights"], "values": {"helpful": 1.0}, "name": None},
        {"kind": "weights", "values": [1.0], "name": None},
        {"kind": "weights", "values": {"helpful": 0.5}, "name": None},
        {"kind": "weights", "values": {"helpful": 1.0}, "name": 3},
    ],
)
def test_json_of_another_form_is_refused(value):
    with pytest.raises(PreferenceError):
        preference.from_json(value, TWO)


def test_is_one_hot():
    assert preference.is_one_hot(preference.parse("helpful", TWO))
    assert preference.is_one_hot(preference.parse({"angle": 90}, TWO))
    assert not preference.is_one_hot(preference.parse({"angle": -90}, TWO))
    assert not preference.is_one_hot(preference.parse("equal", TWO))
    assert not preference.is_one_hot(preference.parse({"helpful": 0.9999995, "harmless": 5e-7}, TWO))
    assert not preference.is_one_hot(preference.parse("harmless>=1", TWO))
    assert preference.is_one_hot(preference.parse({"only": 1}, ("only",)))


def test_format_is_for_people():
    assert preference.format(preference.parse("helpful=1/3,harmless=2/3", TWO)) == "helpful=0.3333, harmless=0.6667"
    assert preference.format(preference.parse("equal", TWO)) == "equal (helpful=0.5, harmless=0.5)"
    assert preference.format(preference.parse("harmless>=0.8", TWO)) == "harmless>=0.8"
    assert preference.format(preference.parse({"angle": -30}, TWO)) == "direction helpful=0.866, harmless=-0.5"


def test_what_has_no_threshold_is_nan_in_the_vector():
    first, second = Preference("thresholds", {"harmless": 0.5}).vector(("harmless", "helpful"))
    assert first == 0.5 and second != second
