"""How much better a response is than the answer that its prompt holds."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Hashable, Sequence
from typing import Any

from moalign.api import DataError, PluginError, Reward, Sample
from moalign_plugins._improvement import Template

REGISTRATION = {
    "name": "improvement",
    "class": "Improvement",
    "summary": "by how much another reward prefers the response to the answer that its prompt asks to better (PIT)",
    "paper": "arXiv:2310.00898",
}


class Improvement(Template, Reward):
    """g(x, y, y_ref) = r(x, y) - r(x, y_ref), r another reward, for prompts as the reader `improvement` makes them.

    r is asked about x, without y_ref and the request around it. r(x, y_ref) is the same for all responses to a prompt,
    so that what compares these (`rloo`, `grpo`, losses on pairs) learns the same as from r(x, y), and what differs from
    RLHF is what the policy reads. A response equal to y_ref has exactly 0.

    With ``gap`` g is what r itself says of y_ref and y together: a reward model that was trained on comparisons of gaps
    (the reader's option ``gaps``), which need not be antisymmetric.

    PIT, arXiv 2310.00898, maximises E[g - beta KL(M(.|x, y_ref) || M_sft(.|x, y_ref))]; beta is the loss's, M_sft the
    base. The formulas have not been compared with the paper's text.

    Abstains where r does, and of a gap where the response is blank; refuses prompts that hold no answer.
    """

    reward: Reward
    """r: the name of a reward, or {name: ..., option: value}"""
    gap: bool = False
    """r scores gaps: it is asked about x and, as the response, ``{y_ref}{after}{y}``"""

    @property
    def deterministic(self) -> bool:  # type: ignore[override]
        return self.reward.deterministic

    def pessimistic(self) -> bool:
        return self.reward.pessimistic()

    def score(self, samples: Sequence[Sample]) -> Any:
        questions = [self._questions(sample) for sample in samples]
        once = {_key(each): each for asked in questions for each in asked}  # one y_ref is that of many responses
        answers = self.reward.score(list(once.values()))
        if inspect.isawaitable(answers):
            return _later(questions, list(once), answers)
        return _gaps(questions, list(once), answers)

    def _questions(self, sample: Sample) -> tuple[Sample, ...]:
        """What r is asked: response and answer, or both as one; nothing of a gap without a response."""
        try:
            prompt, answer = self.taken_apart(sample.prompt)
        except ValueError as reason:
            cure = "read the data with the reader `improvement`, and the same between, after and ask as of this reward"
            raise DataError(f"{reason}; {cure}") from None
        if not self.gap:
            return Sample(prompt, sample.response), Sample(prompt, answer)
        return (Sample(prompt, self.compared(answer, sample.response)),) if sample.response.strip() else ()


def _key(sample: Sample) -> Hashable:
    said = sample.prompt if isinstance(sample.prompt, str) else tuple(tuple(sorted(m.items())) for m in sample.prompt)
    return said, sample.response


Questions = Sequence[tuple[Sample, ...]]


async def _later(questions: Questions, keys: Sequence[Hashable], answers: Awaitable[Any]) -> list[float | None]:
    return _gaps(questions, keys, await answers)


def _gaps(questions: Questions, keys: Sequence[Hashable], answers: Sequence[float | None]) -> list[float | None]:
    """Of each sample the first answer less the second, where there is one; None where one is unknown."""
    if len(answers) != len(keys):
        raise PluginError(f"reward: it returned {len(answers)} scores for {len(keys)} samples")
    of = dict(zip(keys, answers, strict=True))
    found: list[float | None] = []
    for asked in questions:
        known = [value for each in asked if (value := of[_key(each)]) is not None]
        whole = bool(asked) and len(known) == len(asked)
        found.append(known[0] - sum(known[1:]) if whole else None)
    return found
