"""Rules for labelled and scored pairs beyond the weighted sum: soft labels, comparisons, margins."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from moalign.api import Batch, Combiner, Objective, PluginError, Preference, PreferenceError
from moalign.data.dataset import PairDataset, merge_judges
from moalign.engine.losses import loss_of
from moalign.errors import MoalignError
from moalign.registry import discover
from moalign.testing.batch import made_up
from moalign_plugins.combiners.heron_pairs import HERONPairs
from moalign_plugins.combiners.label_mixing import LabelMixing
from moalign_plugins.combiners.linear import Linear
from moalign_plugins.combiners.log_sigmoid_margins import LogSigmoidMargins
from moalign_plugins.combiners.modpo import MODPO
from moalign_plugins.combiners.par_margins import PARMargins
from moalign_plugins.objectives.dpo import DPO
from moalign_plugins.objectives.ipo import IPO
from moalign_plugins.objectives.rebel import REBEL
from moalign_plugins.objectives.rpo import RPO
from moalign_plugins.objectives.sft import SFT

NAMES = ("a", "b", "c")
WEIGHTS = (0.5, 0.2, 0.3)
REGISTRY = discover()


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def weights(values=WEIGHTS) -> Preference:
    return Preference("weights", dict(zip(NAMES, values, strict=False)))


def pairs_of(preference=WEIGHTS, *, scored: bool = False, seed: int = 0, tokens: int = 3) -> Batch:
    needs = frozenset({"pairs", "reference", "margins"})
    batch = made_up(
        prompts=4,
        tokens=tokens,
        preference=list(preference),
        needs=needs,
        scored=scored,
        seed=seed,
        dtype=torch.float64,
    )
    return replace(batch, objectives=NAMES[: len(preference)])


def total_loss(batch: Batch, objective: Objective, combiner: Combiner) -> Tensor:
    """As the engine has it."""
    if not batch.logps.requires_grad:
        return total_loss(replace(batch, logps=batch.logps.clone().requires_grad_()), objective, combiner).detach()
    job: Any = SimpleNamespace(
        objective=objective, combiner=combiner, needs=objective.wants, candidate="", reads_logps=1, labels_rounds=False
    )
    return loss_of(batch, job, None)


# --- labels of several judges ---------------------------------------------------------------------------------------


def judged_by_some(batch: Batch, seed: int) -> Batch:
    """Every objective judges each pair with probability 0.7, in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(batch.pairs), batch.preference.shape[1]
    judges, second = torch.rand(shape, generator=generator) < 0.7, torch.rand(shape, generator=generator) < 0.5
    judges[:, 0] |= ~judges.any(1)
    pair, objective = judges.nonzero().T
    pairs = batch.pairs[pair].where(~second[pair, objective][:, None], batch.pairs[pair].flip(1))
    margins = batch.margins
    assert margins is not None
    return replace(
        batch,
        pairs=pairs,
        pair_objective=objective,
        strength=batch.strength[pair],
        margins=margins[pair] * (1 - 2 * second[pair, objective][:, None].double()),
    )


def as_dataset(batch: Batch) -> PairDataset:
    return PairDataset(
        objectives=batch.objectives,
        sequences=(),
        samples=(),
        pairs=batch.pairs.numpy().copy(),
        pair_objective=batch.pair_objective.numpy().copy(),
        strength=batch.strength.numpy().copy(),
        rewards=np.zeros((len(batch.logps), len(batch.objectives))),
        groups=batch.groups.numpy().copy(),
        counts={},
    )


def merged(batch: Batch) -> Batch:
    found = merge_judges(as_dataset(batch))
    assert found.preferred is not None
    pairs, rewards = torch.from_numpy(found.pairs.copy()), batch.rewards
    return replace(
        batch,
        pairs=pairs,
        pair_objective=torch.from_numpy(found.pair_objective.copy()),
        strength=torch.from_numpy(found.strength.copy()),
        preferred=torch.from_numpy(found.preferred),
        margins=None if rewards is None else rewards[pairs[:, 0]] - rewards[pairs[:, 1]],
    )


