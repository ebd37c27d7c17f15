"""The figures of one policy, from what was read of it and of the base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moalign.data.dataset import PairDataset
from moalign.diagnostics import balance, implicit, proxies, ranking, starc
from moalign.diagnostics import lengths as length
from moalign.diagnostics.material import Material
from moalign.diagnostics.measurement import Reading, Sampled
from moalign.diagnostics.question import Question
from moalign.diagnostics.ranking import PairLogps
from moalign.pareto import standard_error_clustered
from moalign.reward_models import measures

Array = NDArray[np.float64]
Figure = dict[str, float | None]


def of_pairs(material: Material, base: Reading, question: Question) -> dict[str, Any] | None:
    """What is known of the pairs without any candidate: the reference's accuracy, and the idealised one by beta."""
    dataset, read = material.pairs, base.pairs
    if dataset is None or read is None:
        return None
    objectives = {}
    for index, name in enumerate(dataset.objectives):
        mine = np.flatnonzero(dataset.pair_objective == index)
        if len(mine):
            groups = dataset.groups[dataset.pairs[mine, 0]].tolist()
            reference = read.reference_ranks[mine]
            objectives[name] = {
                "pairs": len(mine),
                "groups": len(set(groups)),
                "reference": _figure(measures.accuracy(reference, groups)),
                "idealised": {
                    f"{beta:g}": _figure(measures.accuracy(ranking.idealised(reference, beta, question.share), groups))
                    for beta in question.betas
                },
                "chosen_tokens": float(read.tokens[mine, 0].mean()),
                "rejected_tokens": float(read.tokens[mine, 1].mean()),
            }
    return {"from": material.source, "pairs": len(dataset.pairs), "share": question.share, "objectives": objectives}


def of_policy(
    read: Reading,
    base: Reading,
    pairs: PairDataset | None,
    explicit: Mapping[str, Array],
    rewards: Sequence[str],
    question: Question,
) -> dict[str, Any]:
    """``explicit``: rewards by name of the responses in the pairs."""
    found: dict[str, Any] = {"ranking": None, "explicit": None}
    if pairs is not None and read.pairs is not None:
        found["ranking"] = _ranking(read.pairs, pairs)
        found["explicit"] = _explicit(read.pairs, pairs, explicit, question)
    if read.sampled is not None and base.sampled is not None:
        found |= _of_samples(read.sampled, base.sampled, rewards, question)
    return found


def _judged(pairs: PairDataset) -> dict[str, tuple[NDArray[np.int64], list[int]]]:
    """By objective that judged any: its pairs, and the group of each."""
    found = {}
    for index, name in enumerate(pairs.objectives):
        mine = np.flatnonzero(pairs.pair_objective == index)
        if len(mine):
            found[name] = (mine, pairs.groups[pairs.pairs[mine, 0]].tolist())
    return found


def _ranking(read: PairLogps, pairs: PairDataset) -> dict[str, Any]:
    found = {}
    for name, (mine, groups) in _judged(pairs).items():
        ranks = read.ranks[mine]
        turned, wrong = ranking.turned(ranks, read.reference_ranks[mine])
        found[name] = {
            "accuracy": _figure(measures.accuracy(ranks, groups)),
            "accuracy_by_token": _figure(measures.accuracy(read.ranks_by_token[mine], groups)),
            "preference_accuracy": _figure(measures.accuracy(read.differences[mine], groups)),
            "ties": int((ranks == 0).sum()),
            "wrong_in_reference": wrong,
            "of_these_turned": turned,
        }
    return found


def _explicit(
    read: PairLogps, pairs: PairDataset, rewards: Mapping[str, Array], question: Question
) -> dict[str, Any] | None:
    """By objective, the explicit rewards beside the implicit one: the objective's own, and the gold one."""
    found: dict[str, Any] = {}
    for name, (mine, groups) in _judged(pairs).items():
        own = {}
        for reward in dict.fromkeys((name, question.gold)):
            if reward is not None and reward in rewards:
                values = rewards[reward][pairs.pairs[mine]]
                differences = values[:, 0] - values[:, 1]
                known = np.isfinite(differences)
                kept = _kept(groups, known)
                own[reward] = {
                    "pairs": int(known.sum()),
                    "accuracy": _figure(measures.accuracy(differences[known], kept)) if kept else None,
                    "rank_correlation": implicit.rank_correlation(read.differences[mine], differences),
                }
        if own:
            found[name] = own
    return found or None


