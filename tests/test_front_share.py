"""The benchmark of fronts: the ways are what they are called, the judges choose as they should, nothing runs twice."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from benchmarks import front_peers, front_share, front_ways
from benchmarks.front_peers import judged, run_trl
from benchmarks.front_ways import PARTS, TRL, Request, Steps, run_sweep
from moalign import registry
from moalign.demo import grammar
from moalign.demo import world as worlds
from moalign.sweeps.plan import prepare
from moalign.types import Candidate, Outcome, Preference

FAST = ("train.steps=2", "rollouts.rounds=1", "rollouts.prompts=4", "rollouts.samples=2", "evaluate.samples=1")
WAYS = [(name, way) for name, part in PARTS.items() for way in part.ways]


@pytest.mark.parametrize(("part", "way"), WAYS)
def test_every_way_is_a_configuration_that_a_sweep_takes(part, way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("")  # of the recipe `dpo`
    settings = Request(part, way, seed=5).settings()
    plan = prepare(settings, registry.discover())
    proposed = plan.search.propose(plan.space, (), Random(0))
    points = {"fill": 11, "peers": 5}.get(part, 7)
    coarse = part.startswith("layers") or "soup" in way or "fresh" in way
    assert settings.seed == 5 and settings.search.options["points"] == points
    assert len(proposed) == ((5 if "5 trained" in way else 3) if coarse else points)


@pytest.fixture
def one_prompt(monkeypatch):
    """The world seen on one held-out prompt, which is a second's work and not ten."""
    small = partial(worlds.tiny_world, grammar.HELD_OUT_PROMPTS[:1])
    monkeypatch.setattr(worlds, "tiny_world", small)


def test_a_sweep_says_what_its_front_reaches_and_costs(one_prompt):
    request = Request("fill", "soup, 3 trained", 0, (*FAST, "search.trained=2", "search.points=3"))
    found = run_sweep(request.settings())
    kinds = [point["kind"] for point in found["points"]]
    assert kinds == ["trained", "trained", "mixed"]
    assert found["tokens"] == sum(point["tokens"] for point in found["points"] if point["kind"] == "trained") > 0
    assert (
        abs(found["front_share"]) < 0.2 and found["front_share_worst"] <= found["front_share"]
    )  # two steps go nowhere
    assert 0 < found["step_seconds"] < found["seconds"]


def test_step_seconds_are_shared_by_a_group(monkeypatch):
    times = iter([0.0, 4.0, 20.0, 21.0])
    monkeypatch.setattr(front_ways.time, "perf_counter", lambda: next(times))
    steps, both = Steps(), Preference("weights", {"helpful": 0.5, "harmless": 0.5})
    for group in (["a", "b"], ["c"]):
        candidates = [Candidate(name, both) for name in group]
        for candidate in candidates:
            steps.on_candidate_start(candidate)
        for step in range(2):
            for candidate in candidates:
                steps.on_step(candidate, step, {})
    assert steps.seconds == [2.0, 1.0]
    with pytest.raises(RuntimeError, match="c failed: out of memory"):
        steps.on_candidate_end(Outcome("c", "failed", both, error="out of memory"))


def test_judges_choose_by_reward():
    """The share of each judge's choices for the better response, by how much better it is, within chance."""
    settings = Request("peers", TRL, 0).settings()
    pairs = judged(settings, grammar.TRAIN_PROMPTS[:8], 8, seed=3)
    assert pairs == judged(settings, grammar.TRAIN_PROMPTS[:8], 8, seed=3)
    assert all(pair.responses[0] != pair.responses[1] for pair in pairs)
    for name in settings.objective_names:
        surprise = variance = 0.0
        for pair in pairs:
            first, second = (grammar.score(pair.prompt, text)[name] for text in pair.responses)
            likely = 1 / (1 + math.exp((first - second) * settings.loss.options["beta"] / worlds.BETA))
            surprise += pair.chosen[name] - likely
            variance += likely * (1 - likely)
            assert pair.row(name)["chosen"] == pair.responses[pair.chosen[name]] != pair.row(name)["rejected"]
        assert abs(surprise) < 5 * math.sqrt(variance) < len(pairs) / 4  # choosing the worse would show


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trl_trains_each_preference_on_its_own_mix(tmp_path, monkeypatch, one_prompt):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    few = ("search.points=2", "train.steps=2", "train.pairs_per_step=2", "train.warmup=0")
    settings = Request("peers", TRL, 0, few).settings()
    pairs = judged(settings, grammar.TRAIN_PROMPTS[:2], 4, seed=1)
    given: list[list[dict[str, str]]] = []
    trainer = front_peers.trl_trainer

    def watched(task: Any, how: Any, rows: list[dict[str, str]], callback: Any) -> Any:
        given.append(rows)
        return trainer(task, how, rows, callback)

    monkeypatch.setattr(front_peers, "trl_trainer", watched)
    found = run_trl(settings, pairs, tmp_path)
    assert settings.objective_names == ("harmless", "helpful")
    for rows, name in zip(given, ("helpful", "harmless"), strict=True):  # weight 0 on the first name comes first
        assert len(rows) == 4 and all(row in [pair.row(name) for pair in pairs] for row in rows)
    assert [point["id"] for point in found["points"]] == ["w-0.00-1.00", "w-1.00-0.00"]
    assert all(point["kl"] > 1e-6 and point["tokens"] > 0 for point in found["points"])
    assert -0.2 < found["front_share"] < 0.5


