"""The Triton row pass against float64, under Triton's interpreter.

Rounding errors are bounded by the arithmetic: z carries a relative error of a few eps, so each p one of eps * |z|.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moalign.ops import IGNORED, token_logps, triton_rows
from moalign.ops.triton_rows import launch

triton = pytest.importorskip("triton", reason="Triton has no package for this platform")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, of lanes beyond the row's end
EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels made from here on are interpreted, whoever imported Triton before.

    Triton decides that when ``triton.jit`` wraps a function. Its own tl.sum and tl.max were wrapped when it was
    imported, so they are replaced by the reductions that the interpreter knows.
    """
    tl = triton.language
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(tl, "sum", lambda x, axis: tl.reduce(x, axis, tl.standard._sum_combine))
    monkeypatch.setattr(tl, "max", lambda x, axis: tl.reduce(x, axis, tl.standard._elementwise_max))


# --- against float64 ------------------------------------------------------------------------------------------------


def truth(product: Tensor, labels: Tensor, bias: Tensor | None, temperature: float, softcap: float | None) -> Any:
    """In float64: logps, entropies, the gradients of both times -temperature, and what bounds float32's error in each.

    Written without cancellation where p is nearly 1; autograd, which is not, confirms the gradients to 1e-12.
    """
    product = product.double().requires_grad_()
    score = product if bias is None else product + bias.double()
    z = (score if softcap is None else softcap * torch.tanh(score / softcap)) / temperature
    kept, label = labels >= 0, torch.nn.functional.one_hot(labels.clamp(min=0), product.shape[1]).bool()
    log_p = z.log_softmax(-1)
    by_autograd = torch.autograd.grad(log_p[label][kept].sum(), product, retain_graph=True)
    by_autograd += torch.autograd.grad(torch.special.entr(log_p.exp())[kept].sum(), product)

    score, z, p = score.detach(), z.detach(), log_p.detach().exp()
    logps = -torch.nn.functional.softplus(z.masked_fill(label, -torch.inf).logsumexp(-1) - z[label])
    slope = torch.ones_like(z) if softcap is None else torch.cosh(score / softcap) ** -2
    unit = torch.where(label, logps.expm1()[:, None], p) * slope
    gap = z - z.amax(-1, keepdim=True)
    mean = (p * gap).sum(-1, keepdim=True)
    spread = p * (gap - mean) * slope
    entropies = torch.log1p((gap.exp() * (gap < 0)).sum(-1) + ((gap == 0).sum(-1) - 1)) - mean.squeeze(1)
    for exact, graded in zip((unit, spread), by_autograd, strict=True):
        torch.testing.assert_close(exact * kept[:, None], graded * -temperature, rtol=1e-10, atol=1e-12)

    # z carries a relative error, the slope one that grows with its steepness; the largest z has gap 0 exactly.
    steepness = 1 if softcap is None else 1 + (score / softcap).abs()
    error = 16 * EPS * (1 + z.abs().amax(-1, keepdim=True)) * steepness
    row_error = error.amax(-1) * kept
    gap_size = gap.abs() + (gap != 0)
    return SimpleNamespace(
        logps=logps * kept,
        entropies=entropies * kept,
        unit=unit * kept[:, None],
        spread=spread * kept[:, None],
        logps_error=row_error * torch.where(gap[label] == 0, logps.abs(), 1 + logps.abs()),
        entropies_error=row_error * (1 + entropies),
        unit_error=error * unit.abs(),
        spread_error=error * p * (gap_size + (p * gap_size).sum(-1, keepdim=True)) * slope,
    )


