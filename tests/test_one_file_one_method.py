"""A method is one file: deleting it removes the method and nothing else, and nothing in moalign knows it by name."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from sweeps import small_config, write_pairs

import moalign_plugins
from moalign import registry
from moalign.errors import PluginError

ROOT = Path(__file__).parents[1]
METHODS = ROOT / "plugins" / "moalign_plugins"

# The deleted file, the configuration that names its method, and the same with another one or, for observers, none.
DELETED = [
    ("objectives/ipo.py", "objective ipo", {"loss": "ipo"}, {"loss": "rpo"}),
    ("objectives/dpo.py", "objective dpo", {"loss": "dpo"}, {"loss": {"name": "ipo", "beta": 0.2}}),
    ("combiners/modpo.py", "combiner modpo", {"combine": "modpo"}, {"combine": "linear"}),
    (
        "transforms/clip.py",
        "transform clip",
        {"objectives": {"helpful": {"reward": "length", "transform": "clip"}}, "rollouts": {}, "loss": "rebel"},
        {"objectives": {"helpful": {"reward": "length", "transform": "par"}}, "rollouts": {}, "loss": "rebel"},
    ),
    (
        "rewards/regex.py",
        "reward regex",
        {"objectives": {"helpful": {"reward": {"name": "regex", "pattern": "a"}}}},
        {"objectives": {"helpful": {"reward": "length"}}},
    ),
    (
        "combiners/chebyshev.py",
        "combiner chebyshev",
        {"combine": "chebyshev", "loss": "rebel"},
        {"combine": "smooth-chebyshev", "loss": "rebel"},
    ),
    ("searches/random.py", "search random", {"search": "random"}, {"search": "grid"}),
    ("readers/qa_feedback.py", "reader qa-feedback", {"data": {"reader": "qa-feedback"}}, {}),
    ("readers/helpsteer.py", "reader helpsteer", {"data": {"reader": "helpsteer"}}, {"data": {"reader": "columns"}}),
    (
        "conditioners/soup.py",
        "conditioner soup",
        {"condition": "soup"},
        {"condition": "panacea"},
    ),
    (
        "references/snapshot.py",
        "reference snapshot",
        {"reference": "snapshot"},
        {"reference": {"name": "previous-iterate", "every": 5}},
    ),
    (
        "filters/best_worst.py",
        "filter best-worst",
        {"objectives": {"helpful": {"reward": "length"}}, "rollouts": {"filter": "best-worst"}, "loss": "rebel"},
        {"objectives": {"helpful": {"reward": "length"}}, "rollouts": {"filter": "best-random"}, "loss": "rebel"},
    ),
    ("observers/jsonl.py", "observer jsonl", {"observers": ["jsonl"]}, {"observers": []}),
]

# Strings in moalign's code that are the name of a method, and why. A name inside a longer string counts as well, unless
# it is an ordinary word.
ORDINARY_WORDS = {
    "best",
    "columns",
    "embedding",
    "features",
    "format",
    "grid",
    "http",
    "implicit",
    "jsonl",
    "length",
    "linear",
    "listed",
    "margin",
    "mixture",
    "preference",
    "prime",
    "prompts",
    "random",
    "regex",
    "scale",
}
TERMS = "a field of PairTerms"
SCORE_KINDS = "a kind of evaluation, scores of pairs against those of samples"
MARGINS = "where margins come from, a value of data.margins"
BANDS = "the surface that the best of several runs attains"
LEGITIMATE = {
    "config/sections.py": {
        "implicit": MARGINS,
        "best-worst": "which pairs of a round are trained on, a value of rollouts.pairs",
        "dpo": "what a configuration that is silent gets; without it, it has to say",
        "linear": "so is this; and a schedule of the learning rate",
        "preference": SCORE_KINDS,
        "tiny-assistant": "the model that comes with moalign",
    },
    "commands/plugin_show.py": {"linear": "what a class says of a loss"},
    "commands/select.py": {"preference": "a key of front.json, and the head of a column"},
    "cli.py": dict.fromkeys(("dpo", "modpo", "rebel"), "a recipe: a configuration, which says what it runs"),
    "demo/job.py": {"rebel": "the recipe that the demo runs"},
    "demo/reward.py": {"tiny-assistant": "the demo's own entry point, which registers it"},
    "demo/ceiling.py": {"tiny-assistant": "the folder of the model"},
    "data/labelling.py": {"best-worst": "a value of rollouts.pairs"},
    "data/batching.py": {"preference": "what is known of rows"},
    "door.py": {"random": "Python's module"},
    "demo/grammar.py": {"whiten": "what an assistant is asked about"},
    "engine/conditioning.py": {"preference": "a purpose of randomness"},
    "engine/frozen.py": {"preference": "what is known of rows"},
    "engine/losses.py": {"margin": TERMS, "scale": TERMS},
    "engine/metrics.py": {"margin": "the implicit reward of the better minus that of the worse response"},
    "engine/rollouts.py": {"prompts": "a purpose of randomness"},
    "engine/tokens.py": {"preference": "a field of Batch"},
    "engine/trainee.py": {"linear": "a schedule of the learning rate"},
    "lora/adapters.py": {"mixture": "an attribute of layers that carry several adapters"},
    "pareto/attainment.py": {"best": BANDS},
    "pareto/__init__.py": {"grid": "a grid of weights"},
    "report/analysis.py": {"preference": "a key of front.json"},
    "sweeps/analysis.py": {"preference": "a key of front.json"},
    "sweeps/comparison.py": {"preference": "a key of front.json"},
    "ops/triton_rows.py": {"product": "what a kernel calls a matrix product"},
    "preference.py": {"preference": "what a message calls it"},
    "report/attained.py": {"best": BANDS},
    "report/page.py": {"preference": "a key of front.json"},
    "report/picture.py": {"preference": "a key of front.json"},
    "report/table.py": {"preference": "a key of front.json"},
    "reward_models/config.py": {"bradley-terry": "what a configuration that is silent gets"},
    "reward_models/material.py": {"bradley-terry": "an example in a message"},
    "reward_models/reporting.py": {"format": "a key of report.json"},
    "reward_models/training.py": dict.fromkeys(("format", "scale"), "a key of reward_model.json"),
    "storage.py": {"format": "a key of a model file's header"},
    "sweeps/comparing.py": {"implicit": MARGINS},
    "sweeps/conditions.py": {"implicit": MARGINS},
    "sweeps/doubts.py": {"preference": "a key of front.json"},
    "sweeps/export.py": {"format": "a key of bundle.json", "preference": "a key of front.json and of moalign.json"},
    "sweeps/front.py": {"preference": "a key of front.json"},
    "sweeps/material.py": {"implicit": MARGINS, "preference": SCORE_KINDS},
    "sweeps/outcomes.py": {"preference": "a key of outcome.json"},
    "sweeps/checks.py": {"implicit": MARGINS},
    "sweeps/plan.py": {"preference": SCORE_KINDS},
    "sweeps/run.py": dict.fromkeys(("format", "prompts"), "a key of run.json"),
    "sweeps/workshop.py": {"implicit": MARGINS},
    "testing/batch.py": {"preference": "a field of Batch"},
    "testing/combiner.py": {"margin": TERMS, "scale": TERMS},
    "testing/combiner_trial.py": {"preference": "an argument's name", "margin": TERMS, "scale": TERMS},
    "testing/terms.py": {"margin": TERMS, "scale": TERMS},
    "testing/review.py": {"random": "Python's module"},
}

# Run in a copy of the sources: what is installed there, whether all of it loads, what becomes of two configurations.
PROBE = """
import json, sys
from pathlib import Path
import moalign, moalign_plugins
from moalign import config, registry
from moalign.errors import MoalignError
from moalign.sweeps import plan

