"""The posterior of a candidate: mean and deviation of its weights over the last steps of its training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn

from moalign import lora
from moalign.config import TrainSettings
from moalign.lora.posterior import Moments, Posterior, Tensors, fit


def counts(step: int, settings: TrainSettings) -> bool:
    """Whether the weights after this step (from 0) are among those that make the posterior; a step that was skipped
    counts with the weights that it left."""
    return step >= settings.steps - settings.posterior_steps


def note(moments: Moments, parameters: Sequence[nn.Parameter]) -> None:
    """What the optimizer steps, as it is now."""
    moments.note({str(place): parameter.detach() for place, parameter in enumerate(parameters)})


def posterior(policy: PeftModel, slot: str, parameters: Sequence[nn.Parameter], moments: Moments) -> Posterior:
    """By the names of the peft format, in float32, of the slot whose ``parameters`` were noted; these stay."""
    fitted = fit(moments)
    mean, deviation = (_by_name(policy, slot, parameters, part) for part in (fitted.mean, fitted.deviation))
    return Posterior(mean, deviation)


@torch.no_grad()
def _by_name(policy: PeftModel, slot: str, parameters: Sequence[nn.Parameter], values: Tensors) -> dict[str, Tensor]:
    """The adapter that the slot holds with these values in its parameters, which are put back: they are rows of a block
    that only the adapter's own tensors, views of it, know by name."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        for place, parameter in enumerate(parameters):
            parameter.copy_(values[str(place)])
        return lora.weights(policy, slot)
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
