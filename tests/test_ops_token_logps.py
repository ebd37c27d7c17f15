"""token_logps: every implementation against the specification, and the specification against float64 and by hand."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moalign.errors import ModelError
from moalign.ops import IGNORED, IMPLEMENTATIONS, select, token_logps

ANYWHERE = ["reference", "chunked"]
OPTIONS = [
    {},
    {"temperature": 0.7},
    {"softcap": 3.0},
    {"temperature": 1.9, "softcap": 5.0},
]


def inputs(n, d=7, v=23, dtype=torch.float64, *, bias=False, seed=0, ignored=False, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)
    head = (scale * torch.randn(v, d, generator=generator, dtype=torch.float64)).to(dtype)
    offset = torch.randn(v, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    labels = torch.randint(v, (n,), generator=generator)
    if ignored:
        labels[::3] = IGNORED
    return hidden, head, labels, offset


in_chunks = partial(token_logps, implementation="chunked")


def gradients(function, *tensors, upstream=None):
    """The value of ``function`` at ``tensors``, and the gradients of its sum weighted by ``upstream``."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = function(*leaves)
    weights = torch.linspace(-1, 2, len(value), dtype=value.dtype) if upstream is None else upstream
    return value.detach(), torch.autograd.grad((value * weights).sum(), leaves)


def relative_error(got, truth):
    return float((got.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30))


def test_a_case_by_hand():
    hidden, head = torch.tensor([[1.0, 0.0]]), torch.tensor([[math.log(1.0), 5.0], [math.log(3.0), 5.0]])
    for name in ANYWHERE:
        result = token_logps(hidden, head, torch.tensor([1]), entropy=True, implementation=name)
        assert result.logps.item() == pytest.approx(math.log(0.75), rel=1e-6)
        assert result.entropy.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25), rel=1e-6)


@pytest.mark.parametrize("implementation", ANYWHERE)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("trainable", [False, True])
def test_gradcheck(implementation, options, trainable):
    hidden, head, labels, bias = inputs(5, 3, 11, bias=True, ignored=True)
    hidden.requires_grad_()
    head.requires_grad_(trainable)
    bias.requires_grad_(trainable)

    def logps(hidden, head, bias):
        return token_logps(hidden, head, labels, bias, implementation=implementation, **options).logps

    assert torch.autograd.gradcheck(logps, (hidden, head, bias))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
@pytest.mark.parametrize("n", [0, 1, 13])
def test_chunked_equals_the_reference_in_double_precision(options, bias, chunk, n):
    hidden, head, labels, offset = inputs(n, bias=bias)
    small, spec = (
        lambda h: in_chunks(h, head, labels, offset, chunk_tokens=chunk, **options).logps,
        lambda h: token_logps(h, head, labels, offset, implementation="reference", **options).logps,
    )
    (value, (gradient,)), (truth, (true_gradient,)) = gradients(small, hidden), gradients(spec, hidden)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("v", [1, 2, 129, 1000])
def test_no_further_from_the_truth_than_torch_in_the_same_dtype(options, dtype, v):
    hidden, head, labels, bias = inputs(33, 16, v, dtype, bias=True, ignored=True)
    exact = [tensor.double() for tensor in (hidden, head, bias)]

    def run(implementation, hidden, head, bias):
        return gradients(
            lambda h: token_logps(h, head, labels, bias, implementation=implementation, **options).logps, hidden
        )

    truth, (true_gradient,) = run("reference", *exact)
    by_torch, (torch_gradient,) = run("reference", hidden, head, bias)
    value, (gradient,) = run("chunked", hidden, head, bias)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    # two libraries sum v products in different orders: at random, sqrt(v) roundings of at most half an ulp each
    rounding = torch.finfo(dtype).eps + math.sqrt(v) * torch.finfo(torch.float32).eps / 4
    assert relative_error(value, truth) <= relative_error(by_torch, truth) + rounding
    assert relative_error(gradient, true_gradient) <= relative_error(torch_gradient, true_gradient) + rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("trains", ["head", "bias", "both"])
