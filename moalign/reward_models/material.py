"""What a reward model learns from and is measured on: judgements read, split by groups and tokenised once."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moalign import storage
from moalign.data.dataset import PairDataset
from moalign.data.pairing import labelled, rated
from moalign.data.records import merge
from moalign.data.tokenise import Tokeniser
from moalign.errors import ConfigError, DataError
from moalign.reward_models.plan import Plan
from moalign.sweeps.material import records
from moalign.types import Record

TIE = "dropped pair: tie for "


@dataclass(frozen=True)
class Material:
    """``train``: pairs, or for forms that learn from scores each response alone. ``held_out``: labelled
    held-out pairs; None where there are none. ``looked_at``: what an early stop looks at.

    ``ties``: held-out judgements by objective that say neither is better. ``counts``: what was read, dropped and
    truncated, by reason; ``digest``: a hash over all that decides the result.
    """

    train: PairDataset
    held_out: PairDataset | None
    looked_at: PairDataset | None
    ties: Mapping[str, int]
    counts: Mapping[str, int]
    warnings: tuple[str, ...]
    digest: str


def gather(plan: Plan, tokeniser: Tokeniser) -> Material:
    """Read, split, tokenise. Raises DataError with file and line, ConfigError where nothing judges an objective."""
    counts: Counter[str] = Counter()
    training, unseen = (merge(found) for found in records(plan.config, plan.readers, counts))
    train = _training(plan, training, tokeniser)
    _check_labels(plan, train)
    counts.update({f"training: {reason}": number for reason, number in train.counts.items()})
    counts["training pairs" if plan.compares else "training responses"] = len(train.pairs)
    held_out, left = _pairs(plan, unseen, tokeniser)
    counts.update({f"held out: {reason}": number for reason, number in left.items()})
    counts["held-out pairs"] = 0 if held_out is None else len(held_out.pairs)
    looked_at = _looked_at(plan, unseen, held_out, tokeniser)
    hashes = [storage.sha256_of(path) for path in plan.config.data_paths if path is not None]
    hashes += [each.content_hash for each in (train, held_out) if each is not None]
    return Material(
        train=train,
        held_out=held_out,
        looked_at=looked_at,
        ties={name: left.get(f"{TIE}{name}", 0) for name in plan.objectives},
        counts={reason: number for reason, number in counts.items() if number or reason == "held-out pairs"},
        warnings=(*train.warnings, *_without_pairs(plan, held_out)),
        digest=hashlib.sha256("/".join(hashes).encode()).hexdigest(),
    )


def _training(plan: Plan, read: Sequence[Record], tokeniser: Tokeniser) -> PairDataset:
    how, build = _how(plan), labelled if plan.compares else rated
    name, path = plan.config.reward_model.name, plan.config.data_paths[0]
    lacks = None
    if not plan.compares and not any(record.scores for record in read):
        lacks = (
            "scores, and no response of this file has one; a form that learns from pairs, such as bradley-terry, can"
        )
    if plan.compares and not any(record.pairs or _several(record) for record in read):
        lacks = "pairs, and no prompt of this file has a judged pair or two scored responses"
    if lacks:
        raise DataError(f"reward model '{name}' learns from {lacks}", file=path)
    try:
        return build(read, tokeniser, plan.objectives, **how)
    except DataError as error:
        if error.file is not None:
            raise
        raise DataError(error.reason, file=path) from None


def _several(record: Record) -> bool:
    """Whether scores make a pair of it."""
    return any(sum(value is not None for value in values) > 1 for values in record.scores.values())


def _check_labels(plan: Plan, train: PairDataset) -> None:
    for index, name in enumerate(plan.objectives):
        judged = plan.compares and bool((train.pair_objective == index).any())
        scored = "rewards" in plan.form.needs and not np.isnan(train.rewards[:, index]).all()
        if not judged and not scored:
            what = "pair is judged" if plan.compares else "response is scored"
            raise ConfigError(
                f"objectives.{name}: no training {what} for it in {plan.config.data_paths[0]}; correct its name, or "
                "leave it out (`moalign data check` shows what the file offers)"
            )
        if plan.config.objectives[name].direction == "min" and np.isnan(train.rewards[:, index]).all():
            raise ConfigError(
                f"objectives.{name}.direction: min negates scores, and {plan.config.data_paths[0]} has judged pairs "
                "for it and no scores; exchange chosen and rejected in the data, or leave direction out"
            )


def _pairs(plan: Plan, read: Sequence[Record], tokeniser: Tokeniser) -> tuple[PairDataset | None, Mapping[str, int]]:
    """Labelled pairs, and what was dropped; None where only ties and dropped pairs are there."""
    if not any(record.pairs or _several(record) for record in read):
        return None, {}
    try:
        found = labelled(read, tokeniser, plan.objectives, **_how(plan))
    except DataError:
        return None, {}
    return found, found.counts


def _looked_at(
    plan: Plan, unseen: Sequence[Record], held_out: PairDataset | None, tokeniser: Tokeniser
) -> PairDataset | None:
    if plan.config.train.early_stop is None:
        return None
    try:
        looked_at = held_out if plan.compares else rated(unseen, tokeniser, plan.objectives, **_how(plan))
    except DataError:
        looked_at = None
    if looked_at is None:
        raise ConfigError("train.early_stop: no held-out judgement is left to look at; leave it out")
    return looked_at


def _without_pairs(plan: Plan, held_out: PairDataset | None) -> list[str]:
    judged = set() if held_out is None else set(held_out.pair_objective.tolist())
    return [
        f"no held-out pair is judged for {name}: the report has no accuracy for it; raise data.held_out"
        for index, name in enumerate(plan.objectives)
        if index not in judged
    ]


def _how(plan: Plan) -> dict[str, Any]:
    directions = {name: spec.direction for name, spec in plan.config.objectives.items()}
    return {"max_length": plan.config.data.max_length, "directions": directions}
