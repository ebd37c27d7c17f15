"""The command line as a person uses it: what is typed, what is printed, the exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import moalign
from sweeps import write_pairs


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_model_path) -> Path:
    """A folder with a configuration, its data, and the run that came of it."""
    folder = tmp_path_factory.mktemp("workplace")
    write_pairs(folder / "pairs.jsonl")
    (folder / "sweep.yaml").write_text(
        f"""
model: {{path: {tiny_model_path}, lora: {{r: 2, alpha: 4}}}}
objectives: {{helpful: , harmless: }}
data: {{path: pairs.jsonl, held_out: 0.2}}
search: {{name: grid, points: 2}}
train: {{steps: 2, pairs_per_step: 4}}
evaluate: {{samples: 1, max_new_tokens: 4}}
"""
    )
    done = moalign("sweep", "sweep.yaml", "--out", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "front    run/front.json" in done.stdout and "picture  run/front.png" in done.stdout
    return folder


def test_help_names_every_command():
    done = moalign("--help")
    assert done.returncode == 0
    for command in (
        "demo",
        "init",
        "sweep",
        "resume",
        "front",
        "report",
        "select",
        "compare",
        "generate",
        "export",
        "plugins",
        "data",
    ):
        assert command in done.stdout


def test_a_mistyped_command_exits_with_2():
    done = moalign("swep")
    assert done.returncode == 2
    assert "No such command" in done.stderr


def test_front_as_table_and_as_json(workplace):
    table = moalign("front", "run", cwd=workplace)
    assert table.returncode == 0 and "w-1.00-0.00" in table.stdout and "Hypervolume" in table.stdout
    printed = moalign("front", "run", "--json", cwd=workplace)
    assert printed.stdout == (workplace / "run" / "front.json").read_text()


def test_report_is_made_anew_from_the_directory_alone(workplace):
    before = {name: (workplace / "run" / name).read_bytes() for name in ("front.png", "report.html", "front.json")}
    for name in before:
        (workplace / "run" / name).unlink()
    done = moalign("report", "run", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert {name: (workplace / "run" / name).read_bytes() for name in before} == before


def test_resuming_a_finished_run_changes_nothing(workplace):
    before = (workplace / "run" / "front.json").read_bytes()
    done = moalign("resume", "run", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert "already there: 2 candidates" in done.stdout
    assert (workplace / "run" / "front.json").read_bytes() == before


def test_a_second_start_is_refused(workplace):
    done = moalign("sweep", "sweep.yaml", "--out", "run", cwd=workplace)
    assert done.returncode == 2
    assert "already holds a run; `moalign resume run` goes on with it" in done.stderr


def test_dry_run_prints_the_plan_and_writes_nothing(workplace):
    before = sorted(workplace.iterdir())
    done = moalign("sweep", "sweep.yaml", "--dry-run", "--set", "search.points=5", cwd=workplace)
    assert done.returncode == 0, done.stderr
    for word in ("candidates", "helpful=0.25", "steps", "tokens", "memory", "time"):
        assert word in done.stdout
    assert sorted(workplace.iterdir()) == before


def test_init_writes_every_recipe_and_never_overwrites(tmp_path):
    for recipe in ("dpa", "dpo", "dynamic", "mo-grpo", "modpo", "rebel"):
        done = moalign("init", f"{recipe}.yaml", "--recipe", recipe, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        again = moalign("init", f"{recipe}.yaml", cwd=tmp_path)
        assert again.returncode == 2 and "exists" in again.stderr
    unknown = moalign("init", "x.yaml", "--recipe", "modp", cwd=tmp_path)
    assert unknown.returncode == 2 and "did you mean 'modpo'?" in unknown.stderr


def test_every_recipe_is_valid(tmp_path, monkeypatch):
    from moalign import config, recipes, registry
    from moalign.sweeps.plan import prepare

    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "pairs.jsonl")
    assert recipes.names() == ["conditioned", "dpa", "dpo", "dynamic", "iterated", "mo-grpo", "modpo", "rebel"]
    for name in recipes.names():
        (tmp_path / f"{name}.yaml").write_text(recipes.read(name))
        settings = config.load(tmp_path / f"{name}.yaml")
        if all(entry.name != settings.combine.name for entry in registry.discover().of_kind("combiner")):
            continue  # test_dynamic_recipe.py says so
        assert prepare(settings, registry.discover()).propose(())


def test_data_check_as_json(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl")
    done = moalign("data", "check", "pairs.jsonl", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["records"] == 40
    assert {entry["name"]: entry["pairs"] for entry in report["objectives"]} == {"harmless": 20, "helpful": 20}


# --- early refusal: in a moment, with the key, before a model is loaded ---------------------------------------------

BAD = {
    "an unknown key": (["--set", "train.lrr=1"], "train.lrr: unknown key; did you mean 'lr'?"),
    "a bad value": (["--set", "train.steps=-3"], "train.steps: input should be greater than or equal to 1 (got -3)"),
    "an unknown loss": (["--set", "loss=dop"], "loss.name: no objective is called 'dop'; did you mean 'dpo'?"),
    "an unknown option": (["--set", "loss.btea=1"], "loss.btea: unknown key; did you mean 'beta'?"),
    "an unknown search": (["--set", "search=gird"], "search.name: no search is called 'gird'; did you mean 'grid'?"),
    "an unknown combiner": (["--set", "combine=mopdo"], "combine.name: no combiner is called 'mopdo'"),
    "an unknown reader": (["--set", "data.reader=prefrence"], "data.reader.name: no reader is called 'prefrence'"),
    "an unknown reward": (
        ["--set", "objectives.helpful.reward=lenght"],
        "objectives.helpful.reward.name: no reward is called 'lenght'; did you mean 'length'?",
    ),
    "a missing data file": (["--set", "data.path=pair.jsonl"], "did you mean 'pairs.jsonl'?"),
    "a missing model": (["--set", "model.path=./nowhere"], "model.path: no such directory"),
    "a directory that is no model": (["--set", "model.path=."], "has no config.json"),
    "too few points": (["--set", "search.points=1"], "search.points: 1 cannot hold one candidate per objective"),
    "a disabled plugin": (["--no-plugin", "dpo"], "no objective is called 'dpo'"),
    "a negative weight": (
        ["--set", "preferences.bad={helpful: 1.5, harmless: -0.5}"],
        "preferences.bad: the weight of 'harmless' is negative",
    ),
    "a wrong sum": (
        ["--set", "preferences.bad={helpful: 0.5, harmless: 0.4}"],
        "preferences.bad: the weights add up to 0.9",
    ),
    "an unknown objective": (
        ["--set", "preferences.bad={helpfull: 1.0}"],
        "preferences.bad: there is no objective 'helpfull'; did you mean 'helpful'?",
    ),
    "a preset that is always there": (
        ["--set", "preferences.equal={helpful: 0.3, harmless: 0.7}"],
        "preferences.equal: that name is a preset that is always there; take another",
    ),
    "a name that nobody could ask for": (
        ["--set", "preferences={'a=b': {helpful: 0.3, harmless: 0.7}}"],
        "preferences.a=b: a name without white space and = < > , can be asked for; rename it",
    ),
    "yes for a number": (["--set", "train.steps=yes"], "train.steps: a number is wanted, not true or false"),
    "NaN": (["--set", "preferences.bad={helpful: .nan, harmless: 1.0}"], "preferences.bad.helpful"),
    "thresholds for a linear rule": (
        ["--set", "search=listed", "--set", "preferences.bad=harmless>=0.8"],
        "has no meaning for thresholds",
    ),
    "a direction on labelled pairs": (
        ["--set", "search=listed", "--set", "preferences.bad={direction: {helpful: 0.8, harmless: -0.6}}"],
        "bad: the component of harmless is negative",
    ),
    "a loss without a logit under modpo": (
        ["--set", "combine=modpo", "--set", "loss=sft"],
        "use another loss, or a rule",
    ),
    "a file in place of a folder": (["--out", "pairs.jsonl"], "pairs.jsonl is a file; choose another --out"),
    "rollouts without rewards": (["--set", "rollouts.rounds=2", "--set", "loss=rebel"], "has no reward"),
    "a scored loss under modpo": (
        ["--set", "combine=modpo", "--set", "loss=rebel"],
        "combine: 'modpo' works on labelled",
    ),
    "a reference point that misses one": (
        ["--set", "evaluate.reference_point={helpful: 0}"],
        "evaluate.reference_point: has helpful, must have one number for each of harmless, helpful",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_early_with_the_key(workplace, arguments, message):
    done = moalign("sweep", "sweep.yaml", "--out", "never", *arguments, cwd=workplace)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (workplace / "never").exists()


def test_refusal_does_not_wait_for_torch(workplace):
    """What is refused is refused in under two seconds; the import of torch alone could take longer."""
    code = (
        "import sys, time; sys.argv = ['moalign', 'sweep', 'sweep.yaml', '--set', 'loss=dop']\n"
        "from moalign.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 2\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=workplace,
        env=os.environ | {"MOALIGN_IN_PROCESS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < 10  # two seconds by design; the margin is for a machine that tests in parallel


@pytest.mark.parametrize("command", ["front", "report", "resume", "select --knee", "generate --prefer equal"])
def test_what_is_no_run_is_named(tmp_path, command):
    done = moalign(*command.split(), tmp_path)
    assert done.returncode == 2
    assert "not a run directory" in " ".join(done.stderr.split())