def test_a_trainable_head_takes_the_general_path(dtype, options, trains):
    hidden, head, labels, bias = inputs(29, 8, 37, dtype, bias=True, ignored=True)
    exact = [tensor.double() for tensor in (hidden, head, bias)]
    wanted = {"head": [0, 1], "bias": [0, 2], "both": [0, 1, 2]}[trains]

    def run(compute, tensors):
        def function(*leaves):
            filled = list(tensors)
            for position, leaf in zip(wanted, leaves, strict=True):
                filled[position] = leaf
            return compute(*filled)

        return gradients(function, *(tensors[position] for position in wanted))

    rows = labels != IGNORED
    truth, exact_gradients = run(
        lambda h, w, b: token_logps(h, w, labels, b, implementation="reference", **options).logps[rows], exact
    )
    value, own_gradients = run(
        lambda h, w, b: in_chunks(h[rows], w, labels[rows], b, chunk_tokens=5, **options).logps,
        (hidden, head, bias),
    )
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert relative_error(value, truth) <= tolerance
    for got, expected in zip(own_gradients, exact_gradients, strict=True):
        assert got.dtype == dtype
        assert relative_error(got, expected) <= tolerance


def test_only_the_head_is_trained():
    hidden, head, labels, _ = inputs(9)
    value, (gradient,) = gradients(lambda w: token_logps(hidden, w, labels, implementation="chunked").logps, head)
    truth, (expected,) = gradients(lambda w: token_logps(hidden, w, labels, implementation="reference").logps, head)
    torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("certainty", [0.99, 0.999, 0.99999])
def test_tokens_that_the_model_is_sure_of_keep_their_gradient(dtype, certainty, trainable):
    """p rounds to 1 in bfloat16, so that 1 - (rounded p) would be 0 or 0.0039; the gradient is exact to one rounding.

    The head is the identity: logits are exact in every dtype, and the gradient is onehot - p itself.
    """
    v = 50
    odds = math.log(certainty / (1 - certainty) * (v - 1))
    hidden, labels = odds * torch.eye(v, dtype=dtype), torch.arange(v)
    head = torch.eye(v, dtype=dtype, requires_grad=trainable)
    truth, (expected,) = gradients(
        lambda h: token_logps(h, torch.eye(v).double(), labels, implementation="reference").logps, hidden.double()
    )
    value, (gradient,) = gradients(lambda h: token_logps(h, head, labels, implementation="chunked").logps, hidden)
    assert truth.exp().min() > certainty - 0.003
    scale = 1 if trainable else 2  # the frozen path rounds once more, when it scales by the upstream gradient
    torch.testing.assert_close(gradient.double(), expected, rtol=scale * torch.finfo(dtype).eps + 1e-5, atol=0)
    torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=0)


def test_near_certainty_is_not_lost_in_float32():
    """With p = 1 - 1e-12, log p and 1 - p have full relative precision, where 1 - float32(p) is 0."""
    hidden = torch.ones(1, 1, requires_grad=True)
    head = torch.tensor([[0.0], [-12 * math.log(10)]])
    logps = token_logps(hidden, head, torch.tensor([0]), implementation="chunked").logps
    (gradient,) = torch.autograd.grad(logps.sum(), hidden)
    assert logps.item() == pytest.approx(-1e-12, rel=1e-4)
    assert gradient.item() == pytest.approx(-1e-12 * head[1].item(), rel=1e-4)


