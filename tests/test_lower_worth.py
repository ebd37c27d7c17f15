"""Hidden states are kept where that is cheaper than computing them again, by a rule that a resumed run repeats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interruptions import StopAfterSteps
from sweeps import contents, small_config, write_pairs

from moalign import registry, storage
from moalign.data.tokenise import Sequence
from moalign.engine import lower_worth, shards
from moalign.engine.lower_cache import LowerCache
from moalign.engine.lower_worth import worth
from moalign.sweeps import journal, run
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import Workshop, open_workshop

FREE = 2**40


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


def settings_for(model_path: Path, pairs: Path, layers: str = "upper-half", **train: Any) -> Any:
    """Three candidates, one after the other."""
    return small_config(
        model_path,
        pairs,
        model={"path": str(model_path), "lora": {"r": 4, "alpha": 8, "layers": layers}},
        train={"steps": 6, "pairs_per_step": 8, "lr": 1e-2, "together": 1} | train,
    )


@pytest.fixture(scope="module")
def workshop(tiny_model_path, pairs) -> Workshop:
    plan = prepare(settings_for(tiny_model_path, pairs), registry.discover())
    return open_workshop(plan, Path(), Observer(), keep_cache=False)


@pytest.fixture
def wide(workshop, monkeypatch) -> Workshop:
    """As if the layers below had so many weights that nothing is cheaper than leaving them out."""
    monkeypatch.setattr(lower_worth, "OPERATIONS_PER_SECOND", {False: 1e6, True: 1e6})
    return workshop


def test_rows_that_come_once_are_not_kept(wide):
    model, dataset = wide.model, wide.material.train
    assert dataset is not None
    number = len(dataset.pairs)
    assert "computing them again 0 s" in (worth(model, dataset, number, 1, FREE).against or "")
    assert "computing them again 0 s" in (worth(model, dataset, 3, 1, FREE).against or "")
    assert worth(model, dataset, 2 * number, 1, FREE).against is None
    assert worth(model, dataset, number, 2, FREE).against is None


def test_layers_that_are_cheaper_than_reading_are_computed_again(workshop, monkeypatch):
    dataset = workshop.material.train
    monkeypatch.setattr(lower_worth, "OPERATIONS_PER_SECOND", {False: 1e15, True: 1e15})
    assert "keeping them takes" in (worth(workshop.model, dataset, 10**6, 5, FREE).against or "")


def test_no_more_than_a_share_of_the_free_disk(wide):
    dataset = wide.material.train
    limit = worth(wide.model, dataset, 10**4, 1, FREE).limit
    free = int(limit / lower_worth.DISK_SHARE)
    assert worth(wide.model, dataset, 10**4, 1, free + 4) == worth(wide.model, dataset, 10**4, 1, FREE)
    assert "of the free disk" in (worth(wide.model, dataset, 10**4, 1, free - 4).against or "")


def test_a_model_that_cannot_skip_says_so(wide):
    model = replace(wide.model, unskipped="its layers look back")
    assert worth(model, wide.material.train, 10**4, 5, FREE).against == "its layers look back"


def test_views_take_room_and_time_as_other_rows_do(wide, monkeypatch):
    """A view behind its pair's prompt lies in the pair's row, and one behind another prompt in a row of its own."""
    dataset = wide.material.train
    count, plain = len(dataset.pairs), worth(wide.model, dataset, 10**4, 5, FREE)
    numbers = np.arange(len(dataset.sequences), len(dataset.sequences) + count)
    width = wide.model.head.weight.shape[1] * wide.model.dtype.itemsize
    own = [dataset.sequences[row].prompt for row in dataset.pairs[:, 0]]
    against = {}
    for name, prompts in (("own", own), ("other", [(9, *prompt) for prompt in own])):
        views = tuple(Sequence((*prompt, 5, 6, 7), len(prompt)) for prompt in prompts)
        seen = replace(dataset, sequences=(*dataset.sequences, *views), views={"more": numbers})
        found = worth(wide.model, seen, 10**4, 5, FREE)
        assert found.limit - plain.limit == pytest.approx(
            2 * (sum(len(view.ids) for view in views) * width + count * shards.ENTRY_BYTES), abs=2
        )
        with monkeypatch.context() as slow:
            slow.setattr(lower_worth, "READ", 1e30)
            slow.setattr(lower_worth, "WRITE", 1e30)
            slow.setattr(lower_worth, "ROW_SECONDS", 1e6)  # rows are all that keeping costs
            against[name] = worth(wide.model, seen, 2 * count, 1, FREE).against
            alone = worth(wide.model, dataset, 2 * count, 1, FREE).against
    row, twice = f"keeping them takes some {count * 1e6:.2g} s", f"keeping them takes some {2 * count * 1e6:.2g} s"
    assert row in alone and row in against["own"] and twice in against["other"]


def lower_events(directory: Path) -> list[dict[str, Any]]:
    return [event for event in journal.read(directory / journal.FILE) if event["event"] == "lower layers"]


class Watch(Observer):
    def __init__(self) -> None:
        self.phases: list[str] = []

    def on_phase(self, what):
        self.phases.append(what)


@pytest.fixture
def expensive(monkeypatch) -> None:
    monkeypatch.setattr(lower_worth, "OPERATIONS_PER_SECOND", {False: 1e6, True: 1e6})


@pytest.mark.usefixtures("expensive")
@pytest.mark.parametrize("lost", [False, True])
def test_interrupted_and_resumed_equals_unbroken_byte_for_byte(tiny_model_path, pairs, tmp_path, monkeypatch, lost):
    settings = settings_for(tiny_model_path, pairs)
    watch = Watch()
    run.start(settings, tmp_path / "unbroken", registry.discover(), watch)
    assert any(phase.startswith("keeping the hidden states below the adapters: up to") for phase in watch.phases)
    assert list((tmp_path / "unbroken" / "cache" / "lower").rglob("*.safetensors"))
    with pytest.raises(KeyboardInterrupt):
        run.start(settings, tmp_path / "run", registry.discover(), StopAfterSteps(9))  # in the second candidate
    for file in (tmp_path / "run" / "cache" / "lower").rglob("*.safetensors") if lost else ():
        file.unlink()
    monkeypatch.setattr(lower_worth, "DISK_SHARE", 0.0)  # as if the disk had filled up since
    computed = []
    add = LowerCache.add

    def noting(self, key, value):
        computed.extend([key] if self.directory else [])  # the probe at load has none
        add(self, key, value)

    monkeypatch.setattr(LowerCache, "add", noting)
    run.resume(tmp_path / "run", registry.discover(), Observer())
    assert contents(tmp_path / "run") == contents(tmp_path / "unbroken")
    assert len(lower_events(tmp_path / "run")) == 1
    assert bool(computed) == lost


@pytest.mark.usefixtures("expensive")
def test_the_same_scores_as_without(tiny_model_path, pairs, tmp_path, monkeypatch):
    settings = settings_for(tiny_model_path, pairs)
    run.start(settings, tmp_path / "with", registry.discover(), Observer())
    monkeypatch.setattr(lower_worth, "DISK_SHARE", 0.0)
    watch = Watch()
    run.start(settings, tmp_path / "without", registry.discover(), watch)
    assert any("adapters: not: they may take" in phase for phase in watch.phases)
    assert lower_events(tmp_path / "without") == [{"event": "lower layers", "limit": 0}]
    assert not (tmp_path / "without" / "cache" / "lower").exists()
    folders = [sorted((tmp_path / name / "candidates").iterdir()) for name in ("with", "without")]
    for mine, other in zip(*folders, strict=True):
        tensors = [storage.read_tensors(folder / "adapter_model.safetensors") for folder in (mine, other)]
        for name in tensors[0]:
            torch.testing.assert_close(tensors[0][name], tensors[1][name], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("expensive")
def test_adapters_in_all_layers_ask_for_nothing(tiny_model_path, pairs, tmp_path):
    run.start(
        settings_for(tiny_model_path, pairs, layers="all", steps=1), tmp_path / "run", registry.discover(), Watch()
    )
    assert lower_events(tmp_path / "run") == []
