"""One response of the reference to each prompt, for losses that push it down or hold on to it."""

from __future__ import annotations

from collections.abc import Sequence

from moalign.data.tokenise import Sequence as TokenSequence
from moalign.engine.model import LanguageModel
from moalign.engine.rollouts import sample, sequence_of
from moalign.seeds import derive


def responses(
    model: LanguageModel, prompts: Sequence[tuple[int, ...]], max_new_tokens: int, seed: int, purpose: str
) -> list[tuple[TokenSequence, str]]:
    """Of the untouched base, as it speaks by itself (temperature 1): token ids as sampled, behind the prompt, and text.

    A function of the prompts in their order, the seed and ``purpose``.
    """
    (rollouts,) = sample(
        model,
        [None],
        prompts,
        samples=1,
        temperature=1.0,
        max_new_tokens=max_new_tokens,
        seed=derive(seed, "reference responses", purpose),
    )
    return [(sequence_of(rollout, prompts), rollout.text) for rollout in rollouts]