@pytest.mark.parametrize("implementation", ANYWHERE)
def test_ignored_labels_give_exactly_nothing(implementation):
    hidden, head, labels, _ = inputs(12, ignored=True)
    hidden[labels == IGNORED] = torch.nan  # what stands at an ignored token must not matter
    leaf = hidden.clone().requires_grad_()
    result = token_logps(leaf, head, labels, entropy=True, implementation=implementation)
    upstream = torch.where(labels == IGNORED, torch.inf, 1.0)
    (gradient,) = torch.autograd.grad(result.logps, leaf, upstream.double())
    ignored = labels == IGNORED
    assert (result.logps[ignored] == 0).all() and (result.entropy[ignored] == 0).all()
    assert (gradient[ignored] == 0).all() and gradient.isfinite().all()
    alone = token_logps(hidden[~ignored], head, labels[~ignored], implementation=implementation).logps
    torch.testing.assert_close(result.logps[~ignored], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", ANYWHERE)
@pytest.mark.parametrize("n", [0, 4])
@pytest.mark.parametrize("trainable", [False, True])
def test_no_token_at_all(implementation, n, trainable):
    hidden, head, _, _ = inputs(n, dtype=torch.float32)
    hidden.requires_grad_()
    head.requires_grad_(trainable)
    labels = torch.full((n,), IGNORED)
    result = token_logps(hidden, head, labels, entropy=True, implementation=implementation)
    assert result.logps.shape == result.entropy.shape == (n,)
    result.logps.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros(n, 7))
    if trainable:
        assert torch.equal(head.grad, torch.zeros(23, 7))


@pytest.mark.parametrize("trainable", [False, True])
def test_non_contiguous_inputs(trainable):
    hidden, head, labels, _ = inputs(10)
    leaf, weight = hidden.t().contiguous().t(), torch.stack([head, head], 1)[:, 0]
    spaced = torch.stack([labels, labels], 1)[:, 0]
    assert not (leaf.is_contiguous() or weight.is_contiguous() or spaced.is_contiguous())
    leaf.requires_grad_()
    weight = weight.detach().requires_grad_(trainable)
    logps = token_logps(leaf, weight, spaced, implementation="chunked").logps
    truth, (expected,) = gradients(
        lambda h: token_logps(h, head, labels, implementation="reference").logps, hidden, upstream=torch.ones(10)
    )
    (gradient,) = torch.autograd.grad(logps.sum(), leaf)
    torch.testing.assert_close(logps, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trainable", [False, True])
def test_backward_twice(trainable):
    hidden, head, labels, _ = inputs(8)
    hidden.requires_grad_()
    head.requires_grad_(trainable)
    logps = token_logps(hidden, head, labels, implementation="chunked").logps
    (first,) = torch.autograd.grad(logps.sum(), hidden, retain_graph=True)
    (second,) = torch.autograd.grad(logps.sum(), hidden)
    assert torch.equal(first, second) and first.abs().max() > 0


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_entropy_is_a_metric_without_gradient(options):
    hidden, head, labels, bias = inputs(17, bias=True)
    hidden.requires_grad_()
    with_entropy = token_logps(hidden, head, labels, bias, entropy=True, implementation="chunked", **options)
    truth = token_logps(hidden, head, labels, bias, entropy=True, implementation="reference", **options)
    assert not with_entropy.entropy.requires_grad and not truth.entropy.requires_grad
    torch.testing.assert_close(with_entropy.entropy, truth.entropy, rtol=1e-12, atol=1e-12)
    without = token_logps(hidden, head, labels, bias, implementation="chunked", **options)
    assert without.entropy is None and torch.equal(without.logps, with_entropy.logps)
    (gradient,) = torch.autograd.grad(with_entropy.logps.sum(), hidden)
    (expected,) = torch.autograd.grad(without.logps.sum(), hidden)
    assert torch.equal(gradient, expected)


def test_the_entropy_does_not_depend_on_which_token_is_the_label():
    """Nor does an impossible label spoil it."""
    hidden, head, _, bias = inputs(6, dtype=torch.float32, bias=True)
    bias[3:6] = torch.tensor([-300.0, -30_000.0, -torch.inf])
    labels = torch.tensor([0, 1, 2, 3, 4, 5])
    one_row = hidden[:1].expand(6, -1)
    entropies = token_logps(one_row, head, labels, bias, entropy=True, implementation="chunked").entropy
    truth = token_logps(one_row[:1].double(), head.double(), labels[:1], bias.double().clamp(min=-1e9), entropy=True)
    torch.testing.assert_close(entropies.double(), truth.entropy.expand(6), rtol=1e-5, atol=1e-6)


def test_the_entropy_of_equal_logits_is_the_logarithm_of_the_vocabulary():
    result = token_logps(torch.zeros(3, 4), torch.ones(23, 4), torch.tensor([0, 5, 22]), entropy=True)
    torch.testing.assert_close(result.entropy, torch.full((3,), math.log(23)))
    torch.testing.assert_close(result.logps, torch.full((3,), -math.log(23)))


def test_vocabulary_entries_that_are_ruled_out_stay_out():
    """A padded vocabulary is masked by a bias of -inf: probability 0, no NaN anywhere."""
    hidden, head, labels, bias = inputs(9, bias=True)
    labels = labels.clamp(max=19)
    bias[20:] = -torch.inf
    value, (gradient,) = gradients(lambda h: token_logps(h, head, labels, bias, implementation="chunked").logps, hidden)
    truth, (expected,) = gradients(lambda h: token_logps(h, head[:20], labels, bias[:20]).logps, hidden)
    torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 9),
    d=st.integers(1, 6),
    v=st.integers(1, 40),
    chunk=st.integers(1, 10),
    temperature=st.floats(0.3, 3),
    softcap=st.none() | st.floats(1, 30),
    scale=st.floats(0, 30),
    seed=st.integers(0, 99),
)
def test_any_shape(n, d, v, chunk, temperature, softcap, scale, seed):
    hidden, head, labels, bias = inputs(n, d, v, bias=True, seed=seed, scale=scale)
    options = {"temperature": temperature, "softcap": softcap}
    value, (gradient,) = gradients(
        lambda h: in_chunks(h, head, labels, bias, chunk_tokens=chunk, **options).logps, hidden
    )
    truth, (expected,) = gradients(
        lambda h: token_logps(h, head, labels, bias, implementation="reference", **options).logps, hidden
    )
    torch.testing.assert_close(value, truth, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-11 * (1 + scale))


