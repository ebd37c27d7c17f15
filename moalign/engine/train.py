"""The one loop, for every objective, combiner and source of batches, and for any number of candidates at once.

The candidates of a loop share each forward and backward pass of the base, and nothing else: rows of one never reach
another's loss, so that each is trained as it would be alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from moalign import door, lora
from moalign.calls import BACKWARD
from moalign.data.dataset import PairDataset
from moalign.data.tokenise import Sequence as TokenSequence
from moalign.engine import companions
from moalign.engine.batches import BatchSource, refresh
from moalign.engine.frozen import Frozen, Share
from moalign.engine.layout import Layout
from moalign.engine.losses import loss_of
from moalign.engine.lower import Copies, copied
from moalign.engine.mismatched import mean_log_ratio
from moalign.engine.model import TRAINED, LanguageModel
from moalign.engine.passes import PairPass, apart_beyond_window, pair_passes
from moalign.engine.row_conditions import RowConditions, in_front
from moalign.engine.scoring import LogpCache
from moalign.engine.trainee import Job, Trained, Trainee
from moalign.errors import MoalignError, UserError
from moalign.lora import Mixture
from moalign.ops import TokenLogps
from moalign.seeds import derive


def train(
    model: LanguageModel,
    source: BatchSource,
    job: Job,
    cache: LogpCache,
    accelerator: Accelerator,
    on_step: Callable[[int, dict[str, Any]], None],
) -> Trained:
    """Train one candidate in the slot ``candidate`` of the model, from fresh weights.

    ``on_step`` receives the step number and its metrics. Raises TrainingError where losses or gradients stay
    non-finite, PluginError where a plugin returns what it must not.
    """
    trainee = Trainee(job, source, TRAINED, on_step)
    train_together(model, [trainee], cache, accelerator)
    return trainee.result


def train_together(
    model: LanguageModel, trainees: Sequence[Trainee], cache: LogpCache, accelerator: Accelerator
) -> None:
    """Train candidates, all of them one step at a time.

    One whose numbers stay non-finite, or whose plugin fails, is given up, with its ``error`` set; the others go on.
    Errors that are nobody's own, such as torch.OutOfMemoryError, are raised. Companions of theirs are trained along.
    """
    everybody = companions.beside(trainees)
    _prepare(model, everybody)
    try:
        _loop(model, everybody, cache, accelerator)
    finally:
        companions.share_errors(everybody)
        cache.save()  # also what a failed candidate met first: a resumed run must find the same values


def _loop(model: LanguageModel, trainees: Sequence[Trainee], cache: LogpCache, accelerator: Accelerator) -> None:
    for step in range(max(trainee.job.settings.steps for trainee in trainees)):
        companions.share_errors(trainees)
        going = [trainee for trainee in trainees if trainee.goes_on(step)]
        arrangement = _Arrangements(model)
        shares = []
        refresh([trainee.source for trainee in going], step)
        for trainee in going:
            trainee.begin(step)
            with _own_errors(trainee):
                dataset, pairs = trainee.source.at(step)
                trainee.move_reference(model, step, dataset, pairs)
                shares.append(arrangement.shares(trainee, dataset, pairs))
                trainee.metrics.mismatched = shares[-1][0].mismatched
        for number, together in enumerate(zip_longest(*shares)):
            members = [share for share in together if share is not None and share.trainee.sound]
            if members:
                _pass(model, members, cache, accelerator, (step, number))
        for trainee in going:
            with _own_errors(trainee):
                trainee.weigh(step)
        stepping = [trainee for trainee in going if trainee.error is None]
        for trainee in stepping:
            trainee.end(step)
        _look(model, [trainee for trainee in stepping if trainee.looks_after(step)], cache, step)
        for trainee in stepping:
            trainee.tell(step)


@torch.no_grad()
def _look(model: LanguageModel, trainees: Sequence[Trainee], cache: LogpCache, step: int) -> None:
    """The candidates' losses on their held-out pairs, a mean over the pairs as in training, all in the same passes."""
    arrangement = _Arrangements(model)
    shares = []
    for trainee in trainees:
        dataset = trainee.job.held_out
        assert dataset is not None
        with _own_errors(trainee):
            shares.append(arrangement.all_shares(trainee, dataset))
    found = dict.fromkeys((trainee.slot for trainee in trainees), 0.0)
    for together in zip_longest(*shares):
        members = [share for share in together if share is not None and share.trainee.error is None]
        if members:
            with _losses(model, members, cache, None) as losses:
                for share, loss in zip(members, losses, strict=True):
                    found[share.trainee.slot] += math.nan if loss is None else float(loss) / share.pairs_in_step
    for trainee in trainees:
        if trainee.error is None:
            trainee.looked(step, found[trainee.slot])


