"""The preference as a tag for each objective, in front of the prompt."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from moalign.api import Conditioner, Preference

REGISTRATION = {
    "name": "tags",
    "class": "Tags",
    "summary": "a tag with a level for each objective in front of the prompt, as rewards in context have it",
    "paper": "arXiv:2402.10207",
}


class Tags(Conditioner):
    """A level from 0 to ``levels`` for each objective, the largest component at the top: "<helpful 10> <harmless 3> ".

    The form of rewards in context (arXiv 2402.10207), whose tags are rewards that a response is to have: there the most
    wanted objective is asked for its best reward, and the others for less in proportion. Here the tags say the
    preference, and the model learns from its own responses what serves it. Negative components have negative levels.
    """

    by: ClassVar[Literal["text", "gates"]] = "text"

    levels: int = Field(default=10, ge=1)
    """the level of the objective that counts most"""

    def text(self, preference: Preference) -> str:
        largest = max(abs(value) for value in preference.values.values())
        named = sorted(preference.values.items())
        return "".join(f"<{name} {round(self.levels * value / largest)}> " for name, value in named)
