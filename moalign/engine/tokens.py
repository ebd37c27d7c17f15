"""What is known of each token of a round of sampled responses, for losses that weigh tokens and not whole responses.

A round is measured in the passes that find its log-probabilities, under the policy that sampled it. Arrays are one for
each sequence of the dataset, a number for each of its response tokens; what a plugin sees of a whole round is padded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moalign import door
from moalign.api import Objective
from moalign.batch import Batch, TokenAdvantages, Tokens
from moalign.data.dataset import PairDataset
from moalign.engine.layout import Layout
from moalign.engine.passages import Decode, expressions_of, passages_of
from moalign.errors import PluginError

PerToken = tuple[NDArray[np.float32], ...]


@dataclass
class Measuring:
    """Asks the objective about every pass over the dataset; ``found``: what it said, by name.

    ``preference`` [M]: the candidate's. ``parameters``: the objective's own, as they are now. ``guides``: names of the
    other policies that it reads. ``decode``: token ids to text, where it asks for passages of that.
    """

    objective: Objective
    preference: Sequence[float]
    dataset: PairDataset
    parameters: Mapping[str, Tensor]
    candidate: str = ""
    guides: Sequence[str] = ()
    decode: Decode | None = None
    found: dict[str, list[NDArray[np.float32]]] = field(default_factory=dict)
    asked: bool = False

    def __call__(self, chosen: Sequence[int], layout: Layout, logps: Sequence[Tensor], states: Tensor) -> None:
        """``logps``: [N,T] under the guides, the reference and the policy; ``states`` [S,D]: the policy's."""
        needs, (*guided, reference, own) = self.objective.wants, logps
        batch = batch_of(
            self.dataset,
            np.array(chosen, dtype=np.int64),
            layout,
            own,
            **shared(len(chosen), own, self.preference, self.parameters),
            ref_logps=reference if "reference" in needs else None,
            old_logps=own if "old_logps" in needs else None,
            hidden=layout.place(states.float()) if "hidden" in needs else None,
            guides=dict(zip(self.guides, guided, strict=True)),
        )
        measured = door.call(self.objective, "measure", batch, candidate=self.candidate)
        who = f"{door.origin(self.objective).who}, in measure"
        known = checked(measured, who, batch.mask, "float32 [N,T] as batch.logps")
        if self.asked and known.keys() != self.found.keys():
            raise PluginError(
                f"{who}: it gave {sorted(self.found)} before and {sorted(known)} now; always give the same"
            )
        self.asked = True
        for name, values in known.items():
            arrays = self.found.setdefault(name, [np.empty(0, np.float32)] * len(self.dataset.sequences))
            parts = values.flatten().index_select(0, layout.target).cpu().split(layout.counts)
            for index, part in zip(chosen, parts, strict=True):
                arrays[index] = part.numpy()

    def tokens(
        self, rows: NDArray[np.int64], old: Sequence[np.ndarray], reference: Sequence[np.ndarray], number: int = 0
    ) -> Tokens:
        """Of these sequences, each an example of its own; ``number``: of the round."""
        needs = self.objective.wants
        return Tokens(
            mask=_padded([np.ones(len(old[row])) for row in rows]),
            ended=torch.tensor([not self.dataset.sequences[row].truncated for row in rows]),
            old_logps=_padded([old[row] for row in rows]) if "old_logps" in needs else None,
            ref_logps=_padded([reference[row] for row in rows]) if "reference" in needs else None,
            measured={name: _padded([values[row] for row in rows]) for name, values in self.found.items()},
            number=number,
            passages=self._passages([self.dataset.sequences[row].response for row in rows]),
        )

    def _passages(self, responses: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
        if self.decode is None:
            return {}
        return {
            name: _padded([passages_of(ids, self.decode, expression) for ids in responses])
            for name, expression in expressions_of(self.objective, self.candidate).items()
        }

    def known(self, rows: NDArray[np.int64], given: TokenAdvantages) -> tuple[PerToken, dict[str, PerToken]]:
        """Advantages, and all else that the loss is to know, for each sequence of the dataset; empty for the others."""
        measured = {name: tuple(values) for name, values in self.found.items()}
        if twice := sorted(measured.keys() & given.known.keys()):
            who = f"{door.origin(self.objective).who}, in token_advantages"
            raise PluginError(f"{who}: '{twice[0]}' is measured already; give it another name")
        known = {name: self._apart(rows, values) for name, values in given.known.items()}
        return self._apart(rows, given.advantages), measured | known

    def _apart(self, rows: NDArray[np.int64], values: Tensor) -> PerToken:
        arrays = [np.empty(0, np.float32)] * len(self.dataset.sequences)
        for row, own in zip(rows, values.numpy(), strict=True):
            arrays[row] = own[: len(self.dataset.sequences[row].response)].astype(np.float32)
        return tuple(arrays)


def shared(
    rows: int, logps: Tensor, preference: Sequence[float] = (), parameters: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """What all rows of a batch have in common: the candidate's preference, and its loss's parameters as they are."""
    found: dict[str, Any] = {"parameters": {name: value.detach().clone() for name, value in (parameters or {}).items()}}
    if preference:
        found["preference"] = torch.tensor(preference, device=logps.device).expand(rows, -1)
    return found


def batch_of(dataset: PairDataset, chosen: NDArray[np.int64], layout: Layout, logps: Tensor, **more: Any) -> Batch:
    """A batch of these sequences, each a unit of its own, at the policy that sampled them; ``more``: fields of it."""
    number, device, reference = len(chosen), logps.device, dataset.ref_logps
    batch = Batch(
        logps=logps,
        mask=layout.mask,
        pairs=torch.arange(number, device=device)[:, None].expand(-1, 2),
        pair_objective=torch.full((number,), -1, device=device),
        preference=torch.zeros(number, len(dataset.objectives), device=device),
        strength=torch.ones(number, device=device),
        groups=torch.from_numpy(dataset.groups[chosen]).to(device),
        ref_logps=None if reference is None else layout.place_known([reference[row] for row in chosen]),
        old_logps=logps.detach(),
    )
    return replace(batch, **more)


def checked(found: Any, who: str, mask: Tensor, what: str) -> dict[str, Tensor]:
    """Tensors by name, each like the mask and finite within it. Raises PluginError beginning with ``who``."""
    if not isinstance(found, Mapping):
        raise PluginError(f"{who}: it must return tensors by name, not {type(found).__name__}")
    for name, values in found.items():
        good = isinstance(values, Tensor) and values.shape == mask.shape and values.dtype == mask.dtype
        if not good or values.device != mask.device:
            given = isinstance(values, Tensor)
            kind = f"{values.dtype} {list(values.shape)} on {values.device}" if given else type(values).__name__
            raise PluginError(f"{who}: '{name}' must be {what}, {list(mask.shape)} on {mask.device}; it is {kind}")
        if not bool(values[mask > 0].isfinite().all()):
            raise PluginError(f"{who}: '{name}' has numbers that are not finite")
    return dict(found)


def checked_advantages(found: Any, who: str, tokens: Tokens) -> TokenAdvantages:
    """What ``token_advantages`` returned. Raises PluginError beginning with ``who`` where it is not what it must be."""
    if not isinstance(found, TokenAdvantages):
        raise PluginError(f"{who}: it must return a moalign.api.TokenAdvantages, not {type(found).__name__}")
    what = "float64 [N,T] as tokens.mask"
    checked({"advantages": found.advantages}, who, tokens.mask, what)
    checked(found.known, who, tokens.mask, what)
    if not isinstance(found.figures, Mapping):
        raise PluginError(f"{who}: figures are numbers by name, not {type(found.figures).__name__}")
    wrong = [name for name, value in found.figures.items() if not isinstance(value, int | float)]
    if wrong:
        raise PluginError(f"{who}: the figure '{wrong[0]}' must be a number")
    return found


def _padded(values: Sequence[np.ndarray]) -> Tensor:
    """[N,T] float64, T the longest, 0 behind the others' ends."""
    width = max((len(own) for own in values), default=0)
    return torch.from_numpy(np.stack([np.pad(own.astype(np.float64), (0, width - len(own))) for own in values]))
