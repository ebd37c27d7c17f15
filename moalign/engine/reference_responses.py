"""One response of the reference to each prompt, for losses that push it down or hold on to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moalign.data.tokenise import Ids
from moalign.data.tokenise import Sequence as TokenSequence
from moalign.engine.model import LanguageModel
from moalign.engine.rollouts import sample, sequence_of
from moalign.seeds import derive


@dataclass(frozen=True)
class Said:
    """Token ids as sampled, behind the prompt, and the response's text."""

    sequence: TokenSequence
    text: str


def responses(
    model: LanguageModel, adapter: str | None, prompts: Sequence[Ids], max_new_tokens: int, seed: int, purpose: str
) -> dict[Ids, Said]:
    """Of a frozen policy (``adapter`` None: the untouched base), as it speaks by itself (temperature 1), by prompt.

    A function of the policy, the distinct prompts in their order, the seed and ``purpose``.
    """
    distinct = list(dict.fromkeys(prompts))
    (rollouts,) = sample(
        model,
        [adapter],
        distinct,
        samples=1,
        temperature=1.0,
        max_new_tokens=max_new_tokens,
        seed=derive(seed, "reference responses", purpose),
    )
    said = [Said(sequence_of(rollout, distinct), rollout.text) for rollout in rollouts]
    return dict(zip(distinct, said, strict=True))
