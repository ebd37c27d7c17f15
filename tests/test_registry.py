"""The plugin door: isolation, duplicates, disabling, and no torch before it is needed."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib import metadata

import pytest

from moalign import registry
from moalign.api import Objective, hookimpl, pair_logits
from moalign.errors import ConfigError, PluginError, UnknownPluginError


class _Distribution:
    def __init__(self, name: str, version: str = "1.0"):
        self.name, self.version = name, version


class _Point:
    """An entry point of a distribution that need not be installed."""

    def __init__(self, name: str, distribution: str, load):
        self.name, self.value, self.dist, self._load = name, f"{distribution}:x", _Distribution(distribution), load

    def load(self):
        return self._load()


class Hinge(Objective):
    margin: float = 1.0

    def loss(self, batch, terms):
        return (self.margin - pair_logits(batch, terms, 1.0)).relu()


class _Module:
    @staticmethod
    @hookimpl
    def register_objectives(register):
        register("hinge", Hinge, summary="a hinge", paper="none")


def _built_in() -> list:
    return list(metadata.entry_points(group="moalign"))


def _discover(*points, **keywords) -> registry.Registry:
    return registry.discover(entry_points=[*_built_in(), *points], **keywords)


def test_built_ins_come_through_the_entry_points():
    installed = registry.discover()
    names = {(entry.kind, entry.name) for entry in installed.entries}
    assert {("objective", "dpo"), ("combiner", "modpo"), ("search", "grid"), ("reader", "qa-feedback")} <= names
    assert installed.broken == ()
    assert {entry.distribution for entry in installed.entries} == {"moalign"}


@pytest.mark.parametrize("entry", registry.discover().entries, ids=lambda entry: f"{entry.kind}-{entry.name}")
def test_every_built_in_loads_and_has_a_schema(entry):
    plugin = registry.discover().load(entry)
    assert issubclass(plugin, registry.KINDS[entry.kind])
    assert plugin.__doc__
    assert plugin.model_json_schema()["type"] == "object"


def test_a_strangers_plugin_is_found_and_built():
    installed = _discover(_Point("stranger", "moalign-stranger", lambda: _Module))
    hinge = installed.build("objective", "hinge", {"margin": 2.0}, "loss")
    assert isinstance(hinge, Hinge) and hinge.margin == 2.0


def _exit():
    raise SystemExit(3)


def _missing():
    importlib.import_module("a_module_that_is_not_there")


class _WrongHook:
    @staticmethod
    @hookimpl
    def register_objektives(register):
        pass


class _WrongSignature:
    @staticmethod
    @hookimpl
    def register_objectives(register, extra):
        pass


class _Raises:
    @staticmethod
    @hookimpl
    def register_objectives(register):
        register("half", Hinge, summary="registered before the error")
        raise RuntimeError("broken on purpose")


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (_exit, "SystemExit: 3"),
        (_missing, "a_module_that_is_not_there"),
        (lambda: _WrongHook, "register_objektives"),
        (lambda: _WrongSignature, "extra"),
        (lambda: _Raises, "broken on purpose"),
    ],
)
def test_a_broken_plugin_is_reported_and_stops_nobody(load, reason):
    installed = _discover(_Point("bad", "moalign-bad", load), _Point("good", "moalign-good", lambda: _Module))
    assert [failure.distribution for failure in installed.broken] == ["moalign-bad"]
    assert reason in installed.broken[0].reason
    assert installed.find("objective", "hinge").distribution == "moalign-good"
    assert installed.find("objective", "dpo").distribution == "moalign"
    with pytest.raises(UnknownPluginError, match=r"moalign-bad 1\.0 could not be loaded"):
        installed.find("objective", "half")


def test_a_name_claimed_twice_is_reported_with_both_distributions():
    installed = _discover(_Point("a", "first", lambda: _Module), _Point("b", "second", lambda: _Module))
    with pytest.raises(UnknownPluginError, match=r"first 1\.0 and second 1\.0.*'first:hinge' or 'second:hinge'"):
        installed.find("objective", "hinge")
    assert installed.find("objective", "second:hinge").distribution == "second"
    assert len(installed.duplicates()) == 1


def test_disabling(monkeypatch):
    point = _Point("stranger", "moalign-stranger", lambda: _Module)
    monkeypatch.setenv(registry.DISABLE_VARIABLE, "moalign-stranger, ipo")
    installed = _discover(point)
    with pytest.raises(UnknownPluginError, match="disabled: ipo, moalign-stranger"):
        installed.find("objective", "hinge")
    with pytest.raises(UnknownPluginError):
        installed.find("objective", "ipo")
    monkeypatch.delenv(registry.DISABLE_VARIABLE)
    assert _discover(point).find("objective", "hinge")
    with pytest.raises(UnknownPluginError):
        _discover(point, no_plugin=["hinge"]).find("objective", "hinge")


def test_loading_only_some_keeps_the_built_ins(monkeypatch):
    points = [_Point("a", "wanted", lambda: _Module), _Point("b", "unwanted", _exit)]
    monkeypatch.setenv(registry.LOAD_VARIABLE, "wanted")
    installed = _discover(*points)
    assert installed.broken == ()
    assert {entry.distribution for entry in installed.of_kind("objective")} == {"moalign", "wanted"}


def test_unknown_names_and_options_suggest_the_nearest():
    installed = registry.discover()
    with pytest.raises(UnknownPluginError, match=r"loss\.name: no objective is called 'dop'; did you mean 'dpo'\?"):
        installed.build("objective", "dop", {}, "loss")
    with pytest.raises(ConfigError, match=r"loss\.btea: unknown key; did you mean 'beta'\?"):
        installed.build("objective", "dpo", {"btea": 0.1}, "loss")
    with pytest.raises(ConfigError, match=r"loss\.beta: input should be greater than 0"):
        installed.build("objective", "dpo", {"beta": -1}, "loss")


def test_a_target_that_is_no_plugin_is_refused():
    class Odd:
        @staticmethod
        @hookimpl
        def register_objectives(register):
            register("odd", "collections:OrderedDict", summary="not an objective")
            register("gone", "moalign_plugins.objectives.nowhere:Gone", summary="no such module")

    installed = _discover(_Point("odd", "moalign-odd", lambda: Odd))
    with pytest.raises(
        PluginError, match=r"objective 'odd' of moalign-odd 1\.0.*is not a subclass of moalign\.api\.Objective"
    ):
        installed.build("objective", "odd", {}, "loss")
    with pytest.raises(PluginError, match="could not be imported"):
        installed.build("objective", "gone", {}, "loss")


@pytest.mark.parametrize(
    "arguments",
    [
        ["plugins", "list"],
        ["plugins", "list", "--all"],
        ["plugins", "show", "dpo"],
        ["plugins", "show", "qa-feedback", "--json"],
    ],
)
def test_listing_and_showing_import_no_torch(arguments):
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom moalign.cli import app\n"
        f"result = CliRunner().invoke(app, {arguments!r})\n"
        "assert result.exit_code == 0, result.output\nprint(result.output)\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules), 'heavy imports'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("beta" if "dpo" in arguments else "qa-feedback") in done.stdout


def test_a_mistyped_exclusion_is_refused():
    with pytest.raises(UnknownPluginError, match=r"--no-plugin dpoo: .*did you mean 'dpo'\?"):
        registry.discover(["dpoo"])
