"""One linear head per objective, learned from pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from moalign.api import Batch, RewardModel
from moalign_plugins.reward_models._heads import Positive, first_weights, linear_scores, of_pairs
from moalign_plugins.reward_models._pairwise import logistic

if TYPE_CHECKING:
    from torch import Generator, Tensor

REGISTRATION = {
    "name": "bradley-terry",
    "class": "BradleyTerry",
    "summary": "one linear head per objective, logistic loss on the score difference of a pair",
    "paper": "arXiv:2009.01325, arXiv:2307.09288, arXiv:2401.06080",
}


class BradleyTerry(RewardModel):
    """-q log sigmoid(z) - (1 - q) log sigmoid(-z) with z = r_k(chosen) - r_k(rejected) - margin, q = 1 - e/2.

    k is the objective that judged the pair, e = label_smoothing (the smoothed label is (1 - e) y + e/2). r_k is linear
    in the final state and has no bias, which would cancel, so scores of one objective may be shifted at will unless
    ``centre`` holds them. The margin stands inside the sigmoid (arXiv 2307.09288): it moves the difference that the
    loss asks for, and is not added to the loss, where it would change nothing.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"final", "pairs"})

    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """share of the labels that is replaced by a toss of a coin"""
    margin: Literal["none", "strength"] = "none"
    """strength: ``margin_scale`` times the strength of the judgement, as the data has it (1 where it does not say)"""
    margin_scale: Positive = 1.0
    """in units of the score"""
    smooth_below: Positive | None = None
    """where set, judgements weaker than this have smoothed labels and no margin, and the others hard labels"""
    centre: float = Field(default=0.0, ge=0)
    """weight of (r(chosen) + r(rejected))^2, which keeps scores near 0 (arXiv 2312.09244); 0: none"""
    head_lr: Positive = 1.0
    """the head's learning rate, in units of the adapter's"""

    @model_validator(mode="after")
    def _every_option_does_something(self) -> BradleyTerry:
        if self.margin == "none" and "margin_scale" in self.model_fields_set:
            raise ValueError("margin_scale has no effect without 'margin: strength'")
        if self.smooth_below is not None and self.label_smoothing == 0:
            raise ValueError("smooth_below has no effect where label_smoothing is 0")
        return self

    @property
    def log_odds(self) -> bool:
        return self.margin == "none" and self.label_smoothing == 0  # else the loss fits another probability

    def parameters(self, width: int, objectives: tuple[str, ...], generator: Generator) -> Mapping[str, Tensor]:
        return {"head.weight": first_weights((len(objectives), width), generator)}

    def lr_factor(self, name: str) -> float:
        return self.head_lr

    def loss(self, batch: Batch) -> Tensor:
        chosen, rejected = of_pairs(self.scores(batch), batch)
        strength = batch.strength.to(chosen.dtype)
        margin = self.margin_scale * strength if self.margin == "strength" else 0 * strength
        smoothing: Tensor | float = self.label_smoothing
        if self.smooth_below is not None:
            weak = strength < self.smooth_below
            margin, smoothing = margin * ~weak, self.label_smoothing * weak.to(chosen.dtype)
        loss = logistic(chosen - rejected - margin, smoothing)
        return loss + self.centre * (chosen + rejected) ** 2 if self.centre else loss

    def scores(self, batch: Batch) -> Tensor:
        return linear_scores(batch)

    def head(self, parameters: Mapping[str, Tensor]) -> Tensor:
        return parameters["head.weight"]
