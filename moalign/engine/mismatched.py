"""How far a policy is from its reference on responses that are not to their prompts: the reference point of losses
that judge responses one by one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from moalign.data.dataset import PairDataset
from moalign.data.tokenise import Sequence as TokenSequence
from moalign.engine.model import LanguageModel
from moalign.engine.scoring import logps_under
from moalign.errors import TrainingError


@torch.no_grad()
def mean_log_ratio(
    model: LanguageModel, dataset: PairDataset, pairs: NDArray[np.int64], slot: str, reference: str | None
) -> float:
    """log pi(y') - log pi_ref(y'), a mean over the sequences x, y of a step, with y' the response to another prompt.

    pi and pi_ref are the policies of the adapters in ``slot`` and ``reference`` (None: the base). Exactly 0 where they
    are the same. Raises TrainingError where the
    step has but one prompt.
    """
    rows = list(dict.fromkeys(dataset.pairs[pairs].flatten().tolist()))
    sequences = crossed([dataset.sequences[row] for row in rows], dataset.groups[rows].tolist())
    numbers = range(len(sequences))
    before, own = logps_under(model, sequences, list(numbers), (reference, slot))
    return float(np.mean([(own[i].astype(np.float64) - before[i]).sum() for i in numbers]))


def crossed(sequences: Sequence[TokenSequence], groups: Sequence[int]) -> list[TokenSequence]:
    """Each prompt with the next response, in their order and round again, that is to another one.

    None is longer than the longest given: a longer one loses the beginning of its prompt, as in the data.
    """
    if len(set(groups)) < 2:
        raise TrainingError(
            "the loss compares with responses to other prompts, and all of this step are to one; raise "
            "train.pairs_per_step, or rollouts.prompts_per_step"
        )
    count, longest, made = len(sequences), max(len(each.ids) for each in sequences), []
    for place, (sequence, group) in enumerate(zip(sequences, groups, strict=True)):
        others = (other % count for other in range(place + 1, place + count))
        response = sequences[next(other for other in others if groups[other] != group)].response
        prompt = sequence.prompt[max(0, len(sequence.prompt) + len(response) - longest) :]
        made.append(TokenSequence(prompt + response, len(prompt)))
    return made
