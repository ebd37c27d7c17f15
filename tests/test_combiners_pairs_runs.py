"""Rules for labelled pairs in the engine and in runs: exact steps, several candidates in a pass, resumed runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from interruptions import StopAfterSteps, break_off_and_resume
from sweeps import contents, small_config, write_pairs

from moalign import lora, registry
from moalign.api import Combiner, PairTerms, PluginError, pair_preference
from moalign.config import Config
from moalign.engine.scoring import LogpCache
from moalign.engine.train import train_together
from moalign.engine.trainee import Trainee
from moalign.errors import ConfigError
from moalign.sweeps import run
from moalign.sweeps.candidate import batch_source, job_of, slots
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import Workshop, open_workshop
from moalign.types import Candidate, Preference

BETA, LR, STEPS, PAIRS = 0.3, 2e-3, 4, 6
Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.fixture(scope="module")
def workshop(tiny_model_path, pairs) -> Workshop:
    return workshop_with(tiny_model_path, pairs, "smooth-chebyshev")


def workshop_with(model: Path, pairs: Path, combine: Any) -> Workshop:
    settings = small_config(
        model,
        pairs,
        train={"steps": STEPS, "pairs_per_step": PAIRS, "lr": LR, "warmup": 0.0, "schedule": "constant"},
        loss={"name": "dpo", "beta": BETA},
        combine=combine,
    )
    return open_workshop(prepare(settings, registry.discover()), Path(), Observer(), keep_cache=False)


def trained(
    workshop: Workshop, shares: list[float], combiner: Combiner | None = None, **changes: Any
) -> tuple[list[Trainee], list[Lines], list[dict[str, torch.Tensor]]]:
    """Candidates with these weights of harmless, in one pass, by the workshop's rule or another."""
    made: list[Trainee] = []
    lines: list[Lines] = [[] for _ in shares]
    for share, slot, mine in zip(shares, slots(len(shares)), lines, strict=True):
        candidate = Candidate(f"c{share}", Preference("weights", {"harmless": share, "helpful": 1 - share}))
        job = job_of(candidate, workshop, ())
        if combiner is not None:
            job = replace(job, combiner=combiner, weighing=candidate.preference if combiner.weighs_losses else None)
        job = replace(job, settings=job.settings.model_copy(update=changes))
        on_step = lambda step, metrics, mine=mine: mine.append(metrics)  # noqa: E731
        made.append(Trainee(job, batch_source(candidate, workshop, slot), slot, on_step))
    train_together(workshop.model, made, LogpCache(workshop.model), Accelerator())
    return made, lines, [lora.weights(workshop.model.policy, each.slot) for each in made]


def largest(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


class InShares(Combiner):
    """What "linear" does, by way of the objectives' own gradients: w_k times the share of the pairs that k judged."""

    accepts = frozenset({"labelled"})
    weighs_losses = True

    def pair_terms(self, batch):
        one = torch.ones_like(pair_preference(batch)[:, 0])
        return PairTerms(one, 0 * one, one)

    def observe_losses(self, state, seen):
        share = seen.preference * seen.pairs / seen.pairs.sum()
        return {"weights": dict(zip(seen.objectives, share.tolist(), strict=True))}

    def loss_weights(self, state):
        return state["weights"]


@pytest.mark.parametrize("tokens", [None, 40], ids=["one pass", "several"])
def test_weighing_gradients_by_their_shares_is_linear(workshop, tokens):
    """Step by step the same sums, added up in another order; 40 tokens make several passes of each judge's pairs."""
    linear = registry.discover().build("combiner", "linear", {}, "combine", None)
    _, expected, _ = trained(workshop, [0.3], linear, tokens_per_pass=tokens)
    _, found, _ = trained(workshop, [0.3], InShares(), tokens_per_pass=tokens)
    for step, (one, other) in enumerate(zip(expected[0], found[0], strict=True)):
        for name in ("loss", "gradient_norm", "helpful/loss", "harmless/loss"):  # later Adam makes much of a last bit
            assert one.get(name, 0) == pytest.approx(other.get(name, 0), rel=2e-3 if step else 1e-5), name
    assert expected[0][0]["loss"] != pytest.approx(expected[0][-1]["loss"], rel=1e-2)


def test_the_weights_of_a_step_are_those_at_its_own_losses(workshop):
    made, lines, _ = trained(workshop, [0.3])
    assert made[0].error is None
    temperature, wanted = 0.1, {"harmless": 0.3, "helpful": 0.7}
    for line in lines[0]:
        judged = [name for name in wanted if f"{name}/loss" in line]
        powers = {name: math.exp(wanted[name] * line[f"{name}/loss"] / temperature) for name in judged}
        for name in wanted:
            expected = wanted[name] * powers[name] / sum(powers.values()) if name in judged else 0.0
            assert line[f"combine/weights/{name}"] == pytest.approx(expected, rel=1e-5)
        total = sum(line[f"combine/weights/{name}"] * line[f"{name}/loss"] for name in judged)
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    assert any(len(line) > 0 for line in lines[0]) and len(lines[0]) == STEPS


def test_candidates_in_one_pass_are_weighed_as_each_alone(workshop):
    """Their states differ, and so do the pairs of the first, whose weight is on one objective alone."""
    shares = [0.0, 0.3, 0.8]
    _, together, adapters = trained(workshop, shares)
    for share, lines, adapter in zip(shares, together, adapters, strict=True):
        _, (alone,), (single,) = trained(workshop, [share])
        for one, other in zip(lines, alone, strict=True):
            for name in ("combine/weights/helpful", "combine/weights/harmless", "loss"):
                assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6)
        assert largest(adapter, single) < LR * STEPS / 10  # a step of Adam is about the rate


