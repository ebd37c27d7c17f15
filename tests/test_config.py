"""The configuration: what is refused, with which words, and what comes out."""

from __future__ import annotations

from typing import Any

import pytest

from moalign import config
from moalign.errors import ConfigError

MINIMAL: dict[str, Any] = {"objectives": {"helpful": None, "harmless": {}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trian": {}}, "trian: unknown key; did you mean 'train'?"),
        ({"train": {"lrr": 1}}, "train.lrr: unknown key; did you mean 'lr'?"),
        ({"model": {"lora": {"rank": 4}}}, "model.lora.rank: unknown key"),
        ({"objectives": {"a": {"directoin": "max"}}}, "objectives.a.directoin: unknown key; did you mean 'direction'?"),
        ({"objectives": {}}, "objectives: dictionary should have at least 1 item"),
        ({"objectives": {"a b": None}}, "objectives.a b: a name has letters"),
        ({"train": {"lr": 0}}, "train.lr: input should be greater than 0 (got 0)"),
        ({"train": {"lr": float("nan")}}, "train.lr: input should be"),
        ({"train": {"steps": "many"}}, "train.steps: input should be a valid integer"),
        ({"data": {"held_out": 1.5}}, "data.held_out: input should be less than 1"),
        ({"loss": {"beta": 0.3}}, "loss.name: this key is required"),
        ({"evaluate": {"kind": "guess"}}, "evaluate.kind: input should be 'auto', 'generate' or 'preference'"),
        ({"seed": -1}, "seed: input should be greater than or equal to 0"),
    ],
)
def test_bad_keys_are_named(change, message):
    with pytest.raises(ConfigError) as caught:
        config.from_mapping(MINIMAL | change)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("written", "taken"), [("1e3", 1000), ("2E2", 200), ("1.5e1", 15), ("15e-1", None), ("1e999", None), ("e", None)]
)
def test_a_whole_number_may_be_written_with_an_exponent(written, taken):
    """YAML reads it as text."""
    if taken is not None:
        assert config.from_mapping(MINIMAL | {"train": {"steps": written}}).train.steps == taken
        return
    with pytest.raises(ConfigError, match=r"train\.steps: input should be a valid integer"):
        config.from_mapping(MINIMAL, [f"train.steps={written}"])


def test_all_bad_keys_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        config.from_mapping(MINIMAL | {"trian": {}, "train": {"lr": -1}, "seed": "x"})
    assert all(key in str(caught.value) for key in ("trian", "train.lr", "seed"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("objectives:\n  a: [", ":2: expected the node content"),
        ("objectives: {a: }\nseed: 1\nseed: 2\n", ":3: the key 'seed' stands twice"),
        ("- a\n- b\n", "a configuration is a mapping of keys, this is list"),
        ("", "a configuration is a mapping of keys, this is NoneType"),
        ("data:\n  path: {{ pairs }}\n", ":2: a mapping or list is no key; a value that begins with a brace stands in"),
        ("? [a, b]\n: 1\n", ":1: a mapping or list is no key"),
        ("search: {budget:\n  {minutes: 1:30}}", ":2: 1:30 is read as a number in base 60; write the number itself"),
        ("a: 1:30.5\n", ":1: 1:30.5 is read as a number in base 60"),
        ("a: 2024-13-01\n", "month must be in 1..12; text stands in quotes"),
        ("preferences: {2024-05-01: {a: 1}}\n", "a key is a name, and anything else stands in quotes"),
        ("a: !!python/object/apply:os.system ['true']\n", ":1: could not determine a constructor"),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path, text, message):
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load(file)
    assert str(file) in str(caught.value)
    assert message in str(caught.value)


def test_a_missing_file_says_how_to_get_one(tmp_path):
    with pytest.raises(ConfigError, match="no such file; `moalign init"):
        config.load(tmp_path / "nothing.yaml")


def test_overrides():
    changed = config.from_mapping(
        MINIMAL | {"search": "grid"}, ["train.lr=1e-4", "loss.beta=0.3", "search.points=3", "model.lora.r=4"]
    )
    assert changed.train.lr == 1e-4
    assert changed.loss.name == "dpo" and changed.loss.options == {"beta": 0.3}
    assert changed.search.name == "grid" and changed.search.options == {"points": 3}
    assert changed.model.lora.r == 4


@pytest.mark.parametrize("override", ["train.lr", "=3", "seed.deep=1", "train.lr=[", "train.lrr=1"])
def test_bad_overrides_are_named(override):
    with pytest.raises(ConfigError):
        config.from_mapping(MINIMAL | {"seed": 3}, [override])


def test_equal_meaning_has_an_equal_digest(tmp_path):
    first = config.from_mapping({"objectives": {"a": None, "b": None}, "search": "grid"})
    second = config.from_mapping({"search": {"name": "grid"}, "objectives": {"b": {"direction": "max"}, "a": {}}})
    assert first.digest() == second.digest()
    assert first.digest() != config.from_mapping({"objectives": {"a": None, "b": None}, "seed": 1}).digest()


def test_it_is_frozen_and_survives_a_round_trip():
    settings = config.from_mapping(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        settings.seed = 3
    assert config.Config.model_validate(settings.model_dump(mode="json")) == settings


def test_file_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    settings = config.from_mapping(MINIMAL | {"data": {"path": "pairs.jsonl"}, "model": {"path": "model"}})
    assert settings.data.path == str(tmp_path / "pairs.jsonl")
    assert settings.model.path == str(tmp_path / "model")
    assert config.from_mapping(MINIMAL | {"model": {"path": "org/name"}}).model.path == "org/name"
