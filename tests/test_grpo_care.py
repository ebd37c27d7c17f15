"""GRPO-CARE: its bonus by hand, its rules where nobody is right or all are alike, runs beside a moving reference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import StopAfterSteps
from sweeps import contents, steps_on_the_assistant
from torch import Tensor
from value_heads import settings_of, write_prompts

from moalign import config, registry
from moalign.api import Tokens
from moalign.errors import ConfigError
from moalign.sweeps import run
from moalign.sweeps.observe import Observer
from moalign_plugins.objectives.grpo import GRPO
from moalign_plugins.objectives.grpo_care import GRPOCare

EXACT = {"rtol": 0, "atol": 1e-12}
LENGTHS = torch.tensor([6, 4, 5, 6, 3, 6, 5, 6])
MASK = (torch.arange(6) < LENGTHS[:, None]).double()
GROUPS = torch.tensor([7, 2, 7, 2, 7, 2, 7, 2])
SIGNAL = torch.tensor([1.0, 0.0, 1.0, 0.6, 0.2, 0.9, 1.0, 0.05], dtype=torch.float64)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens_of(answers: Tensor | None = None, reference: Tensor | None = None) -> Tokens:
    """The last two tokens of each response but the end are its answer, unless said otherwise."""
    places = torch.arange(6)
    inside = (places >= LENGTHS[:, None] - 3) & (places < LENGTHS[:, None] - 1)
    return Tokens(
        mask=MASK,
        ended=torch.ones(8, dtype=torch.bool),
        old_logps=-drawn(0, 8, 6).abs() * MASK,
        ref_logps=(-drawn(1, 8, 6).abs() if reference is None else reference) * MASK,
        passages={"answer": inside.double() if answers is None else answers},
    )


def bonuses(objective: GRPOCare, signal: Tensor, tokens: Tokens) -> list[float]:
    """In plain Python, from the text of the method."""
    assert tokens.ref_logps is not None
    found = [0.0] * len(signal)
    for group in set(GROUPS.tolist()):
        rows = [row for row in range(len(signal)) if GROUPS[row] == group]
        mean = sum(float(signal[row]) for row in rows) / len(rows)
        sure: dict[int, float] = {}
        assert tokens.ref_logps is not None
        for row in rows:
            numbers = tokens.passages["answer"][row].tolist()
            places = [t for t in range(6) if numbers[t] and numbers[t] == max(numbers)]
            if places and float(signal[row]) > objective.least and float(signal[row]) >= mean:
                total = sum(float(tokens.ref_logps[row, t]) for t in places)
                sure[row] = min(float(torch.tensor(total / len(places)).double().exp()), objective.ceiling)
        if sure:
            least = sum(sure.values()) / len(sure) - objective.margin
            for row, confidence in sure.items():
                found[row] = objective.bonus * float(signal[row]) * (confidence >= least)
    return found


def added(objective: GRPOCare, signal: Tensor, tokens: Tokens) -> Tensor:
    """What the objective adds to the signal."""
    assert tokens.ref_logps is not None
    confidence, answered = objective.confidence(tokens.ref_logps, tokens.passages["answer"])
    return objective.bonus * signal * objective.consistent(signal, GROUPS, confidence, answered)


@pytest.mark.parametrize("options", [{}, {"margin": 0.0}, {"margin": 0.3}, {"ceiling": 0.2}, {"least": 0.95}], ids=str)
def test_the_bonus_is_that_by_hand(options):
    objective, several = GRPOCare(**options), set()
    for seed in range(12):
        tokens = tokens_of(reference=-drawn(seed, 8, 6).abs())
        signal = SIGNAL if seed % 2 else drawn(100 + seed, 8).abs()
        expected = bonuses(objective, signal, tokens)
        assert added(objective, signal, tokens).tolist() == pytest.approx(expected, abs=1e-14)
        several.add(sum(each > 0 for each in expected))
    assert len(several) > 1


def test_advantages_are_those_of_grpo_on_reward_and_bonus():
    objective, tokens = GRPOCare(), tokens_of()
    given = objective.token_advantages(SIGNAL, GROUPS, tokens)
    total = SIGNAL + torch.tensor(bonuses(objective, SIGNAL, tokens), dtype=torch.float64)
    expected = GRPO(beta=0.0).advantages(total, GROUPS, None)
    torch.testing.assert_close(given.advantages, expected[:, None] * MASK, **EXACT)
    assert given.figures == {"answered": 1.0, "consistent": float((total > SIGNAL).double().mean())}
    assert 0 < given.figures["consistent"] < 1
    plain = GRPOCare(bonus=0.0).token_advantages(SIGNAL, GROUPS, tokens).advantages
    torch.testing.assert_close(plain, GRPO(beta=0.0).advantages(SIGNAL, GROUPS, None)[:, None] * MASK, **EXACT)


def test_a_kl_in_the_reward_is_grpos():
    tokens = tokens_of()
    ratios = ((tokens.old_logps - tokens.ref_logps) * MASK).sum(-1)
    given = GRPOCare(bonus=0.0, beta=0.2, kl="reward").token_advantages(SIGNAL, GROUPS, tokens)
    expected = GRPO(beta=0.2, kl="reward").advantages(SIGNAL, GROUPS, ratios)
    torch.testing.assert_close(given.advantages, expected[:, None] * MASK, **EXACT)


@pytest.mark.parametrize("wrong", [0.0, 0.1, -2.0])
def test_where_all_are_wrong_nobody_gets_a_bonus_and_nothing_is_undefined(wrong):
    given = GRPOCare().token_advantages(SIGNAL * 0 + wrong, GROUPS, tokens_of())
    assert (given.advantages == 0).all() and given.figures["consistent"] == 0
    half = SIGNAL.where(GROUPS == 7, wrong)
    found = added(GRPOCare(), half, tokens_of())
    assert (found[GROUPS == 2] == 0).all() and found[GROUPS == 7].any()


@pytest.mark.parametrize("margin", [0.0, 0.01])
@pytest.mark.parametrize("right", [0.3, 0.7, 1.0])
def test_with_equal_confidences_all_who_are_eligible_get_it(margin, right):
    """Also where sums round: three times 0.3 has a mean above it."""
    tokens = tokens_of(reference=torch.full((8, 6), -0.7, dtype=torch.float64))
    signal = SIGNAL * 0 + right
    assert torch.equal(added(GRPOCare(margin=margin), signal, tokens), 0.5 * signal)


def test_without_an_answer_nobody_is_eligible_whatever_the_mean_of_nothing_is():
    """exp(0) would be the largest confidence of all."""
    tokens = tokens_of()
    answers = tokens.passages["answer"].clone()
    answers[0] = 0
    found = added(GRPOCare(), SIGNAL, replace(tokens, passages={"answer": answers}))
    assert found[0] == 0 and found[[2, 6]].any()
    none = added(GRPOCare(), SIGNAL, replace(tokens, passages={"answer": 0 * answers}))
    assert (none == 0).all()


def test_the_last_answer_counts_and_a_ceiling_makes_the_surest_alike():
    answers = torch.zeros(8, 6, dtype=torch.float64)
    answers[:, 0], answers[:, 2] = 1, 2
    reference = torch.zeros(8, 6, dtype=torch.float64)
    reference[:, 0], reference[0, 2], reference[2, 2], reference[6, 2] = -9.0, -0.01, -0.03, -0.5
    tokens = tokens_of(answers, reference)
    confidence, _ = GRPOCare(ceiling=1.0).confidence(tokens.ref_logps, answers)
    torch.testing.assert_close(
        confidence[[0, 2, 6]], torch.tensor([-0.01, -0.03, -0.5], dtype=torch.float64).exp(), **EXACT
    )
    assert GRPOCare().confidence(tokens.ref_logps, answers)[0][:3].tolist() == [0.95, 0.95, 0.95]


def test_an_answer_that_is_no_expression_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"loss\.answer: not a regular expression: missing \)"):
        registry.discover().build("objective", "grpo-care", {"answer": "(a"}, "loss")


# --- in runs --------------------------------------------------------------------------------------------------------

ROLLOUTS = {"rounds": 4, "samples": 4, "prompts": 4, "prompts_per_step": 4, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("data") / "prompts.jsonl")


def settings(model: Path, prompts: Path, **changes: Any) -> config.Config:
    """Replies with early and with late letters; a letter is an answer."""
    letters = {"reward": {"name": "regex", "pattern": "[a-m]"}}
    own: dict[str, Any] = {
        "objectives": {"harmless": letters, "helpful": {"reward": {"name": "regex", "pattern": "[g-z]"}}},
        "loss": {"name": "grpo-care", "answer": "[a-z]", "margin": 0.0},
        "reference": {"name": "moving-average", "every": 1, "decay": 0.5},
        "rollouts": ROLLOUTS,
        "train": {"steps": 8, "lr": 5e-3, "together": 2},
    }
    return settings_of(model, prompts, **(own | changes))


def test_interrupted_and_resumed_equals_unbroken_byte_for_byte(tiny_model_path, prompts, tmp_path):
    own = settings(tiny_model_path, prompts)
    run.start(own, tmp_path / "unbroken", registry.discover(), Observer())
    with pytest.raises(KeyboardInterrupt):
        run.start(own, tmp_path / "run", registry.discover(), StopAfterSteps(13))
    run.resume(tmp_path / "run", registry.discover(), Observer())
    assert contents(tmp_path / "run") == contents(tmp_path / "unbroken")
    lines = [
        json.loads(line)
        for file in (tmp_path / "run").glob("candidates/*/metrics.jsonl")
        for line in file.read_text().splitlines()
    ]
    assert all(0 < line["loss/answered"] <= 1 for line in lines)
    assert any(0 < line["loss/consistent"] < line["loss/answered"] for line in lines)
    assert any(line["reference/moves"] > 2 for line in lines)


def test_an_average_that_never_moves_is_the_base(tiny_model_path, prompts, tmp_path):
    search, fast = {"name": "grid", "points": 2}, {"steps": 8, "lr": 2e-2, "together": 2}
    for name, reference in (("base", None), ("frozen", {"name": "moving-average", "every": 1, "decay": 1.0})):
        own = settings(tiny_model_path, prompts, reference=reference, search=search, train=fast)
        run.start(own, tmp_path / name, registry.discover(), Observer())
    own = settings(tiny_model_path, prompts, search=search, train=fast)
    run.start(own, tmp_path / "moving", registry.discover(), Observer())
    adapters = [
        (tmp_path / name / "candidates/w-1.00-0.00/adapter_model.safetensors").read_bytes()
        for name in ("base", "frozen", "moving")
    ]
    assert adapters[0] == adapters[1]
    assert adapters[0] != adapters[2]


def test_one_line_on_the_assistant(tmp_path):
    """The answer is the last sentence."""
    lines = steps_on_the_assistant(
        tmp_path,
        loss={"name": "grpo-care", "answer": r"[^.]+\.?\s*$"},
        reference="moving-average",
        rollouts={"rounds": 2, "samples": 6, "prompts": 3, "prompts_per_step": 3, "max_new_tokens": 40},
    )
    assert len(lines) == 2 and all(line["loss/answered"] == 1 for line in lines)
    assert any(line["loss/consistent"] > 0 for line in lines)