def _prepare(model: LanguageModel, trainees: Sequence[Trainee]) -> None:
    stack = lora.stack(model.policy, [trainee.slot for trainee in trainees])
    model.checkpoint(any(trainee.job.settings.gradient_checkpointing for trainee in trainees))
    for trainee in trainees:
        if trainee.error is not None:
            continue  # there is nothing from which it could start
        with _own_errors(trainee):
            trainee.prepare(model, stack.parameters[trainee.slot])


@contextmanager
def _own_errors(trainee: Trainee) -> Iterator[None]:
    """What goes wrong with one candidate ends its training; bad input (UserError) would meet all of them."""
    try:
        yield
    except UserError:
        raise
    except MoalignError as error:
        trainee.error = error


class _Arrangements:
    """A step's passes; candidates with the same pairs get the same objects, whatever these count for each."""

    def __init__(self, model: LanguageModel):
        self.model = model
        self._known: dict[Any, list[PairPass]] = {}

    def shares(self, trainee: Trainee, dataset: PairDataset, pairs: np.ndarray) -> list[Share]:
        """A candidate's passes of a step; one after the other those of each judge, where a rule weighs their losses."""
        mismatched = self._mismatched(trainee, dataset, pairs)
        judges: dict[int | None, np.ndarray] = {None: pairs}
        if trainee.weighing is not None:
            judges = trainee.weighing.by_judge(dataset, pairs)
        return [
            Share(trainee, dataset, part, len(own), mismatched, judge, _scale(dataset, own))
            for judge, own in judges.items()
            for part in self._of(trainee.job, dataset, own)
        ]

    def all_shares(self, trainee: Trainee, dataset: PairDataset) -> list[Share]:
        """Passes of all pairs, whoever judged them."""
        pairs = np.arange(len(dataset.pairs))
        mismatched = self._mismatched(trainee, dataset, pairs)
        return [Share(trainee, dataset, part, len(pairs), mismatched) for part in self._of(trainee.job, dataset, pairs)]

    def _mismatched(self, trainee: Trainee, dataset: PairDataset, pairs: np.ndarray) -> float | None:
        if "mismatched" not in trainee.job.needs:
            return None
        return mean_log_ratio(self.model, dataset, pairs, trainee.slot, trainee.compared_with.adapter)

    def _of(self, job: Job, dataset: PairDataset, pairs: np.ndarray) -> list[PairPass]:
        packing, limit = self.model.packing, job.settings.tokens_per_pass
        arrays = tuple(map(id, (dataset.sequences, dataset.pairs, dataset.groups)))
        key = (arrays, pairs.tobytes(), limit)
        if key not in self._known:
            packing = packing if limit is None else replace(packing, limit=limit)
            self._known[key] = pair_passes(dataset, pairs, packing)
        return self._known[key]


def _scale(dataset: PairDataset, pairs: np.ndarray) -> float:
    """What makes the mean weight of a step's pairs 1."""
    return 1.0 if dataset.weights is None else float(1 / dataset.weights[pairs].mean())


def _pass(
    model: LanguageModel, members: Sequence[Share], cache: LogpCache, accelerator: Accelerator, at: tuple[int, int]
) -> None:
    """Forward and backward for one pass of every member; one whose loss is of no use gets its ``problem`` set."""
    with _losses(model, members, cache, at) as losses:
        kept = []
        for share, loss in zip(members, losses, strict=True):
            if loss is not None and torch.isfinite(loss):
                kept.append((share, loss / share.pairs_in_step))
        if kept:
            with _backward([share.trainee for share, _ in kept]):
                accelerator.backward(torch.stack([loss for _, loss in kept]).sum())
        for share, loss in kept:
            if share.trainee.weighing is not None and share.judge is not None:
                share.trainee.weighing.keep(share.judge, float(loss.detach()), share.trainee.trained)