class Broken(InShares):
    def loss_weights(self, state):
        return {"helpful": -1.0, "harmless": 1.0}


class Infinite(InShares):
    """Two losses of log 2 and more are beyond float32, and one of the judges has three."""

    def pair_terms(self, batch):
        terms = super().pair_terms(batch)
        return replace(terms, weight=terms.weight * 3e38)


def test_what_goes_wrong_with_a_rule_ends_its_candidate_alone(workshop):
    made, _, _ = trained(workshop, [0.3], Broken())
    assert isinstance(made[0].error, PluginError) and "in loss_weights" in str(made[0].error)


def test_a_step_without_finite_numbers_is_skipped_and_no_news(workshop):
    made, lines, _ = trained(workshop, [0.3], Infinite(), steps=2)
    assert made[0].skipped == 2 and all(line["skipped"].startswith("loss is inf") for line in lines[0])
    assert made[0].weighing is not None and made[0].weighing.state == {}


def test_mixed_labels_train_on_each_two_responses_once(tiny_model_path, pairs):
    workshop = workshop_with(tiny_model_path, pairs, "label-mixing")
    train = workshop.material.train
    assert train is not None
    both = workshop.pairs_for(Candidate("c", Preference("weights", {"harmless": 0.5, "helpful": 0.5})))
    assert 2 * len(both.pairs) == len(train.pairs)  # both judged all of them, and disagree on each
    alone = workshop.pairs_for(Candidate("c", Preference("weights", {"harmless": 0.0, "helpful": 1.0})))
    mine = train.pair_objective == train.objectives.index("helpful")
    assert (alone.pairs == train.pairs[mine]).all()
    _, lines, _ = trained(workshop, [0.5])
    # w L(z) + (1 - w) L(-z) at equal weights: no policy is better than the base, and it never moves
    assert all(line["loss"] == pytest.approx(math.log(2), rel=1e-5) for line in lines[0])
    assert lines[0][0]["helpful/loss"] == pytest.approx(math.log(2), rel=1e-5)
    _, (mixed,), (found,) = trained(workshop, [0.0])
    linear = workshop_with(tiny_model_path, pairs, "linear")
    _, (plain,), (expected,) = trained(linear, [0.0])
    assert [line["loss"] for line in mixed] == pytest.approx([line["loss"] for line in plain], rel=1e-6)
    assert [line["helpful/accuracy"] for line in mixed] == [line["helpful/accuracy"] for line in plain]
    assert largest(found, expected) < 1e-6


def test_what_heron_leaves_undecided_is_counted(tiny_model_path, tmp_path):
    rows = []
    for number in range(8):
        scores = {"helpful": [1.0, 0.0], "harmless": [0.0, 0.3 if number % 2 else 0.0]}
        if number < 4:
            scores["helpful"] = [0.1, 0.0]
        for name, (first, second) in scores.items():
            row = {"prompt": f"q{number}: ", "chosen": "ab", "rejected": "cd", "objective": name}
            rows.append(row | {"score_chosen": first, "score_rejected": second})
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    workshop = workshop_with(tiny_model_path, file, {"name": "heron-pairs", "delta": 0.2})
    _, lines, _ = trained(workshop, [0.3])
    wanted = Candidate("c", Preference("weights", {"harmless": 0.3, "helpful": 0.7}))
    source, expected = batch_source(wanted, workshop), []
    for step in range(STEPS):
        dataset, chosen = source.at(step)
        texts = [dataset.samples[row].prompt for row in dataset.pairs[chosen, 0]]
        # too close for the first, and the second finds no difference
        expected.append(sum(text in ("q0: ", "q2: ") for text in texts))
    assert [line.get("pairs_without_weight", 0) for line in lines[0]] == expected and sum(expected) > 0


