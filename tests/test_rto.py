"""RTO: the rewards of its tokens, its limits and its expected gradient; and runs that read a guide once in a round."""

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
from value_heads import settings_of, write_prompts

from moalign import registry
from moalign.api import Tokens
from moalign.demo.grammar import PROMPTS
from moalign.engine import train as loop
from moalign.sweeps import run
from moalign.sweeps.observe import Observer
from moalign_plugins.objectives.ppo import PPO
from moalign_plugins.objectives.rto import RTO

UNBOUNDED: dict[str, Any] = {"guide": "x", "bound": None, "reward_bound": None}


def guided() -> Tokens:
    tokens = tokens_of()
    return replace(tokens, measured={**tokens.measured, "guide": -3 * drawn(7, *MASK.shape).abs() * MASK})


# --- rewards of tokens ----------------------------------------------------------------------------------------------


def test_rewards_of_tokens_are_those_of_the_paper():
    tokens = guided()
    rewards = RTO(guide="x", scale=0.4, bound=0.3, beta=0.02, reward_bound=1.5).token_rewards(3 * SIGNAL, tokens)
    for row, length in enumerate(LENGTHS.tolist()):
        for t in range(length):
            own, reference, guide = (
                float(each[row, t]) for each in (tokens.old_logps, tokens.ref_logps, tokens.measured["guide"])
            )
            expected = min(max(0.4 * (guide - reference), -0.3), 0.3) - 0.02 * (own - reference)
            expected += min(max(3 * float(SIGNAL[row]), -1.5), 1.5) if t == length - 1 else 0.0
            assert float(rewards[row, t]) == pytest.approx(expected, abs=1e-14)
    assert (rewards * (1 - MASK) == 0).all()
    assert (3 * SIGNAL.abs() > 1.5).any() and (3 * SIGNAL.abs() < 1.5).any()


def test_without_bounds_they_sum_to_reward_and_both_log_ratios():
    tokens = guided()
    rewards = RTO(scale=0.4, beta=0.02, **UNBOUNDED).token_rewards(SIGNAL, tokens)
    guide = (tokens.measured["guide"] - tokens.ref_logps).sum(-1)
    own = (tokens.old_logps - tokens.ref_logps).sum(-1)
    torch.testing.assert_close(rewards.sum(-1), 0.4 * guide - 0.02 * own + SIGNAL, **EXACT)


def test_no_token_is_beyond_the_bound_and_it_is_of_the_scaled_log_ratio():
    """A log-ratio of 0.5 nats is beyond a bound of 0.05 if it is clipped before it is scaled by 0.05, and not after."""
    tokens = guided()
    plain = RTO(guide="x", scale=0.0, beta=0.01).token_rewards(SIGNAL, tokens)
    added = RTO(guide="x").token_rewards(SIGNAL, tokens) - plain
    assert float(added.abs().max()) == pytest.approx(0.05, abs=1e-14)
    small = replace(tokens, measured={**tokens.measured, "guide": tokens.ref_logps + 0.5 * MASK})
    added = RTO(guide="x").token_rewards(SIGNAL, small) - plain
    torch.testing.assert_close(added, 0.025 * MASK, **EXACT)


def test_a_guide_that_is_the_reference_or_no_scale_is_ppo():
    tokens, same = guided(), PPO(beta=0.01).token_advantages(SIGNAL, GROUPS, guided())
    none = RTO(guide="x", scale=0)
    assert none.guides() == {} and RTO(guide="x").guides() == {"guide": "x"}
    given = none.token_advantages(SIGNAL, GROUPS, tokens)
    assert torch.equal(given.advantages, same.advantages) and torch.equal(given.known["returns"], same.known["returns"])
    tokens = replace(tokens, measured={**tokens.measured, "guide": tokens.ref_logps})
    assert torch.equal(RTO(guide="x").token_advantages(SIGNAL, GROUPS, tokens).advantages, same.advantages)


@pytest.mark.parametrize("head", [NOTHING, SOMETHING], ids=["no values", "some values"])
@pytest.mark.parametrize("bound", [None, 0.2])
def test_the_expected_gradient_is_that_of_the_rewards_of_whole_responses(bound, head):
    """Over all responses: what tokens get adds up, whatever the values are."""
    world, guide = on_policy(SPEECH), SPEECH.parameters(9)
    objective = RTO(guide="x", scale=0.5, bound=bound, beta=0.3, lam=1.0, gamma=1.0)
    found = expected_gradient(world, objective, head, guide)
    log_ratios = 0.5 * (SPEECH.logps(guide) - SPEECH.logps(world.reference)).detach()
    beside = (log_ratios if bound is None else log_ratios.clamp(-bound, bound)).sum(-1)
    whole = world.expected(lambda own, reference: world.rewards + beside)
    torch.testing.assert_close(found, -world.gradient(whole - 0.3 * world.divergence()), **EXACT)
    assert bound is None or (log_ratios.abs() > bound).any()