@contextmanager
def _backward(trainees: Sequence[Trainee]) -> Iterator[None]:
    """A loss may bring a backward pass of its own; what goes wrong there is its trainee's error if there is but one."""
    source = replace(door.origin(trainees[0].job.objective), deadline=None)  # it is the model's pass as well
    alone = trainees[0] if len(trainees) == 1 else None
    own = nullcontext() if alone is None else _own_errors(alone)
    with own, door.guarded(source, BACKWARD, "" if alone is None else alone.job.candidate):
        yield


@contextmanager
def _losses(
    model: LanguageModel, members: Sequence[Share], cache: LogpCache, at: tuple[int, int] | None
) -> Iterator[list[Tensor | None]]:
    """One pass of every member, a sum over its pairs for each: the base sees all rows at once.

    ``at``: which pass of which step is trained; None: a look, without dropout and without a place in the metrics. The
    backward pass belongs into the context. None for a member whose plugin failed, and its ``error`` is set.
    """
    frozen_of: dict[tuple[int, int], Frozen] = {}
    frozen = []
    for share in members:
        key = (id(share.part), id(share.dataset))  # the same rows may count differently for each
        if key not in frozen_of:
            frozen_of[key] = Frozen(model, share, cache)
        frozen.append(frozen_of[key])
        frozen[-1].prepare(share.trainee)
    layout = frozen[0].layout if len(members) == 1 else _joined(model, members)
    rows = tuple(len(share.part.rows) for share in members)
    lengths: tuple[int, ...] | None = tuple(own.layout.input_ids.shape[1] for own in frozen)
    if sum(rows) != len(layout.input_ids):  # beyond a window: a row for each sequence
        rows, lengths = tuple(len(share.part.sequences) for share in members), None
    seeds = None
    if model.adapter_dropout and at is not None:
        seeds = tuple(derive(s.trainee.job.seed, "dropout", s.trainee.job.candidate, *at) for s in members)
    conditions = _conditions(members[0], lengths is None, model.device)
    gates = None if conditions is None else conditions.gates
    mixture = Mixture(tuple(s.trainee.slot for s in members), rows, seeds, lengths, gates=gates)
    losses: list[Tensor | None] = []
    copies = _copies(members, rows, model.device) if model.upper and len(members) > 1 else None
    once = nullcontext() if copies is None else copied(model.upper, copies)
    known = cache.skipping(layout, copies, keep=all(own.keep for own in frozen))
    wanted = any(share.trainee.job.settings.gradient_checkpointing for share in members)
    with lora.mixed(model.policy, mixture), in_front(model.base, conditions), known, once:
        entropy = any("entropy" in share.trainee.job.needs for share in members)
        with model.checkpointing(wanted and at is not None):
            everywhere = model.hidden_states(layout, copies)
            states = everywhere.index_select(0, layout.source)
            spoken = any(share.trainee.job.reads_logps for share in members)
            scored = model.scores_of(states, layout, entropy=entropy) if spoken else _unspoken(layout)
        start = first = 0
        for share, own in zip(members, frozen, strict=True):
            # clones: a loss that writes into them must not reach another's
            end = start + len(share.part.sequences)
            entropies = None if scored.entropy is None else scored.entropy[start:end, : own.layout.width].clone()
            mine = TokenLogps(scored.logps[start:end, : own.layout.width].clone(), entropies)
            last, reads = first + len(own.layout.labels), "hidden" in share.trainee.job.needs
            hidden = own.layout.place(states[first:last].float()) if reads else None
            ends = _ends(share.trainee.job, everywhere, layout, start, end)
            spread = _distributions(model, share.trainee, own, states[first:last])
            losses.append(_loss(share, own, mine, hidden, ends, at is not None, spread))
            start, first = end, last
        del (
            everywhere,
            states,
            hidden,
            ends,
            spread,
        )  # the head has its own gradients, and the backward pass needs the room
        yield losses


