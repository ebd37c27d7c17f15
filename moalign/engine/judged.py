"""The scores that a trained reward model gives to sequences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moalign import door, lora
from moalign.api import RewardModel
from moalign.batch import Batch
from moalign.data.tokenise import Sequence as TokenSequence
from moalign.engine.layout import Layout
from moalign.engine.model import LanguageModel
from moalign.engine.passes import arrange
from moalign.errors import PluginError


@torch.no_grad()
def scores(
    model: LanguageModel,
    slot: str,
    form: RewardModel,
    objectives: tuple[str, ...],
    parameters: Mapping[str, Tensor],
    sequences: Sequence[TokenSequence],
    groups: Sequence[int],
    rewards: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """[N,M] of the reward model whose adapter is in the slot; ``groups``: those with one number share a prompt.

    ``rewards`` [N,M]: what is known of the rows already, for forms that need it (None: nothing). The model's layouts
    are whole (``Packing.whole``). Raises PluginError where the scores are not finite [N,M].
    """
    found = np.empty((len(sequences), len(objectives)))
    about = (objectives, parameters, sequences, groups, rewards)
    for chosen, batch in _batches(model, slot, form, *about):
        found[chosen] = _checked(door.call(form, "scores", batch), form, (len(chosen), len(objectives)))
    return found


@torch.no_grad()
def token_rewards(
    model: LanguageModel,
    slot: str,
    form: RewardModel,
    objectives: tuple[str, ...],
    parameters: Mapping[str, Tensor],
    sequences: Sequence[TokenSequence],
) -> list[NDArray[np.float64]]:
    """Of each sequence [T], one reward for each token of its response, by a form that has a method ``token_rewards``.

    Raises PluginError where they are not finite [N,T].
    """
    found: list[NDArray[np.float64]] = [np.empty(0)] * len(sequences)
    for chosen, batch in _batches(model, slot, form, objectives, parameters, sequences, range(len(sequences)), None):
        shape = (len(chosen), batch.mask.shape[1])
        values = _checked(door.call(form, "token_rewards", batch), form, shape, "token_rewards")
        for index, row, counts in zip(chosen, values, batch.mask.bool().cpu().numpy(), strict=True):
            found[index] = row[counts]
    return found


def _batches(
    model: LanguageModel,
    slot: str,
    form: RewardModel,
    objectives: tuple[str, ...],
    parameters: Mapping[str, Tensor],
    sequences: Sequence[TokenSequence],
    groups: Sequence[int],
    rewards: NDArray[np.float64] | None,
) -> Iterator[tuple[list[int], Batch]]:
    """Parts of the sequences, by index, that fit a pass."""
    of_group: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        of_group.setdefault(group, []).append(index)
    units = list(of_group.values())
    for part in arrange([[sequences[index] for index in unit] for unit in units], model.packing):
        chosen = [index for unit in part.units for index in units[unit]]
        layout = model.lay_out([sequences[index] for index in chosen], part.rows)
        numbers = torch.tensor([groups[index] for index in chosen], device=model.device)
        known = np.full((len(chosen), len(objectives)), np.nan) if rewards is None else rewards[chosen]
        yield chosen, _batch(model, slot, form, layout, objectives, parameters, numbers, known)


def _batch(
    model: LanguageModel,
    slot: str,
    form: RewardModel,
    layout: Layout,
    objectives: tuple[str, ...],
    parameters: Mapping[str, Tensor],
    groups: Tensor,
    rewards: NDArray[np.float64],
) -> Batch:
    device, nothing = model.device, torch.empty(0, dtype=torch.int64, device=model.device)
    with lora.active(model.policy, slot):
        states = model.hidden_states(layout)
    logps = torch.full(layout.shape, torch.nan, device=device)
    if "logps" in form.needs:
        with lora.active(model.policy, slot):
            logps = model.scores_of(states.index_select(0, layout.source), layout).logps
    reference = None
    if "reference" in form.needs:
        with lora.active(model.policy, None):
            reference = model.response_logps(layout)
    assert layout.final is not None
    return Batch(
        logps=logps,
        mask=layout.mask,
        pairs=nothing.reshape(0, 2),
        pair_objective=nothing,
        preference=torch.full((len(groups), len(objectives)), 1.0 / len(objectives), device=device),
        strength=torch.empty(0, device=device),
        groups=groups,
        ref_logps=reference,
        rewards=torch.from_numpy(rewards.astype(np.float32)).to(device) if "rewards" in form.needs else None,
        objectives=objectives,
        parameters={name: value.detach() for name, value in parameters.items()},
        final=states.index_select(0, layout.final).float() if "final" in form.needs else None,
        context=states.index_select(0, layout.context).float() if "context" in form.needs else None,
    )


def _checked(values: object, form: RewardModel, shape: tuple[int, int], hook: str = "scores") -> NDArray[np.float64]:
    who = f"{door.origin(form).who}, in {hook}"
    if not isinstance(values, Tensor) or tuple(values.shape) != shape:
        given = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        each = "objective" if hook == "scores" else "token"
        raise PluginError(f"{who}: it must return one score per row and {each}, {list(shape)}, not {given}")
    numbers: NDArray[np.float64] = values.double().cpu().numpy()
    if not np.isfinite(numbers).all():
        raise PluginError(f"{who}: a score is not finite")
    return numbers
