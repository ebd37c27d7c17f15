"""Plugins that misbehave when they are loaded, and whether the table in ``isolation`` is whole."""

from __future__ import annotations

import importlib
import sys

import isolation
import pytest
import test_isolation_running
from distributions import install
from isolation import LOADING, ORDER, REPORTED, TABLE

from moalign import registry
from moalign.errors import PluginError, UnknownPluginError

METHODS = {
    "objective": "loss(self, batch)",
    "combiner": "pair_terms(self)",
    "reward": "score(self, samples, *, device)",
    "transform": "apply(self, rewards, state)",
    "search": "propose(self, space, history)",
    "reader": "read(self, rows)",
    "observer": "on_run_start(self)",
    "sampler": "start(self)",
    "decoder": "scores(self, request)",
    "conditioner": "gates(self, preference, parameters)",
    "reward-model": "loss(self, batch, terms)",
    "reference": "moves(self, at)",
    "filter": "keep_responses(self, about)",
}
PLUGIN = """
from moalign.api import {base}
{first}

class Odd({base}):
    def {method}:
        pass
    def model_post_init(self, context):
        {last}
"""
ENTRY_POINT = """
from moalign.api import hookimpl
{first}

@hookimpl
def {hook}(register):
    register("odd", "{module}_inner:Odd", summary="odd")
"""
WRONG = {
    "import error": ("import moalign.nothing", "ModuleNotFoundError: No module named 'moalign.nothing'"),
    "exits at import": ("raise SystemExit(3)", "SystemExit: 3"),
    "missing dependency": ("import a_module_that_is_not_there", "No module named 'a_module_that_is_not_there'"),
}
RIGHT = {  # what moalign calls
    "objective": "loss(self, batch, terms)",
    "combiner": "pair_terms(self, batch)",
    "reward": "score(self, samples)",
    "transform": "apply(self, rewards, about, state)",
    "search": "propose(self, space, history, rng)",
    "reader": "read(self, rows, objectives)",
    "observer": "on_run_start(self, run)",
    "sampler": "start(self, info)",
    "decoder": "scores(self, request, at)",
    "conditioner": "gates(self, preference, parameters, shape)",
    "reward-model": "loss(self, batch)",
    "reference": "moves(self, at, state)",
    "filter": "keep_responses(self, about, generator)",
}
# "dies" and "hangs at import" take the process: see test_isolation_process
HERE = [(kind, how) for how in LOADING for kind in ORDER if "at import" not in how or how == "exits at import"]


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if name.partition("_")[0] in ("odd", "even"):
            del sys.modules[name]
    importlib.invalidate_caches()


def write(folder, name, kind, *, outer="", inner="", last="pass", method=None):
    """A distribution whose entry point registers one plugin by the name of its module."""
    base = registry.KINDS[kind].__name__
    install(folder, name, ENTRY_POINT.format(first=outer, hook=registry.HOOKS[kind], module=name), "0.4")
    text = PLUGIN.format(base=base, first=inner, last=last, method=method or RIGHT[kind])
    (folder / f"{name}_inner.py").write_text(text)
    importlib.invalidate_caches()


@pytest.mark.parametrize(("kind", "how"), [case for case in HERE if case[1] in WRONG])
def test_an_import_that_fails_is_reported_and_the_others_load(kind, how, site):
    statement, reason = WRONG[how]
    write(site, "odd", kind, outer=statement)
    write(site, "odd_inside", kind, inner=statement)
    write(site, "even", kind)
    installed = registry.discover()
    (broken,) = installed.broken
    assert (broken.distribution, broken.version) == ("odd", "0.4") and reason in broken.reason and broken.cure
    with pytest.raises(PluginError, match=rf"{kind} 'odd' of odd_inside 0\.4 could not be imported from .*: ") as error:
        installed.build(kind, "odd_inside:odd", {}, "key")
    assert reason in str(error.value)
    with pytest.raises(UnknownPluginError, match=r"odd 0\.4 could not be loaded: .*") as error:
        installed.build(kind, "another", {}, "key")
    assert reason in str(error.value)
    assert installed.build(kind, "even:odd", {}, "key")


@pytest.mark.parametrize("kind", ORDER)
def test_a_name_that_two_claim_is_reported_with_both(kind, site):
    write(site, "odd", kind)
    write(site, "even", kind)
    installed = registry.discover()
    with pytest.raises(
        UnknownPluginError, match=rf"{kind} 'odd' is claimed by even 0\.4 and odd 0\.4; write 'even:odd'"
    ):
        installed.build(kind, "odd", {}, "key")
    assert installed.build(kind, "even:odd", {}, "key") and installed.build(kind, "odd:odd", {}, "key")


@pytest.mark.parametrize("kind", ORDER)
def test_a_wrong_signature_is_reported_with_the_right_one(kind, site):
    write(site, "odd", kind, method=METHODS[kind])
    with pytest.raises(PluginError) as error:
        registry.discover().build(kind, "odd", {}, "key")
    wrong, right = METHODS[kind], RIGHT[kind]
    assert f"{kind} 'odd' of odd 0.4: `{wrong}` has the wrong arguments; write `def {right}`" == str(error.value)


@pytest.mark.parametrize("kind", ORDER)
def test_a_wrong_hook_is_reported_with_the_right_one(kind, site):
    hook = registry.HOOKS[kind]
    source = f"from moalign.api import hookimpl\n@hookimpl\ndef {hook}(register, options):\n    pass\n"
    install(site, "odd", source, "0.4")
    (broken,) = registry.discover().broken
    assert f"`{hook}(register, options)` has the wrong arguments; the hook is `{hook}(register)`" in broken.reason


@pytest.mark.parametrize("kind", ORDER)
@pytest.mark.parametrize("error", ["RuntimeError('no reason')", "SystemExit('no reason')"])
def test_a_constructor_that_raises_is_reported(kind, error, site):
    write(site, "odd", kind, last=f"raise {error}")
    with pytest.raises(PluginError, match=rf"{kind} 'odd' of odd 0\.4 could not be built: .*: no reason"):
        registry.discover().build(kind, "odd", {}, "key")


def test_what_a_module_prints_does_not_get_among_the_output(site, capsys):
    write(site, "odd", "reward", outer="print('a greeting')")
    registry.discover()
    assert capsys.readouterr() == ("", "a greeting\n")


def test_the_table_is_whole():
    """Every cell has a test, or a reason why it cannot occur."""
    assert tuple(registry.KINDS) == ORDER and all(len(row) == len(ORDER) for row in TABLE.values())
    cells = {(kind, how): isolation.expected(kind, how) for how in TABLE for kind in ORDER}
    outcomes = (
        isolation.FAILS,
        isolation.ENDS,
        isolation.REFUSED,
        isolation.WITHOUT,
        isolation.HARMLESS,
        isolation.TOLD,
        isolation.STOPS,
    )
    tested = set(test_isolation_running.here(*outcomes)) | set(HERE)
    processes = (*isolation.IN_A_PROCESS_OF_ITS_OWN, "dies at import", "hangs at import")
    tested |= {(kind, how) for how in processes for kind in ORDER}
    impossible = {cell for cell, outcome in cells.items() if outcome.startswith("cannot occur: ")}
    assert not tested & impossible and tested | impossible == cells.keys()
    assert {cells[cell] for cell in HERE} == {REPORTED}
