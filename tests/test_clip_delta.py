"""Clip and Delta: its rewards by hand, what they sum to, its expected gradient; runs with a reward model's adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import StopAfterSteps
from sweeps import contents
from tabular import SPEECH, on_policy
from test_ppo import EXACT, GROUPS, LENGTHS, MASK, NOTHING, SIGNAL, SOMETHING, drawn, expected_gradient, tokens_of
from torch import Tensor
from value_heads import settings_of, write_prompts

from moalign import config, registry
from moalign.api import Tokens
from moalign.demo.grammar import PROMPTS, replies
from moalign.sweeps import run
from moalign.sweeps.observe import Observer
from moalign_plugins.objectives.clip_delta import ClipDelta
from moalign_plugins.objectives.ppo import PPO

# Steps of 2, 1 and 2 tokens and the end; none but the end; two steps and the end; three with a token between, no end.
STEPS = torch.tensor([[1, 1, 2, 3, 3, 0], [0] * 6, [1, 2, 0, 0, 0, 0], [1, 0, 2, 2, 3, 0]], dtype=torch.float64)


def guided(steps: Tensor = STEPS, log_ratios: Tensor | None = None) -> Tokens:
    """``log_ratios``: of the guide to the reference."""
    tokens = tokens_of()
    assert tokens.ref_logps is not None
    own = 3 * drawn(7, *MASK.shape) if log_ratios is None else log_ratios
    assert tokens.ref_logps is not None
    measured = {**tokens.measured, "guide": tokens.ref_logps + own * MASK}
    return replace(tokens, measured=measured, passages={"step": steps})


def by_hand(objective: ClipDelta, tokens: Tokens) -> tuple[list[list[float]], list[list[float]]]:
    """Of each response c_k and d_k, from the text of the method."""
    assert tokens.ref_logps is not None
    clipped, rewards = [], []
    assert tokens.ref_logps is not None
    for row, length in enumerate(LENGTHS.tolist()):
        numbers = list(range(1, length + 1)) if objective.step is None else tokens.passages["step"][row].tolist()
        last = [max(t for t in range(length) if numbers[t] == k) for k in sorted(set(numbers[:length]) - {0})]
        ratios = (tokens.measured["guide"] - tokens.ref_logps)[row]
        scores = [float(torch.sigmoid(objective.slope * ratios[: t + 1].sum())) for t in last]
        c = scores if objective.eta is None else [min(score - objective.eta, 0.0) for score in scores]
        steps = len(c)
        d = [c[k] - (c[k + 1] if objective.delta and k + 2 < steps else 0.0) for k in range(steps - 1)]
        clipped.append(c)
        rewards.append([*d, *([0.0] if steps else [])])
    return clipped, rewards


OPTIONS: list[dict[str, Any]] = [
    {},
    {"slope": 2.0},
    {"slope": 2.0, "eta": None},
    {"slope": 1.0, "delta": False},
    {"step": None, "slope": 0.7},
    {"eta": 0.9},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rewards_of_steps_are_those_by_hand(options):
    objective, tokens = ClipDelta(guide="x", **options), guided()
    found, (_, expected) = objective.process_rewards(tokens), by_hand(objective, tokens)
    for row in range(len(LENGTHS)):
        ends = objective.ends(tokens)[row].nonzero().flatten()
        assert found[row, ends].tolist() == pytest.approx(expected[row], abs=1e-14)
        assert float(found[row].abs().sum()) == pytest.approx(sum(map(abs, expected[row])), abs=1e-14)
    assert sum(map(len, expected)) >= 8


@pytest.mark.parametrize("options", [{"slope": 2.0}, {"step": None, "slope": 0.7}, {"eta": 0.9}], ids=str)
def test_from_each_step_on_the_rewards_sum_to_its_clipped_score(options):
    """But for the last step, which has none of its own: whatever their number, the sum is between -eta and 0."""
    objective, tokens = ClipDelta(guide="x", **options), guided()
    to_go = objective.process_rewards(tokens).flip(1).cumsum(1).flip(1)
    clipped, _ = by_hand(objective, tokens)
    for row in range(len(LENGTHS)):
        ends = objective.ends(tokens)[row].nonzero().flatten()
        assert to_go[row, ends].tolist() == pytest.approx(
            [*clipped[row][:-1], *([0.0] if len(ends) else [])], abs=1e-14
        )
    assert objective.eta is not None
    assert (to_go <= 1e-14).all() and (to_go >= -objective.eta - 1e-14).all()


@pytest.mark.parametrize("steps", [2, 5, 40])
def test_repeating_good_steps_adds_nothing_and_without_delta_steps_add_up(steps):
    """All steps but the first are alike; the first token has all of the log-ratio."""
    numbers = torch.arange(1, steps + 1)[None].double()
    ratios = torch.zeros(1, steps, dtype=torch.float64)
    tokens = Tokens(
        mask=numbers * 0 + 1, ended=torch.ones(1, dtype=torch.bool), ref_logps=ratios, passages={"step": numbers}
    )

    def total(first: float, **options: Any) -> float:
        ratios[0, 0] = first
        given = replace(tokens, measured={"guide": ratios.clone()}, ref_logps=torch.zeros_like(ratios))
        return float(ClipDelta(guide="x", slope=1.0, **options).process_rewards(given).sum())

    good, bad = 3.0, -1.0
    assert total(good) == 0
    score = float(torch.tensor(bad, dtype=torch.float64).sigmoid()) - 0.5
    assert total(bad) == pytest.approx(score, abs=1e-14)
    assert total(bad, delta=False) == pytest.approx((steps - 1) * score, abs=1e-12)
    assert total(good, delta=False, eta=None) == pytest.approx((steps - 1) * 0.95257412682243, abs=1e-10)


def test_process_and_outcome_add_up():
    tokens = guided()
    plain, objective = PPO(beta=0.3), ClipDelta(guide="x", beta=0.3, alpha=0.7, slope=2.0)
    expected = plain.token_rewards(SIGNAL, tokens) + 0.7 * objective.process_rewards(tokens)
    torch.testing.assert_close(objective.token_rewards(SIGNAL, tokens), expected, **EXACT)
    assert (objective.process_rewards(tokens) * (1 - MASK) == 0).all()


def test_without_alpha_it_is_ppo_and_reads_nothing():
    none = ClipDelta(guide="x", alpha=0.0)
    assert none.guides() == {} and none.passages() == {}
    assert ClipDelta(guide="x").guides() == {"guide": "x"} and "step" in ClipDelta(guide="x").passages()
    assert ClipDelta(guide="x", step=None).passages() == {}
    given = none.token_advantages(SIGNAL, GROUPS, guided())
    assert torch.equal(given.advantages, PPO().token_advantages(SIGNAL, GROUPS, guided()).advantages)


@pytest.mark.parametrize("head", [NOTHING, SOMETHING], ids=["no values", "some values"])
def test_the_expected_gradient_is_that_of_the_outcome_and_the_first_steps_score(head):
    """Over all responses, each token a step: the rewards of a response telescope, whatever the values are."""
    world, guide = on_policy(SPEECH), SPEECH.parameters(9)
    objective = ClipDelta(guide="x", alpha=0.8, slope=1.5, step=None, beta=0.3, lam=1.0, gamma=1.0)
    found = expected_gradient(world, objective, head, guide)
    ratios = (SPEECH.logps(guide) - SPEECH.logps(world.reference)).detach()
    first = ((1.5 * ratios[:, 0]).sigmoid() - 0.5).clamp(max=0) * (SPEECH.mask.sum(1) > 1)
    whole = world.expected(lambda own, reference: world.rewards + 0.8 * first)
    torch.testing.assert_close(found, -world.gradient(whole - 0.3 * world.divergence()), **EXACT)
    assert (first < 0).any()


# --- in runs --------------------------------------------------------------------------------------------------------


def test_interrupted_and_resumed_equals_unbroken_byte_for_byte(tiny_model_path, small_run, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    adapter = str(small_run / "candidates/w-1.00-0.00")
    own = settings_of(
        tiny_model_path,
        prompts,
        loss={"name": "clip-delta", "guide": adapter, "slope": 1.0, "step": "[a-z]+|[^a-z]+"},
        search={"name": "grid", "points": 3},
        train={"steps": 4, "lr": 2e-3, "together": 2},
        rollouts={"rounds": 2, "samples": 3, "prompts": 4, "prompts_per_step": 4, "max_new_tokens": 8},
    )
    run.start(own, tmp_path / "unbroken", registry.discover(), Observer())
    with pytest.raises(KeyboardInterrupt):
        run.start(own, tmp_path / "run", registry.discover(), StopAfterSteps(7))
    run.resume(tmp_path / "run", registry.discover(), Observer())
    assert contents(tmp_path / "run") == contents(tmp_path / "unbroken")


def test_one_line_on_the_assistant_with_the_adapter_of_a_reward_model(tmp_path, monkeypatch):
    """A reward model learns from outcomes, and its adapter scores the sentences of what the policy samples."""
    import moalign

    rows = [
        {"prompt": prompt, "completion": reply, "label": "Good luck" in reply}
        for prompt in PROMPTS[:4]
        for reply in replies(prompt)[:4]
    ]
    (tmp_path / "outcomes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": each}) + "\n" for each in PROMPTS[:4]))
    judge = {
        "model": {"path": "tiny-assistant"},
        "objectives": {"desirable": None},
        "data": {"path": str(tmp_path / "outcomes.jsonl"), "held_out": 0.25},
        "reward_model": "implicit-outcome",
        "train": {"steps": 2, "pairs_per_step": 4, "lr": 1e-3},
    }
    moalign.train_reward_model(judge, out=tmp_path / "judge")
    content = {
        "model": {"path": "tiny-assistant"},
        "objectives": {"kind": {"reward": {"name": "regex", "pattern": "Good luck"}}},
        "data": {"path": str(tmp_path / "prompts.jsonl"), "held_out": 0.25},
        "search": {"name": "grid", "points": 1},
        "loss": {"name": "clip-delta", "guide": str(tmp_path / "judge/member-0/adapter"), "step": r"[^.]+\."},
        "rollouts": {"rounds": 2, "samples": 3, "prompts": 3, "prompts_per_step": 3, "max_new_tokens": 16},
        "train": {"steps": 2, "lr": 1e-3},
        "evaluate": {"samples": 1, "max_new_tokens": 8},
    }
    seen: list[Tensor] = []
    plain = ClipDelta.process_rewards
    monkeypatch.setattr(ClipDelta, "process_rewards", lambda self, tokens: seen.append(plain(self, tokens)) or seen[-1])
    run.start(config.from_mapping(content), tmp_path / "run", registry.discover(), Observer())
    (file,) = Path(tmp_path / "run").glob("candidates/*/metrics.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 2 and all(line["gradient_norm"] > 0 for line in lines)
    assert len(seen) == 2 and any(bool(each.any()) for each in seen)
