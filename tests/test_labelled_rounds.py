"""Losses on labelled pairs with sampled responses: combined rewards say which of two is the better one."""

from __future__ import annotations

import numpy as np
import pytest
from references import HALF, online, trained
from torch import Tensor

from moalign.api import Batch, Candidate, PairTerms, Preference
from moalign.data.dataset import PairDataset
from moalign.data.labelling import label
from moalign.data.tokenise import Sequence
from moalign.errors import ConfigError, TrainingError
from moalign.sweeps.candidate import batch_source
from moalign.types import Sample
from moalign_plugins.objectives.dpo import DPO

LABELLED = {"loss": {"name": "dpo", "beta": 0.1}}


def dataset(groups: list[int], pairs: list[tuple[int, int]]) -> PairDataset:
    count = len(groups)
    return PairDataset(
        objectives=("a",),
        sequences=tuple(Sequence((1, 2 + row), 1) for row in range(count)),
        samples=(Sample("", ""),) * count,
        pairs=np.array(pairs, dtype=np.int64).reshape(-1, 2),
        pair_objective=np.full(len(pairs), -1, dtype=np.int64),
        strength=np.ones(len(pairs)),
        rewards=np.zeros((count, 1)),
        groups=np.array(groups, dtype=np.int64),
        counts={},
    )


SIGNAL = np.array([1.0, 3.0, 1.0, 0.0, 0.5, 0.5, np.nan])
GIVEN = dataset([0, 0, 0, 1, 1, 2, 2], [(0, 1), (0, 2), (1, 2), (3, 4)])


def test_the_better_one_is_the_chosen_one():
    found = label(GIVEN, SIGNAL, "all", 0.0)
    assert found.dataset.pairs.tolist() == [[1, 0], [1, 2], [4, 3]]
    assert found.dataset.strength.tolist() == [2.0, 2.0, 0.5]
    assert (found.ties, found.close, found.gap) == (1, 0, 1.5)
    assert found.figures == {"pairs": 3.0, "pairs/ties": 1.0, "pairs/close": 0.0, "pairs/gap": 1.5}


def test_pairs_that_differ_by_less_than_the_gap_are_dropped_and_counted():
    found = label(GIVEN, SIGNAL, "all", 2.0)  # as much as the gap is enough
    assert found.dataset.pairs.tolist() == [[1, 0], [1, 2]] and (found.ties, found.close) == (1, 1)
    none = label(GIVEN, SIGNAL, "all", 2.1)
    assert len(none.dataset.pairs) == 0 and (none.ties, none.close) == (1, 3) and np.isnan(none.gap)


def test_of_each_prompt_the_two_that_differ_most():
    found = label(GIVEN, SIGNAL, "best-worst", 0.0)
    assert found.dataset.pairs.tolist() == [[1, 0], [4, 3]] and (found.ties, found.close) == (0, 0)
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(6), 5).tolist()
    every = [(i, j) for i in range(30) for j in range(i + 1, 30) if groups[i] == groups[j]]
    signal = rng.normal(size=30)
    kept = label(dataset(groups, every), signal, "best-worst", 0.0).dataset.pairs
    for chosen, rejected in kept.tolist():
        own = signal[np.array(groups) == groups[chosen]]
        assert signal[chosen] == own.max() and signal[rejected] == own.min()
    assert len(kept) == 6
    alike = label(dataset([0, 0], [(0, 1)]), np.ones(2), "best-worst", 0.0)
    assert (alike.ties, len(alike.dataset.pairs)) == (1, 0)


@pytest.fixture(scope="module")
def rounds():
    return online(**LABELLED)


def weighed(name: str, weight: float) -> Candidate:
    return Candidate(name, Preference("weights", {"harmless": 1 - weight, "helpful": weight}))


def test_a_rounds_pairs_are_labelled_by_each_candidates_own_combined_reward(rounds):
    """Both are asked about the same responses of the base."""
    found = {}
    for weight in (0.0, 1.0):
        rounds.first_round.pop("unused", None)
        source = batch_source(weighed(f"w{weight}", weight), rounds)
        data, _ = source.at(0)
        combined = data.rewards @ np.array([1 - weight, weight])
        chosen, rejected = data.pairs.T
        assert (combined[chosen] > combined[rejected]).all() and len(data.pairs) > 0
        np.testing.assert_allclose(data.strength, combined[chosen] - combined[rejected])
        assert source.figures["pairs"] == len(data.pairs)
        assert source.figures["signal"] == pytest.approx(combined.mean())
        found[weight] = {tuple(pair) for pair in data.pairs.tolist()}
    assert found[0.0] & {pair[::-1] for pair in found[1.0]}  # they disagree about some


def test_a_round_without_a_label_says_why():
    workshop = online(**LABELLED, rollouts={"rounds": 1, "samples": 3, "prompts": 2, "max_new_tokens": 4, "gap": 1e6})
    with pytest.raises(TrainingError, match=r"round 0: no pair .* differ by less than rollouts\.gap, 1e\+06"):
        batch_source(HALF, workshop).at(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollouts": {"pairs": "best-worst"}}, r"rollouts\.pairs: of losses on labelled pairs, and loss 'rebel'"),
        ({"rollouts": {"gap": 0.5}}, r"rollouts\.gap: of losses on labelled pairs, and loss 'rebel'"),
        (
            {"loss": "dpo", "combine": "modpo"},
            "combine: 'modpo' works on labelled pairs, but loss 'dpo' trains on pairs of sampled responses, which",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        online(**changes)


def test_each_step_tells_what_every_objective_says_and_the_loss_is_shown_the_labels_alone(rounds, monkeypatch):
    """Of the sampled responses the rewards, and of the step's pairs which one each objective's own rewards prefer."""
    shown, loss = [], DPO.loss

    def watching(self: DPO, batch: Batch, terms: PairTerms) -> Tensor:
        shown.append(batch)
        return loss(self, batch, terms)

    monkeypatch.setattr(DPO, "loss", watching)
    ((_, told),) = trained(rounds, None)
    assert len(told.steps) == 6 and all(batch.rewards is None and batch.margins is None for batch in shown)
    source = batch_source(HALF, rounds)
    data, pairs = source.at(0)
    lengths = np.array([len(sequence.response) for sequence in data.sequences])
    first, told_of = told.steps[0], 0
    for place, name in enumerate(rounds.plan.objectives):
        assert first[f"{name}/reward"] == pytest.approx(source.figures[f"{name}/reward"], rel=1e-12)
        difference = data.rewards[data.pairs[pairs, 0], place] - data.rewards[data.pairs[pairs, 1], place]
        better = np.where(difference[:, None] > 0, data.pairs[pairs], data.pairs[pairs, ::-1])[difference != 0]
        if not len(better):
            continue
        told_of += 1
        assert first[f"{name}/better_tokens"] == pytest.approx(lengths[better[:, 0]].mean(), rel=1e-6)
        assert first[f"{name}/worse_tokens"] == pytest.approx(lengths[better[:, 1]].mean(), rel=1e-6)
        # the policy is the base yet
        assert first[f"{name}/loss"] == pytest.approx(np.log(2), rel=1e-6)
        assert (first[f"{name}/accuracy"], first[f"{name}/margin"]) == (0.5, 0.0)
        assert 0 <= first[f"{name}/ranking_accuracy"] <= 1
    assert told_of == 2
