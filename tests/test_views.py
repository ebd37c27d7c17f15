"""Losses that read further sequences of a pair: SRPO and SPO as mathematics."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from random import Random

import pytest
import torch
from pydantic import ValidationError
from test_objectives import make_batch, terms_of
from torch.nn.functional import cross_entropy

from moalign.api import Batch, PluginError, Sample
from moalign.testing import check_objective
from moalign_plugins.objectives.dpo import DPO
from moalign_plugins.objectives.spo import SPO
from moalign_plugins.objectives.srpo import SRPO

EVERY = [SRPO(), SRPO(beta=0.7, alpha=0.2), SPO(), SPO(levels=2, gamma=2.0), SPO(gamma=0.0)]


@pytest.mark.parametrize("loss", EVERY, ids=repr)
def test_it_conforms(loss):
    check_objective(loss, prompts=2, tokens=3)


# --- SRPO: a world of four answers ----------------------------------------------------------------------------------

ANSWERS, BETA = 4, 0.6


def random(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


PREFERRED = torch.sigmoid(random(ANSWERS, ANSWERS, seed=0).triu(1) - random(ANSWERS, ANSWERS, seed=0).triu(1).t())
REFERENCE = random(ANSWERS, seed=1).log_softmax(-1)  # of y
REVISING = random(ANSWERS, ANSWERS, seed=2).log_softmax(-1)  # [y1, y2]: of y2 behind y1
SEEN = random(ANSWERS, ANSWERS, seed=3).flatten().softmax(0).view(ANSWERS, ANSWERS)  # how often the pair is in the data


def optimum():
    """log pi(y) and log pi+(y2|y1) [y1, y2] in closed form; PREFERRED[y2, y1] is P(y2 > y1)."""
    unnormalised = REVISING + PREFERRED.t() / BETA
    z = unnormalised.logsumexp(-1)
    return (REFERENCE - z).log_softmax(-1), unnormalised - z[:, None]


def expected_loss(loss, answers, revisions):
    """Over pairs as they are SEEN and their labels; responses are one token each."""
    rows, known, pairs, weights = [], [], [], []
    where: dict[str, list[int]] = {name: [] for name in ("w|w", "l|w", "w|l", "l|l")}
    for w in range(ANSWERS):
        for other in range(ANSWERS):
            if w == other:
                continue
            first = len(rows)
            rows += [answers[w], answers[other]]
            known += [REFERENCE[w], REFERENCE[other]]
            numbers = {"w": w, "l": other}
            for name, places in where.items():
                new, old = (numbers[side] for side in name.split("|"))
                places.append(len(rows))
                rows.append(revisions[old, new])
                known.append(REVISING[old, new])
            pairs.append([first, first + 1])
            weights.append((SEEN[w, other] + SEEN[other, w]) * PREFERRED[w, other])
    count = len(pairs)
    batch = Batch(
        logps=torch.stack(rows)[:, None],
        mask=torch.ones(len(rows), 1, dtype=torch.float64),
        pairs=torch.tensor(pairs),
        pair_objective=torch.zeros(count, dtype=torch.long),
        preference=torch.ones(len(rows), 1, dtype=torch.float64),
        strength=torch.ones(count, dtype=torch.float64),
        groups=torch.zeros(len(rows), dtype=torch.long),
        ref_logps=torch.stack(known)[:, None],
        views={name: torch.tensor(places) for name, places in where.items()},
    )
    return (torch.stack(weights) * loss.loss(batch, terms_of(batch))).sum()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_at_the_closed_forms_nothing_is_left_but_the_noise_of_the_labels(alpha):
    """Both residuals are 0: the expected loss is the variance of the labels, P(1 - P), and its gradient is 0, however
    often each pair is seen."""
    answers, revisions = (each.clone().requires_grad_() for each in optimum())
    loss = expected_loss(SRPO(beta=BETA, alpha=alpha), answers, revisions)
    variance = (SEEN * PREFERRED * PREFERRED.t())[~torch.eye(ANSWERS, dtype=torch.bool)].sum()
    torch.testing.assert_close(loss, variance, rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(loss, (answers, revisions), allow_unused=True)
    assert max(float(each.abs().max()) for each in gradients if each is not None) < 1e-10
    elsewhere = expected_loss(SRPO(beta=BETA, alpha=alpha), answers, revisions + 0.1 * random(4, 4, seed=5))
    assert float(elsewhere.detach()) > float(variance) + 1e-4


def test_the_closed_form_solves_the_min_max_problem():
    """The reviser maximises what the generator minimises; both are Gibbs, so that each falls short by a KL."""
    answers, revisions = optimum()

    def revised(policy, y1):
        return (policy.exp() * (PREFERRED[:, y1] - BETA * (policy - REVISING[y1]))).sum()

    best = torch.stack([revised(revisions[y1], y1) for y1 in range(ANSWERS)])

    def outer(policy):
        return (policy.exp() * (best + BETA * (policy - REFERENCE))).sum()

    for seed in range(5):
        other = random(ANSWERS, seed=10 + seed).log_softmax(-1)
        short = best[0] - revised(other, 0)
        torch.testing.assert_close(short, BETA * (other.exp() * (other - revisions[0])).sum(), rtol=1e-11, atol=1e-13)
        more = outer(other) - outer(answers)
        torch.testing.assert_close(more, BETA * (other.exp() * (other - answers)).sum(), rtol=1e-11, atol=1e-13)


def revised_batch():
    """The pairs of ``make_batch`` with four revisions each."""
    batch, mask = make_batch(), (torch.arange(5) < torch.arange(12)[:, None] % 5 + 1).double()
    names = ("w|w", "l|w", "w|l", "l|l")
    return dataclasses.replace(
        batch,
        logps=torch.cat([batch.logps.detach(), -random(12, 5, seed=6).abs() * mask]).requires_grad_(),
        ref_logps=torch.cat([batch.ref_logps, -random(12, 5, seed=7).abs() * mask]),
        mask=torch.cat([batch.mask, mask]),
        preference=batch.preference[:1].expand(18, 2),
        groups=torch.cat([batch.groups, torch.arange(12) // 4]),
        views={name: torch.tensor([6, 10, 14]) + place for place, name in enumerate(names)},
    )


def test_srpo_is_the_average_over_both_orders_as_written():
    batch, beta, alpha = revised_batch(), 0.3, 0.2
    a = ((batch.logps - batch.ref_logps) * batch.mask).sum(-1).detach()
    expected = []
    for pair, (w, other) in enumerate(batch.pairs.tolist()):
        ratio = {name: a[rows[pair]] for name, rows in batch.views.items()} | {"w": a[w], "l": a[other]}
        total = 0.0
        for y1, y2, p in (("l", "w", 1.0), ("w", "l", 0.0)):
            reviser = p - 0.5 - beta * (ratio[f"{y2}|{y1}"] - ratio[f"{y1}|{y1}"])
            both = ratio[f"{y2}|{y1}"] - ratio[f"{y1}|{y2}"] + ratio[y2] - ratio[y1]
            total += 0.5 * (alpha * reviser**2 + (1 - alpha) * (p - 0.5 - beta / 2 * both) ** 2)
        expected.append(total)
    value = SRPO(beta=beta, alpha=alpha).loss(batch, terms_of(batch))
    torch.testing.assert_close(value, torch.stack(expected), rtol=1e-13, atol=0)


def test_srpo_asks_for_revisions_of_texts_and_of_conversations():
    chosen, rejected = (Sample("Why {response}?", text) for text in ("Good {prompt}", "Bad"))
    found = SRPO(template="{prompt}/{response}.").views(chosen, rejected)
    assert found["w|l"] == Sample("Why {response}?/Bad.", "Good {prompt}")
    assert found["l|w"] == Sample("Why {response}?/Good {prompt}.", "Bad")
    assert {name: view.response for name, view in found.items()}["l|l"] == "Bad"
    talk = ({"role": "user", "content": "Why?"},)
    asked = SRPO(instruction="Again.").views(Sample(talk, "A"), Sample(talk, "B"))["w|l"]
    last = {"role": "user", "content": "Again."}
    assert asked == Sample((*talk, {"role": "assistant", "content": "B"}, last), "A")
    for template in ("{prompt}", "{response}", "{prompt}{response}{prompt}"):
        with pytest.raises(ValidationError, match=r"must hold \{prompt\} and \{response\}, once each"):
            SRPO(template=template)


def test_srpo_refuses_terms_that_it_could_only_ignore():
    batch = revised_batch()
    with pytest.raises(PluginError, match=r"cannot use a combiner's scale and margin"):
        SRPO().loss(batch, terms_of(batch, margin=0.1))


# --- SPO ------------------------------------------------------------------------------------------------------------


def graded(levels=3, at_zero=False):
    """The pairs of ``make_batch`` with rows for the versions of each side, hidden states of width 4 and a head."""
    batch, more = make_batch(), 3 * 2 * (levels - 1)
    mask = (torch.arange(5) < torch.arange(more)[:, None] % 5 + 1).double()
    names = [f"{side} {level}" for side in ("chosen", "rejected") for level in range(1, levels)]
    mask = torch.cat([batch.mask, mask])
    head = {"level.weight": random(levels, 4, seed=8), "level.bias": random(levels, seed=9)}
    return dataclasses.replace(
        batch,
        logps=torch.cat([batch.logps.detach(), -random(more, 5, seed=6).abs() * mask[6:]]).requires_grad_(),
        ref_logps=torch.cat([batch.ref_logps, -random(more, 5, seed=7).abs() * mask[6:]]),
        mask=mask,
        preference=batch.preference[:1].expand(6 + more, 2),
        groups=torch.cat([batch.groups, torch.arange(3).repeat(len(names))]),
        hidden=random(6 + more, 5, 4, seed=10) * mask[:, :, None],
        parameters={name: value * (not at_zero) for name, value in head.items()},
        views={name: 6 + 3 * place + torch.arange(3) for place, name in enumerate(names)},
    )


def test_spo_without_its_term_is_dpo_and_asks_for_nothing():
    loss, batch = SPO(beta=0.3, gamma=0.0), make_batch()
    terms = terms_of(batch, scale=1.7, margin=0.4)
    assert torch.equal(loss.loss(batch, terms), DPO(beta=0.3).loss(batch, terms))
    generator = torch.Generator()
    assert not loss.views(*[Sample("q", "a b c d e f")] * 2) and not loss.parameters(4, generator)
    assert "hidden" not in loss.wants and "hidden" in SPO().wants


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_a_head_that_knows_nothing_costs_the_logarithm_of_the_levels_on_each_side(levels):
    batch, loss = graded(levels, at_zero=True), SPO(beta=0.3, gamma=0.7, levels=levels)
    more = loss.loss(batch, terms_of(batch)) - DPO(beta=0.3).loss(batch, terms_of(batch))
    torch.testing.assert_close(more, torch.full((3,), 1.4 * math.log(levels), dtype=torch.float64), rtol=1e-13, atol=0)
    first = loss.parameters(4, torch.Generator())
    assert {name: value.shape for name, value in first.items()} == {
        "level.weight": (levels, 4),
        "level.bias": (levels,),
    }
    assert not any(value.any() for value in first.values())


def test_spo_is_the_cross_entropy_of_torch_and_level_0_is_the_pair_s_own_response():
    batch, loss = graded(), SPO(beta=0.3, gamma=0.7)
    more = (loss.loss(batch, terms_of(batch)) - DPO(beta=0.3).loss(batch, terms_of(batch))) / 0.7
    for pair, rows in enumerate(batch.pairs.tolist()):
        expected = 0.0
        for row, side in zip(rows, ("chosen", "rejected"), strict=True):
            versions = [row, *(int(batch.views[f"{side} {level}"][pair]) for level in (1, 2))]
            pooled = torch.stack([batch.hidden[v][batch.mask[v] > 0].mean(0) for v in versions])
            logits = pooled @ batch.parameters["level.weight"].t() + batch.parameters["level.bias"]
            expected = expected + cross_entropy(logits, torch.arange(3))
        torch.testing.assert_close(more[pair], expected, rtol=1e-12, atol=0)


def test_gradcheck_through_hidden_states_and_head():
    batch, loss = graded(2), SPO(levels=2, gamma=0.7)

    def losses(logps, hidden, weight, bias):
        own = {"level.weight": weight, "level.bias": bias}
        moved = dataclasses.replace(batch, logps=logps, hidden=hidden, parameters=own)
        return loss.loss(moved, terms_of(batch, scale=1.7, margin=0.4))

    leaves = [batch.logps, batch.hidden, *batch.parameters.values()]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(losses, leaves)


def test_the_longest_words_go_first_and_more_with_every_level():
    text = "  One enormous elephant,\nthree little   mice. "
    assert SPO(levels=3, key_share=0.5).degraded(text) == ["  One three little   mice.", "  One three mice."]
    assert SPO(levels=2, key_share=1.0).degraded("aa bb cc") == ["cc"]  # ties: those that come first; one is left
    rng = Random(0)
    for _ in range(200):
        words = ["".join(rng.choice("ab") for _ in range(rng.randint(1, 6))) for _ in range(rng.randint(1, 9))]
        levels, share = rng.randint(2, 4), rng.choice([0.3, 0.5, 1.0])
        texts = SPO(levels=levels, key_share=share).degraded(" ".join(words))
        most = min(round(share * len(words)), len(words) - 1)
        assert len(texts) == (levels - 1 if most >= levels - 1 else 0)
        counts = [len(words), *(len(each.split()) for each in texts)]
        assert all(more > fewer for more, fewer in pairwise(counts)) and counts[-1] >= 1
        if texts:
            assert counts[-1] == len(words) - most
            kept = sorted(map(len, texts[-1].split()))
            assert kept == sorted(map(len, words))[: len(kept)]