def outcome(content):
    try:
        return "prepared: " + str(len(plan.prepare(config.from_mapping(content), installed).propose(())))
    except MoalignError as error:
        return f"{type(error).__name__}: {error}"

installed = registry.discover()
loaded = [f"{e.kind} {e.name}" for e in installed.entries if issubclass(installed.load(e), registry.KINDS[e.kind])]
broken = [failure.reason for failure in installed.broken]
where = [moalign.__file__, moalign_plugins.__file__]
outcomes = [outcome(json.loads(content)) for content in sys.argv[1:]]
print(json.dumps({"loaded": loaded, "broken": broken, "where": where, "outcomes": outcomes}))
"""


def execute(copy: Path, *arguments: str) -> str:
    search = os.pathsep.join([str(copy), str(copy / "plugins")])
    environment = os.environ | {"PYTHONPATH": search, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def copy(tmp_path) -> Path:
    """The sources, in a folder of their own."""
    without = shutil.ignore_patterns("__pycache__", "*.png")
    shutil.copytree(ROOT / "moalign", tmp_path / "moalign", ignore=without)
    shutil.copytree(METHODS, tmp_path / "plugins" / "moalign_plugins", ignore=without)
    return tmp_path


def shipped() -> set[str]:
    return {f"{entry.kind} {entry.name}" for entry in registry.discover().entries if entry.distribution == "moalign"}


@pytest.mark.parametrize(("file", "method", "naming", "instead"), DELETED, ids=[case[0] for case in DELETED])
def test_deleting_the_file_removes_the_method_and_nothing_else(copy, file, method, naming, instead):
    kind, name = method.split()
    (copy / "plugins" / "moalign_plugins" / file).unlink()
    (copy / "pairs.jsonl").write_text("{}\n")

    listed = json.loads(execute(copy, "-m", "moalign", "plugins", "list", "--json"))
    left = {f"{row['kind']} {row['name']}" for row in listed if row["distribution"] == "moalign"}
    assert method in shipped() and left == shipped() - {method}

    def sweep(choice: dict) -> str:
        content = {"model": {"path": "tiny-assistant"}, "objectives": {"helpful": None, "harmless": None}} | choice
        return json.dumps(content | {"data": {"path": "pairs.jsonl"} | choice.get("data", {})})

    found = json.loads(execute(copy, "-c", PROBE, sweep(naming), sweep(instead)))
    assert all(Path(place).is_relative_to(copy) for place in found["where"])
    assert found["broken"] == []
    assert set(found["loaded"]) >= left
    refused, prepared = found["outcomes"]
    assert f"no {kind} is called '{name}'" in refused
    assert prepared.startswith("prepared: ") and prepared != "prepared: 0"


def test_deleting_a_decoders_file_removes_it_and_nothing_else(copy):
    """No configuration names one, so it is asked for as Python does."""
    (copy / "plugins" / "moalign_plugins" / "decoders" / "guidance.py").unlink()
    probe = """
