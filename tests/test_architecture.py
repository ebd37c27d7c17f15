"""Imports go strictly downward, nothing loads code from data, files stay small: read from the sources themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moalign"
PLUGINS = ROOT / "plugins"

# From the ground up. A part imports parts of lower floors and itself, never a part of its own floor or above.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "types", "batch", "seeds"),
    ("pareto", "disk"),
    ("api", "calls", "validation"),
    ("door", "supervisor"),
    ("hooks", "preference", "storage", "ops"),
    ("registry", "config", "data", "lora", "recipes"),
    ("engine",),
    ("decode",),
    ("sweeps",),
    ("reward_models",),
    ("diagnostics", "report", "demo", "progress", "testing"),
    ("commands", "python"),
    ("cli", "__init__"),
    ("__main__",),
)
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}

MOST_LINES = 400
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "managers", "misc"}
MODULES_THAT_UNPICKLE = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS_THAT_RUN_DATA = {"eval", "exec", "torch.load", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle"}
UNSAFE_KEYWORDS = {("trust_remote_code", True), ("allow_pickle", True), ("weights_only", False)}


def python_files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def nodes_at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under ``if TYPE_CHECKING:``, inside functions as well."""
    yield tree
    children: list[ast.AST] = list(ast.iter_child_nodes(tree))
    if isinstance(tree, ast.If) and ast.unparse(tree.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        children = list(tree.orelse)
    for child in children:
        yield from nodes_at_run_time(child)


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that is imported at run time.

    ``from a import b`` is ``a.b``; the name of a relative import begins with a dot.
    """
    for node in nodes_at_run_time(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def part_of(dotted: str) -> str:
    """The part of moalign that a dotted name belongs to: moalign.data.split.split -> data."""
    name = dotted.partition(".")[2].partition(".")[0]
    return name if name in FLOOR_OF else "__init__"


def upward_imports(part: str, source: str) -> list[str]:
    """What in ``source``, a module of ``part``, is imported from the same floor or above."""
    faults = []
    for line, name in imports(source):
        if name.startswith("."):
            faults.append(f"line {line}: relative import of {name}; write the full name")
        elif name.startswith("moalign_plugins"):
            faults.append(f"line {line}: {name}; plugins come in through the registry")
        elif name.partition(".")[0] == "moalign":
            target = part_of(name)
            if target != part and FLOOR_OF[target] >= FLOOR_OF[part]:
                faults.append(f"line {line}: {name} stands on floor {FLOOR_OF[target]}, {part} on {FLOOR_OF[part]}")
    return faults


def inner_imports(source: str, allowed: tuple[str, ...]) -> list[str]:
    """What a plugin's source imports of moalign beyond ``allowed``."""
    inner = [(line, name) for line, name in imports(source) if name.partition(".")[0] == "moalign"]
    permitted = tuple(f"{name}." for name in allowed)
    return [f"line {line}: {name}" for line, name in inner if not f"{name}.".startswith(permitted)]


def unsafe_loads(source: str) -> list[str]:
    """Calls and imports that can run code found in data."""
    faults = [
        f"line {line}: {name}"
        for line, name in imports(source)
        if name.partition(".")[0] in MODULES_THAT_UNPICKLE or name in CALLS_THAT_RUN_DATA
    ]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in CALLS_THAT_RUN_DATA:
                faults.append(f"line {node.lineno}: {ast.unparse(node.func)}")
            for keyword in node.keywords:
                if isinstance(keyword.value, ast.Constant) and (keyword.arg, keyword.value.value) in UNSAFE_KEYWORDS:
                    faults.append(f"line {node.lineno}: {keyword.arg}={keyword.value.value!r}")
    return faults


def report(faults: dict[Path, list[str]]) -> str:
    return "\n".join(f"{file.relative_to(ROOT)}: {fault}" for file, found in faults.items() for fault in found)


# --- the checks themselves can fail ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "source", "faults"),
    [
        ("sweeps", "from moalign.engine import train\nimport moalign.errors", 0),
        ("sweeps", "from moalign.sweeps.plan import Plan", 0),
        ("data", "from moalign.engine import train", 1),
        ("data", "import moalign.engine.train as train", 1),
        ("data", "from moalign import engine", 1),
        ("data", "from moalign import sweep_anything", 1),
        ("data", "import moalign", 1),
        ("data", "from moalign.config import Config", 1),
        ("data", "def late():\n    from moalign.cli import main", 1),
        ("data", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from moalign.cli import main", 0),
        ("data", "if TYPE_CHECKING:\n    pass\nelse:\n    from moalign.cli import main", 1),
        ("data", "from . import split", 1),
        ("sweeps", "import moalign_plugins.objectives.dpo", 1),
    ],
)
def test_upward_imports_are_seen(part, source, faults):
    assert len(upward_imports(part, source)) == faults


@pytest.mark.parametrize(
    ("source", "faults"),
    [
        ("from moalign.api import Batch\nimport torch", 0),
        ("from moalign import api", 0),
        ("from moalign.batch import Batch", 1),
        ("from moalign.api_secrets import Batch", 1),
        ("def late():\n    import moalign.config", 1),
    ],
)
def test_inner_imports_of_plugins_are_seen(source, faults):
    assert len(inner_imports(source, ("moalign.api",))) == faults


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "from torch import load",
        "torch.load(path)",
        "eval(text)",
        "exec(text)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "numpy.load(path, allow_pickle=True)",
        "read(path, weights_only=False)",
    ],
)
def test_unsafe_loads_are_seen(source):
    assert unsafe_loads(source)


@pytest.mark.parametrize(
    "source", ["model.eval()", "numpy.load(path)", "safetensors.torch.load(data)", "evaluate(model)"]
)
def test_safe_loads_are_let_through(source):
    assert not unsafe_loads(source)


# --- the sources ----------------------------------------------------------------------------------------------------


def test_every_part_has_a_floor():
    parts = {file.stem for file in PACKAGE.glob("*.py")} | {file.parent.name for file in PACKAGE.glob("*/*.py")}
    assert parts - FLOOR_OF.keys() == set(), "give each new part its floor in FLOORS"


def test_imports_go_strictly_downward():
    faults = {}
    for file in python_files("moalign"):
        part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        faults[file] = upward_imports(part, file.read_text(encoding="utf-8"))
    assert faults
    assert not any(faults.values()), report(faults)


def test_plugins_import_only_the_api():
    faults = {}
    for file in python_files("plugins"):
        allowed = ("moalign.api", "moalign.testing") if "tests" in file.parts else ("moalign.api",)
        faults[file] = inner_imports(file.read_text(encoding="utf-8"), allowed)
    assert faults
    assert not any(faults.values()), report(faults)


def test_nothing_loads_code_from_data():
    files = python_files("moalign", "plugins", "benchmarks")
    faults = {file: unsafe_loads(file.read_text(encoding="utf-8")) for file in files}
    assert not any(faults.values()), report(faults)


def test_no_file_is_too_long():
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines())
        for file in python_files("moalign", "plugins", "benchmarks", "tests")
    }
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_every_name_says_something():
    names = [file for folder in ("moalign", "plugins", "benchmarks", "tests") for file in (ROOT / folder).rglob("*")]
    assert [str(file.relative_to(ROOT)) for file in names if file.stem.lower() in VAGUE_NAMES] == []


def test_the_door_opens_without_torch():
    code = (
        "import sys, moalign.registry, moalign.config, moalign.cli;"
        "print(*sorted({'torch', 'transformers', 'peft', 'matplotlib'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
