"""Pairs from judgements and from scores, rewards, the split; faults 3, 5, 6 and 7."""

import dataclasses
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_tokenise import build

from moalign.data.dataset import drop_unrewarded, reward_warnings, with_rewards
from moalign.data.pairing import labelled, scored
from moalign.data.split import split
from moalign.data.tokenise import Tokeniser
from moalign.errors import ConfigError, DataError
from moalign.types import Pair, Record

TOKENISER = Tokeniser.of(build())
OBJECTIVES = ("helpful", "short")


def record(prompt="Q", responses=("a", "b", "c"), scores=None, pairs=None, group=None):
    return Record(prompt, responses, scores or {}, pairs or {}, group=prompt if group is None else group)


def texts(dataset):
    """(objective, chosen, rejected, strength) of every pair."""
    return [
        (k, dataset.samples[i].response, dataset.samples[j].response, s)
        for (i, j), k, s in zip(dataset.pairs, dataset.pair_objective, dataset.strength, strict=True)
    ]


def test_labelled_takes_judgements_and_else_scores():
    row = record(scores={"short": (1.0, 3.0, None)}, pairs={"helpful": (Pair(2, 0, 2.0), Pair(0, 1, 0.0))})
    dataset = labelled([row], TOKENISER, OBJECTIVES)
    assert texts(dataset) == [(0, "c", "a", 2.0), (1, "b", "a", 2.0)]
    assert dataset.counts == {
        "dropped pair: tie for helpful": 1,
        "left out: a response without a score for short": 1,
    }
    assert [sample.response for sample in dataset.samples] == ["c", "a", "b"]  # one sequence each, shared by the pairs
    np.testing.assert_array_equal(dataset.rewards, [[np.nan, np.nan], [np.nan, 1.0], [np.nan, 3.0]])
    assert [sample.prompt for sample in dataset.samples] == ["Q"] * 3


def test_a_tie_never_becomes_a_pair_and_judgements_win_over_scores():
    row = record(responses=("a", "b"), scores={"helpful": (1.0, 2.0)}, pairs={"helpful": (Pair(0, 1, 0.0),)})
    with pytest.raises(DataError, match="no pair is left to train on\n  1 x dropped pair: tie for helpful"):
        labelled([row], TOKENISER, OBJECTIVES)
    equal = record(responses=("a", "b", "c"), scores={"helpful": (2.0, 2.0, 1.0)})
    dataset = labelled([equal], TOKENISER, OBJECTIVES)
    assert [pair[:3] for pair in texts(dataset)] == [(0, "a", "c"), (0, "b", "c")]
    assert dataset.counts == {"dropped pair: tie for helpful": 1}


def test_direction_min_negates_scores_and_the_pairs_made_from_them():
    row = record(scores={"short": (1.0, 3.0, 0.0)}, pairs={"helpful": (Pair(0, 1),)})
    dataset = labelled([row], TOKENISER, OBJECTIVES, directions={"helpful": "min", "short": "min"})
    assert texts(dataset)[0] == (0, "a", "b", 1.0)  # a judgement already says who is better
    assert {pair[1:3] for pair in texts(dataset)[1:]} == {("a", "b"), ("c", "a"), ("c", "b")}
    assert dict(zip("abc", dataset.rewards[:, 1], strict=True)) == {"a": -1.0, "b": -3.0, "c": 0.0}
    assert scored([row], TOKENISER, ["short"], directions={"short": "min"}).rewards[1, 0] == -3.0


@given(scores=st.lists(st.none() | st.floats(-5, 5), min_size=2, max_size=6), sign=st.sampled_from(["min", "max"]))
@settings(max_examples=60, deadline=None)
def test_pairs_from_scores_choose_the_better_score(scores, sign):
    row = record(responses=tuple("abcdef"[: len(scores)]), scores={"x": tuple(scores)})
    known = [score for score in scores if score is not None]
    expected = sum(a != b for a, b in combinations(known, 2))
    if expected == 0:
        with pytest.raises(DataError):
            labelled([row], TOKENISER, ["x"], directions={"x": sign})
        return
    dataset = labelled([row], TOKENISER, ["x"], directions={"x": sign})
    difference = dataset.rewards[dataset.pairs[:, 0], 0] - dataset.rewards[dataset.pairs[:, 1], 0]
    assert len(dataset.pairs) == expected
    assert (difference > 0).all()
    np.testing.assert_array_equal(difference, dataset.strength)


