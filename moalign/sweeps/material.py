"""What a sweep trains and evaluates on: records read, split, scored and tokenised once for all candidates."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from moalign import storage
from moalign.api import Reader
from moalign.config import Config, Shared
from moalign.data.across import across_prompts
from moalign.data.dataset import PairDataset, drop_cut, drop_unrewarded, with_rewards
from moalign.data.loading import read_file
from moalign.data.pairing import labelled, rated, scored
from moalign.data.split import split
from moalign.data.tokenise import Tokeniser
from moalign.engine.conditioning import room_for
from moalign.engine.evaluate import HeldOut
from moalign.engine.model import LanguageModel
from moalign.engine.rewards import Scored, Scorer, score_all
from moalign.engine.rollouts import Rollout, Score
from moalign.errors import ConfigError, DataError
from moalign.sweeps import views
from moalign.sweeps.plan import Plan
from moalign.types import Message, Record, Sample

Prompt = str | tuple[Message, ...]
Asked = tuple[Prompt, tuple[int, ...]]
Scorers = Mapping[str, Scorer]


@dataclass(frozen=True)
class Material:
    """``train`` is None where the policy samples its own responses to ``prompts``, scored by ``score``.

    ``score_base``: the same for the base's responses that transforms compare with, of the plan's ``base_samples``.
    ``looked_at``: held-out pairs with all that the training loss reads, where train.early_stop asks for them.
    ``margins`` tells per objective where reward differences come from: scores, reward or implicit.
    ``texts``: the prompts as they are in the data; ``longest_prompt``: tokens of one that is sampled from.
    ``counts`` is what was read, dropped and truncated, by reason; ``digest`` a hash over all that decides the result.
    """

    train: PairDataset | None
    prompts: tuple[tuple[int, ...], ...]
    score: Score | None
    held_out: HeldOut
    looked_at: PairDataset | None
    margins: Mapping[str, str]
    counts: Mapping[str, int]
    warnings: tuple[str, ...]
    digest: str
    score_base: Score | None = None
    texts: tuple[Prompt, ...] = ()
    longest_prompt: int = 0


def gather(plan: Plan, model: LanguageModel, warn: Callable[[str], None]) -> Material:
    """Read, split, score, tokenise. ``warn`` is told of failures of rewards that are skipped, now and later.

    Raises DataError with file and line, ConfigError where the data lacks what the configuration asks of it.
    """
    counts: Counter[str] = Counter()
    scorers = {name: Scorer(name, each, plan.config.objectives[name], warn) for name, each in plan.rewards.items()}
    training, held_out = records(plan.config, plan.readers, counts)
    tokeniser = model.tokeniser
    room = room_for(plan.conditioner, plan.objectives, tokeniser)
    limit, whole = longest_prompt(plan.config, room), plan.told_in_text and tokeniser.has_template
    asked = asked_prompts(tokeniser, distinct_prompts(training), limit, counts, whole)
    held_out_asked = asked_prompts(tokeniser, distinct_prompts(held_out), limit, counts, whole)
    held_out_asked = held_out_asked[: plan.config.evaluate.prompts]
    if not held_out_asked:
        raise DataError("no held-out prompt is left to evaluate on", file=plan.config.data_paths[0])
    margins = {name: _margin_source(plan, name, training) for name in plan.objectives}
    train = None
    if plan.config.rollouts is None:
        train = views.added(plan, _dataset(plan, scorers, training, tokeniser, margins, room), model, "train")
        counts.update({f"training: {reason}": number for reason, number in train.counts.items()})
        counts["training responses" if plan.grouped else "training pairs"] = len(train.pairs)
    pairs = _held_out_pairs(plan, held_out, tokeniser, room, counts)
    counts["held-out prompts"] = len(held_out_asked)
    counts["held-out pairs"] = 0 if pairs is None else len(pairs.pairs)
    if plan.evaluation_kind == "preference":
        _check_pairs(plan.objectives, plan, pairs, "evaluate", _by_rewards(plan))
    judged = _held_out_responses(plan, held_out, tokeniser, margins, room) if plan.grouped else pairs
    looked_at = _looked_at(plan, scorers, judged, train, margins, counts)
    looked_at = looked_at and views.added(plan, looked_at, model, "held out")
    paths = [storage.sha256_of(path) for path in plan.config.data_paths if path is not None]
    hashes = [*paths, *(data.content_hash for data in (train, pairs, looked_at) if data is not None)]
    return Material(
        train=train,
        prompts=tuple(ids for _, ids in asked),
        score=_score_of(scorers, asked, plan.objectives, dispensable=True),
        held_out=HeldOut(
            pairs=pairs,
            prompts=tuple(ids for _, ids in held_out_asked),
            score=_score_of(scorers, held_out_asked, plan.objectives, dispensable=False),  # a point needs all scores
            texts=tuple(prompt for prompt, _ in held_out_asked),
        ),
        looked_at=looked_at,
        margins=margins,
        counts={reason: number for reason, number in counts.items() if number or reason.startswith("held-out")},
        warnings=() if train is None else train.warnings,
        digest=hashlib.sha256("/".join(hashes).encode()).hexdigest(),
        score_base=_score_of(scorers, asked, tuple(plan.base_samples), dispensable=False)
        if plan.base_samples
        else None,
        texts=tuple(prompt for prompt, _ in asked),
        longest_prompt=limit + room,
    )


def records(
    config: Shared, readers: Mapping[str, Reader], counts: Counter[str]
) -> tuple[Sequence[Record], Sequence[Record]]:
    """To train on and to hold out, from one file or two; what was not taken is counted. Raises DataError."""
    settings, objectives = config.data, config.objective_names
    path, held_out_path = config.data_paths
    training = read_file(path, readers, objectives, settings.malformed)
    counts["records"] = len(training.records)
    for refusal in training.refusals:
        counts[f"skipped: {refusal.reason.partition(': ')[0]}"] += 1
    if held_out_path is None:
        return split(training.records, config.seed, settings.held_out)
    held_out = read_file(held_out_path, readers, objectives, settings.malformed)
    for refusal in held_out.refusals:
        counts[f"skipped in the held-out file: {refusal.reason.partition(': ')[0]}"] += 1
    shared = {record.group for record in training.records} & {record.group for record in held_out.records}
    if shared:
        both = next(record for record in held_out.records if record.group in shared)
        raise DataError("this prompt is in the training file too", file=both.file, line=both.line)
    return training.records, held_out.records


def distinct_prompts(records: Sequence[Record]) -> list[Prompt]:
    """Each once, in the order of the data."""
    seen: dict[str, Prompt] = {}
    for record in records:
        seen.setdefault(repr(record.prompt), record.prompt)
    return list(seen.values())


def asked_prompts(
    tokeniser: Tokeniser, prompts: Sequence[Prompt], limit: int, counts: Counter[str], whole: bool
) -> list[Asked]:
    """Prompts that the policy can be asked, with their ids, at most ``limit``; the rest is counted.

    ``whole``: longer ones are left out and not cut, because a template puts a text in front of them as they are.
    """
    from jinja2 import TemplateError

    asked: list[Asked] = []
    for prompt in prompts:
        try:
            ids = tokeniser.prompt(prompt)
        except TemplateError:
            counts["prompts for sampling that the chat template refuses"] += 1
            continue
        if len(ids) > limit and whole:
            counts["prompts for sampling without room for the text of a preference"] += 1
            continue
        if len(ids) > limit:
            counts["prompts for sampling that lost their beginning"] += 1
            keep = 1 if tokeniser.bos_id is not None and ids[0] == tokeniser.bos_id else 0
            ids = (*ids[:keep], *ids[len(ids) - limit + keep :])
        asked.append((prompt, tuple(ids)))
    return asked


def longest_prompt(config: Config, room: int) -> int:
    """Tokens that leave room for a response, and ``room`` for what tells a preference, within data.max_length."""
    response = max(config.evaluate.max_new_tokens, config.rollouts.max_new_tokens if config.rollouts else 0)
    if response + room >= config.data.max_length:
        beside = f" and {room} that tell a preference" if room else ""
        raise ConfigError(
            f"data.max_length: {config.data.max_length} leaves no prompt beside {response} new tokens{beside}"
        )
    return config.data.max_length - response - room


def _margin_source(plan: Plan, name: str, records: Sequence[Record]) -> str:
    """Where reward differences of this objective come from, in the order scores, reward plugin, one-hot adapter."""
    asked = plan.config.data.margins
    if asked != "auto":
        return asked
    if any(name in record.scores for record in records):
        return "scores"
    return "reward" if name in plan.rewards else "implicit"


def _dataset(
    plan: Plan,
    scorers: Scorers,
    records: Sequence[Record],
    tokeniser: Tokeniser,
    margins: Mapping[str, str],
    room: int,
) -> PairDataset:
    longest = plan.config.data.max_length - room
    directions = {name: spec.direction for name, spec in plan.config.objectives.items()}
    from_rewards = [name for name, source in margins.items() if source == "reward"]
    if plan.scored or plan.grouped:
        without = [name for name, source in margins.items() if source == "implicit"]
        if without:
            what = "rewards of responses" if plan.grouped else "reward differences"
            sampled = ", or rollouts, where responses are to be sampled" if plan.grouped else ""
            raise ConfigError(
                f"loss: '{plan.config.loss.name}' learns from {what}, but nothing scores {without[0]}; add "
                f"scores to the data, or objectives.{without[0]}.reward{sampled}"
            )
        dataset = (partial(rated, by_all=True) if plan.grouped else scored)(
            records,
            tokeniser,
            plan.objectives,
            max_length=longest,
            directions=directions,
            later=from_rewards,
        )
    else:
        dataset = labelled(records, tokeniser, plan.objectives, max_length=longest, directions=directions)
    if plan.told_in_text and tokeniser.has_template:
        dataset = drop_cut(dataset)
    return _rewarded(plan, scorers, dataset, margins)


def _rewarded(plan: Plan, scorers: Scorers, dataset: PairDataset, margins: Mapping[str, str]) -> PairDataset:
    """With the rewards of reward plugins, and without what lacks a reward that the loss or combiner reads."""
    from_rewards = [name for name, source in margins.items() if source == "reward"]
    if from_rewards:
        rewards, counts = np.array(dataset.rewards), dict(dataset.counts)
        for name in from_rewards:
            column = scorers[name].score(dataset.samples)
            rewards[:, plan.objectives.index(name)] = column.values
            if column.failed:
                counts[f"response that the reward of {name} failed on"] = column.failed
        dataset = replace(with_rewards(dataset, rewards), counts=counts)
    if plan.scored or plan.grouped:
        return drop_unrewarded(dataset)
    if plan.mixing_needs_margins:
        return drop_unrewarded(dataset, [name for name, source in margins.items() if source != "implicit"])
    return dataset


def _held_out_pairs(
    plan: Plan, records: Sequence[Record], tokeniser: Tokeniser, room: int, counts: Counter[str]
) -> PairDataset | None:
    """What accuracies are measured on. For a loss on single responses whose prompts have no two that an objective
    judged unlike, of responses to different prompts, which is counted."""
    judged = any(record.pairs or record.scores for record in records)
    if not judged:
        return None
    directions = {name: spec.direction for name, spec in plan.config.objectives.items()}
    max_length = plan.config.data.max_length - room
    pairs, measured = None, set()
    with suppress(DataError):  # nothing but ties and dropped pairs; whoever needs them says so
        pairs = labelled(records, tokeniser, plan.objectives, max_length=max_length, directions=directions)
        measured = set(pairs.pair_objective.tolist())
    if plan.grouped and plan.config.rollouts is None and len(measured) < len(plan.objectives):
        with suppress(DataError):
            found = rated(records, tokeniser, plan.objectives, max_length=max_length, directions=directions)
            others = across_prompts(found)
            if others is not None and measured < set(others.pair_objective.tolist()):
                counts["held-out pairs of responses to different prompts"] = len(others.pairs)
                pairs = others
    return drop_cut(pairs) if pairs is not None and plan.told_in_text and tokeniser.has_template else pairs


def _held_out_responses(
    plan: Plan, records: Sequence[Record], tokeniser: Tokeniser, margins: Mapping[str, str], room: int
) -> PairDataset | None:
    """Scored ones, as they are trained on; None where there are none, or nobody looks."""
    if plan.config.train.early_stop is None or plan.config.rollouts is not None:
        return None
    directions = {name: spec.direction for name, spec in plan.config.objectives.items()}
    from_rewards = [name for name, source in margins.items() if source == "reward"]
    max_length = plan.config.data.max_length - room
    about: dict[str, Any] = {"max_length": max_length, "directions": directions, "later": from_rewards}
    try:
        return rated(records, tokeniser, plan.objectives, by_all=True, **about)
    except DataError:
        return None  # whoever needs them says so


def _looked_at(
    plan: Plan,
    scorers: Scorers,
    pairs: PairDataset | None,
    train: PairDataset | None,
    margins: Mapping[str, str],
    counts: Counter[str],
) -> PairDataset | None:
    """The held-out pairs, or responses, whose loss decides when a candidate ends, made as the training ones are."""
    if plan.config.train.early_stop is None or train is None:
        return None
    what = "response" if plan.grouped else "pair"
    if pairs is not None:
        try:
            rewarded = _rewarded(plan, scorers, pairs, margins)
        except DataError as error:
            where = f"train.early_stop: of the held-out {what}s"
            raise ConfigError(f"{where}, {error}; leave train.early_stop out") from None
        counts[f"early stop: held-out {what} lacks a reward"] = len(pairs.pairs) - len(rewarded.pairs)
        pairs = rewarded
    if plan.grouped:
        if pairs is None:
            raise ConfigError(
                "train.early_stop: no held-out response is scored for every objective; raise data.held_out, give "
                "data.held_out_path, or leave train.early_stop out"
            )
        return pairs
    judging = [name for index, name in enumerate(plan.objectives) if (train.pair_objective == index).any()]
    _check_pairs(judging, plan, pairs, "train.early_stop", "leave train.early_stop out")
    return pairs


def _check_pairs(names: Sequence[str], plan: Plan, pairs: PairDataset | None, key: str, otherwise: str) -> None:
    """Raise ConfigError where one of these objectives has judged no held-out pair."""
    for name in names:
        if pairs is None or not (pairs.pair_objective == plan.objectives.index(name)).any():
            raise ConfigError(
                f"{key}: no held-out pair is judged for {name}; raise data.held_out, give data.held_out_path, "
                f"or {otherwise}"
            )


def _by_rewards(plan: Plan) -> str:
    """What to do for an evaluation by rewards."""
    lacking = [f"give objectives.{name}.reward" for name in plan.objectives if name not in plan.rewards]
    named = ["leave evaluate.kind out"] if plan.config.evaluate.kind == "preference" else []
    return f"{', '.join(lacking + named)}, and rewards score responses"


def _score_of(scorers: Scorers, asked: Sequence[Asked], names: Sequence[str], *, dispensable: bool) -> Score | None:
    """Rewards of rollouts to these prompts by these objectives; None where one has none, or there are none of them.

    ``dispensable``: see Scorer.
    """
    if not names or not set(scorers) >= set(names):
        return None
    ordered = [scorers[name] for name in names]

    def score(rollouts: Sequence[Rollout]) -> Scored:
        samples = [Sample(asked[rollout.prompt][0], rollout.text) for rollout in rollouts]
        return score_all(ordered, samples, dispensable=dispensable)

    return score