def test_inputs_are_left_as_they_were():
    hidden, head, labels, bias = inputs(11, bias=True, ignored=True)
    before = [tensor.clone() for tensor in (hidden, head, labels, bias)]
    leaf = hidden.requires_grad_()
    token_logps(leaf, head, labels, bias, softcap=4.0, temperature=0.5, entropy=True).logps.sum().backward()
    for tensor, copy in zip((hidden, head, labels, bias), before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("bad", [23, 999, -1, -99])
def test_labels_outside_the_head_are_refused(bad):
    hidden, head, labels, _ = inputs(6)
    labels[3] = bad
    with pytest.raises(ModelError, match=f"token id {bad} is outside the model's head of 23 tokens"):
        token_logps(hidden, head, labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": math.nan}, "temperature must be positive"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"labels": torch.zeros(5, dtype=torch.long)}, r"labels must be \[N\]"),
        ({"labels": torch.zeros(6)}, "labels must be integers"),
        ({"hidden": torch.zeros(6, 8, dtype=torch.float64)}, r"hidden must be \[N,D\]"),
        ({"hidden": torch.zeros(6, 7)}, "one dtype is needed"),
        ({"bias": torch.zeros(22, dtype=torch.float64)}, r"bias must be \[V\]"),
        ({"implementation": "tritn"}, "no implementation is called 'tritn'; known: auto, reference, chunked"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    hidden, head, labels, _ = inputs(6)
    arguments = {"hidden": hidden, "lm_head": head, "labels": labels, **change}
    with pytest.raises(ValueError, match=message):
        token_logps(**arguments)


def test_auto_is_the_fastest_for_the_device():
    assert select("auto", torch.device("cpu")) is IMPLEMENTATIONS["chunked"]
    assert select("auto", torch.device("cuda")) is IMPLEMENTATIONS["triton"]


def test_where_triton_cannot_run_the_reason_is_said_and_the_result_is_right(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    hidden, head, labels, _ = inputs(6, dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match="Triton does not compile for the CPU.*'chunked' is used"):
        result = token_logps(hidden, head, labels, implementation="triton")
    assert torch.equal(result.logps, in_chunks(hidden, head, labels).logps)
    with pytest.warns(RuntimeWarning, match=r"no torch\.float64.*'chunked' is used"):
        token_logps(hidden.double(), head.double(), labels, implementation="triton")
