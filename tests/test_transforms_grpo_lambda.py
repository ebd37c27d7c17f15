"""GRPO-lambda: its price by hand, its limits, and its rules where groups or lengths are alike."""

from __future__ import annotations

import math

import pytest
import torch
from sweeps import steps_on_the_assistant
from test_transforms import about, shaped, transform
from torch import Tensor

EXACT = {"rtol": 0, "atol": 1e-14}
GROUPS = [3, 3, 3, 3, 8, 8, 8, 8, 1, 1, 1, 1, 5, 5, 5, 5]
RIGHT = torch.tensor([1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
LENGTHS = torch.tensor([10, 20, 33, 500, 7, 9, 11, 13, 6, 8, 1, 1, 2, 4, 6, 8])
TOLD = about(16, groups=GROUPS, lengths=LENGTHS)


def by_hand(rewards: list[float], lengths: list[int], alpha: float) -> list[float]:
    """Of one group in which length has a price."""
    right = [length for reward, length in zip(rewards, lengths, strict=True) if reward]
    mean = sum(right) / len(right)
    deviation = math.sqrt(sum((each - mean) ** 2 for each in right) / max(1, len(right) - 1))
    found = []
    for reward, length in zip(rewards, lengths, strict=True):
        beyond = (length - mean) / deviation if deviation else 0.0
        found.append(1 - alpha / (1 + math.exp(-beyond)) if reward else 0.0)
    return found


def places(values: Tensor) -> list[int]:
    """The groups, in order of appearance, in which a right answer gets less than 1."""
    rows = [row for row in range(16) if RIGHT[row] and values[row] < 1]
    return sorted({row // 4 for row in rows})


def test_the_best_groups_pay_by_hand():
    """Ratios 3/4, 1/4, 1/2 and 0: with a share of one half, the first and the third."""
    values = shaped(transform("grpo-lambda", share=0.5, alpha=0.4), RIGHT, TOLD)
    expected = RIGHT.clone()
    for start in (0, 8):
        own = slice(start, start + 4)
        expected[own] = torch.tensor(by_hand(RIGHT[own].tolist(), LENGTHS[own].tolist(), 0.4), dtype=torch.float64)
    torch.testing.assert_close(values, expected, **EXACT)
    assert values[8] + values[9] == pytest.approx(2 - 0.4)  # sigmoid(z) + sigmoid(-z) = 1
    assert values[0] > values[1] > values[2]


def test_without_a_share_it_is_right_or_wrong():
    assert torch.equal(shaped(transform("grpo-lambda", share=0), RIGHT, TOLD), RIGHT)
    assert torch.equal(shaped(transform("grpo-lambda", share=1, alpha=0), RIGHT, TOLD), RIGHT)


def test_with_all_of_it_length_has_its_price_everywhere():
    values = shaped(transform("grpo-lambda", share=1, alpha=0.6), RIGHT, TOLD)
    for start in (0, 4, 8):
        own = slice(start, start + 4)
        expected = torch.tensor(by_hand(RIGHT[own].tolist(), LENGTHS[own].tolist(), 0.6), dtype=torch.float64)
        torch.testing.assert_close(values[own], expected, **EXACT)
    assert values[4] == 0.7  # a single right answer is of mean length


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_a_wrong_answer_gets_nothing_however_short_and_wherever_it_stands(share):
    values = shaped(transform("grpo-lambda", share=share), RIGHT, TOLD)
    assert (values[RIGHT == 0] == 0).all() and (values[RIGHT == 1] > 0).all()
    moved = TOLD.lengths.where(RIGHT == 1, 77)
    assert torch.equal(
        shaped(transform("grpo-lambda", share=share), RIGHT, about(16, groups=GROUPS, lengths=moved)), values
    )


def test_a_group_without_a_right_answer_gets_nothing():
    values = shaped(transform("grpo-lambda", share=1), RIGHT * 0, TOLD)
    assert torch.equal(values, RIGHT * 0)


@pytest.mark.parametrize(
    ("share", "paying"), [(0.01, [0]), (0.25, [0]), (0.26, [0, 2]), (0.5, [0, 2]), (0.75, [0, 1, 2])]
)
def test_places_are_rounded_up_and_filled_by_ratio(share, paying):
    assert places(shaped(transform("grpo-lambda", share=share), RIGHT, TOLD)) == paying


def test_seven_hundredths_of_a_hundred_groups_are_seven():
    """0.07 * 100 is above 7 in floating point."""
    assert 0.07 * 100 > 7
    told = about(100, groups=list(range(100)), lengths=torch.arange(100) + 5)
    values = shaped(transform("grpo-lambda", share=0.07), torch.ones(100).double(), told)
    assert (values < 1).nonzero().flatten().tolist() == list(range(93, 100))


def test_of_groups_with_one_ratio_those_with_longer_right_answers_pay():
    lengths = torch.tensor([4, 4, 90, 90, 5, 5, 1, 1, 4, 4, 80, 80])
    rewards = torch.tensor([1.0, 1, 0, 0] * 3).double()
    told = about(12, groups=[0] * 4 + [1] * 4 + [2] * 4, lengths=lengths)
    values = shaped(transform("grpo-lambda", share=1 / 3, alpha=1), rewards, told)
    assert values.tolist() == [1, 1, 0, 0, 0.5, 0.5, 0, 0, 1, 1, 0, 0]
    alike = shaped(transform("grpo-lambda", share=2 / 3, alpha=1), rewards, told)
    assert torch.equal(alike, values)  # one place for the two others, which are alike: neither has it


def test_right_is_more_than_the_threshold():
    rewards = torch.tensor([0.5, 0.51, -3.0, 7.0]).double()
    assert shaped(transform("grpo-lambda", share=0), rewards).tolist() == [0, 1, 0, 1]
    assert shaped(transform("grpo-lambda", share=0, threshold=-4), rewards).tolist() == [1, 1, 1, 1]


def test_one_line_shapes_what_the_assistant_says(tmp_path):
    """Replies with a kind word are right; in half of the groups they pay for their length."""
    lines = steps_on_the_assistant(
        tmp_path,
        prompts=8,
        transform={"name": "grpo-lambda", "share": 0.5},
        loss="grpo",
        rollouts={"rounds": 2, "samples": 4, "prompts": 4, "prompts_per_step": 4, "max_new_tokens": 12},
    )
    assert len(lines) == 2
    for line in lines:
        assert 0.4 * line["right/reward"] < line["right/shaped"] < line["right/reward"]  # alpha is 0.6
