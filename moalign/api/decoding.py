"""What a decoder sees. N responses, T and V tokens, K speakers, D the width of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a decoder.

    ``preference``  the weight of each objective; rewards of responses stand in this order
    ``shares``      the trained candidates whose preferences, so mixed, are this one: not negative, sum 1
    ``values``      objective -> what is still to be expected of its reward: hidden states [...,D] -> [...]
    """

    preference: Mapping[str, float] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    values: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NextToken:
    """What there is to know when the next token of N responses is chosen; K speakers, V tokens, D the model's width.

    ``ids[N,T]``       prompt and response so far, padded on the left
    ``logits[K,N,V]``  of the next token, as the model gives them under each speaker
    ``past[K,N]``      float64: log-probability of the response so far under each speaker, 0 at its beginning
    ``ahead``          tokens [N,k] -> float32 [N,k,D]: the last hidden states, under the first speaker, at each of
                       these tokens if it came next; a forward pass of N k tokens
    """

    ids: Tensor
    logits: Tensor
    past: Tensor
    ahead: Callable[[Tensor], Tensor]
