"""What is exported loads with plain peft and transformers, and is the same function as what the run loads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import command_line
import pytest
import torch
from peft import PeftModel
from sweeps import small_config, write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import moalign
from moalign import config, storage
from moalign.commands import export as command
from moalign.errors import CorruptFileError, RunError, UserError
from moalign.sweeps import export, journal, outcomes, steering
from moalign.sweeps.archive import Archive

MIDDLE = "w-0.50-0.50"
BETWEEN = {"helpful": 0.7, "harmless": 0.3}
IDS = torch.arange(4, 44)[None]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def base(path: Path | str, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def test_refusals_do_not_wait_for_torch(small_run):
    """Nor does a point of the front, or what a preference is made of."""
    code = (
        "import sys\nfrom moalign.commands import steered\n"
        f"archive, mix = steered.chosen(steered.Path({str(small_run)!r}), 'helpful=0.7,harmless=0.3', None)\n"
        "assert len(mix.shares) == 2 and not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- adapters and merged models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [BETWEEN, {"candidate": MIDDLE}])
def test_adapter_merged_model_and_loaded_model_are_the_same_function(small_run, tiny_model_path, tmp_path, way):
    run = moalign.open_run(small_run)
    loaded = logits(run.load(**way)[0])
    run.export(tmp_path / "adapter", **way)
    attached = PeftModel.from_pretrained(base(tiny_model_path), tmp_path / "adapter")
    assert torch.equal(logits(attached), loaded)
    assert attached.peft_config["default"].base_model_name_or_path == str(tiny_model_path)
    run.export(tmp_path / "merged", merge=True, **way)
    merged = base(tmp_path / "merged")
    assert merged.dtype == torch.float32
    # each weight is rounded once more, by 2^-24 of itself; the logits are below 1
    torch.testing.assert_close(logits(merged), loaded, rtol=0, atol=1e-6)
    assert not torch.allclose(loaded, logits(base(tiny_model_path)), atol=1e-3)
    for folder in ("adapter", "merged"):
        assert storage.verify(tmp_path / folder) == []


def test_an_adapter_exported_alone_has_the_very_bytes_of_the_run(small_run, tmp_path):
    moalign.open_run(small_run).export(tmp_path / "adapter", MIDDLE)
    name = "adapter_model.safetensors"
    assert (tmp_path / "adapter" / name).read_bytes() == (small_run / "candidates" / MIDDLE / name).read_bytes()


def test_a_base_in_float64_is_merged_in_float64(tiny_model_path, tmp_path):
    """The run trains on it in float32; what is written is in the precision of the base's files."""
    path = Path(shutil.copytree(tiny_model_path, tmp_path / "model"))
    base(path).double().save_pretrained(path)
    settings = small_config(path, write_pairs(tmp_path / "pairs.jsonl"), search={"name": "grid", "points": 2})
    run = moalign.sweep(settings, tmp_path / "run")
    run.export(tmp_path / "merged", merge=True, **BETWEEN)
    run.export(tmp_path / "adapter", **BETWEEN)
    merged = base(tmp_path / "merged")
    assert (
        merged.dtype == torch.float64 and storage.read_json(tmp_path / "merged" / "moalign.json")["dtype"] == "float64"
    )
    attached = PeftModel.from_pretrained(base(path), tmp_path / "adapter").double()
    torch.testing.assert_close(logits(merged), logits(attached), rtol=0, atol=1e-12)


