"""Transforms that are wrong in one way each; the doc string says which. The last ones are unusual, and right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import PrivateAttr
from torch import Tensor

from moalign.api import Responses, Transform

Result = tuple[Tensor, Mapping[str, Any]]


class Centred(Transform):
    """Right: what the others spoil. Less the mean of all responses so far."""

    def init(self) -> Mapping[str, Any]:
        return {"sum": 0.0, "count": 0}

    def apply(self, rewards: Tensor, about: Responses, state: Mapping[str, Any]) -> Result:
        after = {"sum": state["sum"] + float(rewards.sum()), "count": state["count"] + len(rewards)}
        return rewards - after["sum"] / after["count"], after


class SaysYes(Centred):
    """Declares something that is not True or False."""

    monotone: ClassVar[Any] = "yes"


class WantsLess(Centred):
    """Asks for less than no response of the base."""

    def references(self) -> int:
        return -1


class RemembersTensors(Centred):
    """Keeps a tensor in its state."""

    def init(self) -> Mapping[str, Any]:
        return {"sum": torch.tensor(0.0), "count": 0}


class NotANumber(Centred):
    """Keeps in its state a number that JSON has not."""

    def apply(self, rewards: Tensor, about: Responses, state: Mapping[str, Any]) -> Result:
        return rewards, {**state, "sum": float("nan")}


class DividesByZero(Centred):
    """Divides by the deviation, which may be 0."""

    def apply(self, rewards: Tensor, about: Responses, state: Mapping[str, Any]) -> Result:
        return (rewards - rewards.mean()) / rewards.std(), state


class OnePerRound(Centred):
    """Returns the mean alone."""

    def apply(self, rewards: Tensor, about: Responses, state: Mapping[str, Any]) -> Result:
        return rewards.mean(), state


class Half(Centred):
    """Returns float32."""

    def apply(self, rewards: Tensor, about: Responses, state: Mapping[str, Any]) -> Result:
        return rewards.float(), state


class ForgetsTheState(Centred):
    """Returns the rewards alone."""

    def apply(self, rewards: Tensor, about: Responses, state: Mapping[str, Any]) -> Any:
        return rewards


class InPlace(Centred):
    """Writes into the rewards that it was given."""

    def apply(self, rewards: Tensor, about: Responses, state: Mapping[str, Any]) -> Result:
        return rewards.clamp_(-0.5, 0.5), state


class StateInPlace(Centred):
    """Writes into the state that it was given."""

    def apply(self, rewards: Tensor, about: Responses, state: Any) -> Result:
        state["count"] += len(rewards)
        return rewards, state


class MeanOfNaN(Centred):
    """Counts the base's responses that have no reward."""

    def references(self) -> int:
        return 4

    def apply(self, rewards: Tensor, about: Responses, state: Mapping[str, Any]) -> Result:
        assert about.reference is not None
        return rewards - about.reference.mean(1), state


class Hidden(Centred):
    """Keeps what it remembers in itself."""

    _seen: list[float] = PrivateAttr(default_factory=list)

    def apply(self, rewards: Tensor, about: Responses, state: Mapping[str, Any]) -> Result:
        self._seen.append(float(rewards.mean()))
        return rewards - sum(self._seen) / len(self._seen), state


class KeysOfNumbers(Centred):
    """Keys of its state are numbers, which JSON makes text of."""

    def init(self) -> Mapping[str, Any]:
        return {0: 0.0}  # type: ignore[dict-item]

    def apply(self, rewards: Tensor, about: Responses, state: Mapping[str, Any]) -> Result:
        return rewards, state


class SideBySide(Centred):
    """Takes it that responses to one prompt stand side by side."""

    def apply(self, rewards: Tensor, about: Responses, state: Mapping[str, Any]) -> Result:
        first = torch.cat([about.groups.new_zeros(1), (about.groups[1:] != about.groups[:-1]).long().cumsum(0)])
        size = first.bincount().to(rewards)
        return rewards - (rewards.new_zeros(len(size)).index_add(0, first, rewards) / size)[first], state


class NumbersOfPrompts(Centred):
    """Reads more from the number of a group than who belongs together."""

    def apply(self, rewards: Tensor, about: Responses, state: Mapping[str, Any]) -> Result:
        return rewards + about.groups.to(rewards), state


class UpsideDown(Centred):
    """Takes a loss for a reward."""

    def apply(self, rewards: Tensor, about: Responses, state: Mapping[str, Any]) -> Result:
        return -rewards, state


class LooksAround(Centred):
    """Says that it looks at each response alone, and subtracts the mean."""

    pointwise: ClassVar[bool] = True

    def apply(self, rewards: Tensor, about: Responses, state: Mapping[str, Any]) -> Result:
        return rewards - rewards.mean(), state


class Counts(Centred):
    """Says that it looks at each response alone, and counts the rounds."""

    pointwise: ClassVar[bool] = True

    def apply(self, rewards: Tensor, about: Responses, state: Mapping[str, Any]) -> Result:
        return rewards, {**state, "count": state["count"] + 1}


class Wasteful(Centred):
    """Has the base sampled for nothing."""

    def references(self) -> int:
        return 2


WRONG = {
    SaysYes: "declare monotone as True or False",
    WantsLess: r"tried:  references\(\)\n  got:    -1",
    RemembersTensors: "state .*tensor",
    NotANumber: "the state .*nan",
    KeysOfNumbers: "text as keys",
    DividesByZero: r"nan\], which is not finite",
    OnePerRound: r"got:    torch.float64 \[\]",
    Half: "torch.float32",
    ForgetsTheState: "return two things",
    InPlace: "rewards changed during the call",
    StateInPlace: "state changed during the call",
    MeanOfNaN: r"abstained on all but one(.|\n)*not finite",
    Hidden: "other rewards the second time",
    SideBySide: "need not stand side by side",
    NumbersOfPrompts: "only to see which responses belong together",
    UpsideDown: "with more reward than another gets less",
    LooksAround: "declare pointwise = False",
    Counts: "another state after the round",
    Wasteful: r"return 0 from references\(\)",
}


class Band(Transform):
    """Unusual and right: a reward near 1 is wanted, more is worse."""

    monotone: ClassVar[bool] = False
    pointwise: ClassVar[bool] = True

    def apply(self, rewards: Tensor, about: Responses, state: Mapping[str, Any]) -> Result:
        return -(rewards - 1).abs(), state


class Ranks(Transform):
    """Unusual and right: the share of the last rounds' responses, and the base's, that a reward is above."""

    def references(self) -> int:
        return 3

    def init(self) -> Mapping[str, Any]:
        return {"rounds": []}

    def apply(self, rewards: Tensor, about: Responses, state: Mapping[str, Any]) -> Result:
        assert about.reference is not None
        rounds = [*state["rounds"], sorted(rewards.tolist())][-2:]
        seen = torch.tensor([reward for each in rounds for reward in each], dtype=rewards.dtype)
        beaten = (rewards[:, None] > about.reference).to(rewards).mean(1)
        return (rewards[:, None] > seen).to(rewards).mean(1) + beaten, {"rounds": rounds}


UNUSUAL = (Centred, Band, Ranks)
