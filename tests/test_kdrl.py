"""KDRL: the gradient of its distillation, who is taught, how its coefficient falls, and a teacher in runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tabular import DIE, SPEECH, Situation, on_policy
from test_online_losses_runs import settings_of
from torch import Tensor

from moalign import registry
from moalign.api import Batch, Tokens
from moalign.errors import ConfigError
from moalign.sweeps import run
from moalign.sweeps.observe import Observer
from moalign.testing import check_objective
from moalign_plugins.objectives.grpo import GRPO
from moalign_plugins.objectives.kdrl import KDRL

EXACT = {"rtol": 0, "atol": 1e-12}  # sums of a few hundred float64 of size 1


def kdrl(**options) -> KDRL:
    return KDRL(teacher="a/folder", **options)


def taught_world(language=SPEECH) -> Situation:
    return replace(on_policy(language), guides={"teacher": language.parameters(5)})


def as_reference(world: Situation) -> Situation:
    return replace(world, reference=world.guides["teacher"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.1, "masking": "response"},
        {"distillation": 0.5, "masking": "group", "threshold": 9.0, "entropy": 0.1},
        {"distillation": 0.0, "beta": 0.1, "kl": "reward"},
    ],
)
def test_it_conforms(options):
    check_objective(kdrl(**options))


# --- the gradient ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", [SPEECH, DIE])
def test_distillation_descends_the_kl_from_the_policy_to_the_teacher(language):
    """Of each next token, where the policy goes; k3 without a ratio has the gradient of the other KL."""
    world = taught_world(language)
    silent = replace(world, rewards=world.rewards * 0)
    found = silent.expected_gradient(kdrl(distillation=0.7, distillation_last=0.7, length="none"), 1)
    reverse = world.gradient(as_reference(world).divergence_of_tokens(forward=False))
    torch.testing.assert_close(found, 0.7 * reverse, **EXACT)
    forward = world.gradient(as_reference(world).divergence_of_tokens(forward=True))
    k3 = as_reference(silent).expected_gradient(GRPO(beta=0.7, kl="forward", length="none"), 1)
    torch.testing.assert_close(k3, 0.7 * forward, **EXACT)
    assert (forward - reverse).abs().max() > 0.05


@pytest.mark.parametrize("size", [2, 3])
def test_its_expected_gradient_is_that_of_grpo_and_of_the_kl_to_the_teacher(size):
    world = taught_world()
    plain = world.expected_gradient(GRPO(beta=0.0, length="none"), size)
    found = world.expected_gradient(kdrl(distillation=0.4, length="none"), size)
    reverse = world.gradient(as_reference(world).divergence_of_tokens(forward=False))
    torch.testing.assert_close(found, plain + 0.4 * reverse, **EXACT)


@pytest.mark.parametrize("options", [{}, {"kl": "k2"}, {"kl": "forward"}, {"kl": "reward"}])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_without_distillation_it_is_grpo(beta, options):
    world, drawn = replace(taught_world(), sampler=SPEECH.parameters(7)), torch.tensor([[0, 2, 4], [1, 1, 5]])
    bare, grpo = kdrl(distillation=0.0, beta=beta, **options), GRPO(beta=beta, **options)
    torch.testing.assert_close(world.losses(bare, drawn), world.losses(grpo, drawn), **EXACT)
    assert bare.guides() == {} and ("reference" in bare.wants) == (beta > 0)


def test_only_those_who_are_taught_are_drawn_to_the_teacher():
    """Wrong faces alone: their expected k2 is sum of pi(y) (log pi - log teacher) grad log pi over these."""
    world = taught_world(DIE)
    wrong = world.rewards <= 0.35
    found = world.expected_gradient(kdrl(distillation=1.0, masking="response", threshold=0.35), 1)
    own, teacher = (DIE.logps(each).sum(-1) for each in (world.policy, world.guides["teacher"].detach()))
    expected = world.gradient((own.detach().exp() * wrong * (own - teacher) ** 2 / 2).sum())
    torch.testing.assert_close(found, expected, **EXACT)
    assert (world.expected_gradient(kdrl(distillation=1.0), 1) - expected).abs().max() > 1e-2


# --- who is taught, and how much ------------------------------------------------------------------------------------

SIGNAL = torch.tensor([1.0, 0.0, 0.4, 0.2, 0.0, 0.9, 1.0], dtype=torch.float64)
GROUPS = torch.tensor([3, 3, 3, 1, 1, 8, 8])  # some right, none, all


def prices(objective: KDRL, number: int = 0) -> list[float]:
    mask = torch.ones(7, 2, dtype=torch.float64)
    mask[0, 1] = 0
    tokens = Tokens(mask, torch.ones(7, dtype=torch.bool), mask * -0.5, number=number)
    known = objective.token_advantages(SIGNAL, GROUPS, tokens).known["distillation"]
    assert known[0, 1] == 0 and torch.equal(known[1:, 0], known[1:, 1])
    return known[:, 0].tolist()


@pytest.mark.parametrize(
    ("masking", "taught"),
    [("none", [1, 1, 1, 1, 1, 1, 1]), ("response", [0, 1, 1, 1, 1, 0, 0]), ("group", [0, 0, 0, 1, 1, 0, 0])],
)
def test_who_is_taught(masking, taught):
    """A prompt whose responses are all right has no distillation with either masking."""
    assert prices(kdrl(masking=masking, distillation=0.25)) == [0.25 * each for each in taught]


def test_the_coefficient_falls_by_round_in_a_straight_line_to_the_last():
    objective = kdrl()
    assert [prices(objective, number)[0] for number in (0, 1, 20, 79, 80, 500)] == pytest.approx(
        [5e-3, 4.95e-3, 4e-3, 1.05e-3, 1e-3, 1e-3]
    )
    assert kdrl(distillation=0.0).coefficient(7) == 0
    with pytest.raises(ValidationError, match=r"distillation \(0\.0001\) must not be below distillation_last"):
        kdrl(distillation=1e-4)


# --- in runs --------------------------------------------------------------------------------------------------------


def trained(folder: Path, loss, **changes) -> Path:
    settings = settings_of(loss)
    train = settings.train.model_copy(update={"steps": 2} | changes)
    run.start(settings.model_copy(update={"train": train}), folder, registry.discover(), Observer())
    return sorted((folder / "candidates").iterdir())[0]


@pytest.fixture
def seen(monkeypatch) -> list[Batch]:
    found: list[Batch] = []
    plain = KDRL.loss

    def looking(self, batch, terms):
        found.append(batch)
        return plain(self, batch, terms)

    monkeypatch.setattr(KDRL, "loss", looking)
    return found


@pytest.mark.parametrize("moved", [False, True])
def test_the_loss_sees_the_teachers_log_probabilities_of_what_the_policy_sampled(moved, tmp_path, seen):
    """In the first round the policy is the base: a teacher that has hardly been trained says the same, another not."""
    folder = trained(tmp_path / "teacher", {"name": "rloo"}, lr=0.02 if moved else 1e-12)
    candidate = trained(tmp_path / "run", {"name": "kdrl", "teacher": str(folder)})
    first = seen[0]
    assert first.guides.keys() == {"teacher"} and first.ref_logps is None and first.old_logps is not None
    apart = ((first.guides["teacher"] - first.old_logps) * first.mask).abs().max()
    assert apart > 1e-2 if moved else apart < 1e-4
    assert not (first.guides["teacher"] * (1 - first.mask)).any()
    lines = [json.loads(line) for line in (candidate / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss/distillation"] for line in lines] == pytest.approx([5e-3, 4.95e-3])  # a round each
    assert {"loss/right", "loss/taught"} <= lines[0].keys()


def test_a_teacher_that_is_not_there_is_said_before_anything_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match=r"loss\.teacher: no adapter_config\.json in "):
        trained(tmp_path / "run", {"name": "kdrl", "teacher": str(tmp_path)})


def test_what_a_combiner_multiplies_are_the_advantages_and_not_the_distillation():
    world, drawn = taught_world(), torch.tensor([[0, 2, 4]])

    class Thrice(KDRL):
        def token_advantages(self, signal: Tensor, groups: Tensor, tokens: Tokens):
            given = super().token_advantages(signal, groups, tokens)
            return replace(given, advantages=3 * given.advantages)

    thrice, once = (world.losses(each(teacher="x", distillation=0.5), drawn) for each in (Thrice, KDRL))
    plain = world.losses(GRPO(beta=0.0), drawn)
    torch.testing.assert_close(thrice - once, 2 * plain, **EXACT)
