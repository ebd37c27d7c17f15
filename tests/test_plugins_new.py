"""``moalign plugins new``: what it writes is installed, found, tested and does what its README says."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from command_line import moalign
from distributions import register

from moalign import registry
from moalign.api import Pair, Preference, Sample, Space
from moalign.commands import plugin_new

ROOT = Path(__file__).parents[1]
KINDS = list(registry.KINDS)
CONFIGURATION_KEYS = {
    "objective": ("loss",),
    "combiner": ("combine",),
    "reward": ("objectives", "varied", "reward"),
    "transform": ("objectives", "helpful", "transform", 0),
    "search": ("search",),
    "reader": ("data", "reader"),
    "observer": ("observers", 0),
    "sampler": ("rollouts", "sampler"),
    "conditioner": ("condition",),
    "reward-model": ("reward_model",),
    "reference": ("reference",),
    "filter": ("rollouts", "filter"),
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """A package of each kind, importable, as an editable installation leaves them."""
    folder = tmp_path_factory.mktemp("packages")
    for kind in KINDS:
        plugin_new.write(f"my-{kind}", kind, folder, registry.discover())
    return folder


def package(folder: Path, kind: str) -> Path:
    return folder / f"moalign-my-{kind}"


@pytest.fixture
def built(packages, monkeypatch, request):
    """The plugin of a kind as the registry builds it from the configuration in its README."""
    kind = request.param
    home = package(packages, kind)
    project = tomllib.loads((home / "pyproject.toml").read_text())
    ((_, module),) = project["project"]["entry-points"]["moalign"].items()
    if not list(home.glob("*.dist-info")):
        register(home, project["project"]["name"], module, project["project"]["version"])
    monkeypatch.syspath_prepend(str(home))
    options = named_in((home / "README.md").read_text(), kind)
    installed = registry.discover()
    assert installed.broken == ()
    assert installed.find(kind, options["name"]).full_name == f"moalign-my-{kind}:my-{kind}"
    return installed.build(kind, options.pop("name"), options, "key")


def named_in(readme: str, kind: str) -> dict[str, Any]:
    """Name and options, as a configuration has them or, for decoders, as Python does."""
    if kind == "decoder":
        call = re.search(r'\.decoder\("([\w-]+)", prefer=\{[^}]*\}, (\w+)=([\d.]+)\)', readme)
        assert call is not None, readme
        return {"name": call[1], call[2]: float(call[3])}
    options = yaml.safe_load(readme.split("```yaml\n")[1].split("```")[0])
    for key in CONFIGURATION_KEYS[kind]:
        options = options[key]
    return options


def of(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("built", [kind], indirect=True)


@of("objective")
def test_the_objective_is_a_hinge(built):
    import torch

    from moalign.api import Batch, PairTerms

    one = torch.ones(1, dtype=torch.float64)
    logps = torch.tensor([[3.0], [-1.0]], dtype=torch.float64, requires_grad=True)
    batch = Batch(
        logps=logps,
        mask=torch.ones(2, 1),
        ref_logps=torch.zeros(2, 1, dtype=torch.float64),
        pairs=torch.tensor([[0, 1]]),
        pair_objective=torch.tensor([0]),
        preference=torch.ones(2, 1),
        strength=one,
        groups=torch.zeros(2, dtype=torch.long),
    )
    (loss,) = built.loss(batch, PairTerms(scale=2 * one, margin=0.25 * one, weight=one))
    loss.backward()
    assert loss.item() == pytest.approx(1 - (2 * 0.1 * 4 - 0.25))
    assert logps.grad is not None and logps.grad.flatten().tolist() == pytest.approx([-0.2, 0.2])


@of("combiner")
def test_the_combiner_tempers_the_weights(built):
    import torch

    rewards = torch.tensor([[3.0, float("nan")], [7.0, 14.0]])
    weights = torch.tensor([[1.0, 0.0], [0.64, 0.36]])
    assert built.scalarise(rewards, weights).tolist() == pytest.approx([3.0, 10.0])
    assert built.scalarise(rewards.flip(1), weights).isnan().tolist() == [True, False]
    built.check(Preference("weights", {"a": 1.0}))


@of("reward")
def test_the_reward_is_the_share_of_distinct_runs(built):
    assert built.score([Sample("?", "a b a b"), Sample("?", "a b c"), Sample("?", "a"), Sample("?", "")]) == [
        pytest.approx(2 / 3),
        1.0,
        None,
        None,
    ]


@of("transform")
def test_the_transform_bounds_the_distance_from_the_mean(built):
    import math

    import torch

    from moalign.api import Responses

    about = Responses(0, torch.tensor([1, 0, 1]), torch.ones(3), torch.ones(3) > 0)
    shaped, _ = built.apply(torch.tensor([2.0, 9.0, 0.0], dtype=torch.float64), about, {})
    assert shaped.tolist() == pytest.approx([1 + math.tanh(1), 9, 1 - math.tanh(1)])


@of("sampler")
def test_the_sampler_says_what_the_model_says(built):
    """The demo's assistant, in full sentences that end."""
    from moalign.api import SamplerInfo, Sampling
    from moalign.config import BUILT_IN_DIRECTORY
    from moalign.data.tokenise import Tokeniser
    from moalign.demo import grammar
    from moalign.engine.model import load_tokenizer

    path = str(BUILT_IN_DIRECTORY / "tiny-assistant")
    tokeniser = Tokeniser.of(load_tokenizer(path))
    how = Sampling(3, 1.0, 1.0, 24, tokeniser.stop_ids, 0)
    prompt = grammar.TRAIN_PROMPTS[0]
    ((found,),) = built.start(SamplerInfo(path, "float32", 349, 4)).sample([None], [tokeniser.prompt(prompt)], how)
    said = [tokeniser.tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
    assert len(said) == 3 and set(said) & set(grammar.replies(prompt))


@of("search")
def test_the_search_covers_the_simplex(built):
    space = Space(("a", "b"))
    points = sorted(c.preference.values["a"] for c in built.propose(space, (), Random(0)))
    assert len(points) == 11 and points[0] == 0 and points[-1] == 1
    assert max(b - a for a, b in pairwise(points)) < 0.26  # 10 even gaps would be 0.1


@of("reader")
def test_the_reader_takes_the_best_answer(built):
    row = {"question": "Why?", "answers": ["Because.", "No idea."], "best": 1}
    record, refusal = built.read([("a.jsonl", 1, row), ("a.jsonl", 2, row | {"best": 2})], ["helpful"])
    assert record.pairs == {"helpful": (Pair(1, 0),)} and (record.file, record.line) == ("a.jsonl", 1)
    assert "best is not the index" in refusal.reason
    assert built.recognises(row) and not built.recognises({"question": "Why?"})


@of("decoder")
def test_the_decoder_mixes_probabilities(built):
    import torch

    from moalign.api import NextToken, Request

    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    at = NextToken(torch.zeros(3, 1), logits, torch.zeros(2, 3), lambda tokens: tokens)
    request = Request(shares={"a": 0.5, "b": 0.5})
    assert built.speakers(request) == ["a", "b"] and built.sharpen == 1.5
    assert torch.allclose(built.scores(request, at), 1.5 * logits.softmax(-1).mean(0).log(), atol=1e-5)


@of("conditioner")
def test_the_conditioner_has_gates_that_multiply(built):
    import torch

    from moalign.api import AdapterShape

    shape = AdapterShape(layers=3, rank=2, objectives=2)
    assert built.by == "gates" and built.lr_factor("weight") == 10
    weight = torch.arange(12.0).view(2, 3, 2) / 10
    found = built.gates(torch.tensor([[1.0, 0.0], [0.25, 0.75]]), {"weight": weight}, shape)
    assert torch.allclose(found, torch.stack([weight[0], 0.25 * weight[0] + 0.75 * weight[1]]).exp())
    assert built.gates(torch.rand(4, 2), built.parameters(shape, torch.Generator()), shape).eq(1).all()


@of("reward-model")
def test_the_reward_model_is_that_of_bradley_and_terry_with_a_margin(built):
    import torch

    from moalign.api import Batch

    final = torch.tensor([[0.0, 2.0], [1.0, 0.5], [5.0, 5.0]], dtype=torch.float64, requires_grad=True)
    batch = Batch(
        logps=torch.zeros(3, 1),
        mask=torch.ones(3, 1),
        pairs=torch.tensor([[1, 0], [0, 1]]),
        pair_objective=torch.tensor([0, 1]),
        preference=torch.full((3, 2), 0.5),
        strength=torch.ones(2),
        groups=torch.zeros(3, dtype=torch.long),
        final=final,
        parameters={"head": torch.eye(2, dtype=torch.float64)},
    )
    losses = built.loss(batch)
    expected = -torch.tensor([1.0 - 0.5, 1.5 - 0.5], dtype=torch.float64).sigmoid().log()
    assert losses.tolist() == pytest.approx(expected.tolist())
    losses.sum().backward()
    assert final.grad is not None and final.grad[2].tolist() == [0, 0] and float(final.grad[1, 0]) < 0
    assert built.scores(batch).equal(final) and built.head(batch.parameters) is batch.parameters["head"]


@of("reference")
def test_the_reference_walks_behind_the_policy(built):
    from moalign.api import Move, Progress

    assert built.moves(Progress(49), built.init()) == (None, {"moved_at": 0})
    assert built.moves(Progress(50), built.init()) == (Move(policy=0.5, reference=0.0), {"moved_at": 50})


@of("filter")
def test_the_filter_keeps_what_is_above_the_mean(built):
    import torch

    from moalign.testing.filter import Trial
    from moalign.testing.review import Review

    about = Trial(Review("filter", built), built, 1, 6, 0).case()
    kept = built.keep_responses(about, torch.Generator())
    assert built.margin == 0.1
    assert (kept.weights > 0).tolist() == (about.signal > about.signal.mean() + 0.1).tolist()


@pytest.mark.skipif(importlib.util.find_spec("moalign.testing") is None, reason="the conformance kit is not there")
def test_the_tests_of_the_packages_pass(packages):
    homes = [str(package(packages, kind)) for kind in KINDS]
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(packages)]
    program = f"import pytest, sys\nsys.exit(pytest.main({[*options, *homes]!r}))"
    done = moalign("-c", program, cwd=packages, path=tuple(map(Path, homes)))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["hinge", "a-name-of-thirty-characters-xy"])