def _of_samples(sampled: Sampled, base: Sampled, rewards: Sequence[str], question: Question) -> dict[str, Any]:
    kl, error = standard_error_clustered(sampled.log_ratios, sampled.prompts)
    found: dict[str, Any] = {
        "kl": kl,
        "kl_stderr": error,
        "kl_root": math.sqrt(kl) if kl >= 0 else None,
        "rewards": {name: _mean(sampled.rewards[name], sampled.prompts) for name in rewards},
        "lengths": asdict(length.lengths(sampled.tokens, sampled.ended)),
        "slopes": {name: _slope(sampled, name) for name in rewards},
        "distances": _distances(sampled, rewards),
        "chi2": _chi2(proxies.chi_squared(sampled.log_ratios, sampled.prompts)),
    }
    found["bounds"] = {name: _bound(sampled, base, name, question) for name in question.proxies(rewards)}
    found["balance"] = _balance(sampled, question, rewards)
    return found


def _slope(sampled: Sampled, name: str) -> dict[str, Any] | None:
    found = length.slope(sampled.rewards[name], sampled.tokens, sampled.prompts)
    return None if found is None else asdict(found)


def _mean(values: Array, prompts: Sequence[int]) -> Figure | None:
    known = np.isfinite(values)
    if not known.any():
        return None
    return _figure(standard_error_clustered(values[known], _kept(prompts, known)))


def _kept(items: Sequence[Any], known: NDArray[np.bool_]) -> list[Any]:
    return [item for item, keep in zip(items, known.tolist(), strict=True) if keep]


def _distances(sampled: Sampled, rewards: Sequence[str]) -> list[list[float]] | None:
    """Of all rewards, in their order, on the responses that all of them have scored."""
    table, prompts = _known(sampled, rewards)
    return None if len(rewards) < 2 or not len(table) else starc.distances(table, prompts).tolist()


def _known(sampled: Sampled, rewards: Sequence[str]) -> tuple[Array, list[int]]:
    """[N,M] of the responses that all of these rewards have scored, and their prompts."""
    if not rewards:
        return np.empty((0, 0)), []
    table = np.stack([sampled.rewards[name] for name in rewards], axis=1)
    known: NDArray[np.bool_] = np.asarray(np.isfinite(table).all(1))
    return table[known], _kept(sampled.prompts, known)


def _chi2(found: proxies.ChiSquared) -> dict[str, Any]:
    return {
        "value": found.value,
        "stderr": found.stderr,
        "root": found.root,
        "log_of_one_more": found.log_second,
        "effective_samples": found.effective,
        "largest_share": found.largest,
        "samples": found.samples,
        "dominated": found.dominated,
    }


def _bound(sampled: Sampled, base: Sampled, proxy: str, question: Question) -> dict[str, Any] | None:
    """In units of the gold reward. None where rewards do not vary within prompts under the base, or are unknown."""
    assert question.gold is not None
    under, prompts = _known(base, (proxy, question.gold))
    now, own = _known(sampled, (proxy, question.gold))
    kin = proxies.kinship(under[:, 0], under[:, 1], prompts) if len(under) else None
    if kin is None or not len(now):
        return None
    gains = [
        standard_error_clustered(column, own)[0] - standard_error_clustered(before, prompts)[0]
        for column, before in zip(now.T, under.T, strict=True)
    ]
    root = proxies.chi_squared(sampled.log_ratios, sampled.prompts).root
    least = proxies.least_gain(kin.rho, gains[0] / kin.proxy_deviation, root)
    return {
        "correlation": kin.rho,
        "proxy_gain": gains[0],
        "gold_gain": gains[1],
        "gold_gain_at_least": least * kin.gold_deviation,
    }


def _balance(sampled: Sampled, question: Question, rewards: Sequence[str]) -> dict[str, Any] | None:
    """By proxy: the score at the threshold that was asked for, and the best one of all thresholds."""
    if question.correct is None or question.gold is None:
        return None
    found = {}
    for proxy in question.proxies(rewards) or [question.gold]:
        table, prompts = _known(sampled, (proxy, question.gold))
        if not len(table):
            continue
        answers = _kept(
            sampled.answers, np.isfinite(sampled.rewards[proxy]) & np.isfinite(sampled.rewards[question.gold])
        )
        about = (table[:, 0], table[:, 1] >= question.correct, prompts, answers)
        swept = balance.sweep(*about, balance.grid(table[:, 0]), question.wished)
        threshold, best = balance.best(swept)
        asked = question.threshold
        found[proxy] = {
            "threshold": asked,
            "score": None if asked is None else balance.score(*balance.counts(*about, asked), question.wished),
            "best_threshold": threshold,
            "best_score": best,
            "sweep": [list(each) for each in swept],
        }
    return found


def _figure(mean: tuple[float, float | None]) -> Figure:
    return {"value": mean[0], "stderr": mean[1]}