def test_scored_pairs_all_responses_with_all_scores():
    row = record(scores={"helpful": (1.0, None, 3.0), "short": (1.0, 2.0, 3.0)})
    dataset = scored([row], TOKENISER, OBJECTIVES)
    assert texts(dataset) == [(-1, "a", "c", 1.0)]
    assert dataset.counts == {"left out: a response without a score for helpful": 1}
    later = scored([row], TOKENISER, OBJECTIVES, later=["helpful"])
    assert [pair[1:3] for pair in texts(later)] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert np.isnan(later.rewards[1, 0])


def test_scored_pairs_responses_from_different_rows_of_one_prompt():
    rows = [record(responses=(text,), scores={"helpful": (i,), "short": (-i,)}) for i, text in enumerate("abc")]
    dataset = scored([*rows, record("R", ("z",), {"helpful": (1,), "short": (1,)})], TOKENISER, OBJECTIVES)
    assert [pair[1:3] for pair in texts(dataset)] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert dataset.counts == {"left out: a response with no other to the same prompt": 1}


def test_rewards_filled_in_later_and_abstentions_dropped():
    row = record()
    dataset = scored([row], TOKENISER, OBJECTIVES, later=OBJECTIVES)
    filled = with_rewards(dataset, np.array([[1.0, 2.0], [np.nan, 1.0], [3.0, 0.0]]))
    kept = drop_unrewarded(filled)
    assert [pair[1:3] for pair in texts(kept)] == [("a", "c")]
    assert kept.counts["dropped pair: a response lacks a reward"] == 2
    assert drop_unrewarded(kept) is kept
    with pytest.raises(DataError, match=r"all 3 pairs .* no response has one for helpful, short"):
        drop_unrewarded(dataset)
    with pytest.raises(DataError, match=r"beyond 1e\+30"):
        with_rewards(dataset, np.full((3, 2), np.inf))
    with pytest.raises(ValueError, match=r"\(3, 1\)"):
        with_rewards(dataset, np.zeros((3, 1)))


def test_chosen_equal_to_rejected_is_dropped():
    same_text = record(responses=("a", "a", "b"), pairs={"helpful": (Pair(0, 1), Pair(0, 2))})
    assert labelled([same_text], TOKENISER, OBJECTIVES).counts == {"dropped pair: chosen equals rejected": 1}
    tokeniser = Tokeniser.of(build("word-level"))  # does not keep spaces
    same_tokens = record(responses=("yes no", "yes  no", "no"), pairs={"helpful": (Pair(0, 1), Pair(0, 2))})
    assert labelled([same_tokens], tokeniser, OBJECTIVES).counts == {
        "dropped pair: chosen equals rejected in tokens": 1
    }


def test_nothing_known_at_all():
    with pytest.raises(DataError, match="no objective has scores or pairs"):
        labelled([record()], TOKENISER, OBJECTIVES)
    with pytest.raises(DataError, match="3 x left out: a response without a score for helpful"):
        scored([record()], TOKENISER, OBJECTIVES)


