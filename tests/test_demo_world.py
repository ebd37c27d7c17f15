"""The tiny assistant's world: its grammar, its exact mathematics, and the checkpoint that ships with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moalign.demo import grammar, world
from moalign.demo.enumeration import Enumeration, enumerate_replies, reply_logps
from moalign.errors import DataError, MoalignError

DEMO = Path(grammar.__file__).parent
WEIGHTS = [(1.0, 0.0), (0.7, 0.3), (0.5, 0.5), (0.1, 0.9), (0.0, 1.0)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO / "tiny-assistant")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO / "tiny-assistant", dtype=torch.float32)


@pytest.fixture(scope="module")
def held_out(tokenizer) -> Enumeration:
    return enumerate_replies(tokenizer, grammar.HELD_OUT_PROMPTS)


@pytest.fixture(scope="module")
def reference(model, held_out) -> torch.Tensor:
    with torch.no_grad():
        return reply_logps(model, held_out)


@pytest.fixture(scope="module")
def tiny() -> world.World:
    return world.tiny_world()


def random_policy(reference: torch.Tensor, seed: int, scale: float) -> torch.Tensor:
    """Log-probabilities of the replies of some policy, an uneven one with ``scale``; the rest stays left over."""
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(seed)).double() * scale
    return (world.outcomes(reference) + torch.nn.functional.pad(noise, (0, 1))).log_softmax(-1)[:, :-1]


# --- the grammar ----------------------------------------------------------------------------------------------------


def test_replies_are_distinct_and_their_scores_lie_between_zero_and_one():
    for prompt in (grammar.TRAIN_PROMPTS[0], grammar.HELD_OUT_PROMPTS[-1]):
        replies = grammar.replies(prompt)
        assert 1000 <= len(replies) <= 2500
        assert len(set(replies)) == len(replies)
        scores = np.array([[grammar.score(prompt, r)[name] for name in grammar.OBJECTIVES] for r in replies])
        assert scores.min() > grammar.WORST and scores.max() <= 1.0  # in the grammar is always better than out of it
        assert (scores.max(0) - scores.min(0) > 0.8).all()


def test_objectives_pull_apart():
    prompt = grammar.HELD_OUT_PROMPTS[0]
    scores = np.array([list(grammar.score(prompt, r).values()) for r in grammar.replies(prompt)])
    correlation = np.corrcoef(scores.T)
    helpful, harmless, concise = (grammar.OBJECTIVES.index(name) for name in ("helpful", "harmless", "concise"))
    assert correlation[helpful, harmless] < -0.2
    assert correlation[helpful, concise] < -0.2
    assert not (scores >= scores.max(0)).all(1).any()  # no reply is the best in everything


@pytest.mark.parametrize("text", ["", "Sure", "Use soap. Sure.", "Whatever. Use soap. ", "Whatever. Use tea."])
def test_a_text_outside_the_grammar_gets_the_worst_reward(text):
    assert set(grammar.score(grammar.TRAIN_PROMPTS[0], text).values()) == {0.0}


def test_an_unknown_prompt_is_refused_by_name():
    with pytest.raises(DataError, match="How do I fly"):
        grammar.score("How do I fly?\n", "Whatever. Use soap.")
    with pytest.raises(DataError, match="How do I fly"):
        grammar.replies("How do I fly?\n")


def test_held_out_tasks_are_in_no_training_prompt_and_the_shipped_files_hold_the_same_prompts():
    assert not set(grammar.HELD_OUT_TASKS) & set(grammar.TRAIN_TASKS)
    assert not any(task in prompt for task in grammar.HELD_OUT_TASKS for prompt in grammar.TRAIN_PROMPTS)
    for name, prompts in (("train", grammar.TRAIN_PROMPTS), ("held-out", grammar.HELD_OUT_PROMPTS)):
        lines = (DEMO / f"prompts-{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert tuple(json.loads(line)["prompt"] for line in lines) == prompts


# --- exact values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_optimum_attains_beta_log_z_and_no_other_policy_has_more(tiny, reference, weights):
    base = world.outcomes(reference)
    direction = torch.tensor(weights, dtype=torch.float64)
    most = world.best(tiny, base, weights)
    attained = direction @ world.values(tiny, world.optimum(tiny, base, weights), base)[0]
    assert attained.item() == pytest.approx(most, abs=1e-12)
    for seed in range(5):
        policy = random_policy(reference, seed, scale=0.5 * seed)
        assert direction @ world.evaluate(tiny, policy, reference).f < most


@pytest.mark.parametrize("seed", range(4))
def test_random_policies_have_a_share_below_one_and_the_base_has_none(tiny, reference, seed):
    policies = [random_policy(reference, 10 * seed + k, scale=0.2 * k) for k in range(1, 5)]
    points = torch.stack([world.evaluate(tiny, policy, reference).f for policy in policies])
    assert world.shares(tiny, reference, points).front_share < 1
    base = world.shares(tiny, reference, world.evaluate(tiny, reference, reference).f[None])
    assert base.front_share == pytest.approx(0, abs=1e-9)
    assert base.front_share_worst == pytest.approx(0, abs=1e-9)


def test_the_exact_points_have_all_of_the_front_but_not_all_of_its_volume(tiny, reference):
    eleven = world.exact_front(tiny, reference, world.even_weights(2, 10))
    shares = world.shares(tiny, reference, eleven, divisions=10)
    assert shares.front_share == pytest.approx(1, abs=1e-9)
    assert 0.85 < shares.hypervolume_share < 0.99
    coarser = world.shares(tiny, reference, eleven[::5], divisions=10)
    assert coarser.front_share < shares.front_share and coarser.front_share_worst < 0.9


def test_a_share_above_one_is_an_error(tiny, reference):
    beyond = world.exact_front(tiny, reference, [(0.5, 0.5)]) + 0.01
    with pytest.raises(MoalignError, match="no policy lies beyond"):
        world.shares(tiny, reference, beyond)


def test_mass_outside_the_grammar_counts_with_the_worst_reward(tiny, reference):
    """A policy that is optimal among the replies but loses 40 % of its mass must not look optimal."""
    whole = world.optimum(tiny, world.outcomes(reference), (0.5, 0.5))[:, :-1]
    lossy = whole + np.log(0.6)
    best, value = world.evaluate(tiny, whole, reference), world.evaluate(tiny, lossy, reference)
    assert value.mass == pytest.approx(0.6, abs=1e-4)
    torch.testing.assert_close(value.expected, 0.6 * best.expected, atol=1e-9, rtol=0)
    assert value.kl > 0.4 * np.log(0.4 / 0.01)  # the base has less than 1 % there
    assert world.shares(tiny, reference, value.f[None]).front_share < -1


def test_a_hand_made_world_by_hand():
    """One prompt, two replies of probability 1/2 and 1/4, one objective."""
    small = world.World(("?",), ("good",), torch.tensor([[[1.0], [0.0], [0.0]]], dtype=torch.float64), beta=0.5)
    reference = torch.tensor([[0.5, 0.25]], dtype=torch.float64).log()
    value = world.evaluate(small, torch.tensor([[0.75, 0.25]], dtype=torch.float64).log(), reference)
    assert value.expected.item() == pytest.approx(0.75)
    assert value.kl == pytest.approx(0.75 * np.log(1.5), abs=1e-9)
    assert value.f.item() == pytest.approx(0.75 - 0.5 * 0.75 * np.log(1.5), abs=1e-9)
    assert world.best(small, world.outcomes(reference), (1.0,)) == pytest.approx(0.5 * np.log(0.5 * np.exp(2) + 0.5))


def test_probabilities_above_one_are_an_error(reference):
    with pytest.raises(MoalignError, match="sum to"):
        world.outcomes(reference + 0.1)


@pytest.mark.parametrize(("objectives", "divisions", "count"), [(1, 5, 1), (2, 10, 11), (3, 4, 15)])
def test_even_weights(objectives, divisions, count):
    weights = world.even_weights(objectives, divisions)
    assert len(set(weights)) == len(weights) == count
    np.testing.assert_allclose(np.sum(weights, axis=1), 1.0, rtol=1e-15)


def test_three_objectives_have_a_front_too(reference):
    everything = world.tiny_world(objectives=("helpful", "harmless", "concise"))
    weights = world.even_weights(3, 4)
    shares = world.shares(everything, reference, world.exact_front(everything, reference, weights), divisions=4)
    assert shares.front_share == pytest.approx(1, abs=1e-9)
    assert 0 < shares.hypervolume_share < 1


def test_an_unknown_objective_is_refused_by_name():
    with pytest.raises(MoalignError, match="witty"):
        world.tiny_world(objectives=("helpful", "witty"))


# --- the checkpoint -------------------------------------------------------------------------------------------------


def test_the_checkpoint_keeps_its_mass_inside_the_grammar(model, reference):
    mass = reference.double().exp().sum(1)
    assert mass.mean() >= 0.99 and mass.max() <= 1 + 1e-5
    assert 3e5 < model.num_parameters() < 7e5
    assert sum(file.stat().st_size for file in (DEMO / "tiny-assistant").iterdir()) < 1.5e6


def test_trees_give_the_log_probabilities_of_plain_sequences(model, tokenizer, reference):
    prompt = grammar.HELD_OUT_PROMPTS[3]
    begin, replies = tokenizer(prompt)["input_ids"], grammar.replies(prompt)
    for index in (0, 811, len(replies) - 1):
        answer = [*tokenizer(replies[index], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logps = model(torch.tensor([begin + answer])).logits[0].log_softmax(-1)
        plain = sum(logps[len(begin) - 1 + place, token] for place, token in enumerate(answer))
        assert reference[3, index].item() == pytest.approx(plain.item(), abs=1e-4)


def test_text_round_trips_exactly_through_the_tokenizer(tokenizer):
    prompt = grammar.HELD_OUT_PROMPTS[0]
    for text in (*grammar.replies(prompt), *grammar.PROMPTS, "Früh  um 6:\n\ttea & <b>日本</b> 🙂 ", " a", ""):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    ids = tokenizer(prompt)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids
    answer = grammar.replies(prompt)[5]
    assert ids + tokenizer(answer, add_special_tokens=False)["input_ids"] == tokenizer(prompt + answer)["input_ids"]


@pytest.mark.parametrize(
    "objectives", [("helpful", "harmless"), ("helpful", "harmless", "concise")], ids=["two", "three"]
)
def test_the_shipped_ceiling_is_high_and_belongs_to_this_world(reference, objectives):
    seen = world.tiny_world(objectives=objectives)
    shipped = json.loads((DEMO / "ceiling.json").read_text(encoding="utf-8"))
    (ceiling,) = [each for each in shipped if tuple(each["objectives"]) == objectives]
    assert ceiling["beta"] == seen.beta
    points = torch.tensor([[point["f"][name] for name in objectives] for point in ceiling["points"]])
    shares = world.shares(seen, reference, points)
    assert shares.front_share == pytest.approx(ceiling["front_share"], abs=1e-4)
    assert shares.front_share_worst == pytest.approx(ceiling["front_share_worst"], abs=1e-3)
    assert 0.9 <= shares.front_share <= 1
