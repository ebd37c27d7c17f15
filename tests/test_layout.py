"""How sequences lie in the model's input, and how they are cut into passes: content, positions, masks, padding."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_batching import dataset_of

from moalign.data.tokenise import Sequence
from moalign.engine.layout import lay_out, one_by_one
from moalign.engine.passes import Packing, _cuts, arrange, pack, pair_passes

PACKING = Packing(attention=1 / 1536, overhead=32, limit=10**6, shares=True)


def random_sequences(seed: int, prompts: int = 4, longest: int = 12, responses: int = 3) -> list[Sequence]:
    rng = Random(seed)
    made = []
    for _ in range(prompts):
        prompt = [rng.randrange(3, 100) for _ in range(rng.randint(1, longest))]
        for _ in range(rng.randint(1, responses)):
            response = [rng.randrange(3, 100) for _ in range(rng.randint(1, longest))]
            made.append(Sequence((*prompt, *response), len(prompt)))
    return made


def test_a_shared_row_by_hand():
    layout = lay_out([Sequence((5, 6, 7, 8), 2), Sequence((5, 6, 9), 2), Sequence((5, 6, 3, 4, 1), 2)], [[0, 1, 2]], 0)
    assert layout.input_ids.tolist() == [[5, 6, 7, 3, 4]]  # last tokens predict nothing and are not read
    assert layout.position_ids is not None and layout.position_ids.tolist() == [[0, 1, 2, 2, 3]]
    assert layout.source.tolist() == [1, 2, 1, 1, 3, 4]
    assert layout.labels.tolist() == [7, 8, 9, 3, 4, 1]
    assert layout.counts == (2, 1, 3)
    placed = layout.place(torch.tensor([1.0, 2, 3, 4, 5, 6]))
    assert placed.tolist() == [[0, 1, 2, 0], [0, 3, 0, 0], [0, 4, 5, 6]]
    assert layout.mask.tolist() == [[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1]]
    mask = layout.attention(torch.float32)
    assert mask is not None
    seen = [[key for key in range(5) if mask[0, 0, query, key] == 0] for query in range(5)]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4]]


@given(seed=st.integers(0, 10**6), multiple=st.sampled_from([1, 8]), longest=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_every_response_token_sees_its_own_sequence_and_nothing_else(seed, multiple, longest):
    """Followed through mask and positions, what each scored position sees is exactly the tokens before its label."""
    sequences = random_sequences(seed, longest=longest)
    layout = lay_out(sequences, pack(sequences, PACKING), 0, multiple)
    rows, length = layout.input_ids.shape
    assert length % multiple == 0
    mask = layout.attention(torch.float32)
    if mask is None:
        mask = torch.full((rows, 1, length, length), -1.0).triu(1)
    assert (mask == 0).any(-1).all()  # a row of nothing but lowest values would be a softmax over padding
    positions = layout.position_ids if layout.position_ids is not None else torch.arange(length).expand(rows, -1)
    number = 0
    for index, sequence in enumerate(sequences):
        for place in range(sequence.prompt_length, len(sequence.ids)):
            row, column = divmod(int(layout.source[number]), length)
            seen = (mask[row, 0, column] == 0).nonzero()[:, 0]
            order = positions[row, seen]
            assert order.tolist() == list(range(place))
            assert tuple(layout.input_ids[row, seen].tolist()) == sequence.ids[:place]
            assert int(layout.labels[number]) == sequence.ids[place]
            assert int(layout.target[number]) == index * layout.width + place - 1
            number += 1
    assert number == len(layout.labels) == sum(layout.counts)


def test_prompts_that_differ_do_not_share_a_row():
    with pytest.raises(ValueError, match="their prompts differ"):
        lay_out([Sequence((5, 6, 7), 2), Sequence((5, 7, 7), 2)], [[0, 1]], 0)
    assert pack([Sequence((5,) * 90 + (7,), 90), Sequence((6,) * 90 + (7,), 90)], PACKING) == [[0], [1]]


def test_prompts_are_shared_where_that_is_cheaper():
    long_prompt = [Sequence((5,) * 300 + (number,) * 20, 300) for number in range(4)]
    assert pack(long_prompt, PACKING) == [[0, 1, 2, 3]]
    short_prompt = [Sequence((5,) + (number,) * 900, 1) for number in range(4)]
    assert pack(short_prompt, PACKING) == [[0], [1], [2], [3]]  # attention over 3600 positions costs more
    assert pack(long_prompt, Packing(1 / 1536, 32, 10**6)) == [[0], [1], [2], [3]]
    assert pack(long_prompt, Packing(1 / 1536, 32, 10**6, shares=True, longest=345)) == [[0, 1], [2, 3]]


@given(seed=st.integers(0, 10**6), limit=st.sampled_from([1, 60, 10**6]))
@settings(max_examples=60, deadline=None)
def test_passes_hold_every_unit_once_within_the_limit(seed, limit):
    rng = Random(seed)
    units = [random_sequences(rng.randrange(10**6), prompts=1, longest=30) for _ in range(rng.randint(1, 7))]
    passes = arrange(units, Packing(attention=0.001, overhead=40, limit=limit, shares=True))
    assert sorted(unit for each in passes for unit in each.units) == list(range(len(units)))
    for each in passes:
        sequences = [sequence for unit in each.units for sequence in units[unit]]
        assert sorted(index for row in each.rows for index in row) == list(range(len(sequences)))
        assert lay_out(sequences, each.rows, 0).input_ids.numel() <= limit or len(each.units) == 1


@given(seed=st.integers(0, 10**6), overhead=st.sampled_from([0, 5, 40, 10**6]), limit=st.sampled_from([1, 60, 10**6]))
@settings(max_examples=60, deadline=None)
def test_no_other_cuts_cost_less(seed, overhead, limit):
    rng = np.random.default_rng(seed)
    number = int(rng.integers(1, 8))
    rows, lengths = rng.integers(1, 4, number), np.sort(rng.integers(1, 40, number))
    packing = Packing(attention=0.001, overhead=overhead, limit=limit)

    def cost(cuts: list[tuple[int, int]]) -> float:
        total = 0.0
        for start, end in cuts:
            count, length = int(rows[start:end].sum()), int(lengths[end - 1])
            total += np.inf if count * length > limit and end - start > 1 else overhead
            total += packing.cost(count, length, alone=False)
        return total

    every = []
    for chosen in range(2 ** (number - 1)):
        ends = [place + 1 for place in range(number - 1) if chosen >> place & 1]
        every.append(list(zip([0, *ends], [*ends, number], strict=True)))
    assert cost(list(_cuts(rows, lengths, packing))) <= min(map(cost, every)) + 1e-6


def test_lengths_far_apart_leave_hardly_any_padding():
    """Dialogue-like: prompts three quarters of the row, lengths varying tenfold, 16 pairs in a step."""
    rng = Random(0)
    units = []
    for _ in range(16):
        total = int(48 * 10 ** rng.random())
        prompt = tuple(rng.randrange(3, 100) for _ in range(total * 3 // 4))
        units.append([Sequence(prompt + (9,) * (total - len(prompt)), len(prompt)) for _ in range(2)])
    plain = one_by_one([sequence for unit in units for sequence in unit], 0)
    real = sum(len(sequence.ids) - 1 for unit in units for sequence in unit)
    assert 1 - real / plain.input_ids.numel() > 0.4
    used = filled = 0
    for each in arrange(units, PACKING):
        layout = lay_out([sequence for unit in each.units for sequence in units[unit]], each.rows, 0)
        used += int((layout.segments != -1).sum())
        filled += layout.input_ids.numel()
    assert 1 - used / filled < 0.1
    assert filled < 0.7 * real  # fewer positions than there are tokens: prompts are read once


def test_pairs_of_a_group_stay_together_and_sequences_stand_once():
    dataset = dataset_of([3, 1, 2])
    passes = pair_passes(dataset, np.array([4, 0, 3, 2, 5, 1, 0]), Packing(0.0, 0.0, limit=1, shares=True))
    groups = [sorted({int(dataset.groups[dataset.pairs[pair, 0]]) for pair in each.pairs}) for each in passes]
    assert sorted(groups) == [[0], [1], [2]]
    assert sorted(np.concatenate([each.pairs for each in passes]).tolist()) == [0, 0, 1, 2, 3, 4, 5]
    for each in passes:
        assert sorted(each.sequences.tolist()) == sorted(set(dataset.pairs[each.pairs].reshape(-1).tolist()))
