"""Mixing adapters: exact sums of deltas, the best compression, and which adapters a wanted preference is made of."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from plain_training import trainable
from torch import Tensor
from transformers import AutoModelForCausalLM

from moalign import lora, storage
from moalign.errors import CorruptFileError, MoalignError, RunError
from moalign.lora import mixing

Tensors = dict[str, Tensor]
BASE = "f" * 64
SIZES = {"model.layers.0.q_proj": (5, 7), "model.layers.1.up_proj": (9, 4)}  # layer -> (out, in)


def random_adapter(r: int, seed: int, sizes: dict[str, tuple[int, int]] = SIZES) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, (rows, columns) in sizes.items():
        tensors[f"{layer}.lora_A.weight"] = torch.randn(r, columns, generator=draw, dtype=torch.float64)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(rows, r, generator=draw, dtype=torch.float64)
    return tensors


def dense(tensors: Tensors, scaling: float = 1.0) -> Tensors:
    return {layer: scaling * (b @ a).double() for layer, (a, b) in mixing.factors(tensors).items()}


def weighted(parts: list[Tensors], coefficients: list[float]) -> Tensors:
    pairs = list(zip(coefficients, parts, strict=True))
    return {name: torch.stack([c * part[name] for c, part in pairs]).sum(0) for name in parts[0]}


def assert_same(mine: Tensors, theirs: Tensors, tolerance: float = 1e-12) -> None:
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name].double(), theirs[name].double(), rtol=tolerance, atol=tolerance)


# --- sums of deltas -------------------------------------------------------------------------------------------------

finite = st.floats(-3, 3, allow_nan=False).map(lambda number: round(number, 3))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_mix_is_the_weighted_sum_of_the_deltas(data):
    size = st.tuples(st.integers(1, 8), st.integers(1, 8))
    sizes = {f"layer{k}": data.draw(size) for k in range(data.draw(st.integers(1, 3)))}
    ranks = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    coefficients = [data.draw(finite) for _ in ranks[1:]] + [data.draw(finite.filter(bool))]
    scalings = [data.draw(st.floats(0.1, 4)) for _ in ranks]
    scaling = data.draw(st.floats(0.1, 4))
    adapters = [random_adapter(r, seed, sizes) for seed, r in enumerate(ranks)]
    mixed = mixing.mix(adapters, coefficients, scalings, scaling)
    parts = [dense(adapter, s) for adapter, s in zip(adapters, scalings, strict=True)]
    assert_same(dense(mixed, scaling), weighted(parts, coefficients), 1e-11)
    rank = sum(r for r, c in zip(ranks, coefficients, strict=True) if c != 0)
    assert {len(a) for a, _ in mixing.factors(mixed).values()} == {rank}


def test_one_adapter_with_coefficient_one_is_itself_bit_by_bit():
    one, other = random_adapter(3, 0), random_adapter(2, 1)
    for scaling in (1.0, 2.0, 16 / math.sqrt(3), 0.1):
        mixed = mixing.mix([one, other], [1.0, 0.0], [scaling, 7.0], scaling)
        assert mixed.keys() == one.keys()
        assert all(torch.equal(mixed[name], one[name]) for name in one)


def test_mixing_is_linear_in_the_coefficients():
    adapters, scalings = [random_adapter(r, r) for r in (1, 2, 3)], [1.0, 0.5, 2.0]
    first, second = [0.2, -1.5, 3.0], [0.7, 0.4, -0.1]

    def mixed(coefficients: list[float]) -> Tensors:
        return dense(mixing.mix(adapters, coefficients, scalings))

    both = [2 * a - 3 * b for a, b in zip(first, second, strict=True)]
    assert_same(mixed(both), weighted([mixed(first), mixed(second)], [2.0, -3.0]), 1e-11)


def test_the_order_of_the_adapters_does_not_matter():
    adapters, coefficients, scalings = [random_adapter(r, r) for r in (1, 2, 3)], [0.2, -1.5, 3.0], [1.0, 0.5, 2.0]
    one = mixing.mix(adapters, coefficients, scalings)
    other = mixing.mix(adapters[::-1], coefficients[::-1], scalings[::-1])
    assert_same(dense(one), dense(other))
    # singular values that differ and fixed signs leave one pair of factors, whatever the order
    assert_same(mixing.compress(one, 4)[0], mixing.compress(other, 4)[0], 1e-9)


def test_the_mean_of_the_factors_is_something_else():
    """The same delta in another basis, A -> -A and B -> -B: half and half in delta space is that delta; the mean of
    the factors is nothing at all. And of different deltas it holds the cross products."""
    one = random_adapter(2, 0)
    turned = {name: -tensor for name, tensor in one.items()}
    assert_same(dense(mixing.mix([one, turned], [0.5, 0.5], [1.0, 1.0])), dense(one))
    assert all(not delta.any() for delta in dense(weighted([one, turned], [0.5, 0.5])).values())

    other = random_adapter(2, 1)
    right = dense(mixing.mix([one, other], [0.5, 0.5], [1.0, 1.0]))
    wrong = dense(weighted([one, other], [0.5, 0.5]))
    assert all((right[layer] - wrong[layer]).norm() > 0.3 * right[layer].norm() for layer in right)


def test_coefficients_scalings_and_ranks_that_mean_nothing_are_refused():
    two = [random_adapter(1, 0), random_adapter(1, 1)]
    for coefficients in ([0.0, 0.0], [1.0], [1.0, math.nan], [1.0, math.inf]):
        with pytest.raises(MoalignError, match="coefficient"):
            mixing.mix(two, coefficients, [1.0, 1.0])
    for scalings, scaling in (([1.0], 1.0), ([1.0, math.nan], 1.0), ([1.0, 1.0], 0.0)):
        with pytest.raises(MoalignError, match="scalings"):
            mixing.mix(two, [1.0, 1.0], scalings, scaling)
    with pytest.raises(MoalignError, match="rank 0"):
        mixing.compress(two[0], 0)


def test_tensors_that_are_no_adapter_are_refused():
    good = random_adapter(2, 0)
    name = "model.layers.0.q_proj.lora_B.weight"
    for damaged, message in (
        ({}, "no tensors"),
        ({key: tensor for key, tensor in good.items() if key != name}, "not a pair"),
        (good | {"lm_head.weight": torch.zeros(2, 2)}, "lm_head.weight is not a pair"),
        (good | {name: torch.zeros(5, 3)}, r"A \(2, 7\) and B \(5, 3\)"),
        (good | {name: torch.full((5, 2), math.nan)}, "not finite"),
    ):
        with pytest.raises(CorruptFileError, match=message):
            mixing.factors(damaged)


# --- compression ----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(*[st.integers(1, 9)] * 2, *[st.integers(1, 12)] * 2, st.integers(0, 99))
def test_compression_is_the_truncated_svd(rows, columns, rank, r, seed):
    """Eckart and Young: no matrix of rank r is nearer than the truncated SVD, and its error is the norm of the rest."""
    adapter = random_adapter(rank, seed, {"x": (rows, columns)})
    smaller, lost = mixing.compress(adapter, r)
    assert [tuple(factor.shape) for factor in mixing.factors(smaller)["x"]] == [(r, columns), (rows, r)]
    delta = dense(adapter)["x"]
    values = np.linalg.svd(delta.numpy(), compute_uv=False)
    best = float(np.linalg.norm(values[r:]) / np.linalg.norm(values))
    reached = float((dense(smaller)["x"] - delta).norm() / delta.norm())
    assert lost.layers["x"] == lost.total == pytest.approx(best, abs=1e-12)
    assert reached == pytest.approx(best, abs=1e-12)


def test_compression_is_exact_where_the_true_rank_is_small():
    """Eight factors of true rank two: copies of one adapter in other bases."""
    one = random_adapter(2, 0)
    copies = [{} for _ in range(4)]
    for seed, copy in enumerate(copies):
        turn = torch.randn(2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for layer, (a, b) in mixing.factors(one).items():
            copy[f"{layer}.lora_A.weight"], copy[f"{layer}.lora_B.weight"] = torch.linalg.solve(turn, a), b @ turn
    smaller, lost = mixing.compress(mixing.mix(copies, [0.5, 1.0, -2.0, 1.5], [1.0] * 4), 2)
    assert_same(dense(smaller), dense(one), 1e-11)
    assert lost.total < 1e-13


def test_the_loss_over_all_layers_is_the_root_of_the_sums_of_squares():
    adapter = random_adapter(4, 3)
    smaller, lost = mixing.compress(adapter, 2)
    whole, small = dense(adapter), dense(smaller)
    rest = sum(float((whole[layer] - small[layer]).square().sum()) for layer in whole)
    total = sum(float(delta.square().sum()) for delta in whole.values())
    assert lost.total == pytest.approx(math.sqrt(rest / total), rel=1e-10)
    assert min(lost.layers.values()) < lost.total < max(lost.layers.values())
    losses = [mixing.compress(adapter, r)[1].total for r in (1, 2, 3, 4)]
    assert losses == sorted(losses, reverse=True) and losses[3] == 0


def test_compressed_factors_are_balanced_and_their_signs_are_fixed():
    adapter = random_adapter(4, 5)
    flipped = {name: -tensor for name, tensor in adapter.items()}  # the same deltas
    smaller = mixing.compress(adapter, 3)[0]
    assert_same(smaller, mixing.compress(flipped, 3)[0])
    for layer, (a, b) in mixing.factors(smaller).items():
        values = torch.linalg.svdvals(dense(adapter)[layer])[:3]
        torch.testing.assert_close(a @ a.T, values.diag(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(b.T @ b, values.diag(), rtol=1e-10, atol=1e-10)
        assert (a.amax(1) == a.abs().amax(1)).all()


def test_an_adapter_that_does_nothing_loses_nothing():
    untrained = {name: tensor * ("lora_A" in name) for name, tensor in random_adapter(3, 0).items()}
    smaller, lost = mixing.compress(untrained, 1)
    assert lost.total == 0 and set(lost.layers.values()) == {0.0}
    assert all(not delta.any() for delta in dense(smaller).values())


# --- adapters on disk, against peft ---------------------------------------------------------------------------------

FORMS = [(2, 8.0, False), (3, 5.0, True), (2, 1.0, False)]  # r, alpha, rsLoRA
IDS = torch.tensor([[1, 10, 11, 12, 13, 14, 15, 2], [1, 40, 31, 22, 93, 14, 5, 2]])


def load(path: Path, dtype: torch.dtype = torch.float64):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def inject(path: Path, form: tuple[int, float, bool], adapter: str = "default", dtype: torch.dtype = torch.float64):
    return lora.inject(load(path, dtype), configuration(path, form), adapter)


def configuration(path: Path, form: tuple[int, float, bool]):
    return lora.configuration(*form[:2], ("q_proj", "down_proj"), 0.1, form[2], str(path))


def logits(model) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def written(tmp_path_factory, tiny_model_path) -> list[Path]:
    """Three adapters of one base and one target set, of different ranks and scalings."""
    root = tmp_path_factory.mktemp("mixing")
    for k, form in enumerate(FORMS):
        model = inject(tiny_model_path, form, dtype=torch.float32)
        with torch.no_grad():
            draw = torch.Generator().manual_seed(k)
            for parameter in trainable(model, "default").values():
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
        lora.write(model, "default", root / f"w{k}", BASE)
    return [root / f"w{k}" for k in range(len(FORMS))]


@pytest.fixture
def damaged(written, tmp_path) -> Path:
    return Path(shutil.copytree(written[1], tmp_path / "damaged"))


@pytest.mark.parametrize("coefficients", [[0.5, 0.3, 0.2], [1.5, -0.5, 0.0], [0.0, 0.0, -2.0]])
def test_plain_peft_runs_the_base_plus_the_sum_of_the_deltas(written, tiny_model_path, tmp_path, coefficients):
    adapters = [mixing.read(folder) for folder in written]
    mixed, lost = mixing.soup(adapters, coefficients)
    assert lost.total == 0 and set(lost.layers) == set(mixing.factors(mixed.tensors))
    mixing.write(mixed, tmp_path)
    by_peft = PeftModel.from_pretrained(load(tiny_model_path), tmp_path)
    by_hand = load(tiny_model_path)
    assert not torch.allclose(logits(by_peft), logits(by_hand), atol=1e-2)  # the adapters do something
    for adapter, c in zip(adapters, coefficients, strict=True):
        for layer, delta in dense(dict(adapter.tensors), adapter.scaling).items():
            by_hand.get_submodule(layer.removeprefix("base_model.model.")).weight.data += c * delta
    torch.testing.assert_close(logits(by_peft), logits(by_hand), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("coefficient", [1.0, 0.25])
def test_one_adapter_alone_keeps_its_form_and_is_read_back_by_the_run(written, tiny_model_path, tmp_path, coefficient):
    one, two = (mixing.read(folder) for folder in written[:2])
    mixed, _ = mixing.soup([one, two], [coefficient, 0.0])
    assert (mixed.r, mixed.alpha, mixed.rslora) == FORMS[0]
    ups = [name for name in one.tensors if "lora_B" in name]
    assert all(torch.equal(mixed.tensors[name], coefficient * one.tensors[name]) for name in ups)
    mixing.write(mixed, tmp_path)
    if coefficient == 1.0:
        assert (tmp_path / lora.WEIGHTS_FILE).read_bytes() == (written[0] / lora.WEIGHTS_FILE).read_bytes()
    model = inject(tiny_model_path, FORMS[0])
    lora.read(model, "default", tmp_path, BASE)
    assert_same(lora.weights(model, "default"), dict(mixed.tensors), 0)


SLOTS = [(None, (7, 7.0, False)), (3, FORMS[1]), (2, (2, 2.0, False)), (9, (9, 9.0, False))]


@pytest.mark.parametrize(("r", "slot"), SLOTS)
def test_a_mix_is_read_back_into_a_slot_of_its_form(written, tiny_model_path, tmp_path, r, slot):
    """At the rank of the first that takes part it has that one's alpha and rsLoRA, at others a scaling of 1."""
    adapters = [mixing.read(written[k]) for k in (1, 0, 2)]
    exact, _ = mixing.soup(adapters, [0.5, 0.3, 0.2])
    mixed, lost = mixing.soup(adapters, [0.5, 0.3, 0.2], r)
    assert (mixed.r, mixed.alpha, mixed.rslora) == slot
    whole, small = dense(dict(exact.tensors), exact.scaling), dense(dict(mixed.tensors), mixed.scaling)
    for layer, delta in whole.items():
        assert float((small[layer] - delta).norm() / delta.norm()) == pytest.approx(lost.layers[layer], abs=1e-6)
    assert (lost.total > 0.01) == (mixed.r < 7)
    mixing.write(mixed, tmp_path)
    again = mixing.read(tmp_path)
    assert (again.r, again.alpha, again.rslora, again.base) == (*slot, BASE)
    model = inject(tiny_model_path, FORMS[0], "first")
    model.add_adapter("mixed", configuration(tiny_model_path, slot))
    lora.read(model.eval(), "mixed", tmp_path, BASE)
    with lora.active(model, "mixed"):
        ours = logits(model)
    theirs = logits(PeftModel.from_pretrained(load(tiny_model_path), tmp_path))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_adapters_of_other_bases_targets_or_shapes_are_refused_by_folder(written, damaged):
    first, tensors = mixing.read(written[0]), storage.read_tensors(written[1] / lora.WEIGHTS_FILE)
    lacking = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp" not in name}
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    smaller = tensors | {name: tensors[name][:, :5]}
    for changed, metadata, message in (
        (tensors, {"base": "0" * 64}, "another base model"),
        (tensors, {}, "names no base model"),
        (lacking, {"base": BASE}, r"does not adapt .*layers\.1\.mlp"),
        (smaller, {"base": BASE}, r"q_proj is 32 x 5, in .* it is 32 x 32"),
    ):
        storage.write_tensors(damaged / lora.WEIGHTS_FILE, changed, metadata)
        with pytest.raises(RunError, match=f"^{damaged}.*: .*{message}"):
            mixing.soup([first, mixing.read(damaged)], [0.5, 0.5])


OTHER_KINDS = [
    *({"use_dora": True}, {"bias": "all"}, {"rank_pattern": {"q_proj": 4}}, {"modules_to_save": ["lm_head"]}),
    *({"invented_later": 1}, {"peft_type": "IA3"}, {"peft_type": None}),
]
CORRUPT: list[dict[str, object]] = [{"r": 4}, {"r": "3"}, {"lora_alpha": 0}, {"use_rslora": "no"}]


@pytest.mark.parametrize("change", [*OTHER_KINDS, *CORRUPT])
def test_what_is_not_a_plain_adapter_is_refused_by_file(damaged, change):
    storage.write_json(damaged / lora.CONFIG_FILE, storage.read_json(damaged / lora.CONFIG_FILE) | change)
    with pytest.raises(CorruptFileError if change in CORRUPT else RunError, match=str(damaged)):
        mixing.read(damaged)
