"""PRIME as mathematics: its process rewards and their two streams by hand, its limits, and its process model's loss."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tabular import SPEECH, plain_terms
from tabular_responses import batch_of
from torch import Tensor

from moalign.api import DataError, Tokens
from moalign_plugins.objectives.prime import PRIME, ProcessModel, against_others, normalised, ranked
from moalign_plugins.objectives.rloo import RLOO
from moalign_plugins.reward_models.implicit_outcome import ImplicitFromOutcomes

EXACT = {"rtol": 0, "atol": 1e-12}
LENGTHS = torch.tensor([6, 1, 3, 5, 2, 4, 6, 3])
MASK = (torch.arange(6) < LENGTHS[:, None]).double()
GROUPS = torch.tensor([4, 9, 4, 9, 4, 9, 4, 2])
OUTCOME = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.3, 1.0, 1.0, 0.5], dtype=torch.float64)


def drawn(seed: int) -> Tensor:
    return torch.randn(*MASK.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens_of(process: Tensor | None = None) -> Tokens:
    """``process``: log-ratios of the process model."""
    reference = -drawn(1).abs() * MASK
    own = drawn(2) if process is None else process
    return Tokens(
        mask=MASK,
        ended=torch.ones(8, dtype=torch.bool),
        old_logps=-drawn(0).abs() * MASK,
        ref_logps=reference,
        measured={"process": reference + own * MASK},
    )


def by_hand(objective: PRIME, tokens: Tokens, outcome: list[float]) -> list[list[float]]:
    """Before whitening, in loops, from the text of the method; what belongs to no kept prompt is 0."""
    members: dict[int, list[int]] = {}
    for row, group in enumerate(GROUPS.tolist()):
        members.setdefault(group, []).append(row)
    low = -math.inf if objective.lowest is None else objective.lowest
    high = math.inf if objective.highest is None else objective.highest
    kept = {g: low <= sum(outcome[r] for r in rows) / len(rows) <= high for g, rows in members.items()}
    assert tokens.ref_logps is not None
    process = (tokens.measured["process"] - tokens.ref_logps).tolist()
    largest = 0.0
    for row, length in enumerate(LENGTHS.tolist()):
        if kept[int(GROUPS[row])]:
            largest = max([largest, *(abs(sum(process[row][t:length])) for t in range(length))])
    found = [[0.0] * 6 for _ in LENGTHS]
    for group, rows in members.items():
        size = len(rows)
        if size == 1 or not kept[group]:
            continue
        scaled = {row: [q / (largest + 1e-6) for q in process[row][: LENGTHS[row]]] for row in rows}
        means = {row: sum(scaled[row]) / len(scaled[row]) for row in rows}
        for row in rows:
            own = outcome[row] - sum(outcome[other] for other in rows if other != row) / (size - 1)
            rewards = [size / (size - 1) * q - sum(means.values()) / (size - 1) for q in scaled[row]]
            rewards[-1] += own
            for t in range(len(rewards)):
                found[row][t] = sum(objective.gamma**k * each for k, each in enumerate(rewards[t:]))
    return found


@pytest.mark.parametrize("options", [{}, {"gamma": 0.9}, {"lowest": 0.2, "highest": 0.6}], ids=str)
def test_both_streams_are_those_by_hand(options):
    objective, tokens = PRIME(whiten=False, **options), tokens_of()
    given = objective.token_advantages(OUTCOME, GROUPS, tokens)
    expected = torch.tensor(by_hand(objective, tokens, OUTCOME.tolist()), dtype=torch.float64)
    torch.testing.assert_close(given.advantages, expected, **EXACT)
    assert (given.advantages * (1 - MASK) == 0).all() and (given.advantages[7] == 0).all()
    kept = (expected.abs().sum(1) > 0).tolist()
    assert kept == [True, "lowest" not in options] * 3 + [True, False]  # of group 9 two thirds are right
    torch.testing.assert_close(given.known["kept"][:7].amax(1), torch.tensor(kept[:7]).double(), **EXACT)
    torch.testing.assert_close(given.known["outcome"], OUTCOME[:, None] * MASK, **EXACT)


def test_whitened_they_have_mean_nothing_and_deviation_one_over_the_kept_tokens():
    objective = PRIME(highest=0.6)
    found = objective.token_advantages(OUTCOME, GROUPS, tokens_of())
    kept = found.known["kept"] > 0
    assert kept[[0, 2, 4, 6, 7]].any(1).all() and not kept[[1, 3, 5]].any()
    assert float(found.advantages[kept].mean()) == pytest.approx(0, abs=1e-12)
    assert float(found.advantages[kept].std()) == pytest.approx(1, abs=1e-6)
    assert (found.advantages[~kept] == 0).all()
    plain = replace(objective.token_advantages(OUTCOME, GROUPS, tokens_of()), figures={})
    assert torch.equal(plain.advantages, found.advantages)


def test_where_no_prompt_is_kept_nothing_is_learned_and_nothing_is_undefined():
    given = PRIME(lowest=0.9).token_advantages(OUTCOME, GROUPS, tokens_of())
    assert (given.advantages == 0).all() and (given.known["kept"] == 0).all() and given.figures["kept"] == 0


def test_a_process_model_that_is_the_reference_leaves_rloo():
    """At the start: the process rewards are 0, and every token of a response has the outcome's advantage."""
    given = PRIME(whiten=False).token_advantages(OUTCOME, GROUPS, tokens_of(drawn(2) * 0))
    plain = RLOO(beta=0.0).advantages(OUTCOME, GROUPS, torch.zeros(8, dtype=torch.float64))
    torch.testing.assert_close(given.advantages, plain[:, None] * MASK, **EXACT)
    assert given.figures["ranked"] == 0.5


