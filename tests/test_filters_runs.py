"""Filters of sampled responses in the engine: weights in the loss, refusals, resumed runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from interruptions import StopAfterSteps
from references import HALF, online, online_content, opened, same, trained
from sweeps import contents

from moalign import config, registry
from moalign.api import ConfigError, Filter, Kept, PluginError, TrainingError
from moalign.engine import filtering
from moalign.engine.filtering import Filtering
from moalign.sweeps import plan, run
from moalign.sweeps.candidate import batch_source
from moalign.sweeps.observe import Observer
from moalign_plugins.filters.best import Best
from moalign_plugins.filters.best_random import BestRandom


class Weights(Filter):
    """The weight of each response to a prompt, by its place there."""

    each: tuple[float, ...]

    def keep_responses(self, about, generator):
        found = torch.tensor([self.each[row % 4] for row in range(len(about.signal))], dtype=torch.float64)
        return Kept(found, tuple("" if weight else "by its place" for weight in found.tolist()))


@pytest.fixture(scope="module")
def grouped():
    rollouts = {"rounds": 1, "prompts": 3, "samples": 4, "prompts_per_step": 3, "max_new_tokens": 8}
    return online(loss={"name": "grpo", "beta": 0.0}, rollouts=rollouts, train={"steps": 1, "lr": 1e-2, "warmup": 0})


def with_filter(workshop, plugin):
    return replace(workshop, plan=replace(workshop.plan, filter=plugin))


def test_advantages_are_those_before_the_filter_and_what_is_left_out_is_in_no_step(grouped):
    plain, _ = batch_source(HALF, grouped).at(0)
    source = batch_source(HALF, with_filter(grouped, Best()))
    kept, _ = source.at(0)
    np.testing.assert_array_equal(kept.advantages, plain.advantages)
    assert len(plain.pairs) == 12 and len(kept.pairs) == 3
    combined = plain.rewards.mean(1)
    for row, _ in kept.pairs.tolist():
        assert combined[row] == combined[plain.groups == plain.groups[row]].max()
    assert source.figures["filter/kept"] == 0.25 and source.figures["filter/not among the best"] == 9.0


def test_a_step_is_the_weighted_mean_by_hand(grouped):
    """What one step minimises, and the weights it ends with, are those of responses that stand there so often."""
    weights, told = (2.0, 0.0, 1.0, 3.0), []
    for plugin in (Weights(each=weights), Weights(each=tuple(7 * each for each in weights))):
        told.append(trained(with_filter(grouped, plugin), None)[0])
    ((tensors, steps), (others, _)) = told
    for name, value in tensors.items():
        torch.testing.assert_close(value, others[name], rtol=1e-5, atol=1e-7)  # only their ratios matter
    plain = batch_source(HALF, grouped).at(0)[0]
    # the first step of GRPO without KL: the ratio is 1, so a response's loss is minus its advantage
    each = np.resize(weights, 12)
    assert steps.losses[0] == pytest.approx(-(each * plain.advantages).sum() / each.sum(), abs=1e-6)
    alone = trained(grouped, None)[0][1].losses[0]
    assert alone == pytest.approx(-plain.advantages.mean(), abs=1e-6) and abs(alone - steps.losses[0]) > 1e-3


def test_pairs_have_the_product_of_their_responses_weights():
    rollouts = {"rounds": 1, "prompts": 3, "samples": 4, "max_new_tokens": 8}
    workshop = online(loss={"name": "dpo", "beta": 0.1}, rollouts=rollouts)
    weights = (2.0, 0.0, 1.0, 3.0)
    every = batch_source(HALF, workshop).at(0)[0]
    found = batch_source(HALF, with_filter(workshop, Weights(each=weights))).at(0)[0]
    got = dict(zip(map(tuple, found.pairs.tolist()), found.weights.tolist(), strict=True))
    assert got == {
        (one, other): weights[one % 4] * weights[other % 4]
        for one, other in every.pairs.tolist()
        if weights[one % 4] * weights[other % 4]
    }
    assert 0 < len(got) < len(every.pairs)


class Both(Weights):
    """Pairs count the less the more their responses do."""

    def keep_pairs(self, about, pairs, generator):
        place = torch.tensor(self.each, dtype=torch.float64)[torch.arange(len(about.signal)) % 4]
        found = 1 / place[pairs].prod(1)
        return Kept(found, ("",) * len(found))


def test_weights_of_pairs_are_multiplied_by_those_of_their_responses(grouped):
    """2 times a half is 1: nothing is left of the first weights."""
    data = batch_source(HALF, grouped).at(0)[0]
    pairs = np.array([[0, 2], [4, 7], [6, 7]])
    data = replace(data, pairs=pairs, pair_objective=np.full(3, -1), strength=np.ones(3))
    chooser, signal = Filtering(Both(each=(2.0, 1.0, 4.0, 0.5)), data.objectives, "", 0), data.rewards.mean(1)
    weighed, _ = chooser.responses(0, data, data.rewards, signal)
    assert weighed.weights.tolist() == [8.0, 1.0, 2.0]
    both, figures = chooser.pairs(0, weighed, data.rewards, signal)
    assert both.weights is None and both.pairs.tolist() == pairs.tolist() and figures == {"filter/pairs/kept": 1.0}


LINES = [
    ("grpo", {"name": "best", "keep": 2}),
    ("grpo", "best-random"),
    ("rebel", "best-worst"),
    ("dpo", {"name": "best-worst", "resampled": True}),
    ("reinforce", {"name": "accuracy-band", "objective": "helpful", "right": 0.0, "low": 0, "high": 1}),
    ("rloo", {"name": "reward-threshold", "right_by": "helpful", "right": 0.2, "wanted": 2}),
    ("dpo", {"name": "margin", "gap": 0.01}),
]


@pytest.mark.parametrize(("loss", "choice"), LINES, ids=str)
def test_a_line_in_the_configuration(loss, choice):
    content = online_content(loss=loss, train={"steps": 2, "lr": 1e-2, "warmup": 0})
    content["rollouts"] = content["rollouts"] | {"rounds": 2, "samples": 5, "prompts": 4, "filter": choice}
    ((_, told),) = trained(opened(config.from_mapping(content)), None)
    prefix = "filter/pairs" if choice == LINES[-1][1] else "filter"
    assert all(0 < share <= 1 for share in told.of(f"{prefix}/kept")) and len(told.steps) == 2


@pytest.mark.parametrize("loss", ["rebel", "grpo", "dpo"])
def test_a_round_of_which_nothing_is_left_says_why(loss):
    nothing = {"rounds": 1, "prompts": 2, "samples": 3, "max_new_tokens": 4}
    low = {"name": "reward-threshold", "threshold": 1e6}
    message = r"round 0: filter 'reward-threshold' of moalign .* keeps not one of 6 responses \(left out: \d below the"
    with pytest.raises(TrainingError, match=message):
        batch_source(HALF, online(loss=loss, rollouts=nothing | {"filter": low})).at(0)


def test_a_loss_on_pairs_needs_two_to_a_prompt():
    rollouts = {"rounds": 1, "prompts": 2, "samples": 3, "max_new_tokens": 4}
    with pytest.raises(TrainingError, match="no two different ones to a prompt are left"):
        batch_source(HALF, online(loss="dpo", rollouts=rollouts | {"filter": "best"})).at(0)
    margin = {"name": "margin", "gap": 1e6}
    with pytest.raises(TrainingError, match=r"round 0: filter 'margin' .* keeps not one of \d+ pairs"):
        batch_source(HALF, online(loss="dpo", rollouts=rollouts | {"filter": margin})).at(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"name": "margin", "gap": 1},
            r"rollouts\.filter: 'margin' chooses among labelled pairs of responses, and loss",
        ),
        ({"name": "accuracy-band", "objective": "x"}, r"rollouts\.filter\.objective: there is no objective 'x'; there"),
        ({"name": "accuracy-band", "low": 0.9, "high": 0.5}, "low 0.9 is above high 0.5"),
        ("reward-threshold", "give either threshold, or right_by"),
        ({"name": "reward-threshold", "right_by": "x"}, r"rollouts\.filter\.right_by: there is no objective 'x'"),
        ({"name": "reward-threshold", "right_by": "helpful", "grid": [1, 0, 0.1]}, "grid is lowest, highest and step"),
        ({"name": "best", "keep": 0}, r"rollouts\.filter\.keep"),
        ("bestt", r"rollouts\.filter\.name: no filter is called 'bestt'; did you mean 'best'"),
    ],
)
def test_what_does_not_work_is_refused_before_a_model_is_loaded(changes, message):
    content = config.from_mapping(online_content(rollouts={"filter": changes}))
    with pytest.raises(Exception, match=message) as error:
        plan.prepare(content, registry.discover())
    assert isinstance(error.value, ConfigError) or "no filter" in str(error.value)


def test_a_rule_without_a_combined_reward_is_refused():
    rule = {"name": "par-margins", "reference": 0}
    content = online_content(rollouts={"filter": "best"}, combine=rule)
    with pytest.raises(ConfigError, match=r"rollouts\.filter: combine 'par-margins' has no combined reward of a"):
        plan.prepare(config.from_mapping(content), registry.discover())


ONE = torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (ONE, "it must return a moalign.api.Kept, not Tensor"),
        (Kept(ONE.float(), ("",) * 3), r"weights must be float64 \[3\] on cpu, one of each, not torch.float32"),
        (Kept(ONE[:2], ("",) * 2), r"weights must be float64 \[3\]"),
        (Kept(-ONE, ("",) * 3), "a weight is -1.0; it must be finite"),
        (Kept(ONE * math.nan, ("",) * 3), "a weight is nan"),
        (Kept(ONE, ("",) * 2), "reasons must be a tuple of 3 texts"),
        (Kept(ONE * 0, ("",) * 3), "one has the weight 0 without a reason"),
        (Kept(ONE, ("odd",) * 3), "one has the weight 1 with the reason 'odd' to leave it out"),
        (Kept(ONE * 0, ("kept",) * 3), "the reason 'kept' cannot name a figure"),
        (Kept(ONE * 0, ("a/b",) * 3), "the reason 'a/b' cannot name a figure"),
        (Kept(ONE, ("",) * 3, {"kept": 1.0}), "figures must be numbers by names of their own"),
    ],
)
def test_what_a_filter_must_not_return(found, message):
    with pytest.raises(PluginError, match=message):
        filtering.checked(found, 3, "who")


def test_draws_are_a_function_of_seed_and_round(grouped):
    data = batch_source(HALF, grouped).at(0)[0]
    signal = data.rewards.mean(1)

    def pairs(seed, number):
        chooser = Filtering(BestRandom(), data.objectives, "", seed)
        return chooser.responses(number, data, data.rewards, signal)[0].pairs.tolist()

    assert pairs(1, 0) == pairs(1, 0)
    assert len({str(pairs(seed, number)) for seed in range(4) for number in range(4)}) > 4


def test_a_resumed_run_is_the_unbroken_one(tmp_path):
    """Draws among them: what was broken off is trained anew, as it was."""
    content = online_content(loss="grpo", train={"steps": 2, "lr": 1e-2, "warmup": 0, "together": 1})
    filtered = {"rounds": 2, "filter": {"name": "best-random", "resampled": True}}
    content["rollouts"] = content["rollouts"] | filtered
    settings, installed = config.from_mapping(content), registry.discover()
    run.start(settings, tmp_path / "whole", installed, Observer())
    with pytest.raises(KeyboardInterrupt):
        run.start(settings, tmp_path / "parts", installed, StopAfterSteps(3))
    run.resume(tmp_path / "parts", installed, Observer())
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    told = [file.read_text().splitlines() for file in tmp_path.glob("parts/candidates/*/metrics.jsonl")]
    assert len(told) == 2 and all("filter/kept" in json.loads(line) for lines in told for line in lines)


def test_the_same_filter_trains_the_same(grouped):
    first, second = (trained(with_filter(grouped, BestRandom()), None)[0][0] for _ in range(2))
    assert same(first, second)