from moalign import decode, registry
from moalign.errors import UnknownPluginError
installed = registry.discover()
print(*(f"{e.kind} {e.name}" for e in installed.entries if e.distribution == "moalign" and installed.load(e)), sep=",")
print(type(decode.build("multi-objective")).__name__)
try:
    decode.build("guidance")
except UnknownPluginError as error:
    print(error)
"""
    loaded, other, refused = execute(copy, "-c", probe).splitlines()
    assert set(loaded.split(",")) == shipped() - {"decoder guidance"}
    assert other == "MultiObjective" and "no decoder is called 'guidance'" in refused


def test_deleting_a_reward_models_file_removes_it_and_nothing_else(copy):
    (copy / "plugins" / "moalign_plugins" / "reward_models" / "gaussian.py").unlink()
    probe = """
from moalign import registry
from moalign.errors import UnknownPluginError
installed = registry.discover()
print(*(f"{e.kind} {e.name}" for e in installed.entries if e.distribution == "moalign" and installed.load(e)), sep=",")
print(type(installed.build("reward-model", "gaussian-pairs", {}, "reward_model")).__name__)
try:
    installed.build("reward-model", "gaussian", {}, "reward_model")
except UnknownPluginError as error:
    print(error)
"""
    loaded, other, refused = execute(copy, "-c", probe).splitlines()
    assert set(loaded.split(",")) == shipped() - {"reward-model gaussian"}
    assert other == "GaussianPairs" and "no reward-model is called 'gaussian'" in refused


def test_a_sweep_runs_without_the_files_that_it_does_not_name(copy, tiny_model_path):
    """All that it does not need is gone, but for the readers, among which `auto` chooses, and what several share."""
    needed = {"dpo", "linear", "grid", "__init__"}
    for file in (copy / "plugins" / "moalign_plugins").glob("*/*.py"):
        if file.stem not in needed and file.parent.name != "readers" and not file.name.startswith("_"):
            file.unlink()
    settings = small_config(
        tiny_model_path,
        write_pairs(copy / "pairs.jsonl", prompts=10),
        search={"name": "grid", "points": 2},
        train={"steps": 2, "pairs_per_step": 4, "lr": 1e-2, "together": 2},
    )
    (copy / "sweep.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude_unset=True)))
    execute(copy, "-m", "moalign", "sweep", "sweep.yaml", "--out", "run")
    front = json.loads((copy / "run" / "front.json").read_text())
    assert len(front["points"]) == 2 and front["failed"] == []


# --- nothing in moalign knows a method by name ----------------------------------------------------------------------


def names_in(source: str, methods: set[str]) -> Iterator[tuple[int, str]]:
    """(line, name) of every string in the code, docstrings apart, that is or that contains the name of a method."""
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inside = re.compile(rf"(?<![\w-])({'|'.join(sorted(map(re.escape, methods - ORDINARY_WORDS)))})(?![\w-])")
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            found = {node.value} & methods | set(inside.findall(node.value))
            yield from ((node.lineno, name) for name in found)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("loss = 'dpo'", {"dpo"}),
        ("if name in ('ipo', 'other'): pass", {"ipo"}),
        ("raise ValueError(f'use {x}, or rebel instead')", {"rebel"}),
        ("def f(kind: Literal['linear']): pass", {"linear"}),
        ("message = 'a grid of columns'", set()),
        ("message = 'tdpo, dpo-like'", set()),
        ('def f():\n    """As dpo does."""', set()),
        ("dpo = ipo", set()),
    ],
)
def test_names_are_seen(source, found):
    assert {name for _, name in names_in(source, {"dpo", "ipo", "rebel", "linear", "grid", "columns"})} == found


def test_nothing_in_moalign_names_a_method():
    # what many keys say where moalign decides; and what the model is called that all adapters sit on
    methods = {method.split()[1] for method in shipped()} - {"auto", "base"}
    named = {
        (str(file.relative_to(ROOT / "moalign")), line, name)
        for file in (ROOT / "moalign").rglob("*.py")
        for line, name in names_in(file.read_text(encoding="utf-8"), methods)
    }
    unexplained = [each for each in sorted(named) if each[2] not in LEGITIMATE.get(each[0], {})]
    assert unexplained == [], "take a method's name out, or say in LEGITIMATE why it stands there"
    explained = {(file, name) for file, reasons in LEGITIMATE.items() for name in reasons}
    assert explained - {(file, name) for file, _, name in named} == set(), "these exceptions are no longer needed"


# --- what stands in a file ------------------------------------------------------------------------------------------


@pytest.fixture
def one_file(tmp_path, monkeypatch):
    """Registers what a file with some text would; moalign's own hooks, on a folder of the test's."""
    monkeypatch.setattr(moalign_plugins, "HERE", tmp_path)

    def registered(text: str, name: str = "new.py") -> list[tuple[tuple, dict]]:
        (tmp_path / "objectives").mkdir(exist_ok=True)
        (tmp_path / "objectives" / name).write_text(text)
        calls: list[tuple[tuple, dict]] = []
        register: Any = lambda *arguments, **keywords: calls.append((arguments, keywords))  # noqa: E731
        moalign_plugins.register_objectives(register)
        return calls

    return registered


def test_a_new_file_is_a_new_method_and_is_not_imported(one_file):
    text = 'raise SystemExit\nREGISTRATION = {\n    "name": "new",\n    "class": "New",\n    "summary": "s",\n}\n'
    expected = [((), {"name": "new", "summary": "s", "target": "moalign_plugins.objectives.new:New"})]
    assert one_file(text) == expected
    assert one_file("import torch", name="_shared.py") == expected


@pytest.mark.parametrize("text", ["", "REGISTRATION = None\n", "if 1:\n    REGISTRATION = {\n    }\n"])
def test_a_file_that_registers_nothing_is_an_error(one_file, text):
    with pytest.raises(PluginError, match=r"new\.py has no lines from 'REGISTRATION = \{'"):
        one_file(text)


def test_what_is_registered_is_never_run(one_file):
    with pytest.raises(ValueError, match="malformed"):
        one_file('REGISTRATION = {\n    "name": print("run"),\n}\n')