def test_content_hash_sees_everything_that_is_trained_on():
    def made(**changes):
        row = record(scores={"helpful": (1.0, 2.0, 0.0)}, pairs={"short": (Pair(0, 1, 2.0),)})
        return labelled([dataclasses.replace(row, **changes)], TOKENISER, OBJECTIVES)

    first = made()
    assert first.content_hash == made().content_hash == made(file="elsewhere", line=9).content_hash
    assert made(scores={"helpful": (1.0, 2.0, -0.0)}).content_hash == first.content_hash
    others = [
        made(prompt="R"),
        made(responses=("a", "b", "d")),
        made(scores={"helpful": (1.0, 2.5, 0.0)}),
        made(pairs={"short": (Pair(1, 0, 2.0),)}),
        made(pairs={"short": (Pair(0, 1, 3.0),)}),
        made(pairs={"helpful": (Pair(0, 1, 2.0),)}),
        with_rewards(first, np.zeros_like(first.rewards)),
        dataclasses.replace(first, objectives=("short", "helpful")),
    ]
    assert len({first.content_hash, *(other.content_hash for other in others)}) == 1 + len(others)


def test_arrays_are_read_only_and_shaped():
    rows = [record("Q", scores={"helpful": (1, 2, 3)}), record("R", scores={"helpful": (1, 2, 3)})]
    dataset = labelled(rows, TOKENISER, OBJECTIVES)
    assert dataset.rewards.shape == (6, 2)
    assert dataset.pairs.shape == (6, 2)
    assert dataset.groups.tolist() == [0, 0, 0, 1, 1, 1]
    assert [indices.tolist() for indices in dataset.pairs_of_group] == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="read-only"):
        dataset.pairs[0, 0] = 1


def test_reward_warnings():
    rows = [record(scores={"helpful": (7, 7, 7), "short": (1, 2, 3)})]
    assert scored(rows, TOKENISER, OBJECTIVES).warnings == (
        "helpful: all 3 rewards are 7; it cannot tell responses apart",
    )
    values = np.array([[1.0, 1e7], [2.0, 2e7 + 1], [np.nan, np.nan]])
    assert reward_warnings(values, OBJECTIVES) == ("short varies 1e+07 times as much as helpful; rescale one of them",)
    assert reward_warnings(np.array([[1.0, 3.0], [2.0, np.nan]]), OBJECTIVES) == ()


def test_the_smallest_and_the_largest_numbers_are_scales_too():
    smallest, largest = 5e-324, 1e308
    for one, other in ((1.0, smallest), (largest, 1.0), (largest, smallest)):
        (warning,) = reward_warnings(np.array([[0.0, 0.0], [one, other]]), OBJECTIVES)
        assert f"{OBJECTIVES[0]} varies" in warning and f"as much as {OBJECTIVES[1]}" in warning
    assert reward_warnings(np.array([[-largest, -largest], [largest, largest]]), OBJECTIVES) == ()


# --- split ----------------------------------------------------------------------------------------------------------

GROUPS = st.lists(st.integers(0, 30), min_size=2, max_size=60).filter(lambda groups: len(set(groups)) > 1)


@given(groups=GROUPS, seed=st.integers(0, 2**32), share=st.floats(0, 0.99))
@settings(max_examples=100, deadline=None)
def test_split_keeps_groups_whole(groups, seed, share):
    records = [record(f"{i}", group=f"g{g}") for i, g in enumerate(groups)]
    training, held_out = split(records, seed, share)
    left, right = {r.group for r in training}, {r.group for r in held_out}
    assert not left & right
    assert sorted(map(id, training + held_out)) == sorted(map(id, records))
    assert left
    assert bool(right) == (share > 0)
    if share > 0:
        assert abs(len(right) - share * len(left | right)) <= 1
    again = split(records[::-1], seed, share)[1]
    assert {r.group for r in again} == right
    assert right >= {r.group for r in split(records, seed, share / 2)[1]}


def test_split_depends_on_the_seed_and_says_what_is_wrong():
    records = [record(str(i)) for i in range(50)]
    assert len({tuple(r.group for r in split(records, seed, 0.3)[1]) for seed in range(20)}) == 20
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="held-out share"):
            split(records, 0, share)
    assert split(records[:1], 0, 0.0) == ((records[0],), ())
    with pytest.raises(DataError, match=r"f\.jsonl:3: all records have one prompt"):
        split([dataclasses.replace(records[0], file="f.jsonl", line=3)], 0, 0.1)
