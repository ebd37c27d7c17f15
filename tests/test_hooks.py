"""What is wrong with a plugin's hooks is said with the line as it should be."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from moalign import hooks
from moalign.api import API_VERSION, hookimpl
from moalign.errors import PluginError


def _plugin(**members):
    return SimpleNamespace(**members)


def register_objectives(register):
    pass


def _marked(name, function, **options):
    function.__name__ = name
    return _plugin(**{name: hookimpl(**options)(function)})


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (
            _marked("register_objektives", lambda register: None),
            "there is no hook `register_objektives`; did you mean `register_objectives(register)`?",
        ),
        (_marked("on_fire", lambda: None), "there is no hook `on_fire`"),
        (
            _marked("register_searches", lambda registry: None),
            "`register_searches(registry)` has the wrong arguments; the hook is `register_searches(register)`",
        ),
        (
            _marked("register_rewards", lambda register, extra: None),
            "`register_rewards(register, extra)` has the wrong arguments; the hook is `register_rewards(register)`",
        ),
        (_marked("register_readers", lambda: None), "`register_readers()` has the wrong arguments"),
        (_marked("register_readers", lambda register=None: None), "`register_readers(register=None)` has the wrong"),
        (
            _plugin(register_objectives=register_objectives),
            "`register_objectives` is never called: it lacks the marker; write @hookimpl above",
        ),
        (_plugin(), "it implements no hook; known: register_objectives(register)"),
        (
            _plugin(moalign_api_version=API_VERSION + 1),
            f"written for version {API_VERSION + 1} of the plugin API, and this moalign has version {API_VERSION}",
        ),
        (_plugin(moalign_api_version="1"), "moalign_api_version is '1'; write the number"),
        (_plugin(moalign_api_version=0), "moalign_api_version is 0"),
    ],
)
def test_a_mistake_is_named_with_the_right_line_beside_it(plugin, message):
    with pytest.raises(PluginError, match=re.escape(message)):
        hooks.check(plugin)


def test_all_mistakes_are_named_at_once():
    plugin = _plugin(
        on_fire=hookimpl(lambda: None), register_rewards=hookimpl(lambda x: None), moalign_api_version=API_VERSION
    )
    with pytest.raises(PluginError, match=r"(?s)on_fire.*; .*register_rewards\(x\)"):
        hooks.check(plugin)


def test_what_is_right_passes():
    hooks.check(_marked("register_objectives", lambda register: None))
    hooks.check(_marked("anything", lambda register: None, specname="register_objectives"))
    plugin = _marked("register_objectives", lambda register: None)
    plugin.on_next_century = hookimpl(optionalhook=True)(lambda century: None)
    hooks.check(plugin)


def test_every_kind_has_its_hook():
    from moalign import registry

    assert set(registry.HOOKS.values()) <= set(hooks.specifications())
    assert set(registry.HOOKS) == set(registry.KINDS)


def test_the_api_lists_every_hook():
    from moalign import api

    for name, arguments in hooks.specifications().items():
        assert f"``{name}({', '.join(arguments)})``" in " ".join(str(api.__doc__).split())
