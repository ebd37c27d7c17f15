"""Adapters side by side in one block: the same numbers by every way to them, gradients where the optimizer looks."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from plain_training import trainable

from moalign import lora
from moalign.config import LoraSettings, ModelSettings
from moalign.data.tokenise import Sequence
from moalign.engine import model as models
from moalign.engine.layout import one_by_one
from moalign.engine.model import TRAINED, LanguageModel
from moalign.errors import ModelError
from moalign.lora import Mixture
from moalign.lora.linear import AdaptedLinear, _Linear

SLOTS = (TRAINED, "second", "third")
ROWS = one_by_one([Sequence((1, 5, 6, 7, 8), 2), Sequence((1, 9, 10), 1), Sequence((1, 11, 12, 13), 2)], 0)


@pytest.fixture
def model(tiny_model_path) -> LanguageModel:
    return models.load(str(tiny_model_path), ModelSettings(lora=LoraSettings(r=3, alpha=7)), torch.device("cpu"))


def scattered(model: LanguageModel) -> lora.Stack:
    stack = lora.stack(model.policy, SLOTS)
    stack.block.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return stack


def test_the_adapters_tensors_are_views_of_their_rows(model):
    stack = lora.stack(model.policy, SLOTS)
    assert stack.block.shape == stack.gradients.shape
    assert len(stack.block) == 3
    for place, slot in enumerate(SLOTS):
        lora.initialise(model.policy, slot, place)
        flat = torch.cat([parameter.flatten() for parameter in lora.parameters(model.policy, slot)])
        assert torch.equal(flat, stack.block[place])
        (row,) = stack.parameters[slot]
        row.data += 1.0
        again = torch.cat([parameter.flatten() for parameter in lora.parameters(model.policy, slot)])
        assert torch.equal(again, flat + 1.0)
    assert not any(parameter.requires_grad for parameter in model.policy.parameters())


def test_what_was_in_the_slots_stays(model):
    lora.add_slots(model.policy, SLOTS)
    for place, slot in enumerate(SLOTS):
        lora.initialise(model.policy, slot, place)
    before = [lora.weights(model.policy, slot) for slot in SLOTS]
    for chosen in (SLOTS, SLOTS[1:], SLOTS[::-1]):
        lora.stack(model.policy, chosen)
        for slot, tensors in zip(SLOTS, before, strict=True):
            found = lora.weights(model.policy, slot)
            assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("members", [(0, 1, 2), (1, 2), (2, 0), (1,)])
def test_gradients_of_those_in_the_batch_are_added_up_in_their_rows(model, members):
    """Against autograd through plain adapters, twice in a row; the others' rows stay zero."""
    stack = scattered(model)
    slots = tuple(SLOTS[member] for member in members)
    for _ in range(2):
        with lora.mixed(model.policy, Mixture(slots, (1,) * len(members))):
            rows = ROWS if len(members) == 3 else one_by_one([Sequence((1, 5, 6, 7), 2)] * len(members), 0)
            model.response_logps(rows).sum().backward()
    for place, slot in enumerate(SLOTS):
        if place not in members:
            assert not stack.gradients[place].any()
            continue
        expected = alone(model, slot, rows, members.index(place))
        largest = float(expected.abs().max())  # sums of products of this size, in float32
        torch.testing.assert_close(stack.gradients[place], 2 * expected, rtol=1e-5, atol=1e-5 * largest)


def alone(model: LanguageModel, slot: str, rows, row: int) -> torch.Tensor:
    """The gradient by peft's own forward pass."""
    held = [(layer, layer.stacked) for layer in lora.layers(model.policy) if isinstance(layer, AdaptedLinear)]
    parameters = list(trainable(model.policy, slot).values())
    for layer, _ in held:
        layer.__class__ = LoraLinear  # type: ignore[assignment]
    try:
        gradients = torch.autograd.grad(model.response_logps(rows)[row].sum(), parameters)
    finally:
        for layer, stacked in held:
            layer.__class__ = AdaptedLinear
            layer.stacked = stacked
        model.policy.requires_grad_(False)
    order = {id(parameter): gradient for parameter, gradient in zip(parameters, gradients, strict=True)}
    return torch.cat([order[id(parameter)].flatten() for parameter in lora.parameters(model.policy, slot)])


@pytest.mark.parametrize("ends", [(4, 8, 12), (2, 9, 12), (12,), (0, 5, 5)])
@pytest.mark.parametrize("scalings", [(0.5, 0.5, 0.5), (0.5, 2.0, 3.0)])
def test_the_products_gradients_are_right(ends, scalings):
    """Finite differences in float64, for even and uneven shares of the rows, none at all among them."""
    generator = torch.Generator().manual_seed(1)
    number = len(ends)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)  # noqa: E731
    x, a, b = make(ends[-1], 5), make(number, 2, 5), make(number, 3, 2)
    weight, bias = make(3, 5).detach(), make(3).detach()
    scalings = scalings[:number]

    def apply(x, a, b):
        return _Linear.apply(x, weight, bias, ends, scalings, a, b)

    assert torch.autograd.gradcheck(apply, (x, a, b))
    starts = (0, *ends)
    parts = [
        x[start:end] @ weight.t() + bias + scaling * x[start:end] @ one.t() @ other.t()
        for start, end, scaling, one, other in zip(starts, ends, scalings, a, b, strict=False)
    ]
    torch.testing.assert_close(apply(x, a, b), torch.cat(parts))


def test_half_precision_adapters_are_refused(model):
    lora.add_slots(model.policy, SLOTS)
    lora.parameters(model.policy, "second")[0].data = lora.parameters(model.policy, "second")[0].data.half()
    with pytest.raises(ModelError, match=r"the adapter second is torch\.float16"):
        lora.stack(model.policy, SLOTS)
