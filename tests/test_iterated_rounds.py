"""Rounds of sampling, scoring, filtering and training for every method that the recipe names, each by its line there.

Losses are compared with what the sampled texts give by hand, at every step of two rounds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from interruptions import StopAfterCandidates
from references import HALF, opened, trained
from sweeps import contents
from torch import Tensor
from torch.nn.functional import logsigmoid

from moalign import config, lora, recipes, registry
from moalign.api import Objective
from moalign.config import Config
from moalign.data.dataset import PairDataset
from moalign.data.tokenise import Sequence as TokenSequence
from moalign.engine import round_views
from moalign.engine.batches import RolloutSource
from moalign.engine.model import TRAINED
from moalign.engine.reference_responses import responses
from moalign.engine.scoring import logps_under
from moalign.errors import ConfigError, PluginError, TrainingError
from moalign.lora import frozen
from moalign.sweeps import run, views
from moalign.sweeps.candidate import batch_source, job_of
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare

FEW = (
    *("train.steps=4", "train.lr=1e-2", "train.warmup=0", "train.schedule=constant", "train.together=1"),
    *("search.points=2", "evaluate.samples=1", "evaluate.prompts=2", "evaluate.max_new_tokens=8"),
    *("rollouts.rounds=2", "rollouts.prompts=4", "rollouts.samples=4", "rollouts.prompts_per_step=2"),
    "rollouts.max_new_tokens=12",
)
LINES = {name: line for line, name in re.findall(r"^# (loss: \{name: ([a-z-]+).*\})$", recipes.read("iterated"), re.M)}
BESIDE = {
    "brain": ("rollouts.pairs=all", "reference=base"),
    "rejection-sampling": ("rollouts.pairs=all", "reference=null"),
}
CLOSE = {"rel": 1e-4, "abs": 1e-5}  # sums of float32 log-probabilities from passes of other shapes


def settings_of(folder, *overrides: str) -> Config:
    (folder / "sweep.yaml").write_text(recipes.read("iterated"))
    return config.load(folder / "sweep.yaml", (*FEW, *overrides))


def by_line(folder, name: str, *overrides: str) -> Config:
    return settings_of(folder, LINES[name].replace(": ", "=", 1), *BESIDE.get(name, ()), *overrides)


Look = Callable[[RolloutSource, int, PairDataset, np.ndarray], None]


@pytest.fixture
def watched(monkeypatch) -> Callable[[Look], None]:
    """Looks at what a step trains on, before it does."""

    def watch(look: Look) -> None:
        at = RolloutSource.at

        def looking(self, step):
            dataset, pairs = at(self, step)
            look(self, step, dataset, pairs)
            return dataset, pairs

        monkeypatch.setattr(RolloutSource, "at", looking)

    return watch


def tokens_of(source: RolloutSource, sequences: Sequence[TokenSequence], *adapters: str | None) -> list[list[Tensor]]:
    """Log-probabilities of the responses' tokens under each adapter, in float64."""
    found = logps_under(source.model, sequences, range(len(sequences)), adapters)
    return [[torch.from_numpy(each).double() for each in own] for own in found]


def sums_of(source: RolloutSource, sequences: Sequence[TokenSequence], *adapters: str | None) -> list[Tensor]:
    return [torch.stack([each.sum() for each in own]) for own in tokens_of(source, sequences, *adapters)]


def ratios_of(source: RolloutSource, sequences: Sequence[TokenSequence]) -> Tensor:
    """Of the policy as it is to the reference as it is."""
    assert source.moving is not None
    own, reference = sums_of(source, sequences, source.slot, source.moving.now.adapter)
    return own - reference


def combined(dataset: PairDataset) -> Tensor:
    return torch.tensor(dataset.rewards).mean(-1)


def losses_of(settings: Config) -> list[float]:
    workshop = opened(settings)
    ((_, told),) = trained(workshop, job_of(HALF, workshop, ()).reference)
    return told.losses


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_the_recipe_has_a_line_for_each():
    assert set(LINES) == {"inpo", "selm", "srpo", "brain", "rejection-sampling"}


def test_selm_pushes_down_the_first_thing_that_the_previous_iterate_said(tmp_path, watched):
    expected: list[Tensor] = []

    def look(source, step, dataset, pairs):
        chosen, rejected = dataset.pairs[pairs].T
        assert (combined(dataset)[chosen] > combined(dataset)[rejected]).all()
        first = [int(np.flatnonzero(dataset.groups == group)[0]) for group in dataset.groups[chosen]]
        assert [dataset.views["reference"][pair] for pair in pairs] == first
        ratios = ratios_of(source, dataset.sequences)
        losses = -logsigmoid(0.8 * (ratios[chosen] - ratios[rejected])) + 0.5 * 0.8 * ratios[first]
        expected.append(losses.mean())

    watched(look)
    found = losses_of(by_line(tmp_path, "selm", "loss.beta=0.8", "loss.alpha=0.5"))
    assert found == [pytest.approx(float(loss), **CLOSE) for loss in expected]
    at_start = float(np.log(2))
    assert [abs(loss - at_start) < 1e-5 for loss in found] == [True, False, True, False]  # the policy is the reference