def test_the_built_in_model_is_merged_in_half_precision_and_stays_tied(tmp_path):
    """Its files are float16 and its embeddings tied; the run needs nothing but its own directory."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", prompts=10)
    train = {"steps": 2, "pairs_per_step": 4, "lr": 1e-2, "together": 2}
    settings = small_config(Path("tiny-assistant"), pairs, search={"name": "grid", "points": 2}, train=train)
    run = moalign.sweep(settings, tmp_path / "run")
    pairs.unlink()
    loaded, tokenizer = run.load(**BETWEEN)
    run.export(tmp_path / "merged", merge=True, **BETWEEN)
    merged = base(tmp_path / "merged")
    assert merged.dtype == torch.float16
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    run.export(tmp_path / "wide", merge=True, dtype="float32", **BETWEEN)
    wide = base(tmp_path / "wide")
    assert wide.dtype == torch.float32
    torch.testing.assert_close(logits(wide), logits(loaded), rtol=1e-5, atol=1e-5)
    distance = (logits(merged.float()) - logits(loaded)).abs().max() / logits(loaded).abs().max()
    assert 0 < distance < 2e-3  # some 2^-11 for each weight
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert again("hello there").input_ids == tokenizer("hello there").input_ids


@pytest.mark.parametrize("generation", [{"temperature": 0.6, "do_sample": False}, {"eos_token_id": [2, 5], "top_k": 7}])
def test_generation_settings_are_kept_also_where_transformers_would_not_write_them(
    tiny_model_path, tmp_path, generation
):
    path = Path(shutil.copytree(tiny_model_path, tmp_path / "model"))
    settings = small_config(path, write_pairs(tmp_path / "pairs.jsonl"), search={"name": "grid", "points": 2})
    run = moalign.sweep(settings, tmp_path / "run")
    (path / "generation_config.json").write_text(json.dumps(generation))  # no part of the weights
    run.export(tmp_path / "merged", merge=True, prefer="helpful")
    before, after = (GenerationConfig.from_pretrained(folder).to_dict() for folder in (path, tmp_path / "merged"))
    ours = {"transformers_version", "_from_model_config"}
    assert {k: v for k, v in after.items() if k not in ours} == {k: v for k, v in before.items() if k not in ours}


def test_the_command_says_what_it_mixes_and_what_a_rank_loses(small_run, tmp_path):
    wanted = "helpful=0.7,harmless=0.3"
    done = command_line.moalign("export", small_run, "--prefer", wanted, "--to", tmp_path / "a", "--rank", "3")
    assert done.returncode == 0, done.stderr
    assert f"0.4 of w-0.00-1.00 + 0.6 of {MIDDLE}" in done.stderr
    archive = Archive.open(small_run)
    _, lost = steering.adapter(archive, archive.for_preference(wanted), 3)
    assert f"rank 3 loses {100 * lost.total:.3g} % of the update" in done.stdout
    note = storage.read_json(tmp_path / "a" / "moalign.json")
    assert note["shares"] == pytest.approx({"w-0.00-1.00": 0.4, MIDDLE: 0.6}) and note["r"] == 3
    assert note["lost_to_rank"] == pytest.approx(lost.total)
    done = command_line.moalign("export", small_run, "--prefer", wanted, "--to", tmp_path / "b", "--merge")
    assert done.returncode == 0 and "AutoModelForCausalLM.from_pretrained" in done.stdout, done.stderr


# --- refusals -------------------------------------------------------------------------------------------------------


def test_what_is_there_already_is_never_touched(small_run, tmp_path):
    run = moalign.open_run(small_run)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    for write in (
        lambda to: run.export(to, MIDDLE),
        lambda to: run.export(to, MIDDLE, merge=True),
        lambda to: run.bundle(to),
    ):
        with pytest.raises(RunError, match="exists already"):
            write(tmp_path / "full")
        with pytest.raises(RunError, match="lies in the run directory"):
            write(small_run / "candidates" / "new")
        write(tmp_path / "empty")
        shutil.rmtree(tmp_path / "empty")
        (tmp_path / "empty").mkdir()
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["note.txt"]


@pytest.mark.parametrize("merge", [False, True])
def test_a_full_disk_leaves_nothing(small_run, tmp_path, monkeypatch, merge):
    real = storage.write_json

    def refuse(path, value):
        if Path(path).name == export.NOTE:
            raise RunError(f"cannot write {path}: No space left on device")
        real(path, value)

    monkeypatch.setattr(storage, "write_json", refuse)
    with pytest.raises(RunError, match="No space left"):
        moalign.open_run(small_run).export(tmp_path / "out", MIDDLE, merge=merge)
    assert list(tmp_path.iterdir()) == []


def test_nothing_damaged_is_exported(small_run, tmp_path):
    copy = Path(shutil.copytree(small_run, tmp_path / "run"))
    file = copy / "candidates" / "w-1.00-0.00" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    for write in (lambda run: run.bundle(tmp_path / "o"), lambda run: run.export(tmp_path / "o", harmless=1.0)):
        with pytest.raises(CorruptFileError, match=str(file)):
            write(moalign.open_run(copy))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --prefer or --candidate"),
        (("--prefer", "equal", "--candidate", MIDDLE), "give --prefer or --candidate"),
        (("--prefer", "helpful=0.7"), "add up to 0.7"),
        (("--bundle", "--prefer", "equal"), "without --prefer"),
        (("--prefer", "equal", "--dtype", "float16"), "add --merge"),
        (("--prefer", "equal", "--merge", "--dtype", "int8"), "'int8' is none of stored"),
        (("--prefer", "equal", "--all"), "add --bundle"),
    ],
)
def test_contradictions_are_refused_with_2(small_run, tmp_path, arguments, message):
    done = command_line.moalign("export", small_run, "--to", tmp_path / "o", *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": True, "dtype": "foo"}, "'foo' is none of stored"),
        ({"dtype": "float16"}, "for merged models.* merge=True"),
    ],
)
def test_a_precision_that_cannot_be_written_is_refused_from_python_too(small_run, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        moalign.open_run(small_run).export(tmp_path / "o", MIDDLE, **options)
    assert not (tmp_path / "o").exists()


# --- bundles --------------------------------------------------------------------------------------------------------


def test_a_bundle_names_everything_there_is_to_know(small_run, tiny_model_path, tmp_path):
    done = command_line.moalign("export", small_run, "--bundle", "--all", "--to", tmp_path / "bundle")
    assert done.returncode == 0, done.stderr
    content = storage.read_json(tmp_path / "bundle" / "bundle.json")
    front = moalign.open_run(small_run).front
    record = storage.read_json(small_run / "run.json")
    assert (content["format"], content["version"], content["largest_r"]) == ("moalign-bundle", 1, 4)
    assert content["base"]["name"] == str(tiny_model_path) and content["base"]["fingerprint"] == record["base"]
    assert content["base"]["measured"] == front["base"] and content["objectives"] == front["objectives"]
    assert [entry["name"] for entry in content["adapters"]] == [point["id"] for point in front["points"]]
    modules = []
    for entry, point in zip(content["adapters"], front["points"], strict=True):
        for key in ("preference", "scores", "stderr", "dominated", "kind"):
            assert entry[key] == point[key]
        file = tmp_path / "bundle" / entry["path"] / "adapter_model.safetensors"
        assert storage.sha256_of(file) == entry["sha256"] and (entry["r"], entry["alpha"]) == (4, 8.0)
        modules.append(f"{entry['name']}={tmp_path / 'bundle' / entry['path']}")
    expected = f"vllm serve {tiny_model_path} --enable-lora --max-lora-rank 8 --lora-modules {' '.join(modules)}"
    assert expected in done.stdout.splitlines()
    assert storage.verify(tmp_path / "bundle") == []


def test_the_page_on_bundles_names_every_key(small_run, tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "bundle.md").read_text(encoding="utf-8")
    content = moalign.open_run(small_run).bundle(tmp_path / "bundle")
    keys = {*content, *content["adapters"][0], *(f"base.{key}" for key in content["base"])} - {"base"}
    assert [key for key in sorted(keys) if f"`{key}`" not in page] == []


def test_dominated_points_are_left_out_unless_asked_for(small_run, tmp_path):
    run = moalign.open_run(small_run)
    events = journal.read(small_run / journal.FILE)
    copy = Path(shutil.copytree(small_run, tmp_path / "run"))
    (copy / journal.FILE).unlink()
    for event in events:
        if event.get("id") == MIDDLE:
            event["scores"] = {"harmless": -1.0, "helpful": -1.0}
        journal.append(copy / journal.FILE, event)
    assert outcomes.history(events, ("harmless", "helpful"))
    names = [entry["name"] for entry in moalign.open_run(copy).bundle(tmp_path / "some")["adapters"]]
    assert names == [point["id"] for point in run.front["points"] if point["id"] != MIDDLE]
    everything = moalign.open_run(copy).bundle(tmp_path / "all", everything=True)["adapters"]
    assert [entry["name"] for entry in everything if entry["dominated"]] == [MIDDLE]
    assert not (tmp_path / "some" / "adapters" / MIDDLE).exists()


def test_the_base_is_called_what_others_call_it(small_run, tmp_path):
    content = moalign.open_run(small_run).bundle(tmp_path / "bundle", base="org/model")
    assert content["base"]["name"] == "org/model"
    for entry in content["adapters"]:
        written = storage.read_json(tmp_path / "bundle" / entry["path"] / "adapter_config.json")
        assert written["base_model_name_or_path"] == "org/model"


@pytest.mark.parametrize(("largest", "rank"), [(1, 8), (8, 8), (9, 16), (200, 256), (512, 512)])
def test_the_servers_command_names_a_rank_that_it_takes(largest, rank):
    entry = {"name": "w=1", "path": "adapters/w=1"}
    text = command.serving({"largest_r": largest, "adapters": [entry]}, Path("to here"), "base")
    assert f"--max-lora-rank {rank} " in text
    assert """'{"name": "w=1", "path": "to here/adapters/w=1"}'""" in text  # an = within would split it wrongly
    assert "up to 512" in command.serving({"largest_r": 513, "adapters": [entry]}, Path("a"), "base")


READER = """
import importlib.util, json, sys
from pathlib import Path

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("moalign", "moalign_plugins"):
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

