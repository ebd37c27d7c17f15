"""benchmarks.online: what each training is, what it measures, what its tables say."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import online, online_run, online_tables
from benchmarks.online_run import FIRST, LOSSES, RULES, SECOND, Request
from benchmarks.online_speed import ENGINES, TRL
from benchmarks.processes import ChildError
from moalign import registry
from moalign.demo import grammar, utility

SMALL = ("rollouts.prompts=2", "rollouts.prompts_per_step=2", "rollouts.samples=2")


@pytest.fixture(autouse=True)
def one_held_out_prompt(monkeypatch):
    """Enumerating all of them takes seconds for every policy."""
    monkeypatch.setattr(grammar, "HELD_OUT_PROMPTS", grammar.HELD_OUT_PROMPTS[:1])


def request(world: str, number_of_looks: int, further: tuple[str, ...]) -> Request:
    return Request(world, "fixed weights", "rloo", 1, 3, number_of_looks, further)


def test_a_training_is_measured_along_the_way_and_again_the_same():
    small = request(FIRST, number_of_looks=2, further=(*SMALL, "search.points=2"))
    found = online_run.train(small)
    assert [look["step"] for look in found["looks"]] == small.marks == [2, 3]
    first, last = found["looks"]
    assert 0 < first["tokens"] < last["tokens"] <= 3 * 2 * 4 * 20
    assert last["worst"] <= last["share"] <= 1 and len(last["kl"]) == 2 and first["kl"] != last["kl"]
    assert found["step_seconds"] > 0
    assert online_run.train(small)["looks"] == found["looks"]


def test_what_is_not_installed_is_left_out_with_the_reason(monkeypatch):
    assert online_run.why_not("fixed weights", "rloo", registry.discover()) is None
    monkeypatch.setitem(RULES, "witty", online_run.Rule({"name": "no-such-combiner"}))
    asked = online.requests([FIRST], ["fixed weights", "witty"], ["rloo", "no-such-loss"], [0, 1], 10, 2)
    wanted, notes = online.installed(asked)
    assert [(each.rule, each.loss, each.seed) for each in wanted] == [("fixed weights", "rloo", s) for s in (0, 1)]
    assert notes == [
        "witty, rloo: not run, no combiner `no-such-combiner` is installed.",
        "fixed weights, no-such-loss: not run, no objective `no-such-loss` is installed.",
        "witty, no-such-loss: not run, no combiner `no-such-combiner` is installed.",
    ]


@pytest.mark.parametrize("world", [FIRST, SECOND])
def test_every_rule_and_loss_that_is_installed_makes_a_configuration(world):
    asked = online.requests([world], list(RULES), list(LOSSES), [0], 10, 2)
    wanted, _ = online.installed(asked)
    assert wanted
    for each in wanted:
        plan = online_run.plan_of(each.settings())  # raises where a rule has an option that its combiner does not know
        assert plan.config.train.steps == plan.config.rollouts.rounds == 10
        assert plan.config.combine.name == RULES[each.rule].combine["name"] and plan.config.loss.name == each.loss


def fake(each: Request) -> dict[str, Any]:
    """A better one where the rule is not the fixed weights: there after half of the steps."""
    gain = 0.0 if each.rule == "fixed weights" else 0.1
    looks = [
        {"step": mark, "tokens": 100 * mark, "share": share, "worst": share - 0.1, "kl": [1.0, 2.0], "mass": [0.99]}
        | {"expected": [[share, 0.5], [0.5, 0.5], [0.5, 1 - share]]}
        for mark, share in zip(each.marks, (0.5 + gain, 0.6 + gain + 0.02 * each.seed), strict=True)
    ]
    return {"candidates": [], "looks": looks, "step_seconds": 0.5, "most_of_linear": [0.05, 0.1, 0.15]}


def test_tables_compare_with_fixed_weights_and_a_killed_table_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(RULES, "other", online_run.Rule({"name": "linear"}))
    output, ran, fails = tmp_path / "online.json", [], True

    def in_child(target: Any, each: Request, threads: int | None) -> dict[str, Any]:
        if fails and each.rule == "other":
            raise ChildError("Traceback:\nPluginError: it broke")
        ran.append((each.world, each.rule, each.seed))
        return fake(each)

    monkeypatch.setattr(online, "in_child", in_child)
    options: dict[str, Any] = {"part": [online.PartName.rules], "rule": ["fixed weights", "other"], "loss": ["rloo"]}
    options |= {"world": None, "seed": [0, 1], "steps": 10, "looks": 2, "further": None, "rounds": 1, "threads": None}
    online.main(**options, at_most=3, output=output, append=True)
    report = json.loads(output.read_text())
    assert [result["rule"] for result in report["results"]] == ["fixed weights", "fixed weights"]
    assert report["not_run"] == ["other, rloo, seed 0: failed, PluginError: it broke"]
    fails = False
    online.main(**options, at_most=None, output=output, append=True)
    assert len(ran) == len(set(ran)) == 8
    text = output.with_suffix(".md").read_text()
    row = "| rloo, other | 0.600 | 0.710 | 0.710 ± 0.010 | 0.610 ± 0.010 | +0.100 ± 0.000 | 10 | 1 | 1.50 | 0.990 |"
    assert text.count(row) == 2
    assert "| rloo, fixed weights | 0.500 | 0.610 | 0.610 ± 0.010 |" in text
    # the first of three candidates is better, the second as good, the third worse
    assert text.count("| rloo, other | 33 / 33 | 33 / 33 |") == 2
    assert "the best of all weights and prices of KL: 0.100 (0.050, 0.100, 0.150 for the targets)" in text


def test_times_are_compared_with_one_by_one_and_samples_with_trl():
    turns = {engine: [{"samples_per_second": 40.0, "tokens_per_sample": 8.0, "loss": "rloo"}] for engine in ENGINES}
    turns[TRL] = [{"samples_per_second": 10.0, "tokens_per_sample": 8.0, "settings": {"beta": 0.08}}]
    results = [
        {"part": "step", "loss": "rloo", "candidates": 5, "seconds": {"one pass": [0.5], "one by one": [1.0]}},
        {"part": "speed", "allocator": "tuned", "work": {"prompts": 8, "samples": 8}, "turns": turns},
    ]
    step, speed = online_tables.tables_of({"results": results, "not_run": []})
    assert step.rows[0] == ["5 candidates, one pass", "500", "0.50 (0.50-0.50)"]
    assert speed.rows[0] == ["moalign", "40.0", "8.0", "4.00 (4.00-4.00)"] and speed.rows[-1][0] == TRL


def test_a_child_sends_a_result_that_can_be_written(monkeypatch):
    sent: list[Any] = []
    monkeypatch.setattr(online, "_quiet", lambda threads: None)
    connection: Any = SimpleNamespace(send=sent.append)
    online.train(request(SECOND, number_of_looks=1, further=SMALL), connection)
    ((kind, found),) = sent
    assert kind == "result" and json.loads(json.dumps(found)) == found
    for candidate, targets in zip(found["candidates"], utility.TARGETS, strict=True):
        assert candidate["preference"] == dict(zip(utility.OBJECTIVES, utility.weights_of(targets), strict=True))
    (look,) = found["looks"]
    assert len(look["each"]) == 3 and look["worst"] == min(look["each"]) <= look["share"] < 1
    assert len(found["most_of_linear"]) == 3 and all(0 < share < 0.3 for share in found["most_of_linear"])