def test_srpo_revises_sampled_responses_as_they_were_sampled(tmp_path, watched):
    """Behind a prompt that is made of their texts; those that were cut at max_new_tokens have no end token."""
    settings = by_line(tmp_path, "srpo", "loss.beta=0.3", "loss.alpha=0.25", "rollouts.max_new_tokens=8")
    texts, expected, ends = opened(settings).material.texts, [], set()

    def look(source, step, dataset, pairs):
        losses = []
        for pair in dataset.pairs[pairs].tolist():
            text, sampled = texts[dataset.groups[pair[0]]], [dataset.sequences[row] for row in pair]
            ends.update(each.truncated for each in sampled)
            prompts = [f"{text}\n{dataset.samples[row].response}\n\nRevise the answer above.\n" for row in pair]
            asked = [source.model.tokeniser.prompt(prompt) for prompt in prompts]
            revised = [TokenSequence(ids + each.response, len(ids)) for ids in asked for each in sampled]
            good, bad, kept, spoilt, mended, left = ratios_of(source, [*sampled, *revised])
            joint = (0.5 - 0.15 * (mended - spoilt + good - bad)) ** 2
            reviser = ((0.5 - 0.3 * (mended - left)) ** 2 + (-0.5 - 0.3 * (spoilt - kept)) ** 2) / 2
            losses.append(0.75 * joint + 0.25 * reviser)
        expected.append(torch.stack(losses).mean())

    watched(look)
    found = losses_of(settings)
    assert found == [pytest.approx(float(loss), **CLOSE) for loss in expected]
    assert [abs(loss - 0.25) < 1e-5 for loss in found] == [True, False, True, False] and ends == {True, False}


def test_brain_weighs_by_the_policy_that_sampled_and_is_held_to_the_base(tmp_path, watched):
    """alpha ~ p*(y) / q'(y) and b ~ pi(y) / q'(y) with p* = base exp(R / beta), q' the policy as the round began."""
    expected: list[Tensor] = []
    sampler: dict[str, Tensor] = {}
    apart: list[float] = []

    def look(source, step, dataset, pairs):
        own, base = sums_of(source, dataset.sequences, source.slot, None)
        if step in (0, 2):
            sampler["now"] = own
        written, reward, losses = sampler["now"], combined(dataset), []
        for group in np.unique(dataset.groups[dataset.pairs[pairs, 0]]):
            rows = np.flatnonzero(dataset.groups == group)
            alpha = (base[rows] + reward[rows] / 0.4 - written[rows]).softmax(0)
            losses.append(-len(rows) * alpha * (own[rows] - written[rows]).log_softmax(0))
            apart.append(float((alpha - (reward[rows] / 0.4).softmax(0)).abs().max()))
        expected.append(torch.cat(losses).mean())

    watched(look)
    found = losses_of(by_line(tmp_path, "brain", "loss.beta=0.4"))
    assert found == [pytest.approx(float(loss), **CLOSE) for loss in expected]
    assert max(apart[:4]) < 1e-5 and min(apart[4:]) > 1e-3  # two prompts in each of two steps of a round


def test_rejection_sampling_learns_the_best_of_each_round(tmp_path, watched):
    expected: list[float] = []

    def look(source, step, dataset, pairs):
        (own,), reward = tokens_of(source, dataset.sequences, source.slot), combined(dataset)
        best = []
        for group in np.unique(dataset.groups[dataset.pairs[pairs, 0]]):
            rows = np.flatnonzero(dataset.groups == group)
            best.append(own[rows[int(reward[rows].argmax())]])
        expected.append(float(torch.stack([-each.mean() for each in best]).mean()))

    watched(look)
    found = losses_of(by_line(tmp_path, "rejection-sampling"))
    assert found == [pytest.approx(loss, **CLOSE) for loss in expected]