def test_the_packages_are_clean(tmp_path, name):
    """By the rules in their own pyproject.toml; how long lines are broken depends on the name, and is seen for one."""
    for kind in KINDS:
        plugin_new.write(name, kind, tmp_path / kind, registry.discover())
    for command in (["check"], ["format", "--check"])[: 2 if name == "hinge" else 1]:
        arguments = [sys.executable, "-m", "ruff", *command, "--no-cache", str(tmp_path)]
        done = subprocess.run(arguments, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_an_example_is_at_most_twenty_lines_of_logic(packages):
    """From the class to the hook, without blank lines and documentation."""
    import ast

    for kind in KINDS:
        (file,) = package(packages, kind).glob("*.py")
        found = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)]
        for node in (inner for each in found for inner in ast.walk(each)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                documentation = [s for s in node.body if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)]
                node.body = [statement for statement in node.body if statement not in documentation] or [ast.Pass()]
        lines = [line for line in file.read_text().splitlines() if line.strip()]
        assert sum(len(ast.unparse(each).strip().split("\n")) for each in found) <= 22 and len(lines) < 60, kind


@pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="hatchling is not there")
def test_a_package_builds_as_a_wheel(packages, tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    source = str(package(packages, "objective"))
    done = subprocess.run([*command, "-w", str(tmp_path), source], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("moalign_my_objective-0.1.0-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    shown = moalign("plugins", "show", "my-objective", path=(tmp_path / "site",))
    assert shown.returncode == 0 and "objective of moalign-my-objective 0.1.0" in shown.stdout, shown.stderr


def test_from_the_command_line(tmp_path):
    done = moalign("plugins", "new", "warm-bath", "--kind", "search", "--to", tmp_path)
    assert done.returncode == 0, done.stderr
    home = tmp_path / "moalign-warm-bath"
    written = sorted(str(file.relative_to(home)) for file in home.rglob("*") if file.is_file())
    assert written == ["README.md", "moalign_warm_bath.py", "pyproject.toml", "tests/test_moalign_warm_bath.py"]
    assert "class WarmBathSearch(Search):" in (home / "moalign_warm_bath.py").read_text()
    before = (home / "README.md").read_bytes()
    again = moalign("plugins", "new", "warm-bath", "--kind", "reward", "--to", tmp_path)
    assert again.returncode == 2 and "exists; it is not overwritten" in " ".join(again.stderr.split())
    assert (home / "README.md").read_bytes() == before


@pytest.mark.parametrize("name", ["", "Hinge", "my_loss", "2fast", "-x", "x-", "a--b", "../up", "é", "a b", "x" * 31])
def test_a_bad_name_is_refused(tmp_path, name):
    with pytest.raises(plugin_new.ConfigError, match="cannot be a plugin's name"):
        plugin_new.write(name, "objective", tmp_path, registry.discover())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["MyLoss", "my_loss", "My Loss", "my--loss", "-my-loss"])
def test_a_good_name_is_suggested(tmp_path, name):
    with pytest.raises(plugin_new.ConfigError, match="'my-loss' would do"):
        plugin_new.write(name, "objective", tmp_path, registry.discover())


def test_a_name_with_the_prefix_or_one_that_is_taken_is_refused(tmp_path):
    with pytest.raises(plugin_new.ConfigError, match="leave it out"):
        plugin_new.write("moalign-hinge", "objective", tmp_path, registry.discover())
    with pytest.raises(plugin_new.UnknownPluginError, match=r"objective 'dpo' exists already, in moalign"):
        plugin_new.write("dpo", "objective", tmp_path, registry.discover())
    with pytest.raises(plugin_new.UnknownPluginError, match="already"):
        plugin_new.write("grid", "search", tmp_path, registry.discover())
    plugin_new.write("grid", "objective", tmp_path, registry.discover())


@pytest.mark.parametrize("name", ["none", "class", "objective", "batch", "pair-terms", "x"])
def test_names_that_mean_something_else_in_python_work(name):
    for kind in KINDS:
        files = plugin_new.render(name, kind)
        module = files[f"moalign_{name.replace('-', '_')}.py"]
        namespace: dict = {"__name__": "generated"}
        code = compile(module, "generated", "exec")
        exec(code, namespace)
        class_name = "".join(map(str.capitalize, f"{name}-{kind}".split("-")))
        assert registry.KINDS[kind] in namespace[class_name].__mro__


def test_an_unknown_kind_is_refused(tmp_path):
    done = moalign("plugins", "new", "x", "--kind", "objektive", "--to", tmp_path)
    assert done.returncode == 2 and "did you mean 'objective'?" in done.stderr