LOSSES = [DPO(beta=0.3), IPO(beta=0.3), RPO(beta=0.3, eta=0.4), SFT()]


@pytest.mark.parametrize("objective", LOSSES, ids=repr)
@pytest.mark.parametrize("seed", range(3))
def test_mixed_labels_sum_to_the_weighted_losses_of_all_judges(objective, seed):
    """q L(z) + q' L(-z) over the merged pairs is "linear" over the judges' own, value and gradient."""
    batch = judged_by_some(pairs_of(seed=seed), seed)
    found = []
    for rule, given in ((Linear(), batch), (LabelMixing(), merged(batch))):
        logps = given.logps.detach().clone().requires_grad_()
        loss = total_loss(replace(given, logps=logps), objective, rule)
        found.append((loss.detach(), *torch.autograd.grad(loss, logps)))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert len(merged(batch).pairs) < 0.7 * len(batch.pairs)


def test_a_soft_label_is_q_of_the_loss_and_the_rest_of_the_loss_the_other_way_round():
    batch = pairs_of((0.25, 0.75))
    one = replace(batch, pairs=batch.pairs[:1], strength=batch.strength[:1], pair_objective=tensor([-1]).long())
    one = replace(one, margins=None, preferred=tensor([[0.0, 1.0]]))
    z = 0.3 * ((batch.logps - batch.ref_logps) * batch.mask).sum(1)[one.pairs[0]] @ tensor([1.0, -1.0])
    expected = -(0.75 * logsigmoid(z) + 0.25 * logsigmoid(-z))
    assert float(total_loss(one, DPO(beta=0.3), LabelMixing())) == pytest.approx(float(expected), rel=1e-12)
    # the soft label is where it is smallest: sigmoid(z) = q
    assert float(-(0.75 * logsigmoid(tensor(math.log(3))) + 0.25 * logsigmoid(tensor(-math.log(3))))) < float(expected)


@pytest.mark.parametrize("objective", LOSSES, ids=repr)
def test_with_all_weight_on_one_mixed_labels_are_its_own_pairs(objective):
    batch = judged_by_some(pairs_of((0.0, 1.0, 0.0)), 1)
    own = batch.pair_objective == 1
    margins = batch.margins
    assert margins is not None
    alone = replace(
        batch,
        pairs=batch.pairs[own],
        pair_objective=batch.pair_objective[own],
        strength=batch.strength[own],
        margins=margins[own],
    )
    once = merged(alone)
    assert torch.equal(once.pairs, alone.pairs) and torch.equal(once.strength, alone.strength)
    terms = LabelMixing().pair_terms(once)
    assert terms.reversed is not None and terms.reversed.tolist() == [0.0] * len(once.pairs)
    assert torch.equal(terms.weight, Linear().pair_terms(alone).weight)
    expected = total_loss(alone, objective, Linear())
    torch.testing.assert_close(total_loss(once, objective, LabelMixing()), expected, rtol=1e-14, atol=0)


def test_judgements_are_merged_as_they_are_found():
    """Three judges of two responses, one of them twice and against itself; a pair of one judge; both orders."""
    batch = pairs_of()
    pairs = torch.tensor([[1, 0], [0, 1], [4, 5], [1, 0], [0, 1]])
    judges = torch.tensor([0, 1, 2, 2, 2])
    strength = tensor([1.0, 2.0, 5.0, 3.0, 6.0])
    found = merge_judges(as_dataset(replace(batch, pairs=pairs, pair_objective=judges, strength=strength)))
    assert found.pairs.tolist() == [[1, 0], [4, 5]] and found.pair_objective.tolist() == [-1, -1]
    assert found.preferred is not None
    np.testing.assert_array_equal(found.preferred, [[1.0, 0.0, 0.5], [np.nan, np.nan, 1.0]])
    assert found.strength.tolist() == [3.0, 5.0]


def test_label_mixing_without_verdicts_and_other_preferences_are_refused():
    with pytest.raises(PluginError, match="mixes the verdicts of all objectives"):
        LabelMixing().pair_terms(pairs_of())
    with pytest.raises(PreferenceError, match="'label-mixing' has no meaning for direction"):
        LabelMixing().check(Preference("direction", {"a": 0.6, "b": 0.8}))