# --- who says the reference's response --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "temperature", "asked"),
    [
        ("previous-iterate", 1.0, []),
        ("previous-iterate", 0.8, [None, "first", "other"]),
        ("base", 1.0, [None, None]),
        ({"name": "moving-average", "every": 1, "decay": 0.5}, 1.0, ["first", "other"]),
        ({"name": "snapshot", "every": 3}, 1.0, [None]),
    ],
    ids=str,
)
def test_what_is_known_is_not_sampled_again(reference, temperature, asked, tmp_path, monkeypatch, watched):
    """Two candidates in two rounds. What stays is asked once in a round for both, what moves for each, and the policy
    that sampled the round has spoken already, unless at another temperature."""
    seen, told = [], {}

    def counted(model, adapter, *others):
        seen.append(adapter)
        return responses(model, adapter, *others)

    def look(source, step, dataset, pairs):
        rows = dataset.views["reference"]
        said = [dataset.sequences[row] for row in rows]
        assert [each.prompt for each in said] == [dataset.sequences[row].prompt for row in dataset.pairs[:, 0]]
        told[step // 2, source.slot] = dict(zip(dataset.groups[rows].tolist(), said, strict=True))

    monkeypatch.setattr(round_views, "responses", counted)
    watched(look)
    overrides = (f"reference={json.dumps(reference)}", f"rollouts.temperature={temperature}")
    workshop = opened(by_line(tmp_path, "selm", "loss.alpha=0.5", *overrides))
    plugin = job_of(HALF, workshop, ()).reference
    trained(workshop, plugin, plugin)
    names = {f"reference-{TRAINED}": "first", f"reference-{TRAINED}1": "other"}
    assert [names.get(adapter, adapter) for adapter in seen] == asked
    first, other = (told[0, slot] for slot in (TRAINED, f"{TRAINED}1"))
    assert first and first == other
    assert all(len(said.response) <= 12 for said in first.values())


def test_a_reference_speaks_with_its_adapter(tmp_path):
    """A copy of an adapter says what the adapter says, and not what the base does."""
    workshop = opened(by_line(tmp_path, "selm"))
    model, prompts = workshop.model, workshop.material.prompts[:8]
    lora.add_slots(model.policy, ["own", "copy"])
    generator = torch.Generator().manual_seed(0)
    for parameter in lora.parameters(model.policy, "own"):
        parameter.data = torch.randn(parameter.shape, generator=generator) / 8
    frozen.duplicate(model.policy, "own", "copy")
    own, copied, base = (responses(model, slot, prompts, 12, 0, "a round") for slot in ("own", "copy", None))
    assert own == copied != base
    assert list(own) == list(dict.fromkeys(prompts)) and all(said.sequence.prompt == ids for ids, said in own.items())


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["selm", "srpo", "brain", "rejection-sampling", "xpo"])
def test_an_interrupted_run_goes_on_as_the_unbroken_one(name, tmp_path):
    """Of XPO the base is the reference, whose responses the candidates of a run share."""
    line = ("loss={name: xpo, alpha: 0.1}", "reference=null")
    settings = settings_of(tmp_path, *line) if name == "xpo" else by_line(tmp_path, name)
    run.start(settings, tmp_path / "whole", registry.discover(), Observer())
    with pytest.raises(KeyboardInterrupt):
        run.start(settings, tmp_path / "run", registry.discover(), StopAfterCandidates(1))
    run.resume(tmp_path / "run", registry.discover(), Observer())
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    for candidate in ("w-0.00-1.00", "w-1.00-0.00"):
        lines = (tmp_path / f"run/candidates/{candidate}/metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        assert len(steps) == 4 and all(step["gradient_norm"] > 0 and "skipped" not in step for step in steps)
        moves = [1, 1, 2, 2] if name in ("selm", "srpo") else [None] * 4
        assert [step.get("reference/moves") for step in steps] == moves


def test_other_losses_that_read_further_sequences_learn_in_rounds(tmp_path):
    for loss in ("{name: vpo, optimistic: true, alpha: 1.0}", "{name: spo, levels: 2}"):
        workshop = opened(settings_of(tmp_path, f"loss={loss}"))
        ((_, told),) = trained(workshop, job_of(HALF, workshop, ()).reference)
        assert all(np.isfinite(told.losses)) and len(told.losses) == 4
        assert told.of("pairs/without_views") == [0] * 4 == told.of("pairs/cut_views")


# --- what does not go together ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("loss=selm", "reference=null", "rollouts.pairs=all", "condition=soup"),
            "condition: loss 'selm' reads further",
        ),
        (
            ("loss=srpo", "combine=modpo"),
            "combine: 'modpo' works on labelled pairs, but loss 'srpo' trains on pairs of",
        ),
        (("loss=brain",), r"rollouts\.pairs: of losses on labelled pairs, and loss 'brain' takes all"),
        (("loss=rejection-sampling", "rollouts.pairs=all"), "would be read by nobody: loss 'rejection-sampling'"),
        (("loss={name: brain, proposal: sampler}", "rollouts=null", "reference=null"), "it needs old_logps"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        prepare(settings_of(tmp_path, *overrides), registry.discover())


def test_a_round_without_a_pair_that_has_its_views_says_why(tmp_path):
    """Here none has room."""
    source = batch_source(HALF, opened(by_line(tmp_path, "srpo")))
    short = replace(source, views=replace(source.views, max_length=1))
    with pytest.raises(TrainingError, match=r"round 0: no pair has all further(.|\n)*longer than max_length 1"):
        short.at(0)


class Alone(Objective):
    """Asks for views and has no pairs."""

    needs = frozenset({"groups"})

    def views(self, chosen, rejected):
        return {"again": chosen}


def test_single_responses_have_no_further_sequences(tmp_path):
    plan = prepare(by_line(tmp_path, "brain"), registry.discover())
    object.__setattr__(plan, "objective", Alone())
    with pytest.raises(PluginError, match=r'learns from single responses, .* its `needs` must have "pairs" or "marg'):
        views.check(plan)
