"""What a reward model is worth: measured on held-out judgements, beside the two rules that look at length alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moalign.data.batching import pair_indices
from moalign.data.dataset import PairDataset
from moalign.engine import judged
from moalign.engine.model import LanguageModel
from moalign.reward_models import measures
from moalign.reward_models.material import Material
from moalign.reward_models.members import Member
from moalign.reward_models.plan import Plan

LOOKED_AT = 512  # training units from which scales are taken
FEWEST = 5  # groups, below which a standard error over groups says nothing
SIGMOID = "P(chosen > rejected) = sigmoid(d), d the difference of scores"
FITTED = (
    "the form's differences of scores are no log-odds: P(chosen > rejected) = sigmoid(slope d), with two slopes for "
    "each objective, each fitted by maximum likelihood to the pairs of one half of the held-out groups and used for "
    "the other half; -: a half has no pair in the wrong order, so that no slope is the best"
)
ERROR = (
    f"expected calibration error: {measures.BINS} bins of equal width over confidence max(P, 1 - P) in [1/2, 1]; the "
    "mean over pairs of |share put in the right order - mean confidence| in the pair's bin"
)


def measure(
    model: LanguageModel, plan: Plan, material: Material, members: Sequence[Member]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report, and the scale of each member's scores on training responses, by objective."""
    looked_at = _looked_at(material.train, plan.config.seed)
    training = _scores(model, plan, members, looked_at)
    report: dict[str, Any] = {
        "format": 1,
        "form": plan.config.reward_model.name,
        "objectives": list(plan.objectives),
        "members": len(members),
        "probability": SIGMOID if plan.form.log_odds else FITTED,
        "calibration_error": ERROR,
        "ties": dict(material.ties),
        "early_stop": plan.config.train.early_stop is not None,
    }
    held_out = material.held_out
    if held_out is None:
        return report | {"pairs": 0, "per_objective": {}}, _scales(plan, looked_at, training, members)
    scores = _scores(model, plan, members, held_out)
    return (
        report | _of_pairs(plan, held_out, scores),
        _scales(plan, looked_at, training, members),
    )


def _scores(model: LanguageModel, plan: Plan, members: Sequence[Member], dataset: PairDataset) -> NDArray[np.float64]:
    """[K,N,M]"""
    about = (dataset.sequences, dataset.groups.tolist(), dataset.rewards)
    return np.stack(
        [judged.scores(model, member.slot, plan.form, plan.objectives, member.parameters, *about) for member in members]
    )


def _looked_at(train: PairDataset, seed: int) -> PairDataset:
    """The sequences of at most LOOKED_AT units of the training data, and their pairs."""
    return part(train, pair_indices(train, seed, 0, min(LOOKED_AT, len(train.pairs))))


def part(dataset: PairDataset, pairs: NDArray[np.int64]) -> PairDataset:
    """Some pairs of a dataset, with the sequences that they name and no others."""
    rows, place = np.unique(dataset.pairs[pairs], return_inverse=True)
    return PairDataset(
        objectives=dataset.objectives,
        sequences=tuple(dataset.sequences[row] for row in rows),
        samples=tuple(dataset.samples[row] for row in rows),
        pairs=place.reshape(-1, 2).astype(np.int64),
        pair_objective=dataset.pair_objective[pairs],
        strength=dataset.strength[pairs],
        rewards=dataset.rewards[rows],
        groups=dataset.groups[rows],
        counts={},
    )


def _differences(scores: NDArray[np.float64], dataset: PairDataset) -> NDArray[np.float64]:
    """[N,M] -> [P,M], chosen minus rejected."""
    return np.asarray(scores[dataset.pairs[:, 0]] - scores[dataset.pairs[:, 1]])


