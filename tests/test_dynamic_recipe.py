"""`moalign init FILE --recipe dynamic`: short, and an online sweep over five preference vectors in one pass."""

from __future__ import annotations

import pytest
import yaml

from moalign import config, recipes, registry
from moalign.engine import rollouts
from moalign.sweeps import front, run
from moalign.sweeps.observe import Observer

SHORT = (
    "train.steps=3",
    "rollouts.rounds=3",
    "rollouts.prompts=3",
    "rollouts.prompts_per_step=3",
    "evaluate.samples=1",
)


def settings(*changes: str) -> config.Config:
    return config.from_mapping(yaml.safe_load(recipes.read("dynamic")), changes)


def test_it_is_about_thirty_lines_and_on_policy():
    lines = [line for line in recipes.read("dynamic").splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 30
    rollout, train = settings().rollouts, settings().train
    assert rollout is not None and rollout.rounds == train.steps and rollout.prompts == rollout.prompts_per_step


@pytest.mark.parametrize("combine", [None, "linear"])
def test_five_preferences_are_trained_in_one_pass_and_sampled_in_one_call(combine, tmp_path, monkeypatch):
    wanted = settings(*SHORT, *([] if combine is None else [f"combine={combine}"]))
    installed = registry.discover()
    if all(entry.name != wanted.combine.name for entry in installed.of_kind("combiner")):
        pytest.skip(f"the combiner {wanted.combine.name} is not installed")
    policies, generate = [], rollouts._Call.responses

    def counting(call: rollouts._Call, adapters):
        policies.append(len(adapters))
        return generate(call, adapters)

    monkeypatch.setattr(rollouts._Call, "responses", counting)
    run.start(wanted, tmp_path / "run", installed, Observer())
    assert len(front.read(tmp_path / "run")["points"]) == 5
    # evaluation of the base, the base's own round, a round for all, another; evaluation of all
    assert sorted(policies) == [1, 1, 5, 5, 5]
