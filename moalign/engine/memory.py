"""What training K candidates together takes of the memory: a formula, and the probe that finds its coefficients.

    base  +  K (weights + gradient + two moments)  +  activations of a pass over all K

The base stands there once, whatever K is. A candidate has its adapter's weights, their gradient and AdamW's two
moments: all float32, 4 bytes for each parameter. A pass of B rows of L positions
with S response tokens, B and S those of all K members, holds at the end of the forward pass

    kept  =  fixed + a B L + b B L^2 + c S + d L

for the backward pass, the adapters' inner activations and the head's unit gradients (S D numbers) among it; b is
attention's part, where that keeps a mask or its probabilities, d that of rotary embeddings that all rows have in
common. Beyond this the forward pass needs, at its height, the last hidden states, those of them that meet the head, and
one chunk of logits; the backward pass needs what one layer's gradients take, linear in the same sizes. The larger of
the two counts.

What a layer keeps is the affair of its architecture, its attention and whether activations are checkpointed, so
these are counted and not written down: five small passes of the model itself, as training runs them, with responses in
rows of their own, and five with those to one prompt in one row, which brings a mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moalign import lora
from moalign.api import Objective
from moalign.data.dataset import PairDataset
from moalign.data.tokenise import Sequence as TokenSequence
from moalign.engine.allocations import counted
from moalign.engine.layout import row_length
from moalign.engine.lower import Copies, copied
from moalign.engine.model import TRAINED, LanguageModel
from moalign.engine.owned import first_values
from moalign.engine.passes import PairPass, apart_beyond_window, pair_passes
from moalign.lora import Mixture
from moalign.ops import token_logps
from moalign.ops.chunked import default_chunk_tokens
from moalign.ops.contract import Options

PROBES = (
    (1, 2, 1),
    (1, 2, 3),
    (2, 2, 1),
    (1, 6, 1),
    (2, 4, 2),
)  # prompts, their length, that of the two responses to each
SLOTS = (TRAINED, f"{TRAINED}1")
RESIDENT = 1.5  # resident memory on a CPU, times what tensors take: fragments, and the libraries' own buffers
UNIT = 16  # tokens that those lengths are counted in, fewer where a model has no positions for them
LONGEST = 7  # of prompt and response, in units


@dataclass(frozen=True)
class PassSize:
    """Of a pass: ``rows`` of ``length`` positions, padding among them, and its response ``tokens``.

    ``shared``: some row holds several responses. ``placed``: N T, where a loss sees a row for each sequence.
    """

    rows: int
    length: int
    tokens: int
    shared: bool = False
    placed: int = 0

    @classmethod
    def of(cls, part: PairPass, dataset: PairDataset, multiple: int = 1) -> PassSize:
        sequences = [dataset.sequences[index] for index in part.sequences]
        longest = max(row_length([sequences[index] for index in row]) for row in part.rows)
        tokens = sum(len(sequence.response) for sequence in sequences)
        shared = any(len(row) > 1 for row in part.rows)
        placed = len(sequences) * (max(len(sequence.ids) for sequence in sequences) - 1)
        return cls(len(part.rows), -(-longest // multiple) * multiple, tokens, shared, placed)

    def times(self, members: int) -> PassSize:
        """The same pass for each of so many members."""
        return replace(self, rows=self.rows * members, tokens=self.tokens * members, placed=self.placed * members)

    @property
    def positions(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True)
class Linear:
    """Bytes that grow with the size of a pass: per position, per pair of positions in a row, per response token,
    and per position of the longest row, however many rows there are."""

    fixed: float
    position: float
    attended: float
    token: float
    length: float = 0.0

    def of(self, size: PassSize) -> float:
        attended = self.attended * size.positions * size.length
        rows = self.position * size.positions + attended + self.length * size.length
        return self.fixed + rows + self.token * size.tokens

    @classmethod
    def through(cls, sizes: Sequence[PassSize], found: Sequence[int]) -> Linear:
        rows = [(1, size.positions, size.positions * size.length, size.tokens, size.length) for size in sizes]
        return cls(*np.linalg.solve(np.array(rows, dtype=np.float64), np.array(found, dtype=np.float64)).tolist())


@dataclass(frozen=True)
class Heights:
    """Bytes ``kept`` at the end of the forward pass, and at the height of the ``backward`` pass, those among them."""

    kept: Linear
    backward: Linear


@dataclass(frozen=True)
class Memory:
    """The formula's coefficients for one model. All in bytes.

    ``base``        its parameters and buffers, without adapters
    ``adapter``     one adapter's weights; its gradient and each of its moments take as much
    ``apart``       of passes with a row for each sequence
    ``shared``      of passes with several responses behind one prompt
    ``hidden``      one hidden state
    ``logits``      at the head for each of the ``chunk`` tokens that are there together
    """

    base: int
    adapter: int
    apart: Heights
    shared: Heights
    hidden: int
    logits: float
    chunk: int

    def activations(self, size: PassSize) -> int:
        """Bytes at the height of a pass of that size, all members counted, without what outlives it."""
        head = (size.positions + size.tokens) * self.hidden + min(size.tokens, self.chunk) * self.logits
        heights = self.shared if size.shared else self.apart
        return math.ceil(max(heights.kept.of(size) + head, heights.backward.of(size)))

    def training(self, members: int, passes: Sequence[PassSize]) -> int:
        """Bytes at the height of a step of so many candidates together; ``passes``: one candidate's."""
        height = max((self.activations(size.times(members)) for size in passes), default=0)
        return self.base + 4 * members * self.adapter + height


