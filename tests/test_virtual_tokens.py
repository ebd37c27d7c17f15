"""Vectors in front of a prompt: plain transformers on ``inputs_embeds``, in every way that the engine runs them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from moalign import lora
from moalign.config import LoraSettings, ModelSettings
from moalign.data.tokenise import Sequence, Tokeniser
from moalign.engine import model as models
from moalign.engine.model import TRAINED, LanguageModel
from moalign.engine.replies import Manner, Speaker
from moalign.engine.rollouts import sample
from moalign.engine.row_conditions import (
    RowConditions,
    conditioned,
    embeddings_of,
    in_front,
    place_of_vectors,
    with_places,
)
from moalign.engine.scoring import logps_under

VECTORS, WIDTH = 3, 32
PLAIN = [
    Sequence((1, 5, 6, 7, 8), 2),
    Sequence((1, 5, 9, 10), 2),
    Sequence((1, 11, 12, 13, 14), 3),
    Sequence((1, 11, 12, 15, 16, 17), 3),
]
GROUPS = [0, 0, 1, 1]


@pytest.fixture(params=["decode", "generate"])
def model(tiny_model_path, request) -> LanguageModel:
    """An adapter far from zero; sampled with moalign's cache and with transformers' own loop."""
    settings = ModelSettings(lora=LoraSettings(r=3, alpha=7))
    loaded = models.load(str(tiny_model_path), settings, torch.device("cpu"))
    lora.stack(loaded.policy, [TRAINED]).block.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return replace(loaded, uncached="for the test") if request.param == "generate" else loaded


def conditions_of(number: int, seed: int = 0) -> RowConditions:
    draw = torch.Generator().manual_seed(seed)
    return RowConditions(vectors=torch.randn(number, VECTORS, WIDTH, generator=draw), place=1)


def asked(ids: tuple[int, ...], model: LanguageModel) -> tuple[int, ...]:
    return with_places(ids, VECTORS, model.tokeniser)


def placed(sequences: list[Sequence], model: LanguageModel) -> list[Sequence]:
    made = [asked(each.prompt, model) for each in sequences]
    return [Sequence(ids + each.response, len(ids)) for ids, each in zip(made, sequences, strict=True)]


@torch.no_grad()
def by_hand(model: LanguageModel, ids: tuple[int, ...], vectors: torch.Tensor) -> torch.Tensor:
    """[L,V]: log-probabilities behind each token of plain ids, BOS, the vectors and the others being the input."""
    embedded = model.base.get_input_embeddings()(torch.tensor([ids]))
    whole = torch.cat([embedded[:, :1], vectors[None], embedded[:, 1:]], 1)
    with lora.active(model.policy, TRAINED):
        logits = model.policy(inputs_embeds=whole, use_cache=False).logits[0]
    return torch.cat([logits[:1], logits[1 + VECTORS :]]).log_softmax(-1)


def of_response(sequence: Sequence, logps: torch.Tensor) -> torch.Tensor:
    places = range(sequence.prompt_length, len(sequence.ids))
    return torch.stack([logps[place - 1, sequence.ids[place]] for place in places])


def test_log_probabilities_are_those_of_plain_transformers_on_input_embeddings(model):
    conditions = conditions_of(2)
    (found,) = logps_under(
        model, placed(PLAIN, model), GROUPS, (TRAINED,), conditions=conditions.take(torch.tensor(GROUPS))
    )
    (without,) = logps_under(model, placed(PLAIN, model), GROUPS, (TRAINED,))
    for index, sequence in enumerate(PLAIN):
        expected = of_response(sequence, by_hand(model, sequence.ids, conditions.vectors[GROUPS[index]]))
        torch.testing.assert_close(torch.from_numpy(found[index]), expected, rtol=1e-5, atol=2e-5)
        assert abs(found[index] - without[index]).max() > 1e-2


def test_responses_that_share_a_row_are_computed_as_one_by_one(model):
    sequences, conditions = placed(PLAIN, model), conditions_of(2)
    together = model.lay_out(sequences, [[0, 1], [2, 3]])
    apart = model.lay_out(sequences, [[0], [1], [2], [3]])
    assert together.segments is not None
    with torch.no_grad():
        with conditioned(model, TRAINED, conditions):
            shared = model.response_logps(together)
        with conditioned(model, TRAINED, conditions.take(GROUPS)):
            alone = model.response_logps(apart)
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=2e-5)


def test_the_reference_is_not_conditioned(model):
    sequences, conditions = placed(PLAIN, model), conditions_of(4)
    reference, _ = logps_under(model, sequences, [0, 1, 2, 3], (None, TRAINED), conditions=conditions)
    (bare,) = logps_under(model, sequences, [0, 1, 2, 3], (None,))
    for own, other in zip(reference, bare, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)


def test_vectors_that_are_the_embeddings_of_tokens_are_these_tokens(model):
    tokens = (21, 22, 23)
    vectors = model.base.get_input_embeddings()(torch.tensor([tokens])).detach()
    (found,) = logps_under(model, placed(PLAIN[:1], model), [0], (TRAINED,), conditions=RowConditions(None, vectors, 1))
    ids = PLAIN[0].ids
    spelt = Sequence((ids[0], *tokens, *ids[1:]), PLAIN[0].prompt_length + VECTORS)
    (expected,) = logps_under(model, [spelt], [0], (TRAINED,))
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)


def test_a_response_is_sampled_behind_the_vectors_of_its_prompt(model):
    """Whoever is asked beside it, and the likeliest token is the one that plain transformers find likeliest."""
    prompts = [(1, 5, 6, 9, 9), (1, 7), (1, 5, 6, 9, 9)]
    conditions = replace(conditions_of(3), vectors=3 * conditions_of(3).vectors)
    read, manner = [asked(each, model) for each in prompts], {"samples": 2, "max_new_tokens": 8, "seed": 3}
    (found,) = sample(model, [TRAINED], read, conditions=conditions, temperature=1.0, **manner)
    said = set()
    for place, prompt in enumerate(prompts):
        mine = [rollout for rollout in found if rollout.prompt == place]
        said.add(tuple(rollout.ids for rollout in mine))
        (other,) = sample(model, [TRAINED], read, conditions=conditions.take([place] * 3), temperature=1.0, **manner)
        assert [rollout.ids for rollout in other if rollout.prompt == place] == [rollout.ids for rollout in mine]
        alone = conditions.take([place])
        (greedy,) = sample(model, [TRAINED], [read[place]], conditions=alone, temperature=1e-4, **manner)
        ids = prompt
        for token in greedy[0].ids:
            logps = by_hand(model, ids, conditions.vectors[place])[-1]
            assert logps[token] >= logps.max() - 1e-4
            ids = (*ids, token)
    assert len(said) == 3


def test_both_loops_of_sampling_say_the_same(model):
    prompts = [asked(prompt, model) for prompt in [(1, 5, 6, 9, 9), (1, 7)]]
    manner = {"samples": 4, "temperature": 1.0, "max_new_tokens": 8, "seed": 3, "conditions": conditions_of(2)}
    found = sample(model, [TRAINED], prompts, **manner)
    other = replace(model, uncached=None if model.uncached else "for the test")
    assert sample(other, [TRAINED], prompts, **manner) == found
    bare = manner | {"conditions": conditions_of(2, seed=1)}
    assert sample(model, [TRAINED], prompts, **bare) != found


def test_a_reply_is_that_of_transformers_generate_on_input_embeddings(model):
    vectors = conditions_of(1).vectors[0]
    model.policy.set_adapter(TRAINED)
    speaker = Speaker(model.policy, model.tokeniser.tokenizer, Manner(6, temperature=0), vectors=vectors)
    reply = speaker.reply("ab")
    embedded = model.base.get_input_embeddings()(torch.tensor([model.tokeniser.prompt("ab")]))
    whole = torch.cat([embedded[:, :1], vectors[None], embedded[:, 1:]], 1)
    with torch.no_grad():
        output = model.policy.generate(
            inputs_embeds=whole, attention_mask=torch.ones(whole.shape[:2]), max_new_tokens=6, do_sample=False,
            eos_token_id=sorted(model.end_ids), pad_token_id=model.pad_id,
        )  # fmt: skip
    assert reply.text == model.tokeniser.tokenizer.decode(output[0], skip_special_tokens=True)
    assert reply.text != Speaker(model.policy, model.tokeniser.tokenizer, Manner(6, temperature=0)).reply("ab").text


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_of_vectors_and_adapter_is_that_of_plain_transformers(model, checkpointing):
    """Rows shared, against a row for each on ``inputs_embeds``; also with activations computed again in backward."""
    layout, conditions = model.lay_out(placed(PLAIN, model), [[0, 1], [2, 3]]), conditions_of(2)
    vectors = conditions.vectors.requires_grad_()
    factors = [side for layer in lora.layers(model.policy) for side in (layer.stacked.a, layer.stacked.b)]
    weights = torch.randn(len(PLAIN), generator=torch.Generator().manual_seed(2))
    model.checkpoint(checkpointing)
    with lora.mixed(model.policy, lora.Mixture((TRAINED,), (2,))), in_front(model.base, conditions):
        with model.checkpointing(checkpointing):
            logps = model.response_logps(layout)
        found = torch.autograd.grad((logps.sum(1) * weights).sum(), (vectors, *factors))
    model.checkpoint(False)
    total = torch.zeros(())
    for index, sequence in enumerate(PLAIN):
        embedded = model.base.get_input_embeddings()(torch.tensor([sequence.ids]))
        whole = torch.cat([embedded[:, :1], vectors[GROUPS[index]][None], embedded[:, 1:]], 1)
        with lora.mixed(model.policy, lora.Mixture((TRAINED,), (1,))):
            logits = model.policy(inputs_embeds=whole, use_cache=False).logits[0]
        behind = torch.cat([logits[:1], logits[1 + VECTORS :]]).log_softmax(-1)
        total = total + weights[index] * of_response(sequence, behind).sum()
    for own, other in zip(found, torch.autograd.grad(total, (vectors, *factors)), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
    assert found[0].abs().min() > 0


def test_the_gradient_of_what_is_put_in_is_that_of_finite_differences(model):
    model.policy.double()
    ids, conditions = torch.tensor([[1, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6]]), conditions_of(2)

    def run(vectors: torch.Tensor) -> torch.Tensor:
        with in_front(model.base, replace(conditions, vectors=vectors), torch.tensor([0, 2])):
            return model.base.get_input_embeddings()(ids).sin()

    assert torch.autograd.gradcheck(run, conditions.vectors.double().requires_grad_())


def test_the_embeddings_are_as_before_once_the_context_is_left(model):
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    before = model.base.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="on the way"), in_front(model.base, conditions_of(1)):
        assert not torch.equal(model.base.get_input_embeddings()(ids), before)
        raise ValueError("on the way")
    assert torch.equal(model.base.get_input_embeddings()(ids), before)


def test_vectors_stand_behind_the_token_that_begins_every_prompt(tiny_model_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    tokeniser = Tokeniser.of(tokenizer)
    assert place_of_vectors(tokeniser) == 1
    assert with_places((1, 8, 9), 2, tokeniser) == (1, tokeniser.pad_id, tokeniser.pad_id, 8, 9)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    assert place_of_vectors(Tokeniser.of(tokenizer)) == 0
    assert with_places((8, 9), 1, Tokeniser.of(tokenizer)) == (tokeniser.pad_id, 8, 9)


def test_embeddings_are_what_enters_the_model(model):
    table = model.base.get_input_embeddings()
    assert torch.equal(embeddings_of(model.base), table.weight)
    hook = table.register_forward_hook(lambda module, args, output: 3 * output)  # as in models that scale them
    torch.testing.assert_close(embeddings_of(model.base, most=5), 3 * table.weight[:5])
    hook.remove()