def test_linear_is_the_weighted_sum_of_the_objectives_losses_in_the_shares_of_their_pairs():
    """As its docstring has it: sum_k w_k (n_k / P) L_k, with L_k the mean loss of the n_k pairs that k judged."""
    batch, objective = judged_by_some(pairs_of(), 2), DPO(beta=0.2)
    losses = objective.loss(batch, Linear().pair_terms(batch))
    of_each = [losses[batch.pair_objective == judge] for judge in range(3)]
    size = len(batch.pairs)
    expected = sum(w * len(own) / size * own.mean() for w, own in zip(WEIGHTS, of_each, strict=True))
    torch.testing.assert_close(total_loss(batch, objective, Linear()) / size, expected, rtol=1e-12, atol=0)


# --- HERON ----------------------------------------------------------------------------------------------------------


def scored_pairs(rewards, preference, pairs) -> Batch:
    values, pairs = tensor(rewards), torch.tensor(pairs)
    count = len(values)
    one = torch.ones(count, 1, dtype=torch.float64)
    return Batch(
        logps=-one,
        mask=one,
        pairs=pairs,
        pair_objective=torch.full((len(pairs),), -1),
        preference=tensor(preference).expand(count, -1),
        strength=torch.ones(len(pairs), dtype=torch.float64),
        groups=torch.zeros(count, dtype=torch.int64),
        ref_logps=-one,
        rewards=values,
        margins=values[pairs[:, 0]] - values[pairs[:, 1]],
        objectives=NAMES[: len(preference)],
    )


CYCLE = [[0.0, 2.0], [0.6, 1.0], [1.2, 0.0]]
ROUND = [[0, 1], [1, 2], [0, 2]]


def test_with_a_margin_heron_goes_in_circles_and_without_it_is_an_order():
    """0 beats 1 and 1 beats 2 by the second objective, the first being too close; 2 beats 0 by the first."""
    batch = scored_pairs(CYCLE, (0.7, 0.3), ROUND)
    assert HERONPairs(delta=0.9).pair_terms(batch).difference.tolist() == [1, 1, -1]
    assert HERONPairs(delta={"a": 1.0, "b": 0.0}).pair_terms(batch).difference.tolist() == [1, 1, -1]
    assert HERONPairs().pair_terms(batch).difference.tolist() == [-1, -1, -1]  # 2 > 1 > 0
    assert HERONPairs(delta={"a": 1.0, "b": 1.5}).pair_terms(batch).weight.tolist() == [0, 0, 1]


def test_a_monotone_change_of_a_factor_leaves_heron_alone_without_a_margin():
    batch = pairs_of((0.6, 0.4), scored=True)
    assert batch.rewards is not None
    changed = torch.stack([batch.rewards[:, 0].exp(), 100 * batch.rewards[:, 1] ** 3], 1)
    other = replace(batch, rewards=changed, margins=changed[batch.pairs[:, 0]] - changed[batch.pairs[:, 1]])
    first, second = HERONPairs().pair_terms(batch), HERONPairs().pair_terms(other)
    assert torch.equal(first.difference, second.difference) and (first.weight == 1).all()
    plain, moved = (HERONPairs(delta=0.5).pair_terms(each).difference for each in (batch, other))
    assert not torch.equal(plain, moved)


def test_one_factor_is_the_plain_comparison_and_ties_decide_nothing():
    batch = scored_pairs([[1.0, 5.0], [3.0, 0.0], [3.0, 9.0]], (1.0, 0.0), ROUND)
    terms = HERONPairs().pair_terms(batch)
    assert terms.difference.tolist() == [-1, 0, -1] and terms.weight.tolist() == [1, 0, 1]
    losses = REBEL(beta=1.0).loss(batch, terms)
    assert losses.tolist() == pytest.approx([1, 0, 1])  # no log-ratio yet: the square of the verdict


