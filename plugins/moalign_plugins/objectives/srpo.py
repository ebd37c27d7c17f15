"""Self-improving robust preference optimisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, field_validator

from moalign.api import Batch, Objective, PairTerms, PluginError, Sample, log_ratios
from moalign_plugins.objectives._pairs import of_pairs, refuse_terms

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "srpo",
    "class": "SRPO",
    "summary": "regression on preferences for a model that answers and that revises answers, robust to who answered",
    "paper": "arXiv:2406.01660",
}


class SRPO(Objective):
    """(1 - alpha) * joint + alpha * reviser, of one model that reads two kinds of prompt; arXiv 2406.01660.

    pi(y|x) answers, pi+(y2|y1,x) revises the answer y1: the same model, behind a prompt that holds x and y1. With a the
    log-ratio of an answer to the reference, R(y2|y1) that of a revision to the reference behind the same prompt (both
    summed over tokens), and labels for P(y2 > y1), 1 where y2 is the chosen response and 0 where it is the rejected:

    reviser = (P - 1/2 - beta [R(y2|y1) - R(y1|y1)])^2, averaged over both orders of the pair
    joint   = (P - 1/2 - beta/2 [R(y2|y1) - R(y1|y2) + a(y2) - a(y1)])^2, which is the same for both orders

    With the true P both are 0 where pi+(y2|y1) is proportional to ref(y2|y1) exp(P(y2 > y1) / beta), Z(y1) its
    normaliser, and pi(y) to ref(y) / Z(y), whoever sampled the pairs: the answer whose best revision is no better than
    itself. The losses are derived from that min-max problem. How the paper weighs the two, and its beta, is not stated
    in a source that we could read: 0.5 and 0.1 are a guess.

    Each pair, of the data or of a round, brings four sequences more, whose prompts hold the pair's prompt and a
    response. A combiner's scale and margin ask for a logit, which is not here: they are refused.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference"})
    shiftable: ClassVar[bool] = False

    beta: float = Field(default=0.1, gt=0)
    """strength of the KL penalty towards the reference, in units of a preference probability"""
    alpha: float = Field(default=0.5, ge=0, le=1)
    """share of the reviser's loss"""
    template: str = "{prompt}\n{response}\n\nRevise the answer above.\n"
    """what the reviser reads where the prompt is a text; must hold {prompt} and {response}, once each"""
    instruction: str = Field(default="Revise your answer.", min_length=1)
    """what the user says behind the answer where the prompt is a conversation"""

    @field_validator("template")
    @classmethod
    def _holds_both(cls, template: str) -> str:
        if template.count("{prompt}") != 1 or template.count("{response}") != 1:
            raise ValueError("must hold {prompt} and {response}, once each")
        return template

    def views(self, chosen: Sample, rejected: Sample) -> Mapping[str, Sample]:
        """Revisions, named y2|y1, w the chosen and l the rejected response."""
        responses = {"w": chosen.response, "l": rejected.response}
        prompts = {name: self._asked(chosen, response) for name, response in responses.items()}
        return {f"{new}|{old}": Sample(prompts[old], responses[new]) for old in responses for new in responses}

    def _asked(self, sample: Sample, response: str) -> str | tuple[Mapping[str, str], ...]:
        """The prompt of a revision of the response."""
        if isinstance(sample.prompt, str):
            before, _, after = self.template.partition("{prompt}")
            return before.replace("{response}", response) + sample.prompt + after.replace("{response}", response)
        answer = {"role": "assistant", "content": response}
        return (*sample.prompt, answer, {"role": "user", "content": self.instruction})

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        refuse_terms("srpo", terms)
        if not batch.views:
            raise PluginError("objective 'srpo': the batch has no revisions; the engine adds them to pairs")
        ratios = log_ratios(batch)
        chosen, rejected = of_pairs(batch, ratios)
        revised = {name: ratios[rows] for name, rows in batch.views.items()}
        better = (0.5 - self.beta * (revised["w|l"] - revised["l|l"])) ** 2
        worse = (-0.5 - self.beta * (revised["l|w"] - revised["w|w"])) ** 2
        joint = (0.5 - self.beta / 2 * (revised["w|l"] - revised["l|w"] + chosen - rejected)) ** 2
        return (1 - self.alpha) * joint + self.alpha * (better + worse) / 2
