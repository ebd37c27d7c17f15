"""Value-augmented sampling: tokens raised by what their continuations are worth, and the heads that say so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from moalign.api import ConfigError, Decoder, ModelError, NextToken, PreferenceError, Request

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "value-augmented",
    "class": "ValueAugmented",
    "summary": "logits raised by beta times the value of each likely token, one value for each objective (VAS)",
    "paper": "arXiv:2405.06639",
}


class ValueAugmented(Decoder):
    """logit + beta (V - mean V) for the ``top_k`` likeliest tokens, V = sum_j w_j V_j(response so far with the token).

    With all tokens and the value Q of the base it is pi_0 exp(beta Q) / Z, the policy that maximises
    E[Q] - KL(pi || pi_0) / beta for this token. The other tokens get nothing, which is the mean. Values of several
    objectives add up, also those of several weights: no head is trained anew for a preference.
    """

    beta: float = Field(default=3.0, ge=0)
    """how much value counts; 0: the speaker's own logits"""
    top_k: int | None = Field(default=20, ge=1)
    """how many of the likeliest tokens are looked at, each for a forward pass of one token; null: all"""
    values: Mapping[str, str] = {}
    """objective -> file of a head that ``fit`` has made; what Python gives as values comes first"""
    candidate: str | None = None
    """who speaks, and whose hidden states the heads read; without it the untouched base"""

    def speakers(self, request: Request) -> list[str | None]:
        self._heads(request)
        return [self.candidate]

    def scores(self, request: Request, at: NextToken) -> Tensor:
        import torch

        logits = at.logits[0]
        if self.beta == 0:
            return logits
        count = logits.shape[-1] if self.top_k is None else min(self.top_k, logits.shape[-1])
        tokens = logits.topk(count).indices
        hidden = at.ahead(tokens)
        worth = torch.stack([weight * head(hidden) for weight, head in self._heads(request)]).sum(0)
        raised = self.beta * (worth - worth.mean(-1, keepdim=True))
        return logits.scatter_add(-1, tokens, raised.to(logits.dtype))

    def _heads(self, request: Request) -> list[tuple[float, Callable[[Tensor], Tensor]]]:
        """(weight, head) of each objective that counts. Raises PreferenceError where one has no head."""
        found: list[tuple[float, Callable[[Tensor], Tensor]]] = []
        for name, weight in request.preference.items():
            if weight:
                head = request.values.get(name)
                if head is None and name not in self.values:
                    raise PreferenceError(f"values: there is no value head for '{name}', which has weight {weight}")
                found.append((weight, head or load(self.values[name])))
        if not found:
            raise PreferenceError("value-augmented sampling needs an objective with weight")
        return found


# --- heads ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """V(h) = b_2 + w_2 . tanh(W_1 h + b_1), or without the hidden layer b_2 + w_2 . h; [...,D] -> [...], float32."""

    last: Tensor
    bias: Tensor
    first: Tensor | None = None
    first_bias: Tensor | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        import torch

        here = {name: tensor.to(hidden.device) for name, tensor in self.tensors.items()}
        if "first" in here:
            hidden = torch.tanh(torch.nn.functional.linear(hidden, here["first"], here["first_bias"]))
        return hidden @ here["last"] + here["bias"]

    @property
    def tensors(self) -> dict[str, Tensor]:
        named = {"last": self.last, "bias": self.bias, "first": self.first, "first_bias": self.first_bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def save(self, file: str | Path) -> None:
        """As safetensors, on the CPU."""
        from safetensors.torch import save_file

        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}, str(file))


@lru_cache(maxsize=8)
def load(file: str) -> Head:
    """A head that ``Head.save`` wrote. Raises ConfigError where there is none, ModelError for other tensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"{file}: no such file; a value head is one that Head.save has written")
    try:
        return Head(**load_file(path))
    except (SafetensorError, TypeError) as error:
        raise ModelError(f"{file}: no value head: {error}") from error


def returns(values: Tensor, mask: Tensor, rewards: Tensor, lam: float, gamma: float) -> Tensor:
    """TD(lambda) targets [N,T] of V at each response token, 0 where ``mask`` [N,T] is: rewards [N] come with the last.

    G_T = r; before it G_t = gamma ((1 - lambda) V_(t+1) + lambda G_(t+1)), so that lambda = 1 is what was got in the
    end and lambda = 0 what V expects one token later. Rows begin at their first column.
    """
    import torch

    targets = torch.zeros_like(values)
    following = rewards.to(values)
    last = mask.sum(-1) - 1
    for place in range(values.shape[1] - 1, -1, -1):
        at_end = last == place
        if place + 1 < values.shape[1]:
            earlier = gamma * ((1 - lam) * values[:, place + 1] + lam * following)
            following = torch.where(at_end | (last < place), following, earlier)
        targets[:, place] = torch.where(mask[:, place], following, 0.0)
    return targets


def fit(
    hidden: Tensor,
    mask: Tensor,
    rewards: Tensor,
    *,
    width: int = 0,
    lam: float = 0.95,
    gamma: float = 1.0,
    steps: int = 500,
    lr: float = 1e-2,
    seed: int = 0,
) -> Head:
    """A head that expects the rewards [N] of responses from their hidden states [N,T,D] (``mask`` [N,T]: tokens).

    The regression 0.5 (V - G)^2 on TD(lambda) targets of the head so far, all rows at each of ``steps`` steps of Adam,
    its learning rate falling to 0. The responses are samples of the policy that will speak. ``width``: of a hidden
    layer; 0: linear. A function of its arguments; weights begin at 0 but for the hidden layer's, drawn from ``seed``.
    """
    import torch

    hidden = hidden.float()
    rewards, mask = rewards.to(hidden), mask.to(hidden.device).bool()
    if not bool(rewards.isfinite().all()) or not bool(mask.any(-1).all()):
        raise ConfigError("every response needs a token and a finite reward")
    generator = torch.Generator().manual_seed(seed)
    size = hidden.shape[-1]
    first = torch.randn(width, size, generator=generator) / size**0.5 if width else None
    tensors = {"last": torch.zeros(width or size), "bias": rewards.mean().cpu()}
    if first is not None:
        tensors |= {"first": first, "first_bias": torch.zeros(width)}
    tensors = {name: tensor.to(hidden.device).requires_grad_() for name, tensor in tensors.items()}
    optimizer = torch.optim.Adam(list(tensors.values()), lr=lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        with torch.enable_grad():
            values = Head(**tensors)(hidden)
            targets = returns(values.detach(), mask, rewards, lam, gamma)
            loss = 0.5 * ((values - targets) ** 2)[mask].mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    return Head(**{name: tensor.detach() for name, tensor in tensors.items()})
