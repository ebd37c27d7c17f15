"""Batches are a function of (seed, step); epochs neither drop nor repeat; tensors say what is known of the pairs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_tokenise import build

from moalign.data.batching import collate, group_pair_indices, pair_indices
from moalign.data.dataset import PairDataset
from moalign.data.pairing import scored
from moalign.data.tokenise import Sequence, Tokeniser
from moalign.types import Record, Sample


def dataset_of(group_sizes):
    """One group per entry, with that many pairs, every pair of sequences of its own."""
    pairs = sum(group_sizes)
    groups = np.repeat(np.arange(len(group_sizes)), np.array(group_sizes) * 2)
    return PairDataset(
        objectives=("x",),
        sequences=(Sequence((1, 2), 1),) * (2 * pairs),
        samples=(Sample("", ""),) * (2 * pairs),
        pairs=np.arange(2 * pairs).reshape(pairs, 2),
        pair_objective=np.zeros(pairs, dtype=np.int64),
        strength=np.ones(pairs),
        rewards=np.zeros((2 * pairs, 1)),
        groups=groups,
        counts={},
    )


@given(pairs=st.integers(1, 40), per_step=st.integers(1, 17), seed=st.integers(0, 2**63), epochs=st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_every_pair_once_per_epoch(pairs, per_step, seed, epochs):
    dataset = dataset_of([1] * pairs)
    steps = -(-epochs * pairs // per_step)
    chain = np.concatenate([pair_indices(dataset, seed, step, per_step) for step in range(steps)])
    assert len(chain) == steps * per_step
    for epoch in range(epochs):
        assert sorted(chain[epoch * pairs : (epoch + 1) * pairs]) == list(range(pairs))
    step = steps - 1  # asked for alone, and anew
    np.testing.assert_array_equal(pair_indices(dataset_of([1] * pairs), seed, step, per_step), chain[-per_step:])


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=12), per_step=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_every_group_whole_and_once_per_epoch(sizes, per_step, seed):
    dataset = dataset_of(sizes)
    steps = len(sizes)  # per_step whole epochs
    chain = np.concatenate([group_pair_indices(dataset, seed, step, per_step) for step in range(steps)])
    assert sorted(chain) == sorted(list(range(sum(sizes))) * per_step)
    groups = dataset.groups[dataset.pairs[group_pair_indices(dataset, seed, 0, per_step), 0]]
    assert all((groups == group).sum() % sizes[group] == 0 for group in set(groups))


def test_epochs_and_seeds_differ():
    dataset = dataset_of([1] * 50)
    orders = {tuple(pair_indices(dataset, seed, epoch, 50)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_the_order_is_the_same_on_every_machine():
    assert pair_indices(dataset_of([1] * 8), 0, 0, 8).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]


@pytest.fixture(scope="module")
def scored_dataset():
    rows = [
        Record(prompt, tuple(f"{prompt} {i} {'x' * i}" for i in range(4)), {"h": (0.0, 1.0, 2.0, 3.0)}, group=prompt)
        for prompt in ("why", "the sky is blue")
    ]
    return scored(rows, Tokeniser.of(build()), ["h"])


def test_collate(scored_dataset):
    torch = pytest.importorskip("torch")
    indices, rows = np.array([8, 0, 3, 8]), np.array([5, 4, 7, 0, 2, 1, 3])
    named = np.unique(scored_dataset.pairs[indices])
    rows = rows[np.isin(rows, named)]
    assert sorted(rows) == sorted(named) and list(rows) != sorted(rows)
    batch = collate(scored_dataset, indices, rows)
    np.testing.assert_array_equal(rows[batch["pairs"].numpy()], scored_dataset.pairs[indices])
    np.testing.assert_array_equal(batch["rewards"].numpy(), scored_dataset.rewards[rows].astype(np.float32))
    assert batch["groups"].tolist() == scored_dataset.groups[rows].tolist()
    assert batch["pair_objective"].tolist() == [-1] * 4
    kinds = {"rewards": torch.float32, "strength": torch.float32}
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        name: kinds.get(name, torch.int64) for name in batch
    }
