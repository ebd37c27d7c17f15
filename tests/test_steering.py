"""From a preference to a model out of a run directory: what is mixed, that it is exact, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, PeftModelForCausalLM
from sweeps import small_config, write_pairs
from transformers import AutoModelForCausalLM

import moalign
from moalign import storage
from moalign.errors import CorruptFileError, ModelError, PreferenceError, RunError, UserError
from moalign.lora import mixing
from moalign.sweeps import journal, neighbours, outcomes, steering
from moalign.sweeps.archive import Archive
from moalign.types import Outcome, Preference

OBJECTIVES = ("harmless", "helpful")
MIDDLE = "w-0.50-0.50"
IDS = torch.arange(4, 44)[None]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def base(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture
def copy(small_run, tmp_path) -> Path:
    return Path(shutil.copytree(small_run, tmp_path / "run"))


# --- which adapters -------------------------------------------------------------------------------------------------


def trained(name: str, *weights: float, **more: Any) -> Outcome:
    names = ("a", "b", "c")[: len(weights)]
    return Outcome(name, "done", Preference("weights", dict(zip(names, weights, strict=True))), **more)


def asked(history, **weights: float) -> dict[str, float]:
    names = tuple(sorted(weights))
    return neighbours.asked(Preference("weights", weights), names, history)


def test_between_two_the_neighbours_and_at_one_that_one():
    history = [trained("x", 1, 0), trained("y", 0, 1), trained("z", 0.5, 0.5)]
    assert asked(history, a=0.8, b=0.2) == pytest.approx({"x": 0.6, "z": 0.4})
    assert asked(history, a=0.5, b=0.5) == {"z": 1.0}
    assert asked(history, a=0.5000004, b=0.4999996) == {"z": 1.0}  # as far as weights may be rounded


def test_mixed_and_failed_candidates_are_not_mixed_again():
    history = [
        trained("x", 1, 0),
        trained("y", 0, 1),
        trained("m", 0.5, 0.5, kind="mixed"),
        Outcome("f", "failed", Preference("weights", {"a": 0.5, "b": 0.5})),
    ]
    assert asked(history, a=0.5, b=0.5) == pytest.approx({"x": 0.5, "y": 0.5})


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), number=st.integers(1, 5))
def test_outside_of_the_hull_the_nearest_is_named_and_can_be_had(seed, number):
    rng = np.random.default_rng(seed)
    points = rng.dirichlet(np.ones(3), number).round(2)
    points[:, 2] = (1 - points[:, 0] - points[:, 1]).round(2)
    points = np.abs(points)
    history = [trained(f"t{k}", *row) for k, row in enumerate(points.tolist())]
    wanted = rng.dirichlet(np.ones(3))
    weights = dict(zip("abc", wanted.tolist(), strict=True))
    try:
        shares = asked(history, **weights)
    except PreferenceError as error:
        said = str(error).split("can be mixed is ")[1].split(", and beyond")[0]
        near = {name: float(value) for name, value in (item.split("=") for item in said.split(","))}
        assert asked(history, **near)  # what is offered can be taken
        distance = np.linalg.norm(wanted - list(near.values()))
        mixes = rng.dirichlet(np.ones(number), 300) @ points
        assert distance > 1e-7 and (np.linalg.norm(mixes - wanted, axis=1) >= distance - 1e-6).all()
    else:
        total = sum(share * points[int(name[1:])] for name, share in shares.items())
        np.testing.assert_allclose(total, wanted, atol=1e-9)


def test_what_only_two_inner_points_reach_is_said():
    history = [trained("x", 0.7, 0.3), trained("y", 0.4, 0.6)]
    with pytest.raises(PreferenceError) as caught:
        asked(history, a=0.9, b=0.1)
    assert "enclose (a 0.4 to 0.7, b 0.3 to 0.6); the nearest that can be mixed is a=0.7,b=0.3" in str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Preference("thresholds", {"a": 0.7}), "between thresholds adapters are not mixed"),
        (Preference("direction", {"a": 0.6, "b": 0.8}), "between direction adapters are not mixed"),
    ],
)
def test_thresholds_and_directions_are_had_as_trained_or_not_at_all(wanted, message):
    own = Outcome("own", "done", wanted)
    history = [trained("x", 1, 0), own]
    assert neighbours.asked(wanted, ("a", "b"), history) == {"own": 1.0}
    with pytest.raises(PreferenceError, match=rf"{message}.*name one that was trained: x \(a=1, b=0\)"):
        neighbours.asked(wanted, ("a", "b"), history[:1])
    with pytest.raises(PreferenceError, match=r"no candidate was trained for weights.* own \("):
        asked(history[1:], a=0.5, b=0.5)


# --- what is loaded -------------------------------------------------------------------------------------------------


def test_at_a_trained_preference_it_is_that_adapter(small_run, tiny_model_path):
    run = moalign.open_run(small_run)
    expected = logits(PeftModel.from_pretrained(base(tiny_model_path), small_run / "candidates" / MIDDLE))
    assert not torch.allclose(expected, logits(base(tiny_model_path)), atol=1e-3)
    for way in ({"candidate": MIDDLE}, {"prefer": "equal"}, {"helpful": 0.5, "harmless": 0.5}):
        model, tokenizer = run.load(**way)
        assert torch.equal(logits(model), expected)
        assert tokenizer.eos_token_id == 2


def test_between_trained_ones_it_is_the_sum_of_their_deltas(small_run, tiny_model_path):
    """In float64, against weights summed by hand: nothing is lost and nothing rounded but the factors themselves."""
    model, _ = moalign.open_run(small_run).load(helpful=0.7, harmless=0.3)
    by_hand = base(tiny_model_path).double()
    for name, share in (("w-0.00-1.00", 0.4), (MIDDLE, 0.6)):
        adapter = mixing.read(small_run / "candidates" / name)
        for layer, (a, b) in mixing.factors(adapter.tensors).items():
            weight = by_hand.get_submodule(layer.removeprefix("base_model.model.")).weight
            weight.data += share * adapter.scaling * (b.double() @ a.double())
    # shares are folded into float32 factors: each rounds by 2^-24 of itself
    torch.testing.assert_close(logits(model.double()), logits(by_hand), rtol=0, atol=1e-6)
    assert not torch.allclose(logits(model), logits(moalign.open_run(small_run).load(MIDDLE)[0].double()), atol=1e-3)


def test_a_rank_compresses_as_the_svd_says(small_run, tiny_model_path):
    archive = Archive.open(small_run)
    mix = archive.for_preference({"helpful": 0.7, "harmless": 0.3})
    whole, nothing = steering.adapter(archive, mix)
    small, lost = steering.adapter(archive, mix, 3)
    assert (whole.r, nothing.total, small.r) == (8, 0.0, 3) and 0.01 < lost.total < 1
    model, _ = steering.load(archive, mix, r=3)
    assert {len(t) for n, t in model.named_parameters() if "lora_A" in n} == {3}
    squares = {"cut": 0.0, "whole": 0.0}
    for layer, (a, b) in mixing.factors(whole.tensors).items():
        wanted = whole.scaling * b.double() @ a.double()
        found = model.get_submodule(layer).get_delta_weight("default").double()
        squares["cut"] += float((wanted - found).square().sum())
        squares["whole"] += float(wanted.square().sum())
    assert (squares["cut"] / squares["whole"]) ** 0.5 == pytest.approx(lost.total, rel=1e-4)


def test_it_is_an_ordinary_peft_model(small_run, tiny_model_path, tmp_path):
    model, _ = moalign.open_run(small_run).load(helpful=0.7, harmless=0.3)
    assert type(model) is PeftModelForCausalLM and model.active_adapter == "default" and not model.training
    assert {type(module).__module__.split(".")[0] for module in model.modules()} <= {"torch", "transformers", "peft"}
    assert model.generation_config.to_dict() == base(tiny_model_path).generation_config.to_dict()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(tiny_model_path), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_presets_of_the_configuration_have_names(copy):
    record = storage.read_json(copy / "run.json")
    record["config"]["preferences"] = {"careful": {"helpful": 0.2, "harmless": 0.8}}
    storage.write_json(copy / "run.json", record)
    mix = Archive.open(copy).for_preference("careful")
    assert mix.shares == pytest.approx({"w-1.00-0.00": 0.6, MIDDLE: 0.4})
    assert mix.text == "0.6 of w-1.00-0.00 + 0.4 of w-0.50-0.50" and mix.wanted.name == "careful"


@pytest.mark.parametrize(
    ("prompts", "ending"), [(("a \n", "b \n"), " \n"), (("a\n", "b"), ""), (("a", "b"), ""), (("a ", "b\n"), "")]
)
def test_the_white_space_in_which_all_prompts_end_is_found(copy, prompts, ending):
    archive = Archive.open(copy)
    mix = archive.for_preference("equal")
    rows = [json.dumps({"prompt": prompt, "response": "r", "ended": True}) + "\n" for prompt in prompts]
    file = copy / "candidates" / MIDDLE / "samples.jsonl"
    file.write_text("".join(rows))
    assert steering.ending_of_prompts(archive, mix) == ending
    file.write_text('{"prompt": 1}\n')
    with pytest.raises(CorruptFileError, match=str(file)):
        steering.ending_of_prompts(archive, mix)


def test_select_then_load(small_run):
    run = moalign.open_run(small_run)
    found = run.select(at_least={"harmless": 0.5})
    assert run.front["points"][0]["id"] == found.id == "w-1.00-0.00"
    assert type(run.load(found.id)[0]) is PeftModelForCausalLM


@pytest.mark.parametrize(
    ("way", "error", "message"),
    [
        ({}, PreferenceError, "give one of"),
        ({"candidate": MIDDLE, "helpful": 1.0}, PreferenceError, "give one of"),
        ({"helpful": 0.7}, PreferenceError, "add up to 0.7"),
        ({"helpfull": 1.0}, PreferenceError, "did you mean 'helpful'?"),
        ({"prefer": "harmless>=0.4"}, PreferenceError, "between thresholds adapters are not mixed"),
        ({"candidate": "w-9"}, RunError, f"no candidate 'w-9'; there are w-1.00-0.00, w-0.00-1.00, {MIDDLE}"),
        ({"candidate": "../../etc"}, RunError, "no candidate"),
        ({"candidate": MIDDLE, "device": "gpu9"}, UserError, "device: 'gpu9' is none"),
        ({"candidate": MIDDLE, "device": "cuda:99"}, UserError, "device: 'cuda:99' cannot be used on this machine: "),
        ({"candidate": MIDDLE, "device": "meta"}, UserError, "device: 'meta' cannot be used on this machine: "),
    ],
)
def test_what_cannot_be_had_is_refused(small_run, way, error, message):
    with pytest.raises(error, match=message):
        moalign.open_run(small_run).load(**way)


# --- what is in a run directory is not trusted ------------------------------------------------------------------------


def test_a_flipped_bit_is_found_before_anything_is_loaded(copy):
    file = copy / "candidates" / MIDDLE / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    for way in ({"candidate": MIDDLE}, {"helpful": 0.7, "harmless": 0.3}):
        with pytest.raises(CorruptFileError, match=str(file)):
            moalign.open_run(copy).load(**way)


def test_another_adapter_under_a_manifest_of_its_own_is_not_the_journals(copy):
    mine, other = copy / "candidates" / MIDDLE, copy / "candidates" / "w-1.00-0.00"
    shutil.copy(other / "adapter_model.safetensors", mine)
    (mine / "MANIFEST.json").unlink()
    storage.write_manifest(mine)
    with pytest.raises(CorruptFileError, match="not the adapter that the journal tells of"):
        moalign.open_run(copy).load(MIDDLE)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "MANIFEST.json"])
def test_a_missing_file_is_named(copy, file):
    (copy / "candidates" / MIDDLE / file).unlink()
    with pytest.raises(CorruptFileError, match=file):
        moalign.open_run(copy).load(prefer="equal")


@pytest.mark.parametrize(
    "change",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
        {"auto_mapping": {"base_model_class": "B", "parent_library": "antigravity"}},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": [["q_proj"]]},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["nowhere"]},
        {"r": 1000},
    ],
)
def test_the_configuration_of_an_adapter_imports_nothing_and_changes_nothing(copy, change):
    folder = copy / "candidates" / MIDDLE
    storage.write_json(folder / "adapter_config.json", storage.read_json(folder / "adapter_config.json") | change)
    (folder / "MANIFEST.json").unlink()
    storage.write_manifest(folder)
    with pytest.raises((RunError, CorruptFileError, ModelError), match=f"{MIDDLE}"):
        moalign.open_run(copy).load(MIDDLE)
    assert "antigravity" not in sys.modules


def events_of(run: Path) -> list[dict[str, Any]]:
    return journal.read(run / journal.FILE)


def rewrite(run: Path, events: list[dict[str, Any]]) -> None:
    (run / journal.FILE).unlink()
    for event in events:
        journal.append(run / journal.FILE, event)


def test_an_id_that_leaves_the_folder_is_refused(copy):
    events = json.loads(json.dumps(events_of(copy)).replace(MIDDLE, "../outside"))
    shutil.copytree(copy / "candidates" / MIDDLE, copy / "outside")
    rewrite(copy, events)
    with pytest.raises(CorruptFileError, match="not the name of a folder"):
        moalign.open_run(copy).load(prefer="equal")


def test_a_run_whose_candidates_all_failed_says_why(copy):
    history = outcomes.history(events_of(copy), OBJECTIVES)
    failed = [Outcome(one.id, "failed", one.preference, error="boom") for one in history]
    rewrite(copy, [e for e in events_of(copy) if e["event"] != "outcome"] + [outcomes.to_event(one) for one in failed])
    with pytest.raises(RunError, match=r"every candidate failed; the first, w-1\.00-0\.00: boom"):
        moalign.open_run(copy).load(helpful=0.7, harmless=0.3)
    with pytest.raises(RunError, match=f"the candidate '{MIDDLE}' failed: boom"):
        moalign.open_run(copy).load(MIDDLE)
    with pytest.raises(RunError, match="no points; the first of 3 that failed: boom"):
        moalign.open_run(copy).select(maximise="helpful")


@pytest.mark.parametrize("change", [{"config": {}}, {"base": 1}, {"tokenizer": None}, {"config": {"model": 1}}])
def test_a_record_that_is_none_is_named(copy, change):
    storage.write_json(copy / "run.json", storage.read_json(copy / "run.json") | change)
    said = f"{copy}: record and journal are not those of a run"
    run = moalign.open_run(copy)
    ways = [lambda: run.load(MIDDLE), lambda: run.decoder("multi-objective", prefer="equal")]
    if "config" in change:
        ways += [lambda: run.front, lambda: moalign.resume(copy)]
    for way in ways:
        with pytest.raises(CorruptFileError, match=said):
            way()


def test_events_of_another_form_are_refused(copy):
    rewrite(copy, [event | {"preference": {}} if event["event"] == "outcome" else event for event in events_of(copy)])
    with pytest.raises(PreferenceError, match="expected an object with the keys"):
        moalign.open_run(copy).load(MIDDLE)
    rewrite(copy, [{"event": "outcome", "id": MIDDLE}])
    with pytest.raises(CorruptFileError, match="not those of a run: KeyError"):
        moalign.open_run(copy).load(MIDDLE)


def test_an_adapter_of_another_base_than_the_runs_is_refused(copy):
    record = storage.read_json(copy / "run.json")
    storage.write_json(copy / "run.json", record | {"base": "0" * 64})
    with pytest.raises(RunError, match="another base model than the run"):
        moalign.open_run(copy).load(MIDDLE)


def test_another_base_is_refused_and_the_same_elsewhere_is_taken(copy, tiny_model_path, tmp_path):
    moved = Path(shutil.copytree(tiny_model_path, tmp_path / "moved"))
    run = moalign.open_run(copy)
    expected = logits(run.load(MIDDLE)[0])
    assert torch.equal(logits(run.load(MIDDLE, base=moved)[0]), expected)
    model = base(moved)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1e-3
    model.save_pretrained(moved)
    with pytest.raises(RunError, match=f"{moved}: not the base model that"):
        run.load(MIDDLE, base=moved)
    record = storage.read_json(copy / "run.json")
    record["config"]["model"]["path"] = str(tmp_path / "gone")
    storage.write_json(copy / "run.json", record)
    with pytest.raises(ModelError, match=r"gone: .*; if the base model is elsewhere now, say where \(--base"):
        run.load(MIDDLE)
    assert torch.equal(logits(run.load(MIDDLE, base=tiny_model_path)[0]), expected)


def test_another_tokenizer_is_told_of(copy, tiny_model_path, tmp_path, caplog):
    moved = Path(shutil.copytree(tiny_model_path, tmp_path / "moved"))
    run = moalign.open_run(copy)
    run.load(MIDDLE, base=moved)
    assert caplog.text == ""
    (moved / "chat_template.jinja").write_text("{{ messages[0].content }}")
    run.load(MIDDLE, base=moved)
    assert f"{moved}: not the tokenizer of the run" in caplog.text


def test_adapted_embeddings_are_loaded_and_not_mixed(tiny_model_path, tmp_path):
    model = {"path": str(tiny_model_path), "lora": {"r": 2, "alpha": 4, "targets": ["embed_tokens", "q_proj"]}}
    train = {"steps": 2, "pairs_per_step": 4, "lr": 1e-2, "together": 1}
    pairs = write_pairs(tmp_path / "pairs.jsonl", prompts=10)
    settings = small_config(tiny_model_path, pairs, model=model, search={"name": "grid", "points": 2}, train=train)
    run = moalign.sweep(settings, tmp_path / "run")
    loaded, _ = run.load("w-1.00-0.00")
    expected = PeftModel.from_pretrained(base(tiny_model_path), tmp_path / "run" / "candidates" / "w-1.00-0.00")
    assert torch.equal(logits(loaded), logits(expected))
    with pytest.raises(RunError, match="adapts an embedding; only adapters of linear layers are mixed"):
        run.load(prefer="equal")