def of_loss(objective: Objective, model: LanguageModel, members: int, passes: Sequence[PassSize]) -> int:
    """Bytes beside the formula, for a loss that owns parameters, reads hidden states or distributions; 0 for others.

    Parameters have a gradient and two moments. Hidden states lie there as float32 [N,T,D] for all members until the
    backward pass is over, and those of one member twice while they are laid out. Distributions are float32 [S,V] of
    each member with their gradient, and of each frozen policy, whose every reader has its own.
    """
    own = 4 * members * sum(value.nbytes for value in first_values(objective, model.width, 0).values())
    if "distributions" in objective.wants:
        frozen = len(objective.guides()) + ("reference" in objective.wants)
        most = max((size.tokens for size in passes), default=0)
        own += 4 * model.head.weight.shape[0] * members * (2 + frozen) * most
    if "hidden" not in objective.wants:
        return own
    return own + 4 * model.width * (members + 1) * max((size.placed for size in passes), default=0)


def available(device: torch.device) -> int | None:
    """Bytes of tensors that still fit on this device, as the system tells it; None where it does not."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    told = {name: value for name, _, value in (line.partition(":") for line in lines)}.get("MemAvailable")
    return None if told is None else int(int(told.split()[0]) * 1024 / RESIDENT)


def passes(model: LanguageModel, dataset: PairDataset, pairs: np.ndarray, limit: int | None = None) -> list[PassSize]:
    """Those in which a candidate trains on these pairs; ``limit``: its ``tokens_per_pass``."""
    packing = model.packing if limit is None else replace(model.packing, limit=limit)
    return [PassSize.of(part, dataset, packing.multiple) for part in pair_passes(dataset, pairs, packing)]


def measure(model: LanguageModel, checkpointing: bool = False, entropy: bool = False) -> Memory:
    """Find the coefficients: takes the time of a few passes over a hundred positions; weights stay as they are.

    ``entropy``: of passes that form its gradient too.
    """
    policy, weight = model.policy, model.head.weight
    lora.stack(policy, SLOTS)  # with gradients, so that they are not counted with activations
    model.checkpoint(checkpointing)
    apart = _heights(model, checkpointing, shared=False, entropy=entropy)
    shared = _heights(model, checkpointing, shared=True, entropy=entropy) if model.packing.shares else apart
    model.checkpoint(False)
    chunk = default_chunk_tokens(weight, Options(softcap=model.softcap, entropy=entropy))
    tensors = {**dict(policy.named_parameters()), **dict(policy.named_buffers())}
    base = {tensor.data_ptr(): tensor.nbytes for name, tensor in tensors.items() if "lora_" not in name}
    return Memory(
        base=sum(base.values()),
        adapter=sum(parameter.nbytes for parameter in lora.parameters(policy, TRAINED)),
        apart=apart,
        shared=shared,
        hidden=weight.shape[1] * weight.itemsize,
        logits=_head_bytes(model, chunk, entropy) / chunk,
        chunk=chunk,
    )


def _heights(model: LanguageModel, checkpointing: bool, shared: bool, entropy: bool) -> Heights:
    positions = getattr(model.base.config.get_text_config(), "max_position_embeddings", None) or UNIT * LONGEST
    unit = min(UNIT, positions // LONGEST)
    found = [
        _one_pass(model, prompts, prompt * unit, response * unit, checkpointing, shared, entropy)
        for prompts, prompt, response in PROBES
    ]
    sizes, kept, backward = zip(*found, strict=True)
    return Heights(Linear.through(sizes, kept), Linear.through(sizes, backward))


def _one_pass(
    model: LanguageModel, prompts: int, prompt: int, response: int, checkpointing: bool, shared: bool, entropy: bool
) -> tuple[PassSize, int, int]:
    """(its size, bytes at the end of the forward pass, bytes at the height of the backward pass)."""
    times = 2 if model.upper else 1  # behind the lower layers masks and positions are copied as well
    sequences = [TokenSequence((0,) * (prompt + response), prompt)] * (2 * prompts * times)
    members = np.arange(len(sequences)).reshape(-1, 2 if shared else 1)
    layout = model.lay_out(sequences, apart_beyond_window(sequences, members.tolist(), model.packing))
    rows, length = layout.input_ids.shape
    seeds = (0,) * times if model.adapter_dropout else None
    mixture = Mixture(SLOTS[:times], (rows // times,) * times, seeds)
    copies = Copies.repeated(rows // times, times, model.device) if model.upper else None
    once = nullcontext() if copies is None else copied(model.upper, copies)
    with lora.mixed(model.policy, mixture), once, counted(model.device) as allocations:
        with model.checkpointing(checkpointing):
            scored = model.scores_of(model.response_states(layout, copies), layout, entropy=entropy)
            loss = scored.logps.sum() if scored.entropy is None else (scored.logps + scored.entropy).sum()
        del scored
        kept = allocations.live
        allocations.restart()
        loss.backward()
        return PassSize(rows, length, len(layout.labels)), kept, allocations.peak


def _head_bytes(model: LanguageModel, tokens: int, entropy: bool) -> int:
    """What the head needs for so many tokens, beyond what it keeps."""
    weight = model.head.weight
    hidden = torch.zeros(tokens, weight.shape[1], dtype=weight.dtype, device=weight.device, requires_grad=True)
    labels = torch.zeros(tokens, dtype=torch.long, device=weight.device)
    bias = getattr(model.head, "bias", None)
    with torch.enable_grad(), counted(model.device) as allocations:
        how: Any = {"temperature": model.temperature, "softcap": model.softcap, "entropy_gradient": entropy}
        scored = token_logps(hidden, weight.detach(), labels, bias, **how)
        height, kept = allocations.peak, allocations.live
        del scored
    return height - kept