RULES: dict[str, Any] = {
    "label-mixing": "label-mixing",
    "heron-pairs": "heron-pairs",
    "chebyshev": "chebyshev",
    "smooth-chebyshev": {"name": "smooth-chebyshev", "memory": 0.9},
    "worst-case": "worst-case",
    "mgda": "mgda",
    "upgrad": "upgrad",
    "cagrad": "cagrad",
}


@pytest.mark.parametrize("name", RULES)
def test_one_line_of_configuration_trains_the_assistant_by_it(name, pairs, tmp_path):
    known = registry.discover()
    for module in known.load(known.find("combiner", name)).requires:
        pytest.importorskip(module)
    settings = small_config(
        Path("tiny-assistant"),
        pairs,
        search="listed",
        preferences={"even": {"helpful": 0.5, "harmless": 0.5}},
        train={"steps": 2, "pairs_per_step": 4, "lr": 1e-3},
        evaluate={"kind": "preference"},
        combine=RULES[name],
    )
    run.start(settings, tmp_path / "run", known, Observer())
    lines = (tmp_path / "run" / "candidates" / "even" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all(math.isfinite(json.loads(line)["loss"]) for line in lines)


def test_a_resumed_run_with_a_rule_that_remembers_is_the_unbroken_one(tiny_model_path, pairs, tmp_path):
    settings = small_config(
        tiny_model_path,
        pairs,
        search={"name": "grid", "points": 2},
        train={"steps": 4, "pairs_per_step": 4, "lr": 1e-2, "together": 1},
        evaluate={"kind": "preference"},
        combine={"name": "smooth-chebyshev", "memory": 0.8},
    )
    run.start(settings, tmp_path / "unbroken", registry.discover(), Observer())
    break_off_and_resume(settings, tmp_path / "broken", StopAfterSteps(6))
    expected, found = contents(tmp_path / "unbroken"), contents(tmp_path / "broken")
    assert any(b"combine/losses/" in content for name, content in found.items() if "metrics" in name)
    assert found == expected


@pytest.mark.parametrize("name", ["par-margins", "log-sigmoid-margins"])
def test_a_rule_that_bends_rewards_refuses_those_that_are_known_but_for_a_number(name, tiny_model_path, pairs):
    """Log-ratios of adapters, which the configuration asks for, or which are all that there is for these pairs."""

    def settings(margins: str, combine: Any) -> Config:
        return small_config(tiny_model_path, pairs, combine=combine, data={"path": str(pairs), "margins": margins})

    bends = {"name": name, "reference": 0.0}
    message = rf"data\.margins: .*combine '{name}' reads the rewards themselves.*give scores in the data"
    with pytest.raises(ConfigError, match=message):
        prepare(settings("implicit", bends), registry.discover())
    plan = prepare(settings("auto", bends), registry.discover())
    with pytest.raises(ConfigError, match=message):
        open_workshop(plan, Path(), Observer(), keep_cache=False)
    assert prepare(settings("scores", bends), registry.discover()).reads_levels
    assert not prepare(settings("implicit", "modpo"), registry.discover()).reads_levels


def test_an_early_stop_has_no_scale_where_weights_move(tiny_model_path, pairs):
    settings = small_config(
        tiny_model_path, pairs, combine="chebyshev", train={"steps": 4, "early_stop": {"every": 2, "patience": 2}}
    )
    with pytest.raises(
        ConfigError, match=r"train\.early_stop: combine 'chebyshev' weighs the losses anew in each step"
    ):
        prepare(settings, registry.discover())


def test_one_model_for_many_preferences_does_not_go_with_it(tiny_model_path, pairs):
    settings = small_config(tiny_model_path, pairs, combine="chebyshev", condition="soup")
    with pytest.raises(ConfigError, match="does not go with combine 'chebyshev', which adapts to one preference"):
        prepare(settings, registry.discover())
