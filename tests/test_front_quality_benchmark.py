"""The benchmark of searches: what it crosses can be run, bounds are held against the truth, nothing runs twice."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch
import typer

from benchmarks import front_quality, front_quality_run, front_quality_tables
from benchmarks.front_quality_run import WORLDS, Request, belongs, bounds_hold, proposals, stated_bounds, ways, why_not
from benchmarks.processes import ChildError
from moalign import config, pareto, registry, storage
from moalign.demo import grammar, job
from moalign.demo import world as worlds
from moalign.sweeps.plan import prepare

FAST = ("train.steps=2", "rollouts.rounds=1", "rollouts.prompts=4", "rollouts.samples=2", "evaluate.samples=2")


def test_all_that_is_crossed_is_a_configuration_where_its_plugins_are_installed():
    known = registry.discover()
    searches = {entry.name for entry in known.of_kind("search")}
    combiners = {entry.name for entry in known.of_kind("combiner")}
    asked = front_quality.requests(None, list(ways()["methods"]), None, [4])
    assert {(each.world, each.method) for each in asked} >= {("two", "dpa"), ("three", "dpo"), ("reply", "chebyshev")}
    for request in asked:
        named = config.from_mapping({"objectives": {"any": None}}, [c for c in request.changes if c[:6] == "search"])
        combined = [change.split("=")[1] for change in request.changes if change.startswith("combine=")][-1:]
        reason = why_not(request, known)
        if named.search.name not in searches:
            assert reason is not None and named.search.name in reason
        elif combined and not combined[0].startswith("{") and combined[0] not in combiners:
            assert reason is not None and combined[0] in reason
        elif request.search not in ("epsilon-constraint", "c-morl"):  # their combiners may be older than they are
            assert reason is None, f"{request.name}: {reason}"


def test_a_world_has_its_objectives_and_a_price_of_kl():
    for world, method in (("two", "rebel"), ("three", "grpo"), ("reply", "chebyshev")):
        settings = Request(world, method, "grid", 3).settings()
        assert settings.objective_names == front_quality_tables.OBJECTIVES[world]
        plan = prepare(settings, registry.discover())
        assert plan.kl_price == worlds.BETA and settings.seed == 3
        assert len(plan.propose(())) == (15 if world == "three" else 11)
        assert set(settings.evaluate.reference_point) == set(settings.objectives)


def test_the_reply_world_is_asked_for_its_targets():
    settings = Request("reply", "linear", "targets", 0).settings()
    wanted = [candidate.preference.values for candidate in prepare(settings, registry.discover()).propose(())]
    assert [round(each["brilliant"], 6) for each in wanted] == [round(1 / 3, 6), 0.5, round(2 / 3, 6)]


def test_what_does_not_go_together_is_not_crossed():
    assert belongs("two", "rebel", "grid") and not belongs("reply", "rebel", "grid")
    assert not belongs("two", "rebel", "targets") and not belongs("two", "hypernetwork", "evolution")
    assert not belongs("two", "rebel", "epsilon-constraint") and belongs("two", "grpo", "epsilon-constraint")
    assert not belongs("two", "dpa", "grid") and belongs("two", "dpa", "grid", ["dpa"])


@pytest.mark.parametrize(("world", "method"), [("two", "grpo"), ("reply", "chebyshev"), ("reply", "log-sigmoid")])
def test_what_is_the_grid_by_another_name_is_not_run_twice(world, method):
    settings = Request(world, method, "grid", 0).settings()
    weights = _weights(settings)
    assert len(weights) == 11 and not belongs(world, method, "riesz") and belongs("three", "grpo", "riesz")
    spaced = config.from_mapping(settings.model_dump(mode="json"), ["search={name: riesz, points: 11}"])
    assert _weights(spaced) == pytest.approx(weights, abs=1e-9)
    if world == "reply":
        assert not belongs(world, method, "auto") and belongs(world, "linear", "auto")
        left = config.from_mapping(settings.model_dump(mode="json"), ["search={name: auto}"])
        assert _weights(left) == weights


def _weights(settings):
    """Of the first objective, in what the search proposes first."""
    first = settings.objective_names[0]
    return sorted(one.preference.values[first] for one in prepare(settings, registry.discover()).propose(()))


def test_bounds_are_held_against_what_is_true():
    found = {"front_share_with_base": 0.9, "exact_hypervolume": 0.36}
    right = {"front_share_at_least": 0.9, "hypervolume_at_most": 0.37}
    assert bounds_hold(found | {"stated": right}) == {"front_share_at_least": True, "hypervolume_at_most": True}
    wrong = {"front_share_at_least": 0.91, "hypervolume_at_most": 0.35}
    assert bounds_hold(found | {"stated": wrong}) == {"front_share_at_least": False, "hypervolume_at_most": False}
    assert bounds_hold(found | {"stated": {"front_share_at_least": None}}) == {}
    assert stated_bounds({"analysis": {"bounds": wrong}}) == stated_bounds({"bounds": wrong}) == wrong
    assert stated_bounds({"analysis": {"bounds": None}}) == stated_bounds({}) == {}


@pytest.fixture
def one_prompt(monkeypatch):
    """The world seen on one held-out prompt, which is a second's work and not ten."""
    monkeypatch.setattr(worlds, "tiny_world", partial(worlds.tiny_world, grammar.HELD_OUT_PROMPTS[:1]))


