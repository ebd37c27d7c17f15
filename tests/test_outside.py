"""Responses from a sampler plugin: a run with moalign's own sampling behind it is the same run, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from interruptions import StopAfterSteps
from sweeps import contents, small_config

from moalign import lora, registry
from moalign.api import Sampler, SamplerInfo, Sampling, SamplingSession
from moalign.config import Config, LoraSettings, ModelSettings
from moalign.engine import model as models
from moalign.engine import rollouts
from moalign.engine.outside import Outside, responses
from moalign.errors import ConfigError, PluginError, UnknownPluginError
from moalign.registry import Entry, Registry
from moalign.sweeps import run
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare

SLOTS = ["candidate", "candidate1", "candidate2"]


class Own(Sampler):
    """moalign's own sampling in a model of its own, with adapters read from the folders."""

    deterministic: ClassVar[bool] = True

    def start(self, info: SamplerInfo) -> SamplingSession:
        return Session(info)


class Session(SamplingSession):
    made: ClassVar[list[Session]] = []

    def __init__(self, info: SamplerInfo) -> None:
        self.info, self.asked, self.closed = info, list[tuple[int, int, Sampling]](), 0
        settings = ModelSettings(dtype="float32", lora=LoraSettings(r=info.rank, alpha=8))
        self.model = models.load(info.model, settings, torch.device("cpu"))
        lora.add_slots(self.model.policy, SLOTS)
        self.made.append(self)

    def sample(self, adapters, prompts, how):
        self.asked.append((len(adapters), len(prompts), how))
        slots = SLOTS[: len(adapters)]
        for slot, folder in zip(slots, adapters, strict=True):
            lora.read(self.model.policy, slot, folder, self.model.fingerprint)
        greedy = how.temperature == 0
        found = rollouts.sample(
            self.model,
            slots,
            prompts,
            samples=how.samples,
            temperature=how.temperature or 1.0,
            max_new_tokens=how.max_new_tokens,
            seed=how.seed,
            top_p=how.top_p,
            greedy=greedy,
        )
        return [
            [
                [each.ids for each in mine if each.prompt == number and each.greedy == greedy]
                for number in range(len(prompts))
            ]
            for mine in found
        ]

    def close(self) -> None:
        self.closed += 1


INSTALLED = registry.discover()
INSTALLED = Registry((*INSTALLED.entries, Entry("sampler", "own", Own, "own", "", "here", "1.0")))


def settings_of(model: Path, folder: Path, **rollouts_changes: Any) -> Config:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q{'x' * (number % 3)}{number}: "}) + "\n" for number in range(12)))
    online = {"rounds": 2, "samples": 3, "prompts": 4, "prompts_per_step": 3, "max_new_tokens": 5}
    return small_config(
        model,
        file,
        objectives={"helpful": {"reward": "length"}, "harmless": {"reward": "length", "direction": "min"}},
        train={"steps": 4, "lr": 2e-3, "together": 3},
        rollouts=online | rollouts_changes,
        loss={"name": "remax", "beta": 0.1},
    )


def test_a_sampler_is_told_of_the_largest_rank_that_an_adapter_may_have(tiny_model_path):
    """Not of that of whoever is trained first."""
    model = models.load(str(tiny_model_path), ModelSettings(lora=LoraSettings(r=4, alpha=8)), torch.device("cpu"))
    lora.initialise(model.policy, models.TRAINED, seed=0, r=2, alpha=4.0)
    plugin = Own()
    session = Outside(plugin, str(tiny_model_path))._started(model)
    assert isinstance(session, Session) and session.info.rank == 4


@pytest.fixture
def plain(tiny_model_path, tmp_path) -> Path:
    run.start(settings_of(tiny_model_path, tmp_path), tmp_path / "plain", INSTALLED, Observer())
    return tmp_path / "plain"


