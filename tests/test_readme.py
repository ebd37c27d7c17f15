"""The README's commands and code blocks do what the README says."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from command_line import moalign
from distributions import register
from documents import ROOT, blocks_of, folders, shell
from guide import Reader
from sweeps import write_pairs

from moalign import config

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = blocks_of(ROOT / "README.md")


def blocks(language: str) -> list[str]:
    return [block.text for block in BLOCKS if block.language == language]


def test_the_two_commands_exist():
    assert blocks("bash")[0].split("\n")[:2] == ["make demo", "make test"]
    for command in blocks("bash")[0].splitlines():
        done = shell(f"{command} --dry-run", ROOT)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def first_run(tmp_path_factory) -> Path:
    """A folder in which the README's sweep commands have been typed one after the other."""
    folder = tmp_path_factory.mktemp("reader")
    write_pairs(folder / "pairs.jsonl", prompts=24)
    for command in blocks("bash")[1].splitlines():
        done = shell(command, folder)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return folder


def test_the_sweep_commands_leave_a_run(first_run):
    run = first_run / "runs" / "first"
    for name in ("run.json", "journal.jsonl", "front.json", "front.png", "report.html", "candidates", "cache"):
        assert (run / name).exists(), name


def test_the_python_block_works(first_run):
    (block,) = [text for text in blocks("python") if text.startswith("import moalign")]
    done = shell(f"{sys.executable} - <<'END'\n{block}\nprint(type(model).__name__)\nEND", first_run)
    assert done.returncode == 0, done.stderr
    assert "on the front" in done.stdout and "PeftModel" in done.stdout


def test_the_front_is_used(first_run):
    """Without the data, which nothing of this needs but what runs candidates on it."""
    select, evaluate, *others = blocks("bash")[2].splitlines()
    evaluated = shell(evaluate, first_run, COLUMNS="120")
    assert evaluated.returncode == 0 and "cosine of gradients on labelled pairs" in evaluated.stdout, evaluated.stderr
    (first_run / "pairs.jsonl").rename(first_run / "elsewhere.jsonl")
    done = [shell(command, first_run) for command in (select, *others)]
    assert [one.returncode for one in done] == [0] * 5, "\n".join(one.stderr for one in done)
    selected, generated, adapter, merged, bundle = (one.stdout for one in done)
    assert "with harmless at least 0.4" in selected and generated.strip()
    assert "PeftModel.from_pretrained: exported/adapter" in adapter and "AutoModelForCausalLM" in merged
    assert "vllm serve" in bundle and "--lora-modules w-1.00-0.00=exported/bundle/adapters/w-1.00-0.00" in bundle
    (first_run / "elsewhere.jsonl").rename(first_run / "pairs.jsonl")


def test_a_reward_model_is_learned(first_run):
    (first_run / "reward.yaml").write_text(next(text for text in blocks("yaml") if text.startswith("# reward.yaml")))
    for command in blocks("bash")[4].splitlines():
        done = shell(command, first_run)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "harmless" in done.stdout and (first_run / "runs" / "judge" / "member-1" / "model.safetensors").exists()
    changed = ["search.points=2", "train.steps=2", "evaluate.max_new_tokens=4"]
    for name in ("helpful", "harmless"):
        reward = f"{{name: sequence-classification, path: runs/judge/member-0, head: {name}}}"
        changed.append(f"'objectives.{name}.reward={reward}'")
    done = shell("moalign sweep sweep.yaml --out runs/judged --set " + " --set ".join(changed), first_run)
    assert done.returncode == 0, done.stderr
    front = json.loads((first_run / "runs" / "judged" / "front.json").read_text())
    assert front["evaluation"].startswith("mean reward")


def test_the_bundles_page_is_true(first_run, monkeypatch):
    """After the README's commands; with the bundle that the last of them wrote."""
    monkeypatch.chdir(first_run)
    if not (first_run / "exported" / "bundle").exists():
        assert shell(blocks("bash")[2].splitlines()[-1], first_run).returncode == 0
    Reader(first_run).follow(ROOT / "docs" / "bundle.md")