def test_a_sweep_says_what_its_front_reaches_costs_and_states(one_prompt, tmp_path):
    settings = Request("three", "rebel", "soup, one-hot", 0, (*FAST, "search.points=6")).settings()
    found = front_quality_run.run_sweep(settings, tmp_path / "run")
    assert [point["kind"] for point in found["points"]] == ["trained"] * 3 + ["mixed"] * 3
    assert found["tokens"] == sum(point["tokens"] for point in found["points"] if point["kind"] == "trained") > 0
    assert found["front_share_worst"] <= found["front_share"] < 0.3 and found["failed"] == {}  # two steps go nowhere
    assert found["front_share_with_base"] >= max(found["front_share"], 0.0)
    assert 0 < found["proposing_seconds"] < found["seconds"] and found["proposals"] >= 3
    front = storage.read_json(tmp_path / "run" / "front.json")
    assert front["ceiling"]["front_share"] == pytest.approx(front_quality_tables.ceiling_of("three").share)
    coarse = [[point["scores"][name] for name in settings.objective_names] for point in front["exact_front"]]
    corner = [front["reference_point"][name] for name in settings.objective_names]
    volume = pareto.hypervolume(torch.tensor(coarse).numpy(), corner)
    assert volume <= found["exact_hypervolume"] < 1.1 * volume  # a finer grid of the same front


def test_the_time_that_a_search_takes_is_counted_and_the_plan_is_as_before():
    plan = prepare(Request("two", "rebel", "grid", 0).settings(), registry.discover())
    with proposals() as times:
        assert len(plan.propose(())) == 11
    plan.propose(())
    assert len(times) == 1 and times[0] > 0


SHARES = {"grid": 0.9, "soup, one-hot": 0.85, "random": 0.88}


def fake(request: Request) -> dict[str, Any]:
    if request.search == "random" and request.seed == 1:
        raise ChildError("Traceback\n  ...\nTrainingError: out of luck\n")
    number = 2 if "soup" in request.search else 11
    points = [{"kind": "trained" if place < number else "mixed", "id": f"p{place}"} for place in range(11)]
    return request.identity | {
        "front_share": SHARES[request.search] + 0.01 * request.seed,
        "front_share_worst": 0.8,
        "hypervolume_share": None if request.world == "reply" else 0.7,
        "tokens": 1000 * number,
        "points": points,
        "failed": {},
        "bounds_hold": {"front_share_at_least": True, "hypervolume_at_most": request.seed == 0},
        "seconds": 200.0,
        "proposing_seconds": 1.0 + request.seed,
        "hardware": {"cpu": "a CPU", "threads": 1, "torch": "2", "versions": {}, "libc": "glibc", "date": "today"},
    }


ASKED: dict[str, Any] = {
    "world": ["two"],
    "method": ["rebel"],
    "search": ["grid", "soup, one-hot", "random"],
    "seed": [0, 1],
    "further": None,
    "threads": None,
    "append": True,
}


def test_a_killed_run_goes_on_and_one_that_fails_is_named(tmp_path, monkeypatch):
    output, ran = tmp_path / "quality.json", []

    def run(request: Request) -> dict[str, Any]:
        ran.append((request.search, request.seed))
        return fake(request)

    monkeypatch.setattr(front_quality, "run", run)
    front_quality.main(**ASKED, at_most=2, output=output)
    assert ran == [("grid", 0), ("soup, one-hot", 0)]
    front_quality.main(**ASKED, at_most=None, output=output)
    assert ran[2:] == [("random", 0), ("grid", 1), ("soup, one-hot", 1), ("random", 1)]
    report = json.loads(output.read_text())
    assert report["not_run"] == {"two: rebel, random, seed 1": "failed, TrainingError: out of luck"}
    assert len(report["results"]) == 5 and len(report["commands"]) == 1
    ceiling = front_quality_tables.ceiling_of("two")
    (row,) = [line for line in output.with_suffix(".md").read_text().splitlines() if "| rebel: soup" in line]
    assert ceiling is not None and row == (
        f"| rebel: soup, one-hot | 0.855 ± 0.007 | {0.855 / ceiling.share:.3f} ± 0.007 | 0.800 ± 0.000 | "
        f"{0.8 / ceiling.share:.3f} ± 0.000 | 0.700 ± 0.000 | 2 + 9 | 2 | 0.18 | 1.00 | 3 of 4 | 2 |"
    )
    assert (
        "Not run, failed, TrainingError: out of luck: rebel, random, seed 1." in output.with_suffix(".md").read_text()
    )
    assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_names_are_checked_and_searches_that_are_not_installed_are_said(tmp_path, monkeypatch, capsys):
    with pytest.raises(typer.BadParameter, match="no 'gird'"):
        front_quality.main(**ASKED | {"search": ["gird"]}, at_most=None, output=None)
    monkeypatch.setattr(front_quality, "why_not", lambda request, known: "no such plugin: search `grid`")
    front_quality.main(**ASKED | {"search": ["grid"], "seed": [0]}, at_most=None, output=tmp_path / "none.json")
    assert "two: rebel, grid, seed 0: not run, no such plugin" in capsys.readouterr().out.replace("\n", " ")


def test_a_ceiling_ships_for_every_world_and_is_no_more_than_all():
    shipped = storage.read_json(job.CEILING)
    assert all(each["beta"] == worlds.BETA for each in shipped)
    for world in WORLDS:
        ceiling = front_quality_tables.ceiling_of(world)
        # between 15 points of three objectives some preference gets little: of 15 exact optima 0.643
        assert ceiling is not None and 0.55 < ceiling.worst <= ceiling.share <= 1 and ceiling.share > 0.7
