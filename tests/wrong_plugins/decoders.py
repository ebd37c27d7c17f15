"""Decoders that are wrong in one way each; the doc string says which. The last ones are unusual, and right."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import PrivateAttr
from torch import Tensor

from moalign.api import Decoder, NextToken, PreferenceError, Request


class Mixed(Decoder):
    """Right: what the others spoil."""

    def speakers(self, request: Request) -> Any:
        return list(request.shares)

    def scores(self, request: Request, at: NextToken) -> Tensor:
        weights = at.logits.new_tensor(list(request.shares.values()))
        return torch.einsum("k,knv->nv", weights, at.logits.log_softmax(-1).clamp(min=-1e4))


class OneName(Mixed):
    """Returns a name that is not in a list."""

    def speakers(self, request: Request) -> Any:
        return "first"


class Nobody(Mixed):
    """Returns no speaker."""

    def speakers(self, request: Request) -> Any:
        return []


class Numbers(Mixed):
    """Returns the candidates' numbers."""

    def speakers(self, request: Request) -> Any:
        return list(range(len(request.shares)))


class Refuses(Mixed):
    """Refuses everything."""

    def speakers(self, request: Request) -> Any:
        raise PreferenceError("not this one")


class RefusesLate(Mixed):
    """Finds out in the first step that it cannot do what was asked."""

    def scores(self, request: Request, at: NextToken) -> Tensor:
        raise PreferenceError("not this one")


class Fails(Mixed):
    """Fails where some tokens are forbidden."""

    def scores(self, request: Request, at: NextToken) -> Tensor:
        if bool(at.logits.isinf().any()):
            raise ValueError("inf")
        return super().scores(request, at)


class OneRow(Mixed):
    """Returns the scores of the first row."""

    def scores(self, request: Request, at: NextToken) -> Tensor:
        return super().scores(request, at)[0]


class NextOne(Mixed):
    """Returns the tokens themselves."""

    def scores(self, request: Request, at: NextToken) -> Tensor:
        return super().scores(request, at).argmax(-1)


class Differences(Mixed):
    """Subtracts -inf from -inf."""

    def scores(self, request: Request, at: NextToken) -> Tensor:
        return at.logits[0] + 0.5 * (at.logits[-1] - at.logits[0])


class ForbidsAll(Mixed):
    """Forbids every token that is less likely than e^-1."""

    def scores(self, request: Request, at: NextToken) -> Tensor:
        found = super().scores(request, at).log_softmax(-1)
        return found.masked_fill(found < -1, -torch.inf)


class InPlace(Mixed):
    """Writes into the logits that it was given."""

    def scores(self, request: Request, at: NextToken) -> Tensor:
        return at.logits.clamp_(min=-50)[0]


class Remembers(Mixed):
    """Adds what it said the last time."""

    _last: list[Tensor] = PrivateAttr(default_factory=list)

    def scores(self, request: Request, at: NextToken) -> Tensor:
        found = super().scores(request, at)
        if self._last and self._last[0].shape == found.shape:
            found = found + 0.1 * self._last[0]
        self._last[:] = [found]
        return found


class Draws(Mixed):
    """Draws noise from torch's own generator."""

    def scores(self, request: Request, at: NextToken) -> Tensor:
        found = super().scores(request, at)
        return found + torch.rand_like(found)


class Neighbours(Mixed):
    """Subtracts the mean over rows."""

    def scores(self, request: Request, at: NextToken) -> Tensor:
        found = super().scores(request, at)
        return found - found.mean(0)


class Products(Mixed):
    """Multiplies logits as if they were probabilities."""

    def scores(self, request: Request, at: NextToken) -> Tensor:
        return at.logits.clamp(min=-50).prod(0).clamp(max=1e6)


class Half(Mixed):
    """Samples half a response."""

    def responses(self) -> Any:
        return 0.5


class Worst(Mixed):
    """Keeps the worst."""

    def responses(self) -> int:
        return 5

    def keep(self, request: Request, rewards: Tensor) -> int:
        return int(rewards.nan_to_num(0).sum(-1).argmin())


class LikesTheUnknown(Mixed):
    """Takes NaN for a number, and it is the largest."""

    def responses(self) -> int:
        return 5

    def keep(self, request: Request, rewards: Tensor) -> Any:
        return rewards.sum(-1).argmax()


class ByChance(Mixed):
    """Keeps another one each time."""

    _count: list[int] = PrivateAttr(default_factory=list)

    def responses(self) -> int:
        return 5

    def keep(self, request: Request, rewards: Tensor) -> int:
        self._count.append(0)
        return len(self._count) % 5


class Sorts(Mixed):
    """Sorts the rewards that it was given."""

    def responses(self) -> int:
        return 5

    def keep(self, request: Request, rewards: Tensor) -> int:
        rewards.copy_(rewards.sort(0).values)
        return 4


WRONG = {
    OneName: "got:    'first'",
    Nobody: r"got:    \[\]",
    Numbers: r"got:    \[0\]",
    Refuses: "each refused, the last: PreferenceError: not this one",
    RefusesLate: "refuse a request in speakers",
    Fails: "some are -inf(.|\n)*ValueError: inf",
    OneRow: r"got:    torch.float32 \[17\]",
    NextOne: r"got:    torch.int64 \[5\]",
    Differences: r"got:    \[nan\]",
    ForbidsAll: "every token is forbidden",
    InPlace: "logits changed during the call",
    Remembers: "other scores the second time",
    Draws: "global random state of torch",
    Neighbours: "one row alone",
    Products: "raised by a constant",
    Half: r"tried:  responses\(\)\n  got:    0.5",
    Worst: "others are better in every objective",
    LikesTheUnknown: "got:    tensor",
    ByChance: "choose without chance|others are better",
    Sorts: "the rewards changed during the call",
}


class Contrast(Decoder):
    """Unusual and right: only tokens that the first finds likely enough, by how much less the base finds them."""

    def speakers(self, request: Request) -> list[str | None]:
        return [next(iter(request.shares)), None]

    def scores(self, request: Request, at: NextToken) -> Tensor:
        first, base = at.logits.log_softmax(-1)
        unlikely = first < first.amax(-1, keepdim=True) - 2.5
        return (first - base.clamp(min=-1e4)).masked_fill(unlikely, -torch.inf)


class Picky(Decoder):
    """Unusual and right: answers only requests for one candidate, and keeps a response that nothing dominates."""

    def speakers(self, request: Request) -> list[str | None]:
        if len(request.shares) != 1:
            raise PreferenceError("one candidate at a time")
        return list(request.shares)

    def responses(self) -> int:
        return 9

    def keep(self, request: Request, rewards: Tensor) -> int:
        weights = rewards.new_tensor(list(request.preference.values()))
        known = rewards.isfinite().all(-1)
        least = rewards.where(weights > 0, torch.inf).amin(-1)
        return int(least.masked_fill(~known, -torch.inf).argmax())


UNUSUAL = (Mixed, Contrast, Picky)