# --- in runs --------------------------------------------------------------------------------------------------------

GUIDED = "candidates/w-1.00-0.00"
ROLLOUTS = {"rounds": 2, "samples": 3, "prompts": 4, "prompts_per_step": 4, "max_new_tokens": 5}


@pytest.fixture(scope="module")
def settings(tiny_model_path, small_run, tmp_path_factory):
    prompts = write_prompts(tmp_path_factory.mktemp("data") / "prompts.jsonl")
    loss = {"name": "rto", "guide": str(small_run / GUIDED), "scale": 0.5, "bound": 0.2}
    search, train = {"name": "grid", "points": 3}, {"steps": 4, "lr": 2e-3, "together": 2}
    return settings_of(tiny_model_path, prompts, loss=loss, search=search, train=train, rollouts=ROLLOUTS)


def test_interrupted_and_resumed_equals_unbroken_byte_for_byte(settings, tmp_path):
    run.start(settings, tmp_path / "unbroken", registry.discover(), Observer())
    record = json.loads((tmp_path / "unbroken" / "run.json").read_text())
    assert set(record["guides"]) == {"guide"}
    with pytest.raises(KeyboardInterrupt):
        run.start(settings, tmp_path / "run", registry.discover(), StopAfterSteps(7))
    run.resume(tmp_path / "run", registry.discover(), Observer())
    assert contents(tmp_path / "run") == contents(tmp_path / "unbroken")


def test_the_guide_is_read_once_in_a_round_and_is_the_adapter(settings, tmp_path, monkeypatch):
    """The loss's batches have what was measured, and the log-probabilities are those of peft's own model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    measured, seen = [], []
    measure, loss_of = RTO.measure, loop.loss_of
    monkeypatch.setattr(RTO, "measure", lambda self, batch: measured.append(batch) or measure(self, batch))

    def looking(batch, job, *others):
        seen.append((batch, job))
        return loss_of(batch, job, *others)

    monkeypatch.setattr(loop, "loss_of", looking)
    sequences: dict[tuple[int, ...], int] = {}
    placed = loop.Frozen.batch

    def keeping(self, share, scored, hidden):
        sequences.update({each.ids: each.prompt_length for each in share.sequences})
        return placed(self, share, scored, hidden)

    monkeypatch.setattr(loop.Frozen, "batch", keeping)
    run.start(settings, tmp_path / "run", registry.discover(), Observer())
    assert measured and all(batch.guides.keys() == {"guide"} and not batch.known for batch in measured)
    assert len(measured) < len(seen)
    assert all(not batch.guides and not job.guides and "guide" in batch.known for batch, job in seen)
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(settings.model.path), settings.loss.options["guide"]
    )
    sums = []
    for own, prompt in sequences.items():
        ids = torch.tensor([own])
        with torch.no_grad():
            scores = plain(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        sums.append(float(scores[prompt - 1 :].sum()))
    totals = [total for batch, _ in seen for total in batch.known["guide"].sum(-1).tolist()]
    assert all(min(abs(total - each) for each in sums) < 1e-3 for total in totals)


def test_one_line_on_the_assistant_with_an_earlier_runs_adapter(tmp_path):
    from moalign import config

    (tmp_path / "pairs.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"Advise me about fear {n}.", "chosen": "Talk to a friend.", "rejected": "No."})
            + "\n"
            for n in range(8)
        )
    )
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": each}) + "\n" for each in PROMPTS[:4]))
    common = {
        "model": {"path": "tiny-assistant"},
        "search": {"name": "grid", "points": 1},
        "train": {"steps": 2, "lr": 1e-3, "pairs_per_step": 4},
        "evaluate": {"samples": 1, "max_new_tokens": 8},
    }

    def trained(name: str, **content: Any) -> tuple[Path, list[dict[str, Any]]]:
        run.start(config.from_mapping(common | content), tmp_path / name, registry.discover(), Observer())
        (folder,) = (tmp_path / name / "candidates").iterdir()
        return folder, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    earlier, _ = trained("dpo", objectives={"kind": None}, data={"path": str(tmp_path / "pairs.jsonl")}, loss="dpo")
    _, lines = trained(
        "rto",
        objectives={"short": {"reward": "length"}},
        data={"path": str(tmp_path / "prompts.jsonl"), "held_out": 0.25},
        rollouts={"rounds": 2, "samples": 3, "prompts": 3, "prompts_per_step": 3, "max_new_tokens": 12},
        loss={"name": "rto", "guide": str(earlier)},
    )
    assert len(lines) == 2 and all(line["gradient_norm"] > 0 for line in lines)
