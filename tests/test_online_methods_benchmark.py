"""The benchmark of losses on sampled responses: all that it names can be trained, and what it counts is right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import online_guides, online_methods, online_run
from benchmarks.online_methods import Request, ways
from moalign import registry
from moalign.demo import grammar
from moalign.sweeps.plan import prepare
from moalign_plugins.objectives._policy_gradient import PolicyGradient

SMALL = ("rollouts.prompts=2", "rollouts.prompts_per_step=2", "rollouts.samples=2", "search.points=2")


def settings_of(request: Request) -> Any:
    return request.guided(**dict.fromkeys(request.guides, Path("a/folder"))).settings()


def test_every_loss_that_only_samples_can_train_is_a_method_and_every_filter():
    named = {settings_of(Request(name, 0)).loss.name for name in ways()["methods"]}
    known = registry.discover()
    sampled = {
        entry.name
        for entry in known.of_kind("objective")
        for loss in [known.load(entry)]
        if loss.needs & {"old_logps", "greedy", "token_advantages"} or issubclass(loss, PolicyGradient)
    }
    assert sampled - named == set()
    rollouts = [settings_of(Request(name, 0)).rollouts for name in ways()["methods"]]
    filters = {each.filter.name for each in rollouts if each.filter is not None}
    assert {entry.name for entry in known.of_kind("filter")} - filters == {"margin"}  # of pairs


@pytest.mark.parametrize("method", list(ways()["methods"]))
def test_what_it_compares_is_a_configuration(method):
    request = Request(method, seed=1, steps=10)
    settings = settings_of(request)
    assert settings.train.steps == settings.rollouts.rounds == 10 and settings.seed == 1
    if not request.guides:  # their folders are looked into
        assert len(prepare(settings, registry.discover()).propose(())) == 3


def test_a_training_is_measured_along_the_way_with_what_was_drawn(monkeypatch):
    monkeypatch.setattr(grammar, "HELD_OUT_PROMPTS", grammar.HELD_OUT_PROMPTS[:1])
    request = Request("rloo", 1, steps=4, number_of_looks=2, further=SMALL)
    sent: list[dict[str, Any]] = []

    class Connection:
        def send(self, message: tuple[str, dict[str, Any]]) -> None:
            sent.append(message[1])

    online_methods.work([request, replace(request, method="prime")], Connection())
    for found in sent:
        assert [(look["step"], look["drawn"]) for look in found["looks"]] == [(2, 16), (4, 32)]
        assert len(found["candidates"]) == len(found["looks"][0]["expected"]) == 2 and len(found["base"]) == 2
    table = online_methods.tables_of({"results": [request.identity | sent[0]]})[0]
    assert table.columns[1] == "front share after 16 responses" and table.rows[0][0] == "rloo"


def test_gained_reward_is_weighted_by_each_candidates_own_preference():
    """The preference's order is another one than that of the world's rewards."""
    found = {
        "base": [0.5, 0.25],
        "candidates": [
            {"preference": {"harmless": 0.0, "helpful": 1.0}},
            {"preference": {"harmless": 0.25, "helpful": 0.75}},
        ],
    }
    look = {"expected": [[0.75, 9.0], [0.5, 1.25]]}
    assert online_methods.gained(found, look) == (0.25 + 0.25) / 2


def test_right_is_what_the_thresholds_of_the_methods_say():
    thresholds = [
        settings.loss.options["threshold"]
        for name in ways()["methods"]
        if "threshold" in (settings := settings_of(Request(name, 0))).loss.options
    ]
    assert thresholds and set(thresholds) == {online_guides.RIGHT}


def test_the_base_is_what_the_world_says_it_is():
    from moalign.demo import world as worlds

    prompts = grammar.HELD_OUT_PROMPTS[:1]
    logps = online_run.base_logps(prompts)
    assert logps.shape == (1, len(grammar.replies(prompts[0]))) and 0.95 < float(logps.exp().sum()) < 1
    assert worlds.evaluate(worlds.tiny_world(prompts), logps, logps).kl == 0
