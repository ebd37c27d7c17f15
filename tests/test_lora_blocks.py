"""Shares by blocks of layers: a share of its own for the lower, the middle and the upper layers of an adapter."""

from __future__ import annotations

import math

import pytest
import torch
from test_lora_mixing import assert_same, dense, random_adapter, weighted

from moalign.errors import MoalignError, RunError
from moalign.lora import mixing


def named(layers: int, pattern: str = "model.layers.{}.self_attn.q_proj", *, head: bool = False, start: int = 0):
    """A float64 adapter of so many layers, the first of them numbered ``start``."""
    sizes = {pattern.format(start + number): (5, 7) for number in range(layers)}
    return random_adapter(2, layers, sizes | ({"lm_head": (11, 7)} if head else {}))


def shares_found(adapter, mixed) -> dict[str, float]:
    """By how much each module of ``mixed`` is that of ``adapter``; it must be a multiple of it."""
    before, after = dense(adapter), dense(mixed)
    found = {name: float((after[name] * before[name]).sum() / before[name].square().sum()) for name in before}
    assert_same(after, {name: found[name] * before[name] for name in before})
    return {name: round(share, 12) for name, share in found.items()}


def layer_by_layer(shares, layers: int, pattern: str = "model.layers.{}.self_attn.q_proj", **more) -> list[float]:
    adapter = named(layers, pattern, **more)
    found = shares_found(adapter, mixing.mix([adapter], [shares], [1.0]))
    return [found[pattern.format(more.get("start", 0) + number)] for number in range(layers)]


def test_equal_numbers_in_all_blocks_are_the_plain_share_bit_by_bit():
    one, two = named(6, head=True), {name: tensor.flip(0) for name, tensor in named(6, head=True).items()}
    plain = mixing.mix([one, two], [0.3, 0.7], [2.0, 1.5])
    for blocks in (1, 2, 3, 6, 50):
        by_blocks = mixing.mix([one, two], [(0.3,) * blocks, (0.7,) * blocks], [2.0, 1.5])
        assert by_blocks.keys() == plain.keys()
        assert all(torch.equal(by_blocks[name], plain[name]) for name in plain)


def test_the_lower_and_the_upper_half_of_an_adapter_add_up_to_the_whole():
    adapter = named(5, head=True)
    halves = [mixing.mix([adapter], [share], [0.7]) for share in ((1.0, 0.0), (0.0, 1.0))]
    assert_same(weighted([dense(half) for half in halves], [1.0, 1.0]), dense(adapter, 0.7))
    assert_same(dense(mixing.mix([adapter, adapter], [(1.0, 0.0), (0.0, 1.0)], [0.7, 0.7])), dense(adapter, 0.7))
    lower, upper = map(dense, halves)
    assert all((lower[name] == 0).all() != (upper[name] == 0).all() for name in lower)  # no module in both, or in none


@pytest.mark.parametrize("rank", [None, 8, 3])
def test_every_layer_is_the_sum_of_the_deltas_by_the_shares_of_its_block(rank):
    """Against a sum over dense matrices; compressed, what is lost is what the report says."""
    parts = [random_adapter(r, r, {f"model.layers.{k}.mlp.up_proj": (6, 8) for k in range(7)}) for r in (2, 3)]
    scalings, shares = [1.5, 0.5], [(0.2, 1.1, -0.4), (0.9, 0.0)]
    adapters = [
        mixing.Adapter(f"a{k}", part, k + 2, s * (k + 2), False, "base", {})
        for k, (part, s) in enumerate(zip(parts, scalings, strict=True))
    ]
    assert [adapter.scaling for adapter in adapters] == scalings
    mixed, lost = mixing.soup(adapters, shares, rank)
    whole = dense(dict(mixed.tensors), mixed.scaling)
    thirds, halves = (0, 0, 0, 1, 1, 2, 2), (0, 0, 0, 0, 1, 1, 1)
    for k in range(7):
        name = f"model.layers.{k}.mlp.up_proj"
        expected = shares[0][thirds[k]] * dense(parts[0], 1.5)[name] + shares[1][halves[k]] * dense(parts[1], 0.5)[name]
        assert float((whole[name] - expected).norm() / expected.norm()) == pytest.approx(lost.layers[name], abs=1e-9)
    assert (lost.total < 1e-9) == (rank != 3)


@pytest.mark.parametrize(
    "pattern",
    [
        "model.layers.{}.self_attn.q_proj",
        "base_model.model.transformer.h.{}.attn.c_attn",
        "gpt_neox.layers.{}.mlp.experts.7.dense_h_to_4h",
    ],
)
def test_blocks_are_from_the_bottom_under_the_names_of_several_architectures(pattern):
    assert layer_by_layer((0.1, 0.2, 0.3), 12, pattern) == [0.1] * 4 + [0.2] * 4 + [0.3] * 4
    assert layer_by_layer((0.1, 0.2), 3, pattern) == [0.1, 0.1, 0.2]


def test_a_share_for_each_layer_is_that_layers_share():
    """Also where i / n times n is below i in floating point, as for 1 of 49."""
    for layers in (1, 2, 32, 49, 58, 98):
        shares = tuple(float(number + 1) for number in range(layers))
        assert layer_by_layer(shares, layers) == list(shares)


def test_the_blocks_are_those_of_the_layers_that_are_adapted():
    """An adapter on the upper half alone: none of the shares is without layers."""
    assert layer_by_layer((0.1, 0.2, 0.3), 6, start=6) == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]


def test_with_more_blocks_than_layers_each_layer_takes_the_block_that_it_begins_in():
    assert layer_by_layer((0.1, 0.2, 0.3, 0.4), 2) == [0.1, 0.3]
    assert layer_by_layer((0.1, 0.2, 0.3), 1) == [0.1]


def test_what_has_no_layers_number_counts_to_the_last_block():
    for layers, shares in ((4, (0.1, 0.2)), (2, (0.1, 0.2, 0.3))):
        adapter = named(layers, head=True)
        assert shares_found(adapter, mixing.mix([adapter], [shares], [1.0]))["lm_head"] == shares[-1]
    alone = random_adapter(1, 0, {"lm_head": (4, 3)})
    assert_same(dense(mixing.mix([alone], [(0.0, 2.0)], [1.0])), weighted([dense(alone)], [2.0]))


def test_an_adapter_whose_blocks_are_all_nothing_takes_no_part():
    one, two = named(3), {name: 2 * tensor for name, tensor in named(3).items()}
    mixed = mixing.mix([one, two], [(0.0, 0.0), (0.5, 1.0)], [1.0, 1.0])
    assert {len(a) for a, _ in mixing.factors(mixed).values()} == {2}
    assert_same(dense(mixed), dense(mixing.mix([two], [(0.5, 1.0)], [1.0])))


def test_shares_by_blocks_that_mean_nothing_are_refused():
    two = [named(2), named(2)]
    for shares in ([(), 1.0], [(1.0, math.nan), 1.0], [(math.inf,), 1.0], [(1.0, 2.0)]):
        with pytest.raises(MoalignError, match="one finite number each"):
            mixing.mix(two, shares, [1.0, 1.0])
    with pytest.raises(MoalignError, match="the base itself"):
        mixing.mix(two, [(0.0, 0.0), 0.0], [1.0, 1.0])
    with pytest.raises(RunError, match=r"one: does not adapt model\.layers\.2"):
        mixing.mix([named(3), named(2)], [(1.0, 0.0), 1.0], [1.0, 1.0], names=["three", "one"])
