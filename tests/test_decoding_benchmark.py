"""What benchmarks.decoding enumerates is what the decoder says token by token."""

from __future__ import annotations

import pytest
import torch

from benchmarks.decoding import Spoken, _whole, table_of
from moalign import config, lora
from moalign.decode import Request, Speakers
from moalign.decode.processor import scores_of
from moalign.demo import grammar
from moalign.demo import world as worlds
from moalign.demo.enumeration import enumerate_replies, reply_logps
from moalign.engine import model as models
from moalign_plugins.decoders.multi_objective import MultiObjective

SLOTS = {"a": "first", "b": "second"}
PROMPT = grammar.HELD_OUT_PROMPTS[0]


@pytest.fixture(scope="module")
def model():
    """The tiny assistant with two adapters of random weights."""
    settings = config.from_mapping({"objectives": {"helpful": None}, "model": {"path": "tiny-assistant"}})
    loaded = models.load(settings.model_directory, settings.model, torch.device("cpu"))
    lora.add_slots(loaded.policy, list(SLOTS.values()))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for slot in SLOTS.values():
            for parameter in lora.parameters(loaded.policy, slot):
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return loaded


@pytest.fixture(scope="module")
def replies(model):
    return enumerate_replies(model.tokeniser.tokenizer, [PROMPT])


@torch.no_grad()
def enumerated(model, replies, decoder, **shares):
    return reply_logps(Spoken(model, SLOTS, decoder, Request(shares=shares)), replies)


@pytest.mark.parametrize("divergence", ["reverse-kl", "jsd"])
def test_a_replys_probability_is_that_of_its_tokens_as_they_are_decoded(model, replies, divergence):
    decoder, request = MultiObjective(divergence=divergence), Request(shares={"a": 0.3, "b": 0.7})
    found = enumerated(model, replies, decoder, **request.shares)[0]
    prompt = list(model.tokeniser.tokenizer(PROMPT)["input_ids"])
    for number in (0, 700, 1679):
        reply = list(model.tokeniser.response(grammar.replies(PROMPT)[number]))
        speakers = Speakers(model.policy, decoder.speakers(request), slots=SLOTS)
        total = 0.0
        for place, token in enumerate(reply):
            ids = torch.tensor([prompt + reply[:place]])
            scores = scores_of(decoder, request, speakers, ids)
            total += float(scores[0].double().log_softmax(-1)[token])
        assert total == pytest.approx(float(found[number]), abs=2e-4)  # float32, a sum of up to 13 log-probabilities


def test_all_weight_on_one_is_that_candidate(model, replies):
    for name, slot in SLOTS.items():
        with lora.active(model.policy, slot):
            alone = reply_logps(model.policy, replies)
        assert torch.equal(enumerated(model, replies, MultiObjective(), **{name: 1.0}), alone)


def test_whole_replies_mixed_from_optimal_policies_reach_the_front(model, replies):
    """1 for every preference: the mix of two exact optima is the optimum, so the code that says so is right."""
    world = worlds.tiny_world((PROMPT,))
    with torch.no_grad(), lora.active(model.policy, None):
        reference = reply_logps(model.policy, replies)
    base = worlds.outcomes(reference)
    ends = [worlds.optimum(world, base, weights)[:, :-1] for weights in ((1.0, 0.0), (0.0, 1.0))]
    found = _whole(world, reference, ends, [0.0, 0.25, 0.5, 1.0])
    assert found["own"] == pytest.approx([1.0] * 4, abs=1e-6)
    result = {"ways": {"whole": found}, "seconds": 1.0}
    assert table_of([result]).rows[0][3:5] == ["1.000", "1.000"]
