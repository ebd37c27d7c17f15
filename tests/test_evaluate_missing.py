"""What ``moalign evaluate`` cannot take gradients of, or compare with, is said, and all else is still measured."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
from sweeps import small_config, write_pairs

from moalign import registry, storage
from moalign.config import Config
from moalign.diagnostics.evaluation import evaluate
from moalign.diagnostics.gradients import unsupplied
from moalign.diagnostics.question import Question
from moalign.sweeps import journal
from moalign_plugins.objectives.dpo import DPO
from moalign_plugins.objectives.grpo import GRPO

REGISTRY = registry.discover()
ONE, OTHER = "w-1.00-0.00", "w-0.00-1.00"
RELATIVE = "log-ratios and gradients are relative to the untouched base; the run's loss compared with reference"


def settings(**changes: Any) -> Config:
    return small_config(Path("model"), Path("pairs.jsonl"), **changes)


def lacks(loss: dict[str, Any], **changes: Any) -> str | None:
    config = settings(loss=loss, **changes)
    return unsupplied(REGISTRY.build("objective", config.loss.name, config.loss.options, "loss"), config, 8)


@pytest.fixture
def altered(small_run, tmp_path):
    """A copy of the run whose record says otherwise: keys of the configuration, and a candidate's changes by id."""

    def alter(changes: dict[str, dict[str, Any]] | None = None, recorded: str = "", **keys: Any) -> Path:
        copy = tmp_path / "run"
        shutil.copytree(small_run, copy)
        record = storage.read_json(copy / "run.json")
        storage.write_json(copy / "run.json", record | {"config": record["config"] | keys, "reference": recorded})
        events = journal.read(copy / journal.FILE)
        (copy / journal.FILE).unlink()
        for event in events:
            own = (changes or {}).get(str(event.get("id")))
            journal.append(copy / journal.FILE, event if own is None else event | {"changes": own})
        return copy

    return alter


@pytest.fixture
def ask(tmp_path):
    def asked(run: Path, candidate: str | None = ONE) -> dict[str, Any]:
        pairs = write_pairs(tmp_path / "more.jsonl", prompts=2, seed=1)
        return evaluate(run, REGISTRY, Question(candidate=candidate, data=pairs, samples=1))

    return asked


# --- what a loss needs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        ({"name": "tgdpo", "guide": "folder"}, "guides"),
        ({"name": "align-distil", "teacher": "one", "contrary": "other"}, "distributions, guides"),
        ({"name": "srpo"}, "views"),
        ({"name": "spo"}, "hidden, views, parameters of its own"),
        ({"name": "selm", "alpha": 0.1}, "reference_responses"),
        ({"name": "kto", "reference_point": True}, "mismatched"),
        ({"name": "order-preserving"}, "rewards"),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_what_is_not_supplied_is_named(loss, what):
    assert lacks(loss) == f"no conflict matrix: the loss '{loss['name']}' needs {what}"


@pytest.mark.parametrize("loss", [{"name": "dpo"}, {"name": "selm", "alpha": 0}, {"name": "rebel"}, {"name": "grpo"}])
def test_what_is_supplied_is_asked(loss):
    assert lacks(loss) is None


def test_an_advantage_that_is_no_factor_has_no_gradient_of_its_own():
    class Curved(GRPO):
        linear: ClassVar[bool] = False

    config = settings(loss={"name": "grpo"})
    assert unsupplied(Curved(), config, 8) == (
        "no conflict matrix: in the loss 'grpo' a response's advantage is no factor of its own loss"
    )


def test_shaped_rewards_are_not_asked_as_if_they_were_raw():
    """On labelled pairs nothing is shaped, nor are differences of rewards in the data."""
    shaped = {"helpful": {"reward": "length", "transform": "clip"}, "harmless": {"reward": "length"}}
    reason = "no conflict matrix: the run shapes its rewards with transforms"
    assert lacks({"name": "grpo"}, objectives=shaped, rollouts={}) == reason
    assert lacks({"name": "rebel"}, objectives=shaped, rollouts={}) == reason
    assert lacks({"name": "rebel"}, objectives=shaped) is None
    assert lacks({"name": "dpo"}, objectives=shaped, rollouts={}) is None
    plain = {name: {"reward": "length"} for name in shaped}
    assert lacks({"name": "grpo"}, objectives=plain, rollouts={}) is None


@pytest.mark.parametrize("loss", [{"name": "tgdpo", "guide": "folder"}, {"name": "srpo"}], ids=["guides", "views"])
def test_all_else_is_measured_without_a_conflict_matrix(altered, ask, loss):
    found = ask(altered(loss=loss))
    assert found["policies"][ONE]["conflict"] is None and found["policies"][ONE]["kl"] is not None
    assert [each for each in found["missing"] if "conflict matrix" in each] == [lacks(loss)]


# --- each candidate's own loss --------------------------------------------------------------------------------------


def test_each_candidate_is_asked_by_its_own_loss(altered, ask):
    run = altered(loss={"name": "selm", "alpha": 0.0}, changes={OTHER: {"loss.alpha": 0.1}})
    found = ask(run, None)
    told = {name: policy["conflict"] for name, policy in found["policies"].items() if name != "base"}
    assert [name for name, conflict in told.items() if conflict is None] == [OTHER]
    assert f"{OTHER}: no conflict matrix: the loss 'selm' needs reference_responses" in found["missing"]


def test_a_loss_that_fails_does_not_end_the_evaluation(altered, ask, monkeypatch):
    honest = DPO.loss

    def fails(self, batch, terms):
        if self.beta > 1:
            raise RuntimeError("no reason")
        return honest(self, batch, terms)

    monkeypatch.setattr(DPO, "loss", fails)
    found = ask(altered(changes={ONE: {"loss.beta": 2.0}}), None)
    (why,) = (each for each in found["missing"] if "no reason" in each)
    assert why.startswith(f"{ONE}: no conflict matrix: objective 'dpo' of moalign ") and "in loss" in why
    assert found["policies"][ONE]["conflict"] is None and found["policies"][OTHER]["conflict"] is not None


def test_a_loss_that_is_gone_does_not_end_the_evaluation(altered, ask):
    found = ask(altered(loss={"name": "gone"}))
    assert found["policies"][ONE]["ranking"] is not None
    assert any(
        each.startswith("no conflict matrix: loss.name: no objective is called 'gone'") for each in found["missing"]
    )


# --- the reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "recorded", "other"),
    [
        (None, "", False),
        ({"name": "base"}, "", False),
        ({"name": "moving-average"}, "", True),
        ({"name": "soup", "shares": {"folder": 1.0}}, "0123", True),
        ({"name": "gone"}, "", True),
    ],
    ids=["none", "base", "moves", "given", "gone"],
)
def test_it_is_said_that_the_run_had_another_reference(altered, ask, reference, recorded, other):
    found = ask(altered(reference=reference, recorded=recorded))
    said = [f"{RELATIVE} '{reference['name']}'"] if other else []
    assert [each for each in found["missing"] if "untouched base" in each] == said
    assert found["policies"][ONE]["ranking"] is not None