def test_labels_decide_in_order_of_importance_and_rewards_where_there_is_a_delta():
    batch = scored_pairs(CYCLE, (0.7, 0.3), ROUND)
    preferred = tensor([[0.0, 1.0], [0.5, 1.0], [0.5, math.nan]])
    labelled = replace(batch, preferred=preferred)
    by_labels, by_rewards = HERONPairs().pair_terms(labelled), HERONPairs(delta=0.9).pair_terms(labelled)
    assert by_labels.weight.tolist() == [0, 1, 0] and by_labels.reversed.tolist() == [1, 0, 0]
    assert by_rewards.weight.tolist() == [1, 1, 0] and by_rewards.reversed.tolist() == [0, 0, 1]
    assert HERONPairs().needs(weights()) == frozenset() and HERONPairs(delta=1.0).needs(weights()) == {"margins"}


def test_equal_weights_are_compared_by_their_mean():
    batch = scored_pairs([[3.0, 0.0], [1.0, 1.0], [0.0, 3.0]], (0.5, 0.5), ROUND)
    assert HERONPairs().pair_terms(batch).difference.tolist() == [1, -1, 0]


def test_heron_says_what_does_not_go_together():
    batch = scored_pairs(CYCLE, (0.7, 0.3), ROUND)
    unknown = batch.margins.clone()
    unknown[0, 0] = math.nan
    for rule, given, message in (
        (HERONPairs(), replace(batch, margins=None), "compares verdicts or rewards, and the batch has neither"),
        (HERONPairs(), replace(batch, margins=unknown), "a reward that would decide a comparison is unknown"),
        (HERONPairs(delta={"a": 1.0, "b": 0.0}), replace(batch, objectives=()), "goes by their names"),
    ):
        with pytest.raises(PluginError, match=message):
            rule.pair_terms(given)
    with pytest.raises(PreferenceError, match="delta: there is no objective 'x'"):
        HERONPairs(delta={"x": 1.0}).check(weights((0.7, 0.3)))


# --- bent margins ---------------------------------------------------------------------------------------------------

BENT = [(PARMargins, torch.sigmoid), (LogSigmoidMargins, logsigmoid)]


