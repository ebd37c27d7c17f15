"""One score per objective with its standard error: rewards of sampled responses, or accuracy on held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moalign.config import EvaluateSettings
from moalign.data.dataset import PairDataset
from moalign.engine.model import LanguageModel
from moalign.engine.optimum import optimum
from moalign.engine.passes import apart_beyond_window, pair_passes
from moalign.engine.rollouts import Rollout, Score, sample, sequence_of
from moalign.engine.row_conditions import RowConditions, conditioned
from moalign.engine.scoring import LogpCache, logps_under
from moalign.errors import TrainingError
from moalign.pareto import standard_error_clustered
from moalign.seeds import derive
from moalign.types import Message


@dataclass(frozen=True)
class Evaluation:
    """Scores per objective (larger is better), standard errors (none with one cluster), KL, further columns.

    ``rewards`` [N,M] and ``log_ratios`` log pi / pi_ref [N] of the N samples, where they were scored and measured.
    """

    scores: dict[str, float]
    stderr: dict[str, float]
    kl: float | None
    details: dict[str, float]
    samples: tuple[Rollout, ...]
    rewards: np.ndarray | None = None
    log_ratios: np.ndarray | None = None


@dataclass(frozen=True)
class HeldOut:
    """What evaluation runs on: labelled pairs (may be None), prompts as token ids, and a scorer (None: no rewards).

    ``texts``: the prompts as they are in the data. ``conditions``: of one row, what conditions all of them beside what
    they say.
    """

    pairs: PairDataset | None
    prompts: tuple[tuple[int, ...], ...]
    score: Score | None
    texts: tuple[str | tuple[Message, ...], ...] = ()
    conditions: RowConditions | None = None

    def conditions_of(self, rows: int) -> RowConditions | None:
        """Those of so many rows."""
        return None if self.conditions is None else self.conditions.take([0] * rows)


@dataclass(frozen=True)
class Wish:
    """The weights [M] that a policy is meant to serve, and what a nat of KL costs."""

    weights: tuple[float, ...]
    price: float


def evaluate(
    model: LanguageModel,
    adapter: str | None,
    held_out: HeldOut,
    objectives: tuple[str, ...],
    settings: EvaluateSettings,
    kind: str,
    beta: float,
    cache: LogpCache,
    rollouts: Sequence[Rollout],
    seen: HeldOut | None = None,
    wish: Wish | None = None,
) -> Evaluation:
    """Evaluate the policy with ``adapter`` (None: the untouched base), whose ``samples`` the rollouts are.

    ``kind`` "generate": mean reward of sampled responses, standard error clustered by prompt. "preference": share of
    held-out pairs whose better response has the larger log-ratio (equal counts a half; the base has 0.5 by
    definition), clustered by group; the implicit-reward margin beta * (log-ratio difference) stands in the details.
    Where the data has both, the other kind's figures stand in the details. ``seen``: the same prompts and pairs as the
    policy reads them, if not as the reference does. ``wish``: the details then say what the best policy of all would
    reach for these weights (``optimum``), and the policy itself (``utility``), KL paid for; ``optimum_deviation``
    is how much its samples vary in what they say of it, in nats: the more, the less sure.
    """
    seen = held_out if seen is None else seen
    details: dict[str, float] = {}
    accuracies: dict[str, tuple[float, float | None]] = {}
    if held_out.pairs is not None:
        accuracies = _accuracies(model, adapter, held_out.pairs, seen, objectives, beta, cache, details)
    kl, ratios = None, None
    if settings.temperature == 1.0:
        ratios = _log_ratios(model, adapter, held_out.prompts, seen, rollouts)
        kl, error = _mean_and_error(ratios, np.array([rollout.prompt for rollout in rollouts]))
        details |= {} if error is None else {"kl_stderr": error}
    details["response_tokens"] = float(np.mean([len(r.ids) for r in rollouts]))
    details["ended"] = float(np.mean([r.ended for r in rollouts]))
    chosen, values = accuracies, None
    if held_out.score is not None:
        scored = held_out.score(rollouts)
        values = scored.values
        rewards = _mean_rewards(scored.values, rollouts, objectives)
        details |= {f"{name}/reward": mean for name, (mean, _) in rewards.items()}
        details |= scored.figures
        if wish is not None and ratios is not None:
            details |= _reached(wish, scored.values, ratios, rollouts)
        chosen = rewards if kind == "generate" else accuracies
    missing = [name for name in objectives if name not in chosen]
    if missing:
        raise TrainingError(f"nothing held out scores {', '.join(missing)}; evaluation has no figure for it")
    return Evaluation(
        scores={name: chosen[name][0] for name in objectives},
        stderr={name: error for name in objectives if (error := chosen[name][1]) is not None},
        kl=kl,
        details=details,
        samples=tuple(rollouts),
        rewards=values,
        log_ratios=ratios,
    )


def samples(
    model: LanguageModel, adapters: Sequence[str | None], held_out: HeldOut, settings: EvaluateSettings, seed: int
) -> list[list[Rollout]]:
    """Responses to the held-out prompts under each adapter, all sampled together."""
    return sample(
        model,
        adapters,
        held_out.prompts,
        samples=settings.samples,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        seed=derive(seed, "evaluation"),
        conditions=held_out.conditions_of(len(held_out.prompts)),
    )


def _mean_rewards(
    rewards: np.ndarray, rollouts: Sequence[Rollout], objectives: tuple[str, ...]
) -> dict[str, tuple[float, float | None]]:
    prompts = np.array([rollout.prompt for rollout in rollouts])
    result = {}
    for index, name in enumerate(objectives):
        known = np.isfinite(rewards[:, index])
        if known.any():
            result[name] = _mean_and_error(rewards[known, index], prompts[known])
    return result


def _accuracies(
    model: LanguageModel,
    adapter: str | None,
    pairs: PairDataset,
    seen: HeldOut,
    objectives: tuple[str, ...],
    beta: float,
    cache: LogpCache,
    details: dict[str, float],
) -> dict[str, tuple[float, float | None]]:
    ratios = np.zeros(len(pairs.sequences))
    for part in pair_passes(pairs, np.arange(len(pairs.pairs)), model.packing):
        sequences = [pairs.sequences[index] for index in part.sequences]
        layout = model.lay_out(sequences, part.rows)
        reference = cache.logps(sequences, layout, None, "")
        if seen.pairs is not None and seen.pairs is not pairs:
            read = [seen.pairs.sequences[index] for index in part.sequences]
            layout = model.lay_out(read, apart_beyond_window(read, part.rows, model.packing))
        with conditioned(model, adapter, seen.conditions_of(len(layout.input_ids))), torch.no_grad():
            own = model.response_logps(layout)
        ratios[part.sequences] = (own.double().sum(-1) - reference.double().sum(-1)).cpu().numpy()
    cache.save()
    differences = ratios[pairs.pairs[:, 0]] - ratios[pairs.pairs[:, 1]]
    groups = pairs.groups[pairs.pairs[:, 0]]
    result = {}
    for index, name in enumerate(objectives):
        mine = pairs.pair_objective == index
        if mine.any():
            correct = (differences[mine] > 0) + 0.5 * (differences[mine] == 0)
            result[name] = _mean_and_error(correct, groups[mine])
            details[f"{name}/accuracy"] = result[name][0]
            details[f"{name}/margin"] = float(beta * differences[mine].mean())
            details[f"{name}/pairs"] = float(mine.sum())
    return result


def _reached(wish: Wish, rewards: np.ndarray, ratios: np.ndarray, rollouts: Sequence[Rollout]) -> dict[str, float]:
    counts = np.array(wish.weights) > 0  # an objective that abstains and has no weight is no matter
    weighted = rewards[:, counts] @ np.array(wish.weights)[counts]
    found = optimum(weighted, ratios, [rollout.prompt for rollout in rollouts], wish.price)
    if found is None:
        return {}
    utility = float((weighted - wish.price * ratios).mean())
    (value, error), deviation = found.bound, found.deviation
    details = {"optimum": value, "optimum_stderr": error, "utility": utility, "utility_stderr": found.reached}
    return details | {"optimum_deviation": deviation}


def _log_ratios(
    model: LanguageModel,
    adapter: str | None,
    prompts: Sequence[tuple[int, ...]],
    seen: HeldOut,
    rollouts: Sequence[Rollout],
) -> np.ndarray:
    """log pi - log pi_ref [N] of the policy's own samples, in nats; their mean estimates the KL."""
    plain, groups = [sequence_of(rollout, prompts) for rollout in rollouts], [rollout.prompt for rollout in rollouts]
    if seen.prompts is prompts:
        reference, own = logps_under(model, plain, groups, (None, adapter))
    else:
        (reference,) = logps_under(model, plain, groups, (None,))
        read, conditions = (
            [sequence_of(rollout, seen.prompts) for rollout in rollouts],
            seen.conditions_of(len(rollouts)),
        )
        (own,) = logps_under(model, read, groups, (adapter,), conditions=conditions)
    return np.array([(mine - base).sum(dtype=np.float64) for mine, base in zip(own, reference, strict=True)])


def _mean_and_error(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float | None]:
    mean, error = standard_error_clustered(np.asarray(values, dtype=float), clusters.tolist())
    return float(mean), None if error is None else float(error)