def test_a_constant_of_a_prompt_cancels_in_both_streams():
    constants = torch.tensor([0.4, -3.0, 7.0]).double()[torch.searchsorted(torch.tensor([2, 4, 9]), GROUPS)]
    rewards = normalised(drawn(2) * MASK, MASK)
    moved = against_others(rewards + constants[:, None] * MASK, MASK, GROUPS)
    torch.testing.assert_close(moved, against_others(rewards, MASK, GROUPS), **EXACT)
    for whiten in (False, True):
        objective, tokens = PRIME(whiten=whiten), tokens_of()
        before = objective.token_advantages(OUTCOME, GROUPS, tokens).advantages
        after = objective.token_advantages(OUTCOME + constants, GROUPS, tokens).advantages
        torch.testing.assert_close(after, before, rtol=0, atol=1e-11)


def test_no_return_of_process_rewards_is_larger_than_one():
    scaled = normalised(drawn(2) * MASK, MASK)
    to_go = scaled.flip(1).cumsum(1).flip(1)
    assert float(to_go.abs().max()) == pytest.approx(1, abs=1e-5)
    assert (normalised(MASK * 0, MASK) == 0).all()


def test_process_rewards_are_ranked_within_prompts():
    groups, outcome = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([1.0, 0, 0, 1, 1]).double()
    scores = torch.tensor([3.0, 1, 9, 2, 9]).double()
    assert ranked(scores, outcome, groups) == pytest.approx((1 + 0 + 0.5) / 3)
    assert ranked(scores, outcome * 0, groups) == 0.5


# --- the process model ----------------------------------------------------------------------------------------------

REFERENCE, POLICY = SPEECH.parameters(1), SPEECH.parameters(0)
ROWS = torch.arange(6)
RIGHT = torch.tensor([1.0, 0, 0.25, 1, 0, 1], dtype=torch.float64)


def batch(policy: Tensor = POLICY, outcome: Tensor = RIGHT, kept: Tensor | None = None, **more: Any):
    mask = SPEECH.mask
    known = {"outcome": outcome[:, None] * mask, "kept": mask if kept is None else kept[:, None] * mask}
    return batch_of(SPEECH, policy, ROWS, RIGHT, reference=REFERENCE, known=known, **more)


@pytest.mark.parametrize("beta", [0.05, 0.7])
def test_its_loss_is_the_cross_entropy_of_outcome_and_log_ratio(beta):
    """As the reward model that is trained from a file, and as torch has it."""
    given = batch()
    ratios = ((given.logps - given.ref_logps) * given.mask).sum(-1)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(beta * ratios, RIGHT, reduction="none")
    found = ProcessModel(beta=beta).loss(given, plain_terms(6))
    torch.testing.assert_close(found, expected, **EXACT)
    from_file = ImplicitFromOutcomes(beta=beta).loss(replace(given, rewards=RIGHT[:, None]))
    torch.testing.assert_close(found, from_file, **EXACT)


def test_at_the_reference_it_is_log_2_and_prompts_that_are_left_out_have_none():
    same = batch(REFERENCE.detach().clone().requires_grad_())
    found = ProcessModel().loss(same, plain_terms(6))
    torch.testing.assert_close(found, torch.full((6,), math.log(2), dtype=torch.float64), **EXACT)
    kept = torch.tensor([1.0, 0, 1, 0, 0, 1], dtype=torch.float64)
    losses = ProcessModel().loss(batch(kept=kept), plain_terms(6))
    assert ((losses > 0) == (kept > 0)).all()
    (slope,) = torch.autograd.grad(ProcessModel().loss(batch(kept=kept * 0), plain_terms(6)).sum(), POLICY)
    assert (slope == 0).all()


def test_what_is_no_outcome_is_refused():
    for outcome in (RIGHT - 0.5, RIGHT + 0.5):
        with pytest.raises(DataError, match=r"not from 0 \(wrong\) to 1 \(right\)"):
            ProcessModel().loss(batch(outcome=outcome), plain_terms(6))


def test_the_companion_has_the_options():
    objective = PRIME(process_beta=0.3, process_lr=4.0)
    assert objective.companion() == ProcessModel(beta=0.3) and objective.lr_factor("companion") == 4.0
