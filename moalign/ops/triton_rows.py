"""The fused core's row pass as one Triton kernel: from the head's product to log-probabilities and their gradient.

One program owns one row of the product. Its first sweep over the vocabulary keeps, in each lane, a running maximum and
the sums relative to it; its second sweep, from the row's end backwards because that end was read last and is still in
the cache, overwrites the row with the gradient. All arithmetic is float32, the gradient is rounded once.

Triton is imported when the first row pass is asked for: it takes about 0.2 s that who needs no kernel is spared.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moalign.ops.contract import Options, Rows

tl: Any = None  # triton.language, from the first use on

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the gradient
INTERPRETED_BLOCK = 128  # tokens of the vocabulary at a time under Triton's interpreter, where nothing is tuned
SETTINGS = tuple(  # what is tried: 8 or 16 elements a thread (more would spill registers), loads a block ahead or not
    (block, warps, stages)
    for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16), (8192, 32), (16384, 32))
    for stages in (1, 2)
)
UNTUNED = {"BLOCK_V": 8192, "num_warps": 32, "STAGES": 2}  # for so few rows that each takes a whole multiprocessor
ROWS_TO_TUNE = 128  # from here on the device is full and a setting matters
TUNING_BYTES = 2**27  # of the copy of the product's first rows that tuning works on, all that it allocates


def available(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if ``row_pass`` can run there for a head of that dtype, else the reason in one sentence."""
    if dtype not in DTYPES:
        return f"the Triton kernel has no {dtype}, only {', '.join(map(str, DTYPES))}"
    if device.type not in ("cuda", "cpu"):
        return f"the Triton kernel does not run on devices of type {device.type}"
    if device.type == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        return "Triton does not compile for the CPU; only its interpreter runs there (TRITON_INTERPRET=1)"
    if find_spec("triton") is None:
        return "Triton is not installed (pip install 'moalign[gpu]')"
    if device.type == "cpu" and not _interpreted():
        return f"Triton's interpreter is off (TRITON_INTERPRET={os.environ['TRITON_INTERPRET']})"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"Triton needs compute capability 8.0, {torch.cuda.get_device_name(device)} has less"
    return None


def row_pass(
    product: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    options: Options,
    *,
    dtype: torch.dtype | None = None,
    upstream: tuple[Tensor, Tensor | None] | None = None,
    entropy_gradient: bool = False,
) -> Rows:
    """As ``contract.RowPass`` says, for a float32 ``product``; a float32 gradient is written over it."""
    in_place = dtype == torch.float32
    gradient = product if in_place else None if dtype is None else torch.empty_like(product, dtype=dtype)
    unit = torch.empty_like(product, dtype=dtype) if entropy_gradient else None
    d_logps, d_entropy = (None, None) if upstream is None else upstream
    logps, entropies = launch(
        product,
        labels,
        bias,
        temperature=options.temperature,
        softcap=options.softcap,
        entropy=options.entropy,
        gradient=gradient,
        d_logps=d_logps,
        d_entropy=d_entropy,
        entropy_gradient=unit,
    )
    return Rows(logps, entropies, gradient, unit)