def test_the_preferences_are_valid():
    from moalign import registry
    from moalign.sweeps.plan import prepare

    content = yaml.safe_load(blocks("yaml")[0])
    plan = prepare(config.from_mapping(content | {"data": {"reader": "prompts"}}), registry.discover())
    assert set(plan.space.preferences) == {"careful", "thirds", "steered", "angled"}
    assert plan.space.preferences["angled"].values["harmless"] == pytest.approx(3**0.5 / 2)


def test_the_plugin_is_twenty_lines_and_works(tmp_path):
    """Installed as pip would leave it: the module, and a dist-info folder with the entry point."""
    (source,) = [text for text in blocks("python") if text.startswith("# moalign_hinge.py")]
    (project,) = blocks("toml")
    assert len([line for line in source.splitlines() if line.strip()]) <= 20
    (tmp_path / "moalign_hinge.py").write_text(source)
    name, module = re.search(r'entry-points\.moalign\]\n(\w+) = "(\w+)"', project).groups()
    info = tmp_path / "moalign_hinge-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moalign-hinge\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[moalign]\n{name} = {module}\n")
    shown = shell("moalign plugins show hinge", tmp_path, PYTHONPATH=str(tmp_path))
    assert shown.returncode == 0, shown.stderr
    assert "moalign-hinge 0.1.0" in shown.stdout
    write_pairs(tmp_path / "pairs.jsonl", prompts=12)
    shutil.copy(ROOT / "moalign" / "recipes" / "modpo.yaml", tmp_path / "sweep.yaml")
    fast = "--set train.steps=2 --set search.points=3 --set evaluate.max_new_tokens=4"
    command = f"moalign sweep sweep.yaml --set loss.name=hinge --set loss.beta=0.2 {fast}"
    done = shell(command, tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    used = json.loads((tmp_path / "runs" / "sweep" / "run.json").read_text())["plugins"][
        "objective moalign-hinge:hinge"
    ]
    assert (used["distribution"], used["version"]) == ("moalign-hinge", "0.1.0")
    assert used["sha256"] == hashlib.sha256((tmp_path / "moalign_hinge.py").read_bytes()).hexdigest()


def test_the_commands_for_authors_work(tmp_path):
    """As they stand, but for pip, which would ask the network: its part is done as an editable installation does it."""
    new, install, run_tests, doctor = blocks("bash")[3].splitlines()
    done = shell(new, tmp_path)
    assert done.returncode == 0, done.stderr
    assert install == "pip install --editable './moalign-hinge[test]'"
    package = tmp_path / "moalign-hinge"
    assert 'test = ["pytest"]' in (package / "pyproject.toml").read_text()
    register(package, "moalign-hinge", "moalign_hinge", "0.1.0")
    search = folders(package)
    if find_spec("moalign.testing"):
        done = shell(run_tests, tmp_path, PYTHONPATH=search)
        assert done.returncode == 0, done.stdout + done.stderr
    done = shell(doctor, tmp_path, PYTHONPATH=search)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "moalign-hinge 0.1.0: 1 plugin" in done.stdout and "nothing is broken" in done.stdout


def test_the_tree_names_what_is_there():
    tree = README[README.index("## Architecture") : README.index("A step flows")]
    parts = {file.name for file in (ROOT / "moalign").glob("*.py")} | {
        f"{file.parent.name}/" for file in (ROOT / "moalign").glob("*/__init__.py")
    }
    assert [part for part in sorted(parts - {"__init__.py", "__main__.py"}) if part not in tree] == []


def test_every_built_in_is_listed():
    from moalign import registry

    box = README[README.index("## What is in the box") : README.index("## Architecture")]
    missing = [entry.name for entry in registry.discover().entries if f"`{entry.name}`" not in box]
    assert missing == []


def test_the_python_name_is_the_function_and_stays_it():
    code = "import moalign; first = moalign.sweep; import moalign.sweeps.run; assert moalign.sweep is first"
    assert moalign("-c", code).returncode == 0