def fake(request: Request) -> dict[str, Any]:
    share = {"all trained": 0.9, "soup, 3 trained": 0.8}.get(request.way, 0.5) + 0.01 * request.seed
    kinds = ["trained", "trained", "mixed"] if "soup" in request.way else ["trained"] * 3
    points: list[dict[str, Any]] = [{"kind": kind, "tokens": 1000 * (kind == "trained")} for kind in kinds]
    return request.identity | {
        "front_share": share,
        "front_share_worst": share - 0.1 * request.seed,
        "tokens": sum(point["tokens"] for point in points),
        "points": points,
        "seconds": 2.0,
        "step_seconds": 0.5,
        "hardware": {"cpu": "a CPU", "threads": 1, "torch": "2", "versions": {}, "libc": "glibc", "date": "today"},
    }


def test_a_killed_run_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    output = tmp_path / "front.json"
    ran: list[tuple[str, int]] = []

    def run(request: Request) -> dict[str, Any]:
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append((request.way, request.seed))
        return fake(request)

    def run_on(request: Request) -> dict[str, Any]:
        ran.append((request.way, request.seed))
        return fake(request)

    monkeypatch.setattr(front_share, "run", run)
    part, ways = [front_share.PartName.fill], list(PARTS["fill"].ways)
    with pytest.raises(KeyboardInterrupt):
        front_share.main(part, seed=[0, 1], output=output, append=True, **DEFAULTS)
    assert len(json.loads(output.read_text())["results"]) == 3
    monkeypatch.setattr(front_share, "run", run_on)
    front_share.main(part, seed=[0, 1], output=output, append=True, **DEFAULTS | {"at_most": 1})
    assert len(ran) == 4
    front_share.main(part, seed=[0, 1], output=output, append=True, **DEFAULTS)
    assert ran == [(way, seed) for seed in (0, 1) for way in ways]
    front_share.main(part, seed=[0], output=output, append=True, **DEFAULTS | {"further": ["train.steps=9"]})
    assert len(ran) == 3 * len(ways)  # another configuration is another result
    front_share.main(
        part, seed=[7], output=tmp_path / "other.json", append=True, **DEFAULTS | {"way": ["soup, 3 trained"]}
    )
    assert ran[3 * len(ways) :] == [("soup, 3 trained", 7)]
    text = output.with_suffix(".md").read_text()
    assert "| all trained | 3 + 0 | 0.905 ± 0.005 | 0.900 0.910 | 0.855 ± 0.045 |  | 3 | 1.00 | 2 |" in text
    assert (
        "| soup, 3 trained | 2 + 1 | 0.805 ± 0.005 | 0.800 0.810 | 0.755 ± 0.045 | -0.100 ± 0.000 | 2 | 0.67 |" in text
    )
    assert "filled in different ways, train.steps=9" in text


DEFAULTS: dict[str, Any] = {
    "further": None,
    "bases": Path("bases"),
    "threads": None,
    "seconds": True,
    "at_most": None,
    "way": None,
}


def test_times_of_steps_are_compared_with_the_first_way():
    part, bases = "step", Path("bases")
    results = [fake(request) for request in front_share.requests([part], (0, 1), (), bases, None)]
    for result in results:
        result["step_seconds"] = 0.25 if "quarter" in result["way"] else 0.5
    (table,) = front_share.tables_of(results)
    rows = {row[0]: row[1:] for row in table.rows}
    assert len(rows) == 8
    assert rows["all layers, 7 together"] == ["500.0", "1.00 (1.00-1.00)"]
    assert rows["upper quarter, one by one"] == ["250.0", "0.50 (0.50-0.50)"]


def test_another_base_is_named_in_the_configuration():
    (first, *_) = front_share.requests(["layers"], (0,), (), Path("bases"), None)
    assert first.settings().model.path == str(Path("bases/tiny-assistant-4-layers").resolve())
    (shipped, *_) = front_share.requests(["layers-shipped"], (0,), (), Path("bases"), None)
    assert shipped.settings().model.path == "tiny-assistant"


def test_a_base_of_other_depth_is_made(tmp_path, monkeypatch):
    from moalign.demo import make_checkpoint

    monkeypatch.setattr(make_checkpoint, "train", lambda model, tokenizer, steps: None)
    monkeypatch.setattr(make_checkpoint, "LEAST_MASS", 0.0)
    monkeypatch.setattr(grammar, "HELD_OUT_PROMPTS", grammar.HELD_OUT_PROMPTS[:1])
    front_ways.make_base(3, tmp_path / "bases" / "three")
    assert json.loads((tmp_path / "bases" / "three" / "config.json").read_text())["num_hidden_layers"] == 3