def _of_pairs(plan: Plan, held_out: PairDataset, scores: NDArray[np.float64]) -> dict[str, Any]:
    mean = scores.mean(0)
    differences = _differences(mean, held_out)
    each = [_differences(own, held_out) for own in scores]
    lengths = np.array([len(sequence.response) for sequence in held_out.sequences], dtype=np.float64)
    longer = lengths[held_out.pairs[:, 0]] - lengths[held_out.pairs[:, 1]]
    groups = held_out.groups[held_out.pairs[:, 0]]
    found = {}
    for index, name in enumerate(plan.objectives):
        mine = held_out.pair_objective == index
        if mine.any():
            own = [member[mine, index] for member in each]
            found[name] = _objective(differences[mine, index], longer[mine], groups[mine], own)
            found[name] |= _calibration(plan.form.log_odds, differences[mine, index], groups[mine].tolist())
            found[name] |= _labels(mean[:, index], held_out.rewards[:, index])
    return {
        "pairs": len(held_out.pairs),
        "groups": len(set(groups.tolist())),
        "responses": len(held_out.sequences),
        "per_objective": found,
        "agreement": measures.agreement(differences, held_out.pair_objective),
        "spearman": measures.spearman(mean),
    }


def _objective(
    differences: NDArray[np.float64],
    longer: NDArray[np.float64],
    groups: NDArray[np.int64],
    members: Sequence[NDArray[np.float64]],
) -> dict[str, Any]:
    clusters, number = groups.tolist(), len(set(groups.tolist()))
    baselines = {"always longer": longer, "always shorter": -longer}
    rules = {name: measures.accuracy(values, clusters) for name, values in baselines.items()}
    better = max(rules, key=lambda name: rules[name][0])
    own = [measures.accuracy(member, clusters)[0] for member in members]
    return {
        "pairs": len(differences),
        "groups": number,
        "accuracy": _figure(measures.accuracy(differences, clusters), number),
        "equal scores": int((differences == 0).sum()),
        "baselines": {name: _figure(rule, number) for name, rule in rules.items()},
        "better_baseline": better,
        "gain": _figure(measures.gain(differences, baselines[better], clusters), number),
        "member_accuracy": {"each": own, "mean": float(np.mean(own)), "spread": measures.spread(own)},
    }


def _calibration(log_odds: bool, differences: NDArray[np.float64], groups: Sequence[int]) -> dict[str, Any]:
    """``slopes``: the two of the halves of the groups; none where differences are log-odds as they are."""
    slopes = np.ones(len(differences)) if log_odds else measures.cross_fitted_slopes(differences, groups)
    return {
        "slopes": None if log_odds or slopes is None else sorted(set(slopes.tolist())),
        "calibration_error": None if slopes is None else measures.calibration_error(differences, slopes),
        "log_loss": None if slopes is None else measures.log_loss(differences, slopes),
    }


def _labels(scores: NDArray[np.float64], labels: NDArray[np.float64]) -> dict[str, Any]:
    """Where the data has scores: the correlation of ranks with them, over held-out responses in pairs."""
    known = ~np.isnan(labels)
    if known.sum() < 3:
        return {}
    table = measures.spearman(np.stack([scores[known], labels[known]], 1))
    return {"spearman_with_labels": table[0][1], "labelled_responses": int(known.sum())}


def _figure(mean: measures.Mean, groups: int) -> dict[str, float | None]:
    return {"value": mean[0], "stderr": mean[1] if groups >= FEWEST else None}


def _scales(
    plan: Plan, looked_at: PairDataset, scores: NDArray[np.float64], members: Sequence[Member]
) -> dict[str, Any]:
    """Mean and standard deviation of scores, and of the data's labels where it has any, over training responses."""
    by_member = {
        member.name: {
            name: {"mean": float(own[:, index].mean()), "deviation": float(own[:, index].std())}
            for index, name in enumerate(plan.objectives)
        }
        for member, own in zip(members, scores, strict=True)
    }
    labels = {}
    for index, name in enumerate(plan.objectives):
        known = looked_at.rewards[~np.isnan(looked_at.rewards[:, index]), index]
        if len(known):
            labels[name] = {"mean": float(known.mean()), "deviation": float(known.std())}
    return {"responses": len(looked_at.sequences), "members": by_member, "labels": labels}
