"""What front.json says of a front, and the one line that a person reads of it; from made-up journals."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from moalign import config as configuration
from moalign import pareto, storage
from moalign.errors import CorruptFileError
from moalign.report import analysis as words
from moalign.report import wording
from moalign.report.page import write_page
from moalign.report.source import check_front
from moalign.report.table import show_front
from moalign.sweeps import front, journal

PRICE = 0.1
CONFIG = configuration.from_mapping(
    {"objectives": {"harmless": None, "helpful": None}, "data": {"path": "none.jsonl"}, "search": {"name": "grid"}}
)
BASE = {"event": "base", "scores": {"harmless": 0.0, "helpful": 0.0}, "stderr": {}, "details": {}}


def outcome(name, weights, scores, kl=0.5, optimum=None, stderr=0.02, **changes):
    """The event of a candidate; ``optimum``: the estimate and its error."""
    found = {} if optimum is None else {"optimum": optimum[0], "optimum_stderr": optimum[1], "utility": 0.0}
    names = ("harmless", "helpful")
    return {
        "event": "outcome",
        "id": name,
        "status": "done",
        "preference": {"kind": "weights", "values": dict(zip(names, weights, strict=True)), "name": None},
        "scores": dict(zip(names, scores, strict=True)),
        "stderr": dict.fromkeys(names, stderr) if stderr else {},
        "kl": kl,
        "tokens": 1000,
        "checksum": None,
        "error": None,
        "details": found,
        "kind": "trained",
    } | changes


# values: (1, 0), (0.6, 0.6), (0, 1), each less 0.05; bounds: 1.05, 0.7 and 1.15 of the weights
EVENTS = [
    BASE,
    outcome("one", (1, 0), (1.0, 0.0), optimum=(1.02, 0.01), tokens=900),
    outcome("both", (0.5, 0.5), (0.6, 0.6), optimum=(0.64, 0.02), tokens=1100),
    outcome("two", (0, 1), (0.0, 1.0), optimum=(1.0, 0.05), tokens=5000),
]


def computed(events=EVENTS, kind="generate", world=None, price=PRICE, config=CONFIG):
    found = front.compute(config, kind, events, world, price)
    check_front(found)
    return found


def shown(found) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show_front(found, console)
    return console.export_text()


def test_the_line_says_how_good_the_front_is_and_what_one_more_run_would_bring():
    found = computed()
    bounds = found["analysis"]["bounds"]
    reached, base = np.array([(0.95, -0.05), (0.55, 0.55), (-0.05, 0.95)]), np.zeros(2)
    weights, most = [(1, 0), (0.5, 0.5), (0, 1)], [1.05, 0.70, 1.15]
    unsure = np.full((3, len(pareto.grid(2))), 3 * 0.02)  # three standard errors of scores whose samples nobody kept
    gap = pareto.gap(reached, base, weights, most, unsure)
    assert gap is not None
    assert bounds["front_share_at_least"] == pytest.approx(gap.share, abs=1e-12)
    assert bounds["front_share_worst_at_least"] == pytest.approx(gap.worst, abs=1e-12)
    assert bounds["next"]["preference"] == dict(zip(("harmless", "helpful"), gap.weights, strict=True))
    assert bounds["next"]["tokens"] == 1100, "the median of what was trained"
    assert bounds["kl_price"] == PRICE and bounds["hypervolume_values"] == pytest.approx(0.55**2)
    assert bounds["hypervolume_values"] < bounds["hypervolume_mixtures"] < bounds["hypervolume_at_most"]
    corner = pareto.hypervolume_at_most(weights, most, base)
    assert bounds["hypervolume_at_most"] == pytest.approx(corner)
    line = words.outlook(found)
    assert line is not None and line in shown(found).replace("\n", "")
    where = ", ".join(f"{name}={value:.4g}" for name, value in bounds["next"]["preference"].items())
    assert line.startswith(f"Front share at least {math.floor(gap.share * 1000) / 1000:.3f} (worst preference 0.")
    rounded = float(line.rsplit(" ", 1)[1])
    assert gap.gain <= rounded < gap.gain * 1.1, "two digits, rounded up"
    assert line.endswith(f"; one more run, such as at {where} (about 1,100 tokens), brings at most {rounded:.2g}")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("share", "gain", "least", "most"),
    [(0.29, 0.01241, "0.290", "0.013"), (0.99999, 0.0456, "0.999", "0.046"), (0.57, 0.046, "0.570", "0.046")],
)
def test_what_is_at_least_is_rounded_down_and_what_is_at_most_is_rounded_up(share, gain, least, most):
    found = computed()
    bounds = found["analysis"]["bounds"]
    bounds |= {"front_share_at_least": share, "hypervolume_at_most": 0.43211}
    bounds["next"]["gain_at_most"] = gain
    line = words.outlook(found)
    assert line is not None
    assert line.startswith(f"Front share at least {least} ") and line.endswith(f"at most {most}")
    assert "no front has more than 0.4322;" in dict(words.facts(found))["Hypervolume, KL paid for"]


def test_points_say_what_they_add_and_who_beats_them():
    events = [*EVENTS, outcome("weak", (0.3, 0.7), (0.2, 0.75)), outcome("near", (0.4, 0.6), (0.58, 0.615))]
    found = computed([*events, outcome("low", (0.9, 0.1), (0.1, 0.1)), outcome("copy", (1, 0), (1.0, 0.0))])
    said = {point["id"]: point for point in found["points"]}
    assert [name for name, point in said.items() if point["dominated"]] == ["low"]
    assert [name for name, point in said.items() if point["mixture_dominated"]] == ["weak", "low"]
    assert said["weak"]["contribution"] == pytest.approx(0.2 * (0.75 - 0.615)), "it adds volume all the same"
    assert said["low"]["contribution"] == said["one"]["contribution"] == said["copy"]["contribution"] == 0
    assert said["near"]["alike"] == ["both"] and said["both"]["alike"] == ["near"] and said["one"]["alike"] == ["copy"]
    assert found["analysis"]["knee"] in ("both", "near")
    facts = dict(words.facts(found))
    assert facts["Mixtures of others dominate"] == "weak"
    assert facts["Not told apart"] == "one and copy; both and near, within 1.96 standard errors"
    expected = pareto.expected_utility([list(point["scores"].values()) for point in said.values()], pareto.grid(2))
    assert found["analysis"]["expected_utility"] == expected
    assert found["analysis"]["expected_utility_stderr"] == pytest.approx(0.02)


def test_for_more_than_five_objectives_there_are_no_volumes_of_mixtures_and_the_table_says_so():
    names = tuple("abcdef")
    several = configuration.from_mapping(
        {"objectives": dict.fromkeys(names), "data": {"path": "none.jsonl"}, "search": {"name": "grid"}}
    )
    rows = [*np.eye(6).tolist(), *np.random.default_rng(0).dirichlet(np.ones(6), 14).tolist()]
    events: list[dict[str, Any]] = [BASE | {"scores": dict.fromkeys(names, 0.0)}]
    for place, weights in enumerate(rows):
        length = math.hypot(*weights)
        values = dict(zip(names, weights, strict=True))
        scores = {name: weight / length for name, weight in values.items()}
        preferred = {"kind": "weights", "values": values, "name": None}
        stderr = dict.fromkeys(names, 0.02)
        made = {"preference": preferred, "scores": scores, "stderr": stderr}
        events.append(outcome(f"c{place}", (1, 0), (0, 0), optimum=(length, 0.01)) | made)
    found = computed(events, config=several)
    bounds = found["analysis"]["bounds"]
    assert bounds["hypervolume_mixtures"] is bounds["hypervolume_at_most"] is None
    assert 0 < bounds["front_share_at_least"] < 1
    assert "not computed for so many objectives" in dict(words.facts(found))["Hypervolume, KL paid for"]


def test_the_same_journal_gives_the_same_bytes():
    assert storage.canonical_json(computed()) == storage.canonical_json(computed())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "preference"}, "the scores are no rewards"),
        ({"price": 0.0}, "set evaluate.kl_price"),
        ({"events": [BASE]}, "no candidate is finished"),
        ({"events": [BASE, outcome("a", (1, 0), (1, 1))]}, "nothing says what the best policies reach"),
        ({"config": CONFIG.model_copy(update={"evaluate": CONFIG.evaluate.model_copy(update={"temperature": 0.7})})},
         "evaluate.temperature 1"),
    ],
)  # fmt: skip
def test_where_nothing_bounds_the_front_the_line_says_why(changes, reason):
    found = computed(**changes)
    assert found["analysis"]["bounds"] is None and reason in found["analysis"]["unbounded"]
    assert words.outlook(found) == f"Front share not bounded: {found['analysis']['unbounded']}"


def test_an_objective_without_a_candidate_of_its_own_is_what_to_run_next():
    found = computed(EVENTS[:3])
    bounds = found["analysis"]["bounds"]
    assert bounds["front_share_at_least"] is None and bounds["hypervolume_at_most"] is not None
    assert words.outlook(found) == (
        "Front share not bounded: no candidate is for helpful alone; one more run, at harmless=0, helpful=1 "
        "(about 1,000 tokens), bounds it"
    )


def test_where_several_objectives_have_none_a_run_for_each_bounds_it():
    found = computed([BASE, EVENTS[2]])
    assert found["analysis"]["bounds"]["missing"] == ["harmless", "helpful"]
    assert words.outlook(found) == (
        "Front share not bounded: no candidate is for harmless alone, none for helpful alone; 2 more runs, one for "
        "each of these (about 1,100 tokens each), bound it"
    )


def test_an_empty_front_a_single_point_and_points_without_errors():
    empty = computed([BASE])["analysis"]
    assert empty["expected_utility"] is empty["sparsity"] is empty["knee"] is empty["expected_utility_stderr"] is None
    single = computed(EVENTS[:2])
    assert single["analysis"]["sparsity"] is None and single["points"][0]["alike"] == []
    bare = computed([BASE, outcome("a", (1, 0), (1, 1), stderr=None), outcome("b", (0, 1), (1, 1), stderr=None)])
    assert bare["analysis"]["expected_utility_stderr"] is None and bare["points"][0]["alike"] == ["b"]
    assert "Not told apart" not in shown(bare) and "expected" not in shown(computed([BASE]))


def test_what_is_not_finite_is_refused():
    with pytest.raises(Exception, match="row 0, objective 1 is nan"):
        computed([BASE, outcome("a", (1, 0), (1, math.nan))])


def test_in_a_known_world_kl_is_paid_once_and_the_bounds_stay_the_sampled_ones():
    exact = {"one": (0.9, 0.0), "both": (0.6, 0.5), "two": (0.0, 1.0)}
    names = ("harmless", "helpful")
    world = {
        "kl_price": PRICE,
        "points": {
            name: {"scores": dict(zip(names, scores, strict=True)), "stderr": {}, "kl": 0.7}
            for name, scores in exact.items()
        },
        "base": {"scores": {"harmless": 0.0, "helpful": 0.0}, "stderr": {}},
        "front": {"exact_front": [{"weights": dict.fromkeys(names, 0.5), "scores": dict.fromkeys(names, 0.7)}]},
    }
    found = computed(world=world)
    gap = pareto.gap(list(exact.values()), [0, 0], [(1, 0), (0.5, 0.5), (0, 1)], [1.05, 0.70, 1.15])
    assert gap is not None and found["analysis"]["bounds"]["front_share_at_least"] == pytest.approx(gap.share)
    assert found["analysis"]["bounds"]["hypervolume_values"] == pytest.approx(found["hypervolume"])
    assert found["analysis"]["igd_plus"] == pytest.approx(math.hypot(0.1, 0.2))
    other = computed(world=world | {"kl_price": 0.2})
    assert "another price of KL, 0.2" in other["analysis"]["unbounded"]
    fewer = CONFIG.model_copy(update={"evaluate": CONFIG.evaluate.model_copy(update={"prompts": 3})})
    assert "evaluate.prompts" in computed(world=world, config=fewer)["analysis"]["unbounded"]


def test_a_bound_that_chance_put_below_a_point_gives_way():
    events = [
        BASE,
        outcome("a", (1, 0), (1.0, 0.2), optimum=(0.5, 0.01)),
        outcome("b", (0, 1), (0, 1), optimum=(1.2, 0)),
    ]
    bounds = computed(events)["analysis"]["bounds"]
    assert bounds["hypervolume_at_most"] >= bounds["hypervolume_values"] and bounds["front_share_at_least"] <= 1


def test_skipped_candidates_are_counted():
    left_out = {"id": "late", "preference": EVENTS[1]["preference"], "parents": []}
    found = computed([*EVENTS, {"event": "proposed", "candidates": [], "skipped": [left_out]}])
    assert found["skipped"] == ["late"] and len(found["points"]) == 3
    assert ("Skipped", "1 candidate did not fit into the budget") in wording.summary(found)
    twice = {"event": "proposed", "candidates": [], "skipped": [left_out, left_out | {"id": "later"}]}
    assert "2 candidates did not fit into the budget" in shown(computed([*EVENTS, twice]))


def test_the_page_shows_the_analysis_and_reads_fronts_without(tmp_path):
    found = computed()
    storage.write_json(tmp_path / "front.json", found)
    page = write_page(tmp_path).read_text()
    assert words.outlook(found) in page and "<h2>Analysis</h2>" in page and "Hypervolume, KL paid for" in page
    old = {key: value for key, value in found.items() if key not in ("analysis", "skipped")}
    new = ("mixture_dominated", "contribution", "alike")
    old["points"] = [{key: value for key, value in each.items() if key not in new} for each in found["points"]]
    storage.write_json(tmp_path / "front.json", old)
    page = write_page(tmp_path).read_text()
    assert "<h2>Analysis</h2>" not in page and "contribution" not in page
    assert words.outlook(old) is None and words.facts(old) == [] and "Front share" not in shown(old)


def test_an_analysis_that_is_none_is_refused():
    found = computed()
    with pytest.raises(CorruptFileError, match=r"analysis\.bounds\.next\.gain_at_most"):
        check_front(json.loads(json.dumps(found).replace('"gain_at_most"', '"gain"')))


def test_the_front_of_a_directory_takes_the_price_from_its_record(tmp_path):
    record = {"config": CONFIG.model_dump(mode="json"), "evaluation": "generate", "kl_price": PRICE}
    storage.write_json(tmp_path / "run.json", record)
    for event in EVENTS:
        journal.append(tmp_path / journal.FILE, event)
    assert front.read(tmp_path) == computed()
    storage.write_json(tmp_path / "run.json", {key: value for key, value in record.items() if key != "kl_price"})
    assert "evaluate.kl_price" in front.read(tmp_path)["analysis"]["unbounded"], "of a run before prices were written"
