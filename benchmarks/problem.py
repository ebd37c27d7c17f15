"""The operation's inputs, and what a right answer is: float64 on a few tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SPREAD = 4.0  # standard deviation of the logits: an entropy of a few nats, as of a language model on text
SURE = 4  # so many tokens have a label with p > 0.999, where the difference 1 - p cancels
SURE_LOGIT = 20.0  # of that label; the other logits lie around 0
OBJECTIVES = 3


@dataclass(frozen=True)
class Shape:
    """N tokens, D hidden, V vocabulary."""

    tokens: int
    hidden: int
    vocabulary: int
    dtype: str

    def __str__(self) -> str:
        return f"N {self.tokens:,}  D {self.hidden:,}  V {self.vocabulary:,}  {self.dtype}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Problem:
    """hidden[N,D], lm_head[V,D], labels[N], upstream[3,N]: the gradient that arrives per token, for each objective."""

    hidden: Tensor
    lm_head: Tensor
    labels: Tensor
    upstream: Tensor

    @property
    def checked_rows(self) -> Tensor:
        """The sure tokens and as many others."""
        count = len(self.labels)
        others = torch.linspace(count // 2, count - 1, SURE, dtype=torch.long, device=self.labels.device)
        return torch.cat([torch.arange(SURE, device=self.labels.device), others])

    def only_checked_rows(self) -> Problem:
        """The same with no upstream gradient but at the checked tokens, so that dW can be known from them alone."""
        upstream = torch.zeros_like(self.upstream)
        upstream[:, self.checked_rows] = self.upstream[:, self.checked_rows]
        return replace(self, upstream=upstream)


@torch.no_grad()
def make(shape: Shape, device: torch.device, seed: int = 0) -> Problem:
    """Labels are drawn from the softmax itself; the first ``SURE`` tokens are aligned with their label's row of W."""
    if shape.tokens < 4 * SURE or shape.vocabulary < 2 * SURE:
        raise ValueError(f"at least {4 * SURE} tokens and {2 * SURE} words are needed, got {shape}")
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, shape.dtype)
    normal: Any = dict(generator=generator, device=device, dtype=torch.float32)
    lm_head = torch.randn(shape.vocabulary, shape.hidden, **normal)
    lm_head = lm_head.mul_(SPREAD * shape.hidden**-0.5).to(dtype)
    hidden = torch.randn(shape.tokens, shape.hidden, **normal)
    aligned = lm_head[:SURE].float()
    hidden[:SURE] = SURE_LOGIT * aligned / aligned.square().sum(1, keepdim=True)
    hidden = hidden.to(dtype)
    labels = _draw(hidden, lm_head, generator)
    labels[:SURE] = torch.arange(SURE, device=device)
    upstream = torch.randn(OBJECTIVES, shape.tokens, **normal)
    return Problem(hidden, lm_head, labels, upstream)


def _draw(hidden: Tensor, lm_head: Tensor, generator: torch.Generator) -> Tensor:
    """A label per token from softmax(hidden @ lm_head.T), by Gumbel's maximum, a few tokens at a time."""
    rows = max(1, 2**25 // len(lm_head))
    drawn = []
    for part in hidden.split(rows):
        logits = (part @ lm_head.t()).float()
        drawn.append(logits.sub_(torch.empty_like(logits).exponential_(generator=generator).log_()).argmax(-1))
    return torch.cat(drawn)


@dataclass(frozen=True)
class Truth:
    """In float64, for the checked tokens [R]: logps[R], d logp / d hidden [R,D], and the logits' gradient [R,V]."""

    logps: Tensor
    unit: Tensor
    d_logits: Tensor


@torch.no_grad()
def truth(problem: Problem) -> Truth:
    rows = problem.checked_rows
    weight = problem.lm_head.double()
    log_p = F.log_softmax(problem.hidden[rows].double() @ weight.t(), -1)
    label = problem.labels[rows][:, None]
    logps = log_p.gather(1, label)
    d_logits = log_p.exp().neg_().scatter_(1, label, -torch.expm1(logps))
    return Truth(logps.squeeze(1), d_logits @ weight, d_logits)


@dataclass(frozen=True)
class Errors:
    """Of log-probabilities: the largest, in nats. Of gradients: relative (L2), the worst token's; of dW as a whole."""

    logps: float
    gradient: float | None = None
    sure_gradient: float | None = None
    weight: float | None = None

    def too_large(self, dtype: str) -> str | None:
        """What is too far off to be timed. Sure tokens are only reported: low precision fails there in many ways."""
        logps, gradient = {"float64": (1e-8, 1e-6), "float32": (1e-3, 1e-2)}.get(dtype, (0.1, 0.1))
        limits = {"logps": logps, "gradient": gradient, "weight": gradient}
        for name, limit in limits.items():
            value = getattr(self, name)
            if value is not None and not value <= limit:
                return f"{name} off by {value:.2g}, more than {limit:g}"
        return None


@torch.no_grad()
def errors(mode: str, problem: Problem, right: Truth, outputs: tuple[Tensor, ...]) -> Errors:
    """``outputs`` of a variant on ``problem.only_checked_rows()``."""
    rows = problem.checked_rows
    logps = float((outputs[0][rows].double() - right.logps).abs().max())
    if mode == "forward":
        return Errors(logps)
    wanted = problem.upstream[: OBJECTIVES if mode == "objectives" else 1, rows].double()
    gradients = outputs[1 : 1 + len(wanted)]
    relative = torch.stack(
        [
            (got[rows].double() - scale[:, None] * right.unit).norm(dim=1) / (scale[:, None] * right.unit).norm(dim=1)
            for got, scale in zip(gradients, wanted, strict=True)
        ]
    )
    weight = None
    if mode == "trainable":
        d_weight = (wanted[0][:, None] * right.d_logits).t() @ problem.hidden[rows].double()
        weight = float((outputs[2].double() - d_weight).norm() / d_weight.norm())
    return Errors(logps, float(relative[:, SURE:].max()), float(relative[:, :SURE].max()), weight)
