"""What is asked of a variant in one timed call, and the bare GEMMs that no one can do without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from benchmarks import products, recomputing
from benchmarks.peers import LogpsFunction
from benchmarks.problem import OBJECTIVES, Problem, Shape

WHOLE_BYTES = 4 * 2**30  # the floor's N x V matrix is taken in pieces of at most so much


def forward(logps: LogpsFunction, problem: Problem) -> tuple[Tensor, ...]:
    """Log-probabilities without a gradient, as of a reference."""
    with torch.no_grad():
        return (logps(problem.hidden, problem.lm_head, problem.labels),)


def frozen(logps: LogpsFunction, problem: Problem) -> tuple[Tensor, ...]:
    """Forward and backward to the hidden states; the head is frozen, as under LoRA."""
    hidden = problem.hidden.detach().requires_grad_()
    values = logps(hidden, problem.lm_head, problem.labels)
    return values.detach(), *_gradients(values, [hidden], problem.upstream[0])


def objectives(logps: LogpsFunction, problem: Problem) -> tuple[Tensor, ...]:
    """One forward pass and three gradients to the hidden states, one for each of three objectives; frozen head."""
    hidden = problem.hidden.detach().requires_grad_()
    values = logps(hidden, problem.lm_head, problem.labels)
    gradients = [
        _gradients(values, [hidden], problem.upstream[number], keep=number + 1 < OBJECTIVES)[0]
        for number in range(OBJECTIVES)
    ]
    return values.detach(), *gradients


def trainable(logps: LogpsFunction, problem: Problem) -> tuple[Tensor, ...]:
    """Forward and backward to the hidden states and to the head."""
    hidden, lm_head = problem.hidden.detach().requires_grad_(), problem.lm_head.detach().requires_grad_()
    values = logps(hidden, lm_head, problem.labels)
    return values.detach(), *_gradients(values, [hidden, lm_head], problem.upstream[0])


def _gradients(values: Tensor, inputs: list[Tensor], upstream: Tensor, keep: bool = False) -> tuple[Tensor, ...]:
    return torch.autograd.grad(values, inputs, upstream.to(values.dtype), retain_graph=keep)


MODES: Mapping[str, Callable[[LogpsFunction, Problem], tuple[Tensor, ...]]] = {
    "frozen": frozen,
    "forward": forward,
    "objectives": objectives,
    "trainable": trainable,
}
FLOOR_GEMMS = {"forward": 1, "frozen": 2, "objectives": 2, "trainable": 3}
TITLES = {
    "frozen": "forward and backward, frozen head",
    "forward": "forward only",
    "objectives": f"{OBJECTIVES} objective gradients, frozen head",
    "trainable": "forward and backward, trainable head",
}


def floors(mode: str, problem: Problem, shape: Shape) -> dict[str, Callable[[], None]]:
    """The mode's GEMMs alone: logits, d hidden, and d lm_head if that is trained.

    Whole, into matrices that are there already; on a CPU in float32 also by oneDNN, a few tokens at a time.
    """
    found = {"bare GEMMs, torch.mm": _whole(mode, problem, shape)}
    if products.onednn(problem.lm_head):
        found["bare GEMMs, oneDNN"] = _chunked(mode, problem, shape)
    return found


def _whole(mode: str, problem: Problem, shape: Shape) -> Callable[[], None]:
    hidden, lm_head = problem.hidden, problem.lm_head
    rows = min(shape.tokens, max(1, WHOLE_BYTES // (shape.vocabulary * hidden.element_size())))
    matrix = lm_head.new_empty(rows, shape.vocabulary)
    d_hidden, d_lm_head = torch.empty_like(hidden), torch.empty_like(lm_head) if mode == "trainable" else None

    @torch.no_grad()
    def run() -> None:
        for part in _parts(shape.tokens, rows):
            piece = matrix[: part.stop - part.start]
            torch.mm(hidden[part], lm_head.t(), out=piece)
            if mode != "forward":
                torch.mm(piece, lm_head, out=d_hidden[part])
            if d_lm_head is not None:
                torch.mm(piece.t(), hidden[part], out=d_lm_head)

    return run


def _chunked(mode: str, problem: Problem, shape: Shape) -> Callable[[], None]:
    hidden, lm_head = problem.hidden, problem.lm_head
    rows = recomputing.chunk_tokens(lm_head)

    @torch.no_grad()
    def run() -> None:
        for part in _parts(shape.tokens, rows):
            piece = products.linear(hidden[part], lm_head)
            if mode != "forward":
                products.linear(piece, lm_head.t())
            if mode == "trainable":
                products.linear(piece.t(), hidden[part].t())

    return run


def _parts(tokens: int, rows: int) -> Iterator[slice]:
    return (slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows))