def test_whoever_samples_what_is_trained_is_the_same(plain, tiny_model_path, tmp_path):
    Session.made.clear()
    settings = settings_of(tiny_model_path, tmp_path, sampler="own")
    run.start(settings, tmp_path / "run", INSTALLED, Observer())
    assert contents(tmp_path / "run") == contents(plain)
    (session,) = Session.made
    assert session.info == SamplerInfo(str(tiny_model_path), "float32", session.model.head.weight.shape[0], 4)
    assert session.closed == 1
    # the base's round serves all three; then all of them in one call, and their greedy responses in another
    assert [(adapters, prompts, how.samples, how.temperature) for adapters, prompts, how in session.asked] == [
        (1, 4, 3, 1.0),
        (1, 4, 1, 0.0),
        (3, 4, 3, 1.0),
        (3, 4, 1, 0.0),
    ]


def test_interrupted_and_resumed_equals_unbroken(plain, tiny_model_path, tmp_path):
    """With a sampler that says the same again."""
    Session.made.clear()
    settings = settings_of(tiny_model_path, tmp_path, sampler="own")
    with pytest.raises(KeyboardInterrupt):
        run.start(settings, tmp_path / "run", INSTALLED, StopAfterSteps(8))
    run.resume(tmp_path / "run", INSTALLED, Observer())
    assert contents(tmp_path / "run") == contents(plain)
    assert [session.closed for session in Session.made] == [1, 1]


def test_a_sampler_that_is_not_there_is_refused(tiny_model_path, tmp_path):
    with pytest.raises(UnknownPluginError, match=r"rollouts\.sampler\.name: no sampler is called 'vlm'"):
        prepare(settings_of(tiny_model_path, tmp_path, sampler="vlm"), INSTALLED)
    with pytest.raises(ConfigError, match=r"rollouts\.sampler\.speed"):
        prepare(settings_of(tiny_model_path, tmp_path, sampler={"name": "own", "speed": 3}), INSTALLED)


HOW = Sampling(samples=2, temperature=1.0, top_p=1.0, max_new_tokens=3, stop_token_ids=(2, 9), seed=0)
GOOD = [[5, 9], [5, 6, 7]]


def test_what_was_asked_for_is_taken():
    found = ([GOOD, ([2], iter([4, 4, 2]))] for _ in range(1))
    assert responses(found, (1, 2, 2), HOW, 10) == [[[(5, 9), (5, 6, 7)], [(2,), (4, 4, 2)]]]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "returned NoneType where a sequence of 1 adapters was asked for"),
        ([], "returned 0 adapters where 1 were asked for"),
        ([[GOOD, GOOD]], "returned 2 prompts, each with its responses, where 1 were asked for"),
        ([[GOOD[:1]]], "returned 1 responses to a prompt where 2 were asked for"),
        ([["ab"]], "returned str where a sequence of 2 responses"),
        ([[[GOOD[0], "yes"]]], "a response is a sequence of token ids, not str"),
        ([[[GOOD[0], 5]]], "a response is a sequence of token ids, not int"),
        ([[[GOOD[0], [5.0, 9]]]], r"a token id is a plain int, not float \(5.0\)"),
        ([[[GOOD[0], [True, 9]]]], "a token id is a plain int, not bool"),
        ([[[GOOD[0], torch.tensor([5, 9])]]], "a token id is a plain int, not Tensor"),
        ([[[GOOD[0], [5, 10, 9]]]], "the token id 10 is not in the vocabulary of 10"),
        ([[[GOOD[0], [-1, 9]]]], "the token id -1 is not in the vocabulary"),
        ([[[GOOD[0], []]]], "a response has no token"),
        ([[[GOOD[0], [5, 6, 7, 9]]]], "a response has 4 tokens, and at most 3"),
        ([[[GOOD[0], [5, 9, 7]]]], "goes on after a stop token"),
        ([[[GOOD[0], [5, 6]]]], "shorter than 3 and does not end with a stop token"),
    ],
)
def test_what_was_not_asked_for_is_refused(found, words):
    with pytest.raises(PluginError, match=words):
        responses(found, (1, 1, 2), HOW, 10)