def launch(
    product: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    *,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    gradient: Tensor | None = None,
    d_logps: Tensor | None = None,
    d_entropy: Tensor | None = None,
    entropy_gradient: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities [n] and entropies [n] (None: not asked for); writes the gradients into the buffers given.

    ``gradient`` [n,V] and ``entropy_gradient`` [n,V] are those of ``contract.RowPass``, ``gradient`` may be ``product``
    itself; None for ``d_logps`` [n] means ones, for ``d_entropy`` [n] zeros. Rows are contiguous. A label of -100 gives
    0, 0 and rows of zeros.
    """
    n, vocabulary = product.shape
    logps = torch.empty(n, dtype=torch.float32, device=product.device)
    entropies = torch.empty_like(logps) if entropy else None
    arguments = {
        "product": product,
        "product_stride": product.stride(0),
        "labels": labels.contiguous(),
        "bias": None if bias is None else bias.contiguous(),
        "vocabulary": vocabulary,
        "softcap": softcap,
        "inverse_temperature": 1 / temperature,
        "logps": logps,
        "entropies": entropies,
        "gradient": gradient,
        "gradient_stride": 0 if gradient is None else gradient.stride(0),
        "d_logps": None if d_logps is None else d_logps.contiguous(),
        "d_entropy": None if d_entropy is None else d_entropy.contiguous(),
        "entropy_gradient": entropy_gradient,
        "entropy_gradient_stride": 0 if entropy_gradient is None else entropy_gradient.stride(0),
        "SWEEPS": 1 if gradient is None and entropy_gradient is None else 2,
        "SPREAD": entropy or d_entropy is not None or entropy_gradient is not None,
        "enable_fp_fusion": False,  # the largest z minus itself must be 0, not what rounding z has cut off
    }
    if n:
        with torch.cuda.device_of(product):  # Triton launches on the current device
            kernel, tuner, logits = _kernel(_interpreted())
            arguments["LOGITS"] = logits
            kernel[(n,)](**arguments, **_settings(tuner, arguments))
    return logps, entropies


def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


@cache
def _kernel(interpreted: bool) -> tuple[Any, Any, Any]:
    """The kernel, its tuner (None: interpreted) and the function that it calls, all made by Triton."""
    global tl
    import triton
    import triton.language as tl

    kernel = triton.jit(_row)
    if interpreted:
        return kernel, None, _logits
    tuner = triton.autotune(
        configs=[triton.Config({"BLOCK_V": b, "STAGES": s}, num_warps=w) for b, w, s in SETTINGS],
        key=["vocabulary", "SWEEPS", "SPREAD"],  # and the dtypes of all tensors
        do_bench=_time,
        cache_results=True,  # on disk, for later processes
    )(kernel)
    return kernel, tuner, triton.jit(_logits)


def _settings(tuner: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Block size and warps for that shape, tuned where it matters and not known yet.

    Tuning runs the kernel many times over rows that it overwrites, so it works on a copy of the first rows, and the
    kernel itself is launched without the tuner. The other outputs are overwritten by that launch anyway.
    """
    if tuner is None:
        return {"BLOCK_V": INTERPRETED_BLOCK, "STAGES": 1}
    product, gradient = arguments["product"], arguments["gradient"]
    if len(product) < ROWS_TO_TUNE:
        return UNTUNED
    names = ("bias", "gradient", "d_logps", "d_entropy", "entropy_gradient")
    dtypes = (None if arguments[name] is None else arguments[name].dtype for name in names)
    key = (product.device, arguments["vocabulary"], arguments["SWEEPS"], arguments["SPREAD"], *dtypes)
    if key not in _tuned:
        stride = arguments["product_stride"]
        rows = min(len(product), max(ROWS_TO_TUNE, TUNING_BYTES // (4 * stride)))
        scratch = product.new_empty(rows, stride)[:, : arguments["vocabulary"]].copy_(product[:rows])
        in_place = gradient is not None and gradient.data_ptr() == product.data_ptr()
        tuner[(rows,)](**{**arguments, "product": scratch, "gradient": scratch if in_place else gradient})
        _tuned[key] = tuner.best_config.all_kwargs()
    return _tuned[key]


_tuned: dict[tuple[Any, ...], dict[str, Any]] = {}


def _time(call: Any, quantiles: tuple[float, ...]) -> list[float]:
    """Milliseconds, the median of ten: the rows exceed the cache, so no buffer has to be allocated to flush it."""
    call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in pairwise(events))
    return [times[len(times) // 2]] * len(quantiles)


def _logits(product, bias, columns, inside, softcap, inverse_temperature):
    """z and the slope of the cap at some columns of a row."""
    score = tl.load(product + columns, mask=inside, other=0.0)
    if bias is not None:
        score += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    slope = 1.0
    if softcap is not None:
        # tanh and 1 - tanh^2 from exp(-2|x|), which cannot overflow and does not cancel but in 1 - q near 0.
        x = score * (1.0 / softcap)
        q = tl.exp(-2.0 * tl.abs(x))
        r = 1.0 / (1.0 + q)
        slope = 4.0 * q * r * r
        s = x * x
        # The series to x^7, within 2e-9 below 1/8.
        near = x * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315))))
        far = (1.0 - q) * r
        score = softcap * tl.where(s < 0.015625, near, tl.where(x < 0, -far, far))
    return score * inverse_temperature, slope