def _conditions(share: Share, one_by_one: bool, device: torch.device) -> RowConditions | None:
    """Of the rows of a candidate whose conditioner says something of each; it has the pass for itself.

    ``one_by_one``: a row for each sequence.
    """
    conditioning, part = share.trainee.job.conditioning, share.part
    if conditioning is None or not conditioning.by_row or share.dataset.preference is None:
        return None
    first = part.sequences if one_by_one else part.sequences[[row[0] for row in part.rows]]
    wanted = torch.from_numpy(share.dataset.preference[first]).float().to(device)
    return conditioning.of_rows(wanted, share.trainee.conditioned)


def _copies(members: Sequence[Share], rows: Sequence[int], device: torch.device) -> Copies:
    """Which rows of the pass are the same: those of members with the same pairs. ``rows`` of each member."""
    first: list[int] = []
    of: list[int] = []
    begins: dict[int, int] = {}
    for share, number in zip(members, rows, strict=True):
        if id(share.part) not in begins:
            begins[id(share.part)] = len(first)
            first += range(len(of), len(of) + number)
        begin = begins[id(share.part)]
        of += range(begin, begin + number)
    return Copies(torch.tensor(first, device=device), torch.tensor(of, device=device))


def _unspoken(layout: Layout) -> TokenLogps:
    """In place of log-probabilities that nobody reads."""
    return TokenLogps(torch.full(layout.shape, math.nan, device=layout.labels.device), None)


def _ends(job: Job, states: Tensor, layout: Layout, start: int, end: int) -> dict[str, Any]:
    """The hidden states [N,D] at both ends of a member's responses, as far as its loss reads them.

    The member has the pass's sequences from ``start`` to ``end``.
    """
    places = {"context": layout.context, "final": layout.final}
    wanted = {name: place[start:end] for name, place in places.items() if name in job.needs and place is not None}
    return {name: states.index_select(0, place).float() for name, place in wanted.items()}


def _distributions(model: LanguageModel, trainee: Trainee, frozen: Frozen, states: Tensor) -> dict[str, Tensor]:
    """Of the policy, from its response states [S,D], and of frozen ones, [S,V] each, where the loss reads them."""
    if "distributions" not in trainee.job.needs:
        return {}
    return {"policy": model.distributions(states), **frozen.distributions(trainee)}


def _loss(
    share: Share,
    frozen: Frozen,
    scored: TokenLogps,
    hidden: Tensor | None,
    ends: dict[str, Any],
    training: bool,
    spread: dict[str, Tensor],
) -> Tensor | None:
    """The candidate's loss, a sum over its pairs; None, and its ``error`` set, where a plugin failed.

    Where it is not finite it is the ``problem`` of the step.
    """
    trainee = share.trainee
    with _own_errors(trainee):
        batch = replace(frozen.batch(share, scored, hidden), distributions=spread, **ends)
        metrics = trainee.metrics if training else None
        loss = loss_of(batch, trainee.job, metrics, trainee.looks_closely, share.weights(batch.logps))
        if training and not torch.isfinite(loss):
            given = {"log-probabilities": batch.logps} if trainee.job.reads_logps else {}
            sound = all(bool(torch.isfinite(each).all()) for each in [*given.values(), *ends.values()])
            what = " and ".join([*given, *(["hidden states"] if ends else [])])
            who = door.origin(trainee.job.objective).who
            blame = f", which {who}, in loss, made of finite {what}" if what and sound else ""
            trainee.problem = f"loss is {loss.item()}{blame}"
        return loss
    return None


def _joined(model: LanguageModel, members: Sequence[Share]) -> Layout:
    """The rows of all members, one member after the other."""
    sequences: list[TokenSequence] = []
    rows: list[list[int]] = []
    for share in members:
        rows += [[len(sequences) + index for index in row] for row in share.part.rows]
        sequences += share.sequences
    rows = apart_beyond_window(sequences, rows, model.packing)
    return model.lay_out(sequences, rows)