def plain(product: Tensor, labels: Tensor, bias: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    logps, entropies = launch(product, labels, bias, softcap=None, entropy=True, **{"temperature": 1.0, **options})
    assert entropies is not None
    return logps, entropies


ROUNDING = {torch.float32: (0.0, 0.0), torch.bfloat16: (2**-7, 0.0), torch.float16: (2**-11, 2**-25)}


def agree(value: Tensor, exact: Tensor, error: Tensor) -> None:
    """The tolerance of a buffer's dtype is half a unit in its last place (a whole one for bf16: see below)."""
    relative, absolute = ROUNDING[value.dtype]
    excess = (value.double() - exact).abs() - error - relative * exact.abs() - absolute
    # exp flushes to 0 below 1e-38
    assert excess.max() <= 1e-37, f"off by {excess.max():.3e} more than allowed"


def draw(generator: torch.Generator, choices: list[Any]) -> Any:
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def random_case(generator: torch.Generator, block: int) -> dict[str, Any]:
    """A few rows off the block size, some of them nearly certain, nearly impossible or ignored."""
    n, size = draw(generator, [1, 2]), draw(generator, [8, 64, 400, 1000])
    vocabulary = 1 + int(torch.randint(size, (), generator=generator))
    vocabulary += vocabulary % block == 0
    padding = draw(generator, [0, 0, 5])
    product = torch.randn(n, vocabulary + padding, generator=generator)[:, :vocabulary]
    product *= draw(generator, [0.1, 2.0, 20.0])
    labels = torch.randint(vocabulary, (n,), generator=generator)
    # p_y > 0.999, p_y around 1e-30, a label or all others underflow
    shift = draw(generator, [0, 0, 15, 60, -70, -300])
    product.scatter_add_(1, labels[:, None], torch.full((n, 1), float(shift)))
    labels[torch.rand(n, generator=generator) < 0.1] = -100
    bias_dtype = draw(generator, [None, None, torch.float32, torch.bfloat16, torch.float16])
    return {
        "product": product,
        "labels": labels,
        "bias": None if bias_dtype is None else torch.randn(vocabulary, generator=generator).to(bias_dtype),
        "temperature": draw(generator, [1.0, 0.7, 3.0]),
        "softcap": draw(generator, [None, None, 30.0, 4.0]),
    }


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("seed", range(10))
def test_equals_float64_on_500_shapes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the arithmetic's error of the truth, so no farther from it than torch in float32 plus that error."""
    generator = torch.Generator().manual_seed(seed)
    sure = rare = 0
    for _ in range(52):
        block = draw(generator, [32, 64, 128])
        monkeypatch.setattr(triton_rows, "INTERPRETED_BLOCK", block)
        case = random_case(generator, block)
        exact = truth(**case)
        product = case["product"]
        entropy = draw(generator, [True, False])
        in_place = draw(generator, [True, False])
        dtype = torch.float32 if in_place else draw(generator, [None, torch.float32, torch.bfloat16, torch.float16])
        gradient = product.clone() if in_place else None if dtype is None else torch.empty_like(product, dtype=dtype)
        spread = draw(generator, [None, torch.empty_like(product, dtype=dtype or torch.float32)])
        d_logps, d_entropy = (draw(generator, [None, torch.randn(len(product), generator=generator)]) for _ in "ab")
        case["product"] = gradient if in_place else product.clone()
        options = {"gradient": gradient, "d_logps": d_logps, "d_entropy": d_entropy, "entropy_gradient": spread}
        logps, entropies = launch(**case, entropy=entropy, **options)
        agree(logps, exact.logps, exact.logps_error)
        if entropy:
            assert entropies is not None
            agree(entropies, exact.entropies, exact.entropies_error)
        else:
            assert entropies is None
        if gradient is not None:
            up = torch.ones(len(product), 1) if d_logps is None else d_logps[:, None]
            down = torch.zeros(len(product), 1) if d_entropy is None else d_entropy[:, None]
            error = exact.unit_error * up.abs() + exact.spread_error * down.abs()
            agree(gradient, exact.unit * up.double() + exact.spread * down.double(), error)
        if spread is not None:
            agree(spread, exact.spread, exact.spread_error)
        kept = case["labels"] >= 0
        sure += int((exact.logps[kept].exp() > 0.999).sum())
        rare += int((exact.logps[kept] < -60).sum())
    assert sure > 5
    assert rare > 5


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("vocabulary", [129_920, 151_936, 262_144])
def test_vocabularies_of_real_models(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_rows, "INTERPRETED_BLOCK", 16_384)
    product, labels = 3 * torch.randn(1, vocabulary), torch.tensor([vocabulary - 1])
    exact = truth(product, labels, None, 1.0, None)
    logps, entropies = plain(product, labels, gradient=product)
    agree(logps, exact.logps, exact.logps_error)
    agree(entropies, exact.entropies, exact.entropies_error)
    agree(product, exact.unit, exact.unit_error)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("lead", [5.0, 15.0, 30.0, 60.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_certain_token_keeps_its_relative_precision(lead: float, temperature: float) -> None:
    """p_y up to 1 - 1e-24: what 1 - p in float32 makes 0. The others' logits are small, so their z are precise."""
    product = 0.1 * torch.randn(1, 500)
    product[0, 17] = lead
    labels, unit, spread = torch.tensor([17]), torch.empty(1, 500), torch.empty(1, 500)
    exact = truth(product, labels, None, temperature, None)
    logps, entropies = plain(product, labels, temperature=temperature, gradient=unit, entropy_gradient=spread)
    relative = 4 * EPS * (2 + lead / temperature)
    expected = torch.stack([exact.logps, exact.logps.expm1(), exact.entropies, exact.spread[:, 17]])
    measured = torch.stack([logps, unit[:, 17], entropies, spread[:, 17]])
    assert ((measured - expected).abs() <= relative * expected.abs()).all()


@pytest.mark.usefixtures("interpreter")
def test_a_distant_cap_changes_nothing_near_zero() -> None:
    """c tanh(s / c) of a small s / c has the precision of s, not that of c."""
    product, labels = torch.randn(3, 300), torch.tensor([1, 2, 3])
    exact = truth(product, labels, None, 1.0, 1e4)
    logps, _ = launch(product, labels, None, temperature=1.0, softcap=1e4, entropy=False)
    agree(logps, exact.logps, 4 * EPS * (1 - exact.logps))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("options", [{}, {"entropy_gradient": True, "softcap": 8.0, "temperature": 0.7}], ids=str)
def test_token_logps_through_the_kernel_equals_the_reference(dtype: Any, trainable: bool, options: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, head, bias = (torch.randn(*size, generator=generator).to(dtype) for size in ((9, 6), (150, 6), (150,)))
    labels = torch.randint(150, (9,), generator=generator)
    labels[4] = IGNORED

    def run(implementation: str, *tensors: Tensor) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_(i == 0 or trainable) for i, tensor in enumerate(tensors)]
        result = token_logps(
            leaves[0], leaves[1], labels, leaves[2], implementation=implementation, chunk_tokens=4, **options
        )
        total = result.logps.sum() if result.entropy is None else (result.logps - 0.5 * result.entropy).sum()
        gradients = torch.autograd.grad(total, [leaf for leaf in leaves if leaf.requires_grad])
        return [result.logps.detach(), *gradients]

    exact = run("reference", *(tensor.double() for tensor in (hidden, head, bias)))
    for value, expected in zip(run("triton", hidden, head, bias), exact, strict=True):
        error = float((value.double() - expected).norm() / expected.norm())
        assert error < 16 * (EPS if value.dtype == torch.float32 else torch.finfo(dtype).eps)


# --- what a formula cannot show -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("interpreter")
def test_impossible_and_forbidden_tokens() -> None:
    """A bias of -inf forbids a token; a label that is forbidden has p = 0; a broken row stays broken, alone."""
    product, bias = torch.randn(4, 300), torch.zeros(300)
    bias[100:250] = -torch.inf
    product[1, 5] = 500.0
    product[2, 7] = torch.nan
    gradient, spread = torch.empty_like(product), torch.empty_like(product)
    labels = torch.tensor([150, 5, 3, 2])
    logps, entropies = plain(product, labels, bias, gradient=gradient, entropy_gradient=spread)
    assert logps[0] == -torch.inf
    assert abs(gradient[0, 150] + 1) <= 2 * EPS
    assert logps[1] == 0
    assert entropies[1] == 0
    assert not gradient[1].any()
    assert not spread[1].any()
    assert logps[2].isnan()
    assert entropies[2].isnan()
    assert gradient[2].isnan().all()
    for row in (0, 3):
        assert not gradient[row, 100:150].any()
        assert not gradient[row, 151:250].any()
        assert not spread[row, 100:250].any()
        assert gradient[row].isfinite().all()
        assert spread[row].isfinite().all()
        assert entropies[row].isfinite()


@pytest.mark.usefixtures("interpreter")
def test_an_ignored_label_gives_zeros() -> None:
    gradient, spread = torch.full((2, 200), 9.0), torch.full((2, 200), 9.0, dtype=torch.bfloat16)
    ones = torch.ones(2)
    product = torch.randn(2, 200)
    product[0] = torch.nan
    options = {"gradient": gradient, "entropy_gradient": spread, "d_logps": ones, "d_entropy": ones}
    logps, entropies = plain(product, torch.tensor([-100, 3]), **options)
    assert (logps == 0).tolist() == [True, False]
    assert (entropies == 0).tolist() == [True, False]
    assert gradient.any(1).tolist() == spread.any(1).tolist() == [False, True]


@pytest.mark.usefixtures("interpreter")
def test_in_place_and_strides_change_nothing() -> None:
    product, labels = torch.randn(3, 300), torch.tensor([0, 299, 128])
    upstream = torch.randn(1).expand(3)
    options = {"d_logps": upstream, "d_entropy": upstream}
    expected = torch.empty(3, 300)
    logps, entropies = plain(product.clone(), labels, gradient=expected, **options)
    wide = torch.full((3, 311), 7.0)
    wide[:, :300] = product
    in_place = wide[:, :300]
    results = plain(in_place, labels.repeat_interleave(2)[::2], gradient=in_place, **options)
    assert torch.equal(torch.stack(results), torch.stack([logps, entropies]))
    assert torch.equal(in_place, expected)
    assert (wide[:, 300:] == 7).all()


@pytest.mark.usefixtures("interpreter")
def test_the_gradient_is_rounded_once() -> None:
    """Equal to the float32 gradient, rounded; the interpreter cuts bf16 off instead: at most one unit, downwards."""
    product, labels = 4 * torch.randn(2, 300), torch.tensor([1, 2])
    product[0, 1] = 22.0  # p_y = 0.9999
    exact, half, brain = (torch.empty(2, 300, dtype=d) for d in (torch.float32, torch.float16, torch.bfloat16))
    for gradient in (exact, half, brain):
        plain(product, labels, gradient=gradient)
    assert torch.equal(half, exact.half())
    error = exact.abs() - brain.float().abs()
    assert (error >= 0).all()
    assert (error < 2**-7 * exact.abs()).all()


@pytest.mark.usefixtures("interpreter")
def test_no_rows() -> None:
    logps, entropies = plain(torch.empty(0, 10), torch.empty(0, dtype=torch.long), gradient=torch.empty(0, 10))
    assert logps.shape == entropies.shape == (0,)
    assert logps.dtype == entropies.dtype == torch.float32


@pytest.mark.usefixtures("interpreter")
def test_offsets_beyond_two_to_the_31(tmp_path: Path) -> None:
    """Three rows 2^30 elements apart in a sparse file: row 2 begins beyond what 32 bits can address.

    The first row lies so deep in the file that an offset which wraps around finds the file's zeros.
    """
    first, stride, vocabulary = 2**31, 2**30 + 16, 200
    rows, labels = torch.randn(3, vocabulary), torch.tensor([5, 6, 7])
    expected = torch.empty_like(rows)
    logps, _ = plain(rows, labels, gradient=expected)
    with (tmp_path / "sparse").open("w+b") as file:
        file.truncate(4 * (first + 2 * stride + vocabulary))
        with mmap.mmap(file.fileno(), 0) as memory:
            starts = range(first, first + 3 * stride, stride)
            views = [torch.frombuffer(memory, dtype=torch.float32, offset=4 * i, count=200) for i in starts]
            for view, row in zip(views, rows, strict=True):
                view.copy_(row)
            kernel, _, logits = triton_rows._kernel(True)
            absent = dict.fromkeys(("bias", "softcap", "entropies", "d_logps", "d_entropy", "entropy_gradient"))
            results = torch.empty(3)
            kernel[(3,)](
                product=views[0],
                product_stride=stride,
                labels=labels,
                vocabulary=vocabulary,
                inverse_temperature=1.0,
                logps=results,
                gradient=views[0],
                gradient_stride=stride,
                entropy_gradient_stride=0,
                SWEEPS=2,
                SPREAD=False,
                BLOCK_V=128,
                STAGES=1,
                LOGITS=logits,
                **absent,
            )
            gradients = torch.stack([view.clone() for view in views])
            del view, views
    assert torch.equal(results, logps)
    assert torch.equal(gradients, expected)
