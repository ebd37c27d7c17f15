"""The preference in words and numbers, in front of the prompt."""

from __future__ import annotations

import math
import string
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from moalign.api import Conditioner, ConfigError, Preference

REGISTRATION = {
    "name": "prompt-text",
    "class": "PromptText",
    "summary": "the preference as whole numbers in the system prompt, or in front of the prompt (DPA)",
    "paper": "arXiv:2402.18571",
}

WEIGHTS = "{weights}"


class PromptText(Conditioner):
    """Directional preference alignment, arXiv 2402.18571: the prompt says how much each objective counts.

    Weights are written as the direction that they point in, a vector of length 1, times ``scale`` and rounded:
    helpful=0.7, harmless=0.3 is "harmless*39 + helpful*92". So weights and directions are written in one way, and
    components may be negative. What differs by less than the rounding is read as the same.

    ``written: tally`` has a letter for each objective, as often as the number says: "aaaabbbbbbbbb", capital where the
    component is negative. To a small model digits are no numbers, but what it attends to evenly it can count.
    """

    by: ClassVar[Literal["text", "gates", "vectors"]] = "text"

    template: str = "Maximise {weights}.\n"
    """the text, with {weights} where the numbers are to stand, and what separates it from the prompt"""
    scale: int = Field(default=100, ge=2)
    """the number of a component of 1"""
    written: Literal["number", "tally"] = "number"
    """harmless*4 + helpful*9, or aaaabbbbbbbbb"""

    @field_validator("template")
    @classmethod
    def _says_the_weights(cls, template: str) -> str:
        if template.count(WEIGHTS) != 1:
            raise ValueError("write {weights} in it, once, where the numbers are to stand")
        return template

    def check(self, rank: int, objectives: tuple[str, ...]) -> None:
        if self.written == "tally" and len(objectives) > len(string.ascii_lowercase):
            raise ConfigError(f"condition.written: a tally has no letters for {len(objectives)} objectives; use number")

    def text(self, preference: Preference) -> str:
        length = math.hypot(*preference.values.values())
        numbers = {name: round(self.scale * value / length) for name, value in sorted(preference.values.items())}
        if self.written == "number":
            return self.template.replace(WEIGHTS, " + ".join(f"{name}*{each}" for name, each in numbers.items()))
        marks = zip(string.ascii_lowercase, numbers.values(), strict=False)
        tally = "".join((mark if number > 0 else mark.upper()) * abs(number) for mark, number in marks)
        return self.template.replace(WEIGHTS, tally)
