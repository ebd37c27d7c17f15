"""moalign, moalign-example and a distribution that is broken, as wheels in a virtual environment with nothing else."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from sweeps import small_config, write_pairs

ROOT = Path(__file__).parents[1]
SOURCES = (ROOT, ROOT / "plugins" / "moalign-example", ROOT / "tests" / "broken_distribution")
MISSING = "ModuleNotFoundError: No module named 'moalign_missing_lexicon'"
EXITED = "SystemExit: set MOALIGN_BROKEN_ACCOUNT"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
ALONE = ("--no-deps", "--no-index")  # and nothing from the network


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the three wheels in it, and a sweep with the example's loss that was run in it."""

    home: Path
    sweep: subprocess.CompletedProcess[str]

    @property
    def run(self) -> Path:
        return self.home / "run"

    @property
    def configuration(self) -> Path:
        return self.home / "sweep.yaml"

    def moalign(self, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        return execute(self.home, "venv/bin/moalign", *arguments, **variables)


def execute(home: Path, program: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """A program of the environment, from its folder and without what makes moalign importable here."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MOALIGN"))}
    command = [str(home / program), *map(str, arguments)]
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"} | variables
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="session")
def environment(tmp_path_factory, tiny_model_path) -> Environment:
    """Made once, also where several processes of one test session share the tests."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    home = shared / "clean-environment"
    with (shared / "clean-environment.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "ended.json").exists():
            home.mkdir()
            install(home)
            done = sweep(home, tiny_model_path)
            (home / "ended.json").write_text(json.dumps([done.returncode, done.stdout, done.stderr]))
    return Environment(home, subprocess.CompletedProcess([], *json.loads((home / "ended.json").read_text())))


def install(home: Path) -> None:
    """The heavy libraries come from where the tests run, behind all that is in the environment itself."""
    wheels = home / "wheels"
    run = [*PIP, "wheel", *ALONE, "--no-build-isolation", "--wheel-dir", str(wheels), *map(str, SOURCES)]
    assert subprocess.run(run, timeout=120).returncode == 0
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home / "venv")], check=True, timeout=60)
    python = home / "venv" / "bin" / "python"
    run = [*PIP, "--python", str(python), "install", *ALONE, "--no-compile", *map(str, sorted(wheels.glob("*.whl")))]
    assert subprocess.run(run, timeout=120).returncode == 0
    (site,) = (home / "venv" / "lib").glob("python*/site-packages")
    outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "heavy.pth").write_text("".join(f"{path}\n" for path in sorted(outer)))


