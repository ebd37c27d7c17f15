"""Plugins that misbehave while one model is trained alone, conditioners and reward models: see ``isolation``."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import isolation
import pytest
import torch
from command_line import moalign
from isolation import HOOKS, IN_A_PROCESS_OF_ITS_OWN, STOPS, cases
from sweeps import write_pairs
from test_isolation_process import HOW, lines
from test_isolation_running import WHY, generators, here, names

from moalign import config, door, registry
from moalign.api import AdapterShape
from moalign.errors import MoalignError, PluginError
from moalign.sweeps import run
from moalign.sweeps.observe import Observer
from moalign.testing.judgements import judged

AT_THE_DOOR = (*WHY, "mutates inputs", "reseeds generators")
HOSTS = {
    "conditioner": "condition" in config.Config.model_fields,
    "reward-model": importlib.util.find_spec("moalign.reward_models") is not None,
}


def needs_host(kind: str) -> None:
    if not HOSTS[kind]:
        pytest.skip("host missing on this branch")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", prompts=12)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return isolation.install(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def installed(site):
    sys.path.insert(0, str(site))
    yield registry.discover()
    sys.path.remove(str(site))
    sys.modules.pop(isolation.NAME)


def asked(kind: str) -> tuple[Any, ...]:
    """What the plugin's method gets."""
    if kind == "conditioner":
        return torch.full((2, 2), 0.5), {"weight": torch.zeros(2, 4)}, AdapterShape(layers=1, rank=4, objectives=2)
    needs, objectives = frozenset({"final", "pairs"}), ("harmless", "helpful")
    batch = judged(prompts=2, tokens=3, objectives=objectives, needs=needs, missing=False, seed=0, dtype=None)
    assert batch.final is not None
    return (replace(batch, parameters={"head": batch.final.new_zeros(2, 4)}),)


def settings(kind: str, how: str, model: Any, pairs: Any, **changes: Any) -> dict[str, Any]:
    """A configuration of the training in which the plugin misbehaves."""
    content = isolation.content(model, pairs, **changes)
    if kind == "conditioner":
        return content | {"condition": {"name": "bad", "how": how}}
    kept = {key: content[key] for key in ("model", "objectives", "data", "train", *changes)}
    return kept | {"objectives": {"helpful": {}, "harmless": {}}, "reward_model": {"name": "bad", "how": how}}


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("how", AT_THE_DOOR)
def test_at_the_door_it_is_named_and_the_generators_are_put_back(kind, how, installed):
    plugin, healthy = (installed.build(kind, "bad", {"how": each}, "key") for each in (how, ""))
    before = generators()
    with pytest.raises(PluginError) as error:
        door.call(plugin, HOOKS[kind], *asked(kind))
    assert names(kind) in str(error.value) and WHY.get(how, "") in str(error.value)
    assert generators() == before
    assert bool(door.call(healthy, HOOKS[kind], *asked(kind)).isfinite().all())


@pytest.mark.parametrize(("kind", "how"), here(STOPS))
def test_the_training_ends_and_leaves_nothing_that_looks_whole(kind, how, installed, pairs, tiny_model_path, tmp_path):
    needs_host(kind)
    content, out = settings(kind, how, tiny_model_path, pairs), tmp_path / "out"
    with pytest.raises(MoalignError) as error:
        train(kind, content, out, installed)
    assert names(kind) in str(error.value) and WHY.get(how, "") in str(error.value)
    check_left(kind, out)


def check_left(kind: str, out: Path) -> None:
    """Of a conditioned sweep a front without points, which says that the model has failed; else nothing."""
    if kind == "reward-model":
        assert not out.exists() or not list(out.iterdir())
        return
    front = json.loads((out / "front.json").read_text())
    assert front["points"] == [] and front["failed"][0]["id"] == "model"


@pytest.mark.parametrize("kind", HOSTS)
def test_without_misbehaviour_it_is_trained(kind, installed, pairs, tiny_model_path, tmp_path):
    needs_host(kind)
    train(kind, settings(kind, "", tiny_model_path, pairs), tmp_path / "out", installed)
    assert any((tmp_path / "out" / name).exists() for name in ("front.json", "report.json"))


def train(kind: str, content: dict[str, Any], out: Any, installed: Any) -> None:
    if kind == "conditioner":
        run.start(config.from_mapping(content), out, installed, Observer())
        return
    from moalign.reward_models import config as configuration
    from moalign.reward_models import training

    training.train(configuration.from_mapping(content), out, installed, Observer())


@pytest.mark.parametrize(("kind", "how"), cases(STOPS, behaviours=IN_A_PROCESS_OF_ITS_OWN))
def test_what_takes_the_process_is_named(kind, how, site, pairs, tiny_model_path, tmp_path):
    needs_host(kind)
    content = settings(kind, how, tiny_model_path, pairs, plugin_deadline=1.5)
    (tmp_path / "once.yaml").write_text(json.dumps(content))
    command = ("sweep",) if kind == "conditioner" else ("reward-model", "train")
    done = moalign(*command, tmp_path / "once.yaml", "--out", tmp_path / "out", path=(site,))
    assert done.returncode != 0
    assert f"{kind} 'bad' of misbehaving 2.5, in {HOOKS[kind]}" in done.stderr and HOW[how] in done.stderr
    assert lines(done, "error")
    check_left(kind, tmp_path / "out")
