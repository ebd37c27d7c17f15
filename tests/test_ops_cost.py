"""What token_logps costs: matrix products and memory, counted and not timed."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moalign.ops import token_logps
from moalign.ops.chunked import default_chunk_tokens
from moalign.ops.contract import Options

PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.mkldnn._linear_pointwise}


def inputs(n, d=8, v=400, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(size, d, generator=generator).to(dtype) for size in (n, v))
    return hidden, head, torch.randint(v, (n,), generator=generator)


class Watch(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returned, and counts the products."""

    def __init__(self):
        super().__init__()
        self.elements, self.products = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.products += function.overloadpacket in PRODUCTS
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def watch(implementation, *, hidden_grad=True, head_grad=False, chunk=16, dtype=torch.float32):
    hidden, head, labels = inputs(256, dtype=dtype)
    hidden.requires_grad_(hidden_grad)
    head.requires_grad_(head_grad)
    with Watch() as watched:
        options = {"softcap": 20.0, "entropy": True, "chunk_tokens": chunk, "implementation": implementation}
        logps = token_logps(hidden, head, labels, **options).logps
        if logps.requires_grad:
            logps.sum().backward()
    return watched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("hidden_grad", "head_grad"), [(True, False), (False, False), (True, True), (False, True)])
def test_memory_is_a_chunk_of_logits_never_all_of_them(dtype, hidden_grad, head_grad):
    watched = watch("chunked", hidden_grad=hidden_grad, head_grad=head_grad, dtype=dtype)
    assert watched.elements == 16 * 400  # more than N*D and V*D here, a sixteenth of N*V
    assert watch("reference").elements == 256 * 400


@pytest.mark.parametrize(
    ("hidden_grad", "head_grad", "per_chunk"), [(False, False, 1), (True, False, 2), (True, True, 4)]
)
def test_the_number_of_matrix_products(hidden_grad, head_grad, per_chunk):
    watched = watch("chunked", hidden_grad=hidden_grad, head_grad=head_grad, chunk=16)
    assert watched.products == per_chunk * 256 // 16


def test_no_gradient_is_prepared_where_none_is_recorded():
    hidden, head, labels = inputs(5)
    hidden.requires_grad_()
    head.requires_grad_()
    with torch.no_grad(), Watch() as watched:
        assert not token_logps(hidden, head, labels, implementation="chunked", chunk_tokens=1).logps.requires_grad
    assert watched.products == 5


def test_the_gradient_of_the_entropy_costs_one_product_more():
    hidden, head, labels = inputs(96)
    counts = {}
    for wanted in ({}, {"entropy": True}, {"entropy_gradient": True}):
        with Watch() as counted:
            token_logps(hidden.requires_grad_(), head, labels, implementation="chunked", chunk_tokens=32, **wanted)
        counts[str(wanted)] = counted.products / 3
    assert list(counts.values()) == [2, 2, 3]


def test_many_objectives_gradients_cost_the_same_two_products():
    hidden, head, labels = inputs(96)
    leaf = hidden.requires_grad_()
    upstream = torch.randn(3, len(labels), generator=torch.Generator().manual_seed(5))
    with Watch() as counted:
        logps = token_logps(leaf, head, labels, implementation="chunked", chunk_tokens=len(labels)).logps
        one_by_one = [torch.autograd.grad(logps, leaf, row, retain_graph=True)[0] for row in upstream]
        (together,) = torch.autograd.grad(logps, leaf, upstream, is_grads_batched=True)
    assert counted.products == 2
    assert torch.equal(torch.stack(one_by_one), together)
    for row, gradient in zip(upstream, one_by_one, strict=True):
        logps = token_logps(leaf, head, labels, implementation="reference").logps
        (expected,) = torch.autograd.grad(logps, leaf, row)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_the_memory_of_a_chunk_is_stated_in_bytes_whatever_the_vocabulary():
    for v in (32_000, 129_920, 151_936, 262_144):
        tokens = default_chunk_tokens(torch.empty(v, 1), Options())
        assert 8e6 < tokens * v * 4 <= 56 * 2**20
        on_a_gpu = default_chunk_tokens(torch.empty(v, 1, dtype=torch.bfloat16, device="meta"), Options())
        assert on_a_gpu % 128 == 0 and 300e6 < on_a_gpu * v * 6 <= 448 * 2**20