def sweep(home: Path, model: Path) -> subprocess.CompletedProcess[str]:
    settings = small_config(
        model,
        write_pairs(home / "pairs.jsonl", prompts=10),
        loss={"name": "squared-hinge", "beta": 1.0},
        search={"name": "grid", "points": 2},
        train={"steps": 2, "pairs_per_step": 4, "lr": 1e-2, "together": 2},
    )
    (home / "sweep.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude_unset=True)))
    return execute(home, "venv/bin/moalign", "sweep", "sweep.yaml", "--out", "run")


def test_everything_of_ours_is_the_installed_one(environment):
    names = "moalign", "moalign_plugins", "moalign_example"
    code = f"import {', '.join(names)}; print({', '.join(f'{name}.__file__' for name in names)}, sep='\\n')"
    done = execute(environment.home, "venv/bin/python", "-c", code)
    files = [Path(line) for line in done.stdout.splitlines()]
    assert len(files) == len(names), done.stderr
    assert [file for file in files if not file.is_relative_to(environment.home / "venv")] == []


def test_the_example_is_not_in_our_wheel(environment):
    (wheel,) = (environment.home / "wheels").glob("moalign-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        folders = {Path(name).parts[0].split("-")[0] for name in archive.namelist()}
    assert folders == {"moalign", "moalign_plugins"}


def test_a_sweep_with_the_example_runs_to_its_front(environment):
    assert environment.sweep.returncode == 0, environment.sweep.stderr
    front = json.loads((environment.run / "front.json").read_text())
    assert len(front["points"]) == 2 and front["failed"] == []
    assert all(set(point["scores"]) == {"helpful", "harmless"} for point in front["points"])
    assert (environment.run / "report.html").exists()


def test_the_run_records_the_example(environment):
    plugins = json.loads((environment.run / "run.json").read_text())["plugins"]
    digest = hashlib.sha256((SOURCES[1] / "moalign_example" / "squared_hinge.py").read_bytes()).hexdigest()
    assert plugins["objective moalign-example:squared-hinge"] == {
        "distribution": "moalign-example",
        "version": "0.1.0",
        "sha256": digest,
    }
    assert not any("moalign-broken" in name for name in plugins)


def test_what_its_readme_configures_can_be_trained(environment):
    """Every configuration in it, up to where a model would be loaded."""
    home, readme = environment.home, (SOURCES[1] / "README.md").read_text()
    blocks = [yaml.safe_load(block.split("```")[0]) for block in readme.split("```yaml\n")[1:]]
    basis = {key: yaml.safe_load(environment.configuration.read_text())[key] for key in ("model", "objectives", "data")}
    code = (
        "import json, sys; from moalign import config, registry; from moalign.sweeps import plan\n"
        "for block in json.loads(sys.argv[1]):\n"
        "    print(len(plan.prepare(config.from_mapping(block), registry.discover()).propose(())))"
    )
    done = execute(home, "venv/bin/python", "-c", code, json.dumps([basis | block for block in blocks]))
    assert len(blocks) == 2 and [int(line) > 0 for line in done.stdout.split()] == [True, True], done.stderr


def test_list_shows_the_example_and_reports_the_broken_one(environment):
    done = environment.moalign("plugins", "list", "--json", "--all")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    good = {(r["kind"], r["name"], r["version"], r["status"]) for r in rows if r["distribution"] == "moalign-example"}
    assert good == {
        ("objective", "squared-hinge", "0.1.0", "ok"),
        ("combiner", "soft-minimum", "0.1.0", "ok"),
        ("reward", "compressibility", "0.1.0", "ok"),
    }
    bad = {row["name"]: row for row in rows if row["distribution"] == "moalign-broken"}
    assert {(row["version"], row["status"]) for row in bad.values()} == {("2.1", "broken")}
    assert bad["lexicon"]["reason"].startswith(MISSING) and bad["account"]["reason"].startswith(EXITED)
    plain = environment.moalign("plugins", "list")
    assert plain.returncode == 0 and "squared-hinge" in plain.stdout and "2 broken" in plain.stderr


def test_a_configuration_that_names_a_plugin_of_the_broken_one_is_refused(environment):
    content = yaml.safe_load(environment.configuration.read_text())
    content["objectives"] = {"helpful": {"reward": "politeness"}, "harmless": None}
    (environment.home / "refused.yaml").write_text(yaml.safe_dump(content))
    done = environment.moalign("sweep", "refused.yaml", "--out", "refused")
    assert done.returncode == 2
    for part in ("objectives.helpful.reward", "'politeness'", f"moalign-broken 2.1 could not be loaded: {MISSING}"):
        assert part in done.stderr
    assert not (environment.home / "refused").exists()


def test_doctor_names_the_broken_one_and_passes_the_example(environment):
    done = environment.moalign("plugins", "doctor", "--json", MOALIGN_DISABLE_PLUGINS="moalign")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] == {"moalign-broken 2.1": 0, "moalign-example 0.1.0": 3}
    serious = [finding for finding in report["findings"] if finding["what"] in ("broken", "faulty")]
    assert {(finding["distribution"], finding["version"]) for finding in serious} == {("moalign-broken", "2.1")}
    lexicon = next(finding for finding in serious if "lexicon" in finding["about"])
    assert lexicon["reason"] == MISSING and "install the missing module" in lexicon["cure"]


def test_the_broken_one_is_broken_for_the_reason_that_is_given(environment):
    """With the account that one of its modules asks for, that one loads."""
    done = environment.moalign("plugins", "list", "--json", "--kind", "reward", MOALIGN_BROKEN_ACCOUNT="mine")
    rows = {row["name"]: row["distribution"] for row in json.loads(done.stdout)}
    assert rows["judged"] == "moalign-broken" and "politeness" not in rows