@pytest.mark.parametrize(("kind", "function"), BENT)
def test_rewards_are_bent_around_their_reference_before_they_are_weighed(kind, function):
    references = {"a": 0.3, "b": -0.2, "c": 1.0}
    rule = kind(reference=references, slope=2.0)
    batch = pairs_of(scored=True)
    values = function(2 * (batch.rewards - tensor(list(references.values()))))
    expected = (values[batch.pairs[:, 0]] - values[batch.pairs[:, 1]]) @ tensor(WEIGHTS)
    torch.testing.assert_close(rule.pair_terms(batch).difference, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(PluginError, match="goes by their names"):
        rule.pair_terms(replace(batch, objectives=()))
    labelled = pairs_of()
    values = function(2 * (labelled.rewards - tensor(list(references.values()))))
    known = replace(labelled, margins=values[labelled.pairs[:, 0]] - values[labelled.pairs[:, 1]])
    found, modpo = rule.pair_terms(labelled), MODPO().pair_terms(known)
    for name in ("scale", "margin", "weight"):
        torch.testing.assert_close(getattr(found, name), getattr(modpo, name), rtol=1e-12, atol=1e-12)


def test_what_bends_rewards_does_far_from_the_reference():
    """PAR is bounded by the weights and 1/4 c r near the reference; log-sigmoid is linear below and flat above it."""
    low, high = scored_pairs([[-50.0], [-60.0]], (1.0,), [[0, 1]]), scored_pairs([[60.0], [50.0]], (1.0,), [[0, 1]])
    near = scored_pairs([[1e-3], [-1e-3]], (1.0,), [[0, 1]])
    par, log_sigmoid = PARMargins(reference=0.0), LogSigmoidMargins(reference=0.0)
    assert float(par.pair_terms(low).difference) == pytest.approx(0, abs=1e-20)
    assert float(log_sigmoid.pair_terms(low).difference) == pytest.approx(10, abs=1e-12)
    assert float(log_sigmoid.pair_terms(high).difference) == pytest.approx(0, abs=1e-20)
    assert float(par.pair_terms(near).difference) == pytest.approx(2e-3 / 4, rel=1e-6)
    apart = scored_pairs([[90.0, 90.0], [-90.0, -90.0]], (0.3, 0.7), [[0, 1]])
    assert float(par.pair_terms(apart).difference) == pytest.approx(1, abs=1e-12)
    # the other response as the reference bends nothing: log s(x) - log s(-x) = x
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(logsigmoid(x) - logsigmoid(-x), x, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", [PARMargins, LogSigmoidMargins])
def test_the_reference_must_be_said_and_cover_all(kind):
    with pytest.raises(ValueError, match="reference"):
        kind()
    with pytest.raises(PreferenceError, match="nothing is said of b, c"):
        kind(reference={"a": 0.0}).check(weights())
    with pytest.raises(PreferenceError, match="has no meaning for direction"):
        kind(reference=0.0).check(Preference("direction", {"a": 1.0}))


# --- MODPO over every loss that is installed ------------------------------------------------------------------------


def shiftable() -> list[Any]:
    """Losses on labelled pairs that read scale and margin, need no more than a reference, and work without options."""
    found = []
    for entry in REGISTRY.of_kind("objective"):
        try:
            objective: Any = REGISTRY.build("objective", entry.full_name, {}, "loss", None)
        except MoalignError:
            continue
        if objective.shiftable and "pairs" in objective.wants and objective.wants <= {"pairs", "reference"}:
            found.append(pytest.param(objective, id=entry.name))
    return found


def moved(batch: Batch, by: Tensor) -> Batch:
    """Another log-probability of each row [N], in its first token."""
    first = torch.zeros_like(batch.mask)
    first[:, 0] = 1
    return replace(batch, logps=batch.logps + by[:, None] * first)


@pytest.mark.parametrize("objective", shiftable())
def test_modpo_over_any_loss(objective):
    """With one objective it is the plain loss; constants in rewards of a prompt do not matter, differences do."""
    one_hot = pairs_of((0.0, 1.0, 0.0))
    plain = objective.loss(one_hot, Linear().pair_terms(one_hot))
    assert torch.equal(objective.loss(one_hot, MODPO().pair_terms(replace(one_hot, margins=None))), plain)
    batch = pairs_of()
    assert batch.margins is not None
    found = objective.loss(batch, MODPO().pair_terms(batch))
    assert found.isfinite().all()
    other = replace(batch, margins=batch.margins + 0.5)
    assert (objective.loss(other, MODPO().pair_terms(other)) != found).all()
    idle = replace(batch, margins=batch.margins.scatter_add(1, batch.pair_objective[:, None], batch.margins[:, :1] + 9))
    assert torch.equal(objective.loss(idle, MODPO().pair_terms(idle)), found)  # its own reward is in its labels


@pytest.mark.parametrize("objective", shiftable())
def test_where_the_loss_is_one_of_a_difference_modpo_moves_the_policy(objective):
    """Then it is the plain loss of a policy whose log-ratios are (a - sum_j w_j r_j / beta) / w_k for pairs of k."""
    batch = pairs_of(tokens=1)
    terms = Linear().pair_terms(batch)
    plain = objective.loss(batch, terms)
    if not torch.allclose(objective.loss(moved(batch, 0.1 + 0 * batch.logps[:, 0]), terms), plain, rtol=1e-9):
        pytest.skip("the loss depends on more than the difference of the two responses")
    assert batch.rewards is not None
    found, beta = objective.loss(batch, MODPO().pair_terms(batch)), objective.beta
    logps = batch.logps[:, 0]
    own = logps if batch.ref_logps is None or "reference" not in objective.wants else logps - batch.ref_logps[:, 0]
    for judge, weight in enumerate(WEIGHTS):
        others = tensor([0.0 if k == judge else w for k, w in enumerate(WEIGHTS)])
        target = (own - batch.rewards @ others / beta) / weight
        expected = objective.loss(moved(batch, (target - own) * batch.mask[:, 0]), terms)
        mine = batch.pair_objective == judge
        torch.testing.assert_close(found[mine], expected[mine], rtol=1e-8, atol=1e-10)