sys.meta_path.insert(0, Refuse())
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

bundle, merged, out = map(Path, sys.argv[1:])
content = json.loads((bundle / "bundle.json").read_text())
ids = torch.arange(4, 44)[None]
found = {}
with torch.no_grad():
    model = None
    for entry in content["adapters"]:
        if model is None:
            model = AutoModelForCausalLM.from_pretrained(content["base"]["name"]).eval()
            model = PeftModel.from_pretrained(model, bundle / entry["path"], adapter_name="a0")
        else:
            model.load_adapter(bundle / entry["path"], adapter_name=f"a{len(found)}")
        model.set_adapter(f"a{len(found)}")
        found[entry["name"]] = model(input_ids=ids).logits.clone()
    found["merged"] = AutoModelForCausalLM.from_pretrained(merged).eval()(input_ids=ids).logits
assert not any(name.split(".")[0] in ("moalign", "moalign_plugins") for name in sys.modules)
save_file(found, out)
"""


def test_a_clean_environment_without_moalign_loads_bundle_and_merged_model(small_run, tmp_path):
    """A virtual environment with the libraries alone, in a process that refuses to import anything of ours."""
    from safetensors.torch import load_file

    run = moalign.open_run(small_run)
    run.bundle(tmp_path / "bundle", everything=True)
    run.export(tmp_path / "merged", merge=True, **BETWEEN)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True, timeout=60)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "heavy.pth").write_text("".join(f"{path}\n" for path in sorted(outer)))
    (tmp_path / "reader.py").write_text(READER)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MOALIGN"))}
    python = tmp_path / "venv" / "bin" / "python"
    arguments = [python, "reader.py", "bundle", "merged", "found.safetensors"]
    done = subprocess.run(arguments, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found.safetensors")
    for point in run.front["points"]:
        assert torch.equal(found[point["id"]], logits(run.load(point["id"])[0]))
    torch.testing.assert_close(found["merged"], logits(run.load(**BETWEEN)[0]), rtol=0, atol=1e-6)


def test_the_configuration_of_the_run_is_not_changed_by_steering(small_run):
    record = storage.read_json(small_run / "run.json")
    assert config.Config.model_validate(record["config"]).model_dump(mode="json") == record["config"]
    assert not Path(record["config"]["data"]["path"]).exists()  # and all of the above went without the data