def _row(
    product,
    product_stride,
    labels,
    bias,
    vocabulary,
    softcap,
    inverse_temperature,
    logps,
    entropies,
    gradient,
    gradient_stride,
    d_logps,
    d_entropy,
    entropy_gradient,
    entropy_gradient_stride,
    SWEEPS: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
    LOGITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # a row's offset can exceed 2^31
    product += row * product_stride
    label = tl.load(labels + row).to(tl.int32)
    lanes = tl.arange(0, BLOCK_V)

    # First sweep, over all tokens but the label: where p is nearly 1, 1 - p is the sum over the others and nothing else
    # has its precision. Starting at the label's logit, the maximum is finite, so that differences are defined.
    own, _ = LOGITS(product, bias, label, label >= 0, softcap, inverse_temperature)
    top = tl.full([BLOCK_V], -1e30, tl.float32)
    top = tl.where(own > top, own, top)
    others = tl.full([BLOCK_V], 0.0, tl.float32)  # sum of exp(z - top)
    spread = tl.full([BLOCK_V], 0.0, tl.float32)  # sum of exp(z - top) (z - top)
    for start in tl.range(0, vocabulary, BLOCK_V, num_stages=STAGES):
        columns = start + lanes
        z, slope = LOGITS(product, bias, columns, columns < vocabulary, softcap, inverse_temperature)
        gap = z - top
        # exp(-200) is 0 in float32; -inf would make 0 * inf of it. NaN passes.
        gap = tl.where((columns == label) | (columns >= vocabulary) | (gap < -200.0), -200.0, gap)
        decay = tl.exp(-tl.abs(gap))  # of the sums if the maximum rises, else of the new term
        if SPREAD:
            spread = tl.where(gap > 0, decay * (spread - others * gap), spread + decay * gap)
        others = tl.where(gap > 0, others * decay + 1.0, others + decay)
        top = tl.where(gap > 0, z, top)

    peak = tl.max(top, 0)
    weight = tl.exp(top - peak)
    rest = tl.sum(others * weight, 0)
    own_gap = own - peak
    own_term = tl.exp(own_gap)
    total = rest + own_term
    # log(total); below 1 for the rest, the label is the peak, total = 1 + rest: log1p, by the series of 2 artanh.
    t = rest / (2.0 + rest)
    s = t * t
    near = 2.0 * t * (1.0 + s * (1.0 / 3 + s * (0.2 + s * (1.0 / 7 + s * (1.0 / 9)))))
    log_total = tl.where(rest < 0.25, near, tl.log(total))
    tl.store(logps + row, tl.where(label < 0, 0.0, own_gap - log_total))
    if SPREAD:
        mean = tl.sum(weight * (spread + others * (top - peak)), 0)  # of z - peak, here still times the total
        mean = (mean + tl.where(own_term > 0, own_term * own_gap, 0.0)) / total
        if entropies is not None:
            tl.store(entropies + row, tl.where(label < 0, 0.0, log_total - mean))

    if SWEEPS == 2:
        inverse_total = 1.0 / total
        missing = rest / total  # 1 - p of the label, = -expm1(logp)
        d_logp = 1.0
        if d_logps is not None:
            d_logp = tl.load(d_logps + row)
        if d_entropy is not None:
            d_h = tl.load(d_entropy + row)
        blocks = (vocabulary + BLOCK_V - 1) // BLOCK_V
        for block in tl.range(0, blocks, num_stages=STAGES):
            columns = (blocks - 1 - block) * BLOCK_V + lanes
            inside = columns < vocabulary
            # In place, these loads come before the stores below, and no other program or block touches these columns.
            z, slope = LOGITS(product, bias, columns, inside, softcap, inverse_temperature)
            gap = z - peak
            gap = tl.where(gap < -200.0, -200.0, gap)
            p = tl.exp(gap) * inverse_total
            if gradient is not None:
                d_z = tl.where(columns == label, -missing, p) * d_logp
                if d_entropy is not None:
                    d_z += p * (gap - mean) * d_h
                d_z = tl.where(label < 0, 0.0, d_z * slope)
                tl.store(gradient + row * gradient_stride + columns, d_z.to(gradient.dtype.element_ty), mask=inside)
            if entropy_gradient is not None:
                d_z = tl.where(label < 0, 0.0, p * (gap - mean) * slope)
                place = entropy_gradient + row * entropy_gradient_stride + columns
                tl.store(place, d_z.to(entropy_gradient.dtype.element_ty), mask=inside)
