"""Adapters gated row by row: the plain adapter of each row's gates, in every way that the engine runs them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moalign import lora
from moalign.config import LoraSettings, ModelSettings
from moalign.data.tokenise import Sequence
from moalign.engine import model as models
from moalign.engine.model import TRAINED, LanguageModel
from moalign.engine.rollouts import sample
from moalign.engine.row_conditions import RowConditions
from moalign.engine.scoring import logps_under
from moalign.errors import CorruptFileError, RunError
from moalign.lora import Mixture, gated, mixing

RANK = 3
SEQUENCES = [
    Sequence((1, 5, 6, 7, 8), 2),
    Sequence((1, 5, 9, 10), 2),
    Sequence((1, 11, 12, 13), 2),
    Sequence((1, 11, 14, 15, 16, 17), 2),
]
GROUPS = [0, 0, 1, 1]


@pytest.fixture(params=["decode", "generate"])
def model(tiny_model_path, request) -> LanguageModel:
    """An adapter far from zero; sampled with moalign's cache and with transformers' own loop."""
    settings = ModelSettings(lora=LoraSettings(r=RANK, alpha=7))
    loaded = models.load(str(tiny_model_path), settings, torch.device("cpu"))
    stack = lora.stack(loaded.policy, [TRAINED])
    stack.block.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    if request.param == "generate":
        object.__setattr__(loaded, "uncached", "for the test")
    return loaded


def drawn_gates(model: LanguageModel, number: int) -> torch.Tensor:
    shape = (number, len(lora.layers(model.policy)), RANK)
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


class Folded:
    """The same base with the plain adapter of some gates in a slot of its own."""

    def __init__(self, model: LanguageModel, gates: torch.Tensor):
        lora.add_slots(model.policy, ["folded"])
        weights = zip(lora.parameters(model.policy, "folded"), lora.parameters(model.policy, TRAINED), strict=True)
        for own, first in weights:
            own.data.copy_(first.data)
        gated.fold(model.policy, "folded", gates)


def test_each_row_is_computed_as_by_the_plain_adapter_of_its_gates(model):
    gates = drawn_gates(model, 2)
    of_sequences = gates[GROUPS]
    reference, own = logps_under(model, SEQUENCES, GROUPS, (None, TRAINED), conditions=RowConditions(of_sequences))
    (bare,) = logps_under(model, SEQUENCES, GROUPS, (None,))
    for group in (0, 1):
        Folded(model, gates[group])
        (expected,) = logps_under(model, SEQUENCES, GROUPS, ("folded",))
        for index in [place for place, each in enumerate(GROUPS) if each == group]:
            torch.testing.assert_close(own[index], expected[index], rtol=1e-5, atol=2e-5)
            assert abs(own[index] - bare[index]).max() > 1e-2
            torch.testing.assert_close(reference[index], bare[index], rtol=1e-5, atol=1e-5)


def test_gates_of_one_are_the_adapter_and_of_zero_the_base(model):
    ones = torch.ones(len(SEQUENCES), len(lora.layers(model.policy)), RANK)
    for gates, adapter in ((ones, TRAINED), (ones * 0, None)):
        (found,) = logps_under(model, SEQUENCES, GROUPS, (TRAINED,), conditions=RowConditions(gates))
        (expected,) = logps_under(model, SEQUENCES, GROUPS, (adapter,))
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_a_response_is_sampled_from_the_policy_of_its_gates(model):
    """With the same noise each prompt's responses are those of the plain adapter, whoever is asked beside it."""
    prompts = [(1, 5, 6), (1, 7), (1, 5, 6)]
    gates = 3 * drawn_gates(model, 3)
    manner = {"samples": 4, "temperature": 1.0, "max_new_tokens": 8, "seed": 3}
    (found,) = sample(model, [TRAINED], prompts, conditions=RowConditions(gates), **manner)
    said = set()
    for place in range(3):
        Folded(model, gates[place])
        (expected,) = sample(model, ["folded"], prompts, **manner)
        mine = [rollout.ids for rollout in found if rollout.prompt == place]
        assert mine == [rollout.ids for rollout in expected if rollout.prompt == place]
        said.add(tuple(mine))
    assert len(said) == 3


def test_the_gradient_of_gates_and_factors_is_that_of_the_formula(model):
    """x W^T + s (g * x A^T) B^T in float64, against finite differences."""
    layer = next(each for each in lora.layers(model.policy) if isinstance(each, lora.linear.AdaptedLinear))
    layer.double()
    layer.stacked = None
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, layer.in_features, generator=draw, dtype=torch.float64)
    gates = torch.randn(2, len(lora.layers(model.policy)), RANK, generator=draw, dtype=torch.float64)

    def run(x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        layer.mixture = Mixture((TRAINED,), (2,), gates=gates)
        return layer(x)

    a, b = layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight
    own = gates[:, layer.place, None]
    expected = layer.base_layer(x) + layer.scaling[TRAINED] * (own * (x @ a.T)) @ b.T
    torch.testing.assert_close(run(x, gates), expected)
    assert torch.autograd.gradcheck(run, (x.requires_grad_(), gates.requires_grad_()))
    weight = torch.randn(expected.shape, generator=draw, dtype=torch.float64)
    for parameter in (a, b):
        parameter.requires_grad_()
    found = torch.autograd.grad((run(x, gates) * weight).sum(), (a, b))
    formula = layer.base_layer(x) + layer.scaling[TRAINED] * (own * (x @ a.T)) @ b.T
    for mine, other in zip(found, torch.autograd.grad((formula * weight).sum(), (a, b)), strict=True):
        torch.testing.assert_close(mine, other)


def test_a_family_on_disk_has_the_plain_adapter_of_any_gates(model, tiny_model_path, tmp_path):
    """What plain peft computes with it is what the gated pass computes."""
    made = gated.family(model.policy, TRAINED, {"scale": torch.arange(4.0)})
    gated.write(made, tmp_path, model.fingerprint)
    again = gated.read(tmp_path, model.fingerprint)
    assert again.layers == made.layers
    assert again.rank == RANK
    assert torch.equal(again.own["scale"], torch.arange(4.0))
    (gates,) = drawn_gates(model, 1)
    lora.write(model.policy, TRAINED, tmp_path, model.fingerprint)
    plain = mixing.read(tmp_path)
    mixing.write(replace(plain, tensors=again.at(gates)), tmp_path / "at")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    policy = PeftModel.from_pretrained(base, tmp_path / "at").eval()
    for sequence in SEQUENCES:
        with torch.no_grad():
            logps = policy(torch.tensor([sequence.ids])).logits[0].log_softmax(-1)
        wanted = [float(logps[at - 1, sequence.ids[at]]) for at in range(sequence.prompt_length, len(sequence.ids))]
        ((found,),) = logps_under(model, [sequence], [0], (TRAINED,), conditions=RowConditions(gates[None]))
        torch.testing.assert_close(torch.tensor(wanted), torch.from_numpy(found), rtol=1e-5, atol=3e-5)


def test_a_family_of_another_base_or_with_other_layers_is_refused(model, tmp_path):
    made = gated.family(model.policy, TRAINED, {})
    gated.write(made, tmp_path, model.fingerprint)
    with pytest.raises(RunError, match="trained on another base model"):
        gated.read(tmp_path, "another")
    gated.write(gated.Family(made.tensors, made.own, made.layers[1:]), tmp_path, model.fingerprint)
    with pytest.raises(CorruptFileError, match="not those of the layers that it names"):
        gated.read(tmp_path, model.fingerprint)
    assert len(load_file(tmp_path / gated.FILE)) == len(made.tensors)
