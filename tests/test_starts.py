"""Training that starts from a mix of finished candidates, and the searches that ask for it, end to end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from interruptions import StopAfterCandidates, break_off_and_resume
from sweeps import contents, small_config, write_pairs

from moalign import lora, registry, storage
from moalign.api import Candidate, Preference, Search
from moalign.errors import PluginError
from moalign.sweeps import checks, run
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare

HALF = {"w-1.00-0.00": 0.5, "w-0.00-1.00": 0.5}
MIDDLE = Preference("weights", {"harmless": 0.5, "helpful": 0.5})


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


class Fixed(Search):
    """Two ends; then their mix; then training from that candidate, and from the same mix by shares."""

    def propose(self, space, history, rng):
        alone = {name: {other: float(other == name) for other in space.objectives} for name in space.objectives}
        ends = [
            Candidate(name, Preference("weights", alone[objective]))
            for name, objective in zip(HALF, space.objectives, strict=True)
        ]
        stages = [
            ends,
            [Candidate("mix", MIDDLE, mixed=True, shares=HALF)],
            [
                Candidate("by-parent", MIDDLE, parents=("mix",), changes={"train.steps": 3}),
                Candidate("by-shares", MIDDLE, shares=HALF, changes={"train.steps": 3}),
            ],
        ]
        seen = {outcome.id for outcome in history}
        return next(
            ([each for each in stage if each.id not in seen] for stage in stages if stage[-1].id not in seen), []
        )


def test_training_from_shares_is_training_from_the_mixed_candidate(tiny_model_path, pairs, tmp_path):
    plan = replace(prepare(small_config(tiny_model_path, pairs), registry.discover()), search=Fixed())
    front = run._execute(plan, tmp_path / "run", {}, Observer())
    points = {point["id"]: point for point in front["points"]}
    assert points["mix"]["parents"] == points["by-shares"]["parents"] == HALF
    assert points["by-parent"]["parents"] == {"mix": 1.0} and points["by-shares"]["kind"] == "trained"
    weights = [
        (tmp_path / "run/candidates" / name / lora.WEIGHTS_FILE).read_bytes()
        for name in ("mix", "by-parent", "by-shares")
    ]
    assert weights[1] == weights[2] != weights[0]


def test_a_mix_that_cannot_be_made_fails_its_candidate_alone(tiny_model_path, pairs, tmp_path):
    class Mixing(Search):
        def propose(self, space, history, rng):
            if not history:
                return Fixed().propose(space, history, rng)
            bad = Candidate("bad", MIDDLE, shares=HALF)
            mix = Candidate("mix", MIDDLE, mixed=True, shares=HALF)
            return [bad, Candidate("good", MIDDLE), mix] if len(history) == 2 else []

    class Damaging(Observer):
        phases: ClassVar[list[str]] = []

        def on_candidate_start(self, candidate):
            if candidate.id == "bad":
                file = tmp_path / "run/candidates/w-1.00-0.00" / lora.CONFIG_FILE
                storage.write_json(file, {**storage.read_json(file), "use_dora": True})

        def on_phase(self, what):
            self.phases.append(what)

    plan = replace(prepare(small_config(tiny_model_path, pairs), registry.discover()), search=Mixing())
    front = run._execute(plan, tmp_path / "run", {}, Damaging())
    assert [point["id"] for point in front["points"]] == [*HALF, "good"]
    assert [failed["id"] for failed in front["failed"]] == ["bad", "mix"]
    assert all("only plain LoRA adapters can be mixed" in failed["error"] for failed in front["failed"])
    assert not any("going on with" in phase for phase in Damaging.phases)  # nothing was trained twice


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        (Candidate("c", MIDDLE, shares={"nobody": 1.0}), "mixed from 'nobody', which is not done"),
        (Candidate("c", MIDDLE, mixed=True, shares={"nobody": 1.0}), "mixed from 'nobody', which is not done"),
    ],
)
def test_shares_of_who_is_not_done_are_refused(tiny_model_path, pairs, candidate, message):
    class Wrong(Search):
        def propose(self, space, history, rng):
            return [candidate]

    plan = replace(prepare(small_config(tiny_model_path, pairs), registry.discover()), search=Wrong())
    with pytest.raises(PluginError, match=message):
        plan.propose(())


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"a": "x"}, "each is a finite number"),
        ({"a": [0.5, 0.5]}, "a tuple of them"),
        ({"a": None}, "each is a finite number"),
        ({"a": True}, "each is a finite number"),
        ({"a": ()}, "each is a finite number"),
        ({"a": (0.5, "x")}, "each is a finite number"),
        ({"a": float("nan")}, "each is a finite number"),
        ({"a": 10**400}, "each is a finite number"),
        ({"a": 0.0, "b": (0, 0)}, "shares that are all 0"),
        ({"a": 1.0, 3: 1.0}, "mixed from '3', which is not done"),
        (["a"], "numbers by the ids of candidates"),
    ],
)
@pytest.mark.parametrize("mixed", [True, False])
def test_shares_that_are_no_numbers_or_all_0_are_refused(shares, message, mixed):
    with pytest.raises(PluginError, match=f"^search 's': it proposed 'c' .*{message}"):
        checks.check_shares(
            Candidate("c", MIDDLE, mixed=mixed, shares=shares), {"a", "b"}, "search 's': it proposed 'c'"
        )


def test_shares_may_be_0_or_negative_where_one_is_not_0():
    for shares in ({"a": 0.0, "b": (0, -0.5)}, {"a": np.float64(0.3)}, {"a": 1}):
        checks.check_shares(Candidate("c", MIDDLE, shares=shares), {"a", "b"}, "")


def test_linear_support_is_resumed_with_its_budget_spent_and_ends_alike(tiny_model_path, pairs, tmp_path):
    search = {"name": "optimistic-linear-support", "points": 4, "tolerance": 0.0, "warm_steps": 0.5, "mixes": 2}
    rollouts = {"prompts": 4, "samples": 2, "rounds": 2, "prompts_per_step": 2, "max_new_tokens": 8}
    targets = {"helpful": 6, "harmless": 0}
    objectives = {name: {"reward": {"name": "length", "target": words}} for name, words in targets.items()}
    changes = {"search": search, "rollouts": rollouts, "objectives": objectives, "loss": {"name": "rebel", "beta": 0.1}}
    changes |= {"train": {"steps": 8, "lr": 0.1, "together": 2}, "evaluate": {"samples": 8, "max_new_tokens": 8}}
    settings = small_config(tiny_model_path, pairs, **changes)
    whole = run.start(settings, tmp_path / "whole", registry.discover(), Observer())
    assert len(whole["points"]) >= 3 and "utility" in whole["points"][0]["details"]
    resumed = break_off_and_resume(settings, tmp_path / "run", StopAfterCandidates(2))
    assert contents(resumed) == contents(tmp_path / "whole")
