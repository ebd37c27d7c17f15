"""``moalign plugins list``, ``show`` and ``doctor``, among plugins that are wrong in one way each."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import moalign
from distributions import GOOD, install

from moalign.api import Objective, Reader
from moalign.commands import plugin_examination
from moalign.commands.plugin_options import options

ONLY_STRANGERS: dict[str, Any] = {"MOALIGN_DISABLE_PLUGINS": "moalign"}
DEADLINE = 4

# What a plugin does, the finding, and what must stand in it. The first ones would kill the process that imports them.
LETHAL = {
    "bad-exit": ("import os; os._exit(7)", "broken", "importing 'bad_exit' and calling its hooks ended the process"),
    "bad-exit-zero": ("import os; os._exit(0)", "broken", "with exit code 0"),
    "bad-segfault": ("import ctypes\nctypes.string_at(0)", "broken", "died of SIGSEGV"),
    "bad-hang": ("import time\nwhile True: time.sleep(1)", "broken", f"did not finish within {DEADLINE} seconds"),
    "bad-late": (
        GOOD.replace("{module}:Good", "{module}_inner:Good"),
        "broken",
        "importing objective 'bad-late' from 'bad_late_inner:Good' ended the process with exit code 9",
    ),
}
HARMLESS = {
    "bad-system-exit": ("raise SystemExit(3)", "broken", "SystemExit: 3"),
    "bad-dependency": ("import not_there", "broken", "No module named 'not_there'"),
    "bad-base": ("class Odd(BaseException): pass\nraise Odd('odd')", "broken", "Odd: odd"),
    "bad-newer": ("moalign_api_version = 99", "broken", "written for version 99 of the plugin API"),
    "bad-api": ("from moalign.api import Oracle", "broken", "cannot import name 'Oracle'"),
    "bad-hook": (
        GOOD.replace("def register_objectives", "def register_objektives"),
        "broken",
        "did you mean `register_objectives(register)`?",
    ),
    "bad-signature": (
        GOOD.replace("def register_objectives(register)", "def register_objectives(register, config)"),
        "broken",
        "the hook is `register_objectives(register)`",
    ),
    "bad-middle": (
        GOOD.replace('    register("', '    raise ValueError("in the middle")\n    register("'),
        "broken",
        "its hook `register_objectives` raised ValueError: in the middle",
    ),
    "bad-target": (
        GOOD.replace("{module}:Good", "{module}_gone:Good"),
        "faulty",
        "objective 'bad-target' of bad-target 1.0 could not be imported from 'bad_target_gone:Good'",
    ),
    "bad-class": (GOOD.replace("{module}:Good", "collections:OrderedDict"), "faulty", "is not a subclass of"),
    "twin-a": (GOOD.replace('"{name}"', '"twin"'), "conflict", "also claimed by twin-b 1.0"),
    "twin-b": (GOOD.replace('"{name}"', '"twin"'), "conflict", "also claimed by twin-a 1.0"),
}


def _install(folder: Path, cases: dict[str, tuple[str, str, str]]) -> Path:
    for name, (source, _, _) in cases.items():
        install(folder, name, source)
    (folder / "bad_late_inner.py").write_text("import os; os._exit(9)")
    install(folder, "good", "print('a stranger prints on standard output')\n" + GOOD)
    return folder


@pytest.fixture(scope="module")
def strangers(tmp_path_factory) -> Path:
    return _install(tmp_path_factory.mktemp("harmless"), HARMLESS)


@pytest.fixture(scope="module")
def diagnosis(tmp_path_factory) -> dict:
    folder = _install(tmp_path_factory.mktemp("all"), LETHAL | HARMLESS)
    done = moalign("plugins", "doctor", "--json", "--deadline", DEADLINE, path=(folder,), **ONLY_STRANGERS)
    assert done.returncode == 1, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", [*LETHAL, *HARMLESS])
def test_doctor_survives_and_names(diagnosis, name):
    _, what, reason = (LETHAL | HARMLESS)[name]
    found = [finding for finding in diagnosis["findings"] if finding["distribution"] == name]
    (serious,) = [finding for finding in found if finding["what"] != "unchecked"]
    assert serious["what"] == what and reason in serious["reason"], serious
    assert serious["version"] == "1.0" and serious["cure"]


def test_doctor_says_where_a_process_died(diagnosis):
    for name in ("bad-segfault", "bad-hang"):
        (finding,) = [finding for finding in diagnosis["findings"] if finding["distribution"] == name]
        assert f"{name.replace('-', '_')}.py" in finding["reason"] or "ctypes" in finding["reason"]


def test_doctor_says_how_to_mend_it(diagnosis):
    cures = {finding["distribution"]: finding["cure"] for finding in diagnosis["findings"]}
    assert "install the missing module 'not_there'" in cures["bad-dependency"]
    assert "upgrade moalign" in cures["bad-newer"] and "upgrade moalign" in cures["bad-api"]
    assert "MOALIGN_DISABLE_PLUGINS=bad-exit " in cures["bad-exit"]
    assert "MOALIGN_DISABLE_PLUGINS=bad-class:bad-class " in cures["bad-class"]
    assert "write 'twin-a:twin'" in cures["twin-a"]


def test_doctor_counts_the_others(diagnosis):
    assert diagnosis["plugins"]["good 1.0"] == 1
    assert [f for f in diagnosis["findings"] if f["distribution"] == "good" and f["what"] != "unchecked"] == []
    assert [f["reason"] for f in diagnosis["findings"] if f["what"] == "disabled"] == [
        "MOALIGN_DISABLE_PLUGINS names it"
    ]


def test_a_hang_is_cut_at_the_deadline(tmp_path):
    install(tmp_path, "bad-hang", LETHAL["bad-hang"][0])
    begin = time.monotonic()
    done = moalign("plugins", "doctor", "--deadline", 1, path=(tmp_path,), **ONLY_STRANGERS)
    assert done.returncode == 1 and "did not finish within 1 seconds" in done.stdout and "1 to mend" in done.stdout
    assert time.monotonic() - begin < 30  # about two by design; the margin is for a busy machine


def test_doctor_is_content_with_what_is_right(tmp_path):
    install(tmp_path, "good", GOOD.replace("beta: float = 0.1", "beta: float"))  # not built, so not for the kit
    done = moalign("plugins", "doctor", path=(tmp_path,), **ONLY_STRANGERS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "good 1.0: 1 plugin, 0 passed" in done.stdout and "cannot be built without options (beta)" in done.stdout
    assert "nothing is broken" in done.stdout


# --- the conformance kit, by way of doctor --------------------------------------------------------------------------


class Plain(Objective):
    beta: float = 0.1


class Demanding(Objective):
    beta: float


class Exploding(Objective):
    def model_post_init(self, context) -> None:
        raise RuntimeError("in the constructor")


def _complain(plugin):
    raise AssertionError("the loss is reduced; return one value per pair")


def _leave(plugin):
    raise SystemExit(0)


@pytest.mark.parametrize(
    ("kind", "plugin", "check", "event", "reason"),
    [
        ("objective", Plain, lambda plugin: None, "passed", ""),
        ("objective", Plain, _complain, "faulty", "the loss is reduced; return one value per pair"),
        ("objective", Plain, _leave, "faulty", "0"),
        ("objective", Plain, None, "unchecked", "no such check"),
        ("objective", Demanding, _complain, "unchecked", "cannot be built without options (beta)"),
        ("objective", Exploding, _complain, "faulty", "RuntimeError: in the constructor"),
        ("reader", Reader, _complain, "unchecked", "rows of its own format"),
    ],
)
def test_what_doctor_makes_of_the_kit(kind, plugin, check, event, reason):
    found = plugin_examination._check(SimpleNamespace(**{f"check_{kind}": check}), kind, plugin)
    assert found["event"] == event and reason in found.get("reason", "")


def test_without_the_kit_nothing_is_checked():
    assert plugin_examination._check(None, "objective", Plain)["event"] == "unchecked"


# --- list -----------------------------------------------------------------------------------------------------------


def test_list_prints_one_line_per_plugin(strangers):
    done = moalign("plugins", "list", "--kind", "objective", path=(strangers,), COLUMNS="40")
    lines = [line for line in done.stdout.splitlines() if line.startswith("objective")]
    names = [line.split()[1] for line in lines]
    assert {"dpo", "good", "bad-class", "twin-a:twin", "twin-b:twin"} <= set(names) and "bad-hook" not in names
    (dpo,) = [line for line in lines if line.split()[1] == "dpo"]
    assert dpo.endswith("of a pair (arXiv:2305.18290)")
    assert "reader" not in "".join(line[:10] for line in done.stdout.splitlines())
    assert "8 broken" in done.stderr and "--all" in done.stderr


def test_list_all_says_why(strangers):
    done = moalign("plugins", "list", "--all", path=(strangers,), MOALIGN_DISABLE_PLUGINS="moalign,good")
    assert done.returncode == 0 and "not listed" not in done.stderr
    text = done.stdout
    for name, (_, what, reason) in HARMLESS.items():
        if what == "broken":
            assert any(name in line and "broken: " in line and reason in line for line in text.splitlines()), name
    assert "disabled: MOALIGN_DISABLE_PLUGINS names it" in text
    assert "conflict: 'twin' is also claimed by twin-b 1.0; write 'twin-a:twin'" in text


def test_list_as_json(strangers):
    done = moalign("plugins", "list", "--all", "--json", path=(strangers,), MOALIGN_DISABLE_PLUGINS="good:good")
    # what a module prints at import is its own doing, and stands before what the command prints
    rows = json.loads(done.stdout[done.stdout.index("[\n") :])
    assert {row["name"]: row["status"] for row in rows if row["name"] in ("dpo", "good", "bad-hook")} == {
        "dpo": "ok",
        "good": "disabled",
        "bad-hook": "broken",
    }


def test_an_unknown_kind_suggests_the_nearest():
    done = moalign("plugins", "list", "--kind", "objektive")
    assert done.returncode == 2 and "did you mean 'objective'?" in done.stderr


def test_an_installation_behind_another_is_shadowed(tmp_path):
    front, back = tmp_path / "front", tmp_path / "back"
    install(front, "good", GOOD, version="2.0")
    install(back, "Good", GOOD, version="1.0")
    done = moalign("plugins", "list", "--all", path=(front, back))
    (line,) = [line for line in done.stdout.splitlines() if "shadowed: " in line]
    assert "Good 1.0" in line and f"{back} is behind 2.0 in {front}" in line
    checked = moalign("plugins", "doctor", "--json", path=(front, back), **ONLY_STRANGERS)
    assert [f["version"] for f in json.loads(checked.stdout)["findings"] if f["what"] == "shadowed"] == ["1.0"]
    assert checked.returncode == 0


# --- show -----------------------------------------------------------------------------------------------------------


def test_show_says_everything(tmp_path):
    install(tmp_path, "good", GOOD)
    done = moalign("plugins", "show", "good", path=(tmp_path,))
    assert done.returncode == 0, done.stderr
    for part in ("good: objective of good 1.0", "a squared loss", "arXiv:0000.00000", str(tmp_path / "good.py")):
        assert part in done.stdout
    assert "needs:         pairs, reference" in done.stdout and "A squared loss." in done.stdout
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("beta")]
    assert row.split() == ["beta", "number", "0.1", "how", "strong"]
    content = json.loads(moalign("plugins", "show", "good:good", "--json", path=(tmp_path,)).stdout)
    silent = {"shiftable": True, "symmetric": False, "linear": True, "detaches": False}
    assert content[0]["declares"] == {"needs": ["pairs", "reference"]} | silent
    assert content[0]["schema"]["properties"]["beta"]["description"] == "how strong"


def test_show_names_every_option_of_the_built_ins():
    done = moalign("plugins", "show", "grid")
    keys = [line.split()[0] for line in done.stdout[done.stdout.index("key ") :].splitlines()[1:] if line[:1].strip()]
    assert {"points", "warm_start"} <= set(keys)


def test_show_explains_what_is_not_there(strangers):
    unknown = moalign("plugins", "show", "dop")
    assert unknown.returncode == 2 and "did you mean 'dpo'?" in unknown.stderr
    broken = moalign("plugins", "show", "bad-hook", path=(strangers,))
    assert broken.returncode == 2 and "bad-hook 1.0 could not be loaded" in broken.stderr
    disabled = moalign("plugins", "show", "dpo", MOALIGN_DISABLE_PLUGINS="dpo")
    assert disabled.returncode == 2 and "is disabled: MOALIGN_DISABLE_PLUGINS names it" in disabled.stderr


def test_options_in_words():
    schema = {
        "$defs": {"Inner": {"type": "object", "properties": {"deep": {"type": "boolean", "default": True}}}},
        "required": ["path"],
        "properties": {
            "path": {"type": "string"},
            "rate": {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}], "default": None},
            "mode": {"enum": ["a", "b"], "default": "a"},
            "names": {"type": "array", "items": {"type": "string"}, "minItems": 1},
            "map": {"type": "object", "additionalProperties": {"type": "integer"}, "default": {}},
            "inner": {"$ref": "#/$defs/Inner"},
        },
    }
    assert [(option.key, option.type, option.default) for option in options(schema)] == [
        ("path", "string", "(required)"),
        ("rate", "number > 0 or null", "null"),
        ("mode", '"a" or "b"', '"a"'),
        ("names", "list of string, at least 1 of them", ""),
        ("map", "mapping to integer", "{}"),
        ("inner", "mapping", ""),
        ("inner.deep", "boolean", "true"),
    ]
