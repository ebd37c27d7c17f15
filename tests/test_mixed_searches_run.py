"""Searches that mix by shares of their own, run on the tiny model: interrupted, resumed, and found again on disk."""

from __future__ import annotations

from math import hypot
from pathlib import Path

import pytest
import torch
from interruptions import StopAfterCandidates, break_off_and_resume
from sweeps import contents, small_config, write_pairs

from moalign import registry, storage
from moalign.errors import ConfigError
from moalign.lora import mixing
from moalign.sweeps import journal, run
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.types import Outcome

SEARCHES = {
    "evolution": {"name": "evolution", "vary": "mixes", "strength": True, "population": 4, "generations": 2},
    "layer-averaging": {"name": "layer-averaging", "trained": 2, "blocks": 2, "base_shares": [0.3]},
}
TRAINED = ["w-0.00-1.00", "w-1.00-0.00"]


@pytest.fixture(scope="module", params=SEARCHES)
def unbroken(request, tmp_path_factory, tiny_model_path):
    """The configuration of a search, and its run."""
    folder = tmp_path_factory.mktemp(request.param)
    train, evaluate = (
        {"steps": 3, "pairs_per_step": 4, "lr": 1e-2, "together": 2},
        {"samples": 1, "max_new_tokens": 4},
    )
    pairs = write_pairs(folder / "pairs.jsonl", prompts=10)
    settings = small_config(tiny_model_path, pairs, search=SEARCHES[request.param], train=train, evaluate=evaluate)
    front = run.start(settings, folder / "run", registry.discover(), Observer())
    return settings, folder / "run", front


def test_an_interrupted_run_ends_as_an_unbroken_one(unbroken, tmp_path):
    """In the midst of a proposal of mixes, of which the rest is read from the journal: for evolution of the second
    generation, which is replayed from the first."""
    settings, whole, _ = unbroken
    candidates = 5 if settings.search.name == "evolution" else 4
    directory = tmp_path / "run"
    resumed = break_off_and_resume(settings, directory, StopAfterCandidates(candidates))
    assert contents(resumed) == contents(whole)


def test_only_the_parents_are_trained_and_all_the_others_are_mixed_from_them(unbroken):
    settings, _, front = unbroken
    assert front["failed"] == []
    trained = [point["id"] for point in front["points"] if point["kind"] == "trained"]
    mixed = [point for point in front["points"] if point["kind"] == "mixed"]
    assert sorted(trained) == TRAINED and all(point["tokens"] == 0 for point in mixed)
    if settings.search.name == "evolution":
        assert len(mixed) == 2 + 4
        assert all(0 < sum(point["parents"].values()) <= 1.2 for point in mixed)
    else:
        assert 2 * 3 <= len(mixed) <= 2 * (3 + 4)
        assert all(share == pytest.approx(0.7) for point in mixed for share in point["parents"].values())


def test_the_adapters_are_what_the_shares_say(unbroken):
    """Layer by layer, as dense matrices; two blocks of one layer each."""
    _, directory, front = unbroken
    proposed = [event for event in _journal(directory) if event["event"] == "proposed"]
    shares = {each["id"]: each["shares"] for event in proposed for each in event["candidates"] if each["mixed"]}
    assert len(shares) == sum(point["kind"] == "mixed" for point in front["points"]) > 0
    parents = {name: _deltas(directory / "candidates" / name) for name in TRAINED}
    lost = {point["id"]: point["details"].get("lost to rank", 0.0) for point in front["points"]}
    for name, parts in shares.items():
        errors, sizes = [], []
        for layer, delta in _deltas(directory / "candidates" / name).items():
            block = 1 if ".layers.1." in layer else 0
            expected = sum(_of_block(share, block) * parents[parent][layer] for parent, share in parts.items())
            errors.append(float((delta - expected).norm()))
            sizes.append(float(expected.norm()))
        assert hypot(*errors) / hypot(*sizes) == pytest.approx(lost[name], abs=1e-5)


def test_one_model_for_all_preferences_is_asked_by_evolution_but_not_mixed_by_shares(tiny_model_path, tmp_path):
    """Mixing by shares would only ask the same again and again, and is refused; weights are bred by asking."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", prompts=10)

    def plan(**search):
        return prepare(small_config(tiny_model_path, pairs, condition="soup", search=search), registry.discover())

    def answered(candidates):
        values = [each.preference.values for each in candidates]
        return [
            Outcome(each.id, "done", each.preference, {k: v**0.5 for k, v in value.items()}, kind=each.kind)
            for each, value in zip(candidates, values, strict=True)
        ]

    bred = plan(name="evolution", population=4, generations=2)
    first = bred.propose(())
    second = bred.propose(answered(first))
    assert len(second) == 4 and all(each.kind == "conditioned" and not each.changes for each in second)
    with pytest.raises(ConfigError, match=r"'layer-averaging' .* one model is trained and only asked"):
        plan(name="layer-averaging")


def _journal(directory: Path) -> list[dict]:
    return journal.read(directory / journal.FILE)


def _of_block(share, block: int) -> float:
    return share[block] if isinstance(share, list | tuple) else share


def _deltas(folder: Path) -> dict[str, torch.Tensor]:
    storage.verify(folder)
    adapter = mixing.read(folder)
    pairs = mixing.factors(adapter.tensors)
    return {layer: adapter.scaling * b.double() @ a.double() for layer, (a, b) in pairs.items()}
