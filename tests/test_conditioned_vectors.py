"""One model that virtual tokens tell its preference, as a run: trained, asked, steered, exported; each number is that
of plain transformers on ``inputs_embeds``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
import torch
from conditioned import runs_of
from peft import PeftModel
from safetensors.torch import load_file
from sweeps import small_config, write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

import moalign
from moalign import lora, registry, storage
from moalign.batch import AdapterShape
from moalign.data.tokenise import Tokeniser
from moalign.engine.owned import first_values
from moalign.engine.row_conditions import embeddings_of
from moalign.engine.scoring import logps_under
from moalign.errors import PreferenceError, RunError
from moalign.lora import gated
from moalign.sweeps import conditions, steering
from moalign.sweeps.archive import Archive
from moalign.sweeps.candidate import batch_source
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import open_workshop
from moalign.types import Candidate, Preference

NAMES = ("harmless", "helpful")
WAYS: dict[str, dict[str, Any]] = {
    "embedding, from pairs": {"condition": {"name": "embedding", "tokens": 2, "lr_scale": 3}},
    "embedding, policy gradient": {
        "condition": {"name": "embedding", "per_prompt": 2},
        "loss": "grpo",
        "objectives": {"helpful": {"reward": "length"}, "harmless": {"reward": "length", "direction": "min"}},
        "rollouts": {"rounds": 2, "samples": 3, "prompts": 5, "prompts_per_step": 4, "max_new_tokens": 5},
    },
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_path, pairs):
    return runs_of(WAYS, tiny_model_path, pairs, tmp_path_factory)


def source(model_path: Path, pairs: Path, way: str, tmp_path: Path) -> Any:
    plan = prepare(small_config(model_path, pairs, **WAYS[way]), registry.discover())
    equal = Candidate("model", Preference("weights", dict.fromkeys(NAMES, 0.5), "equal"))
    return batch_source(equal, open_workshop(plan, tmp_path, Observer(), keep_cache=False))


@pytest.mark.parametrize("way", ["embedding, from pairs", "embedding, policy gradient"])
def test_points_told_by_vectors_have_one_adapter_and_vectors_of_their_own(finished, way):
    """E_0 + sum_k w_k E_k of what lies beside the model, at the spread of the base's embeddings."""
    directory = finished(way)
    archive = Archive.open(directory)
    first, *others = [steering.verified(archive, name).tensors for name in archive.finished()]
    assert all(torch.equal(other[name], first[name]) for other in others for name in first)
    own = storage.read_tensors(directory / "candidates" / "model" / gated.FILE)
    model = AutoModelForCausalLM.from_pretrained(archive.base)
    spread = float(model.get_input_embeddings().weight.detach().std())
    for point in moalign.open_run(directory).front["points"]:
        harmless, helpful = (point["preference"]["values"][name] for name in NAMES)
        expected = spread * (own["shared"] + harmless * own["objectives"][0] + helpful * own["objectives"][1])
        for mix in (archive.of_candidate(point["id"]), archive.for_preference(point["preference"]["values"])):
            torch.testing.assert_close(steering.vectors(archive, mix), expected, rtol=1e-5, atol=1e-6)
    metadata = storage.read_metadata(directory / "candidates" / "model" / gated.FILE)
    shape = replace(AdapterShape(**json.loads(metadata["shape"])), embeddings=embeddings_of(model))
    conditioner = conditions.conditioner_of(archive.config, registry.discover())
    moved = own["objectives"] - first_values(conditioner, shape, archive.config.seed, "model")["objectives"]
    assert moved.abs().mean(dim=(1, 2)).min() > 1e-4


def test_the_scores_of_a_point_are_those_of_its_vectors(finished, tiny_model_path):
    """The accuracy of plain transformers on ``inputs_embeds``, of the held-out pairs that evaluation saw."""
    directory = finished("embedding, from pairs")
    archive = Archive.open(directory)
    plan = prepare(archive.config, registry.discover())
    held_out = open_workshop(plan, directory, Observer(), keep_cache=False).material.held_out.pairs
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32).eval()
    policy = PeftModel.from_pretrained(base, directory / "candidates" / "w-1.00-0.00").eval()
    for point in moalign.open_run(directory).front["points"]:
        vectors = steering.vectors(archive, archive.of_candidate(point["id"]))
        ratios = []
        for sequence in held_out.sequences:
            ids = torch.tensor([sequence.ids])
            embedded = base.get_input_embeddings()(ids)
            whole = torch.cat([embedded[:, :1], vectors[None], embedded[:, 1:]], 1)
            with torch.no_grad():
                told = policy(inputs_embeds=whole).logits[0, len(vectors) :]
                with policy.disable_adapter():
                    plain = policy(ids).logits[0]
            places = range(sequence.prompt_length, len(sequence.ids))
            both = (logits.log_softmax(-1) for logits in (told, plain))
            own, reference = (sum(float(each[at - 1, sequence.ids[at]]) for at in places) for each in both)
            ratios.append(own - reference)
        for index, name in enumerate(NAMES):
            mine = held_out.pairs[held_out.pair_objective == index].tolist()
            correct = [ratios[better] > ratios[worse] for better, worse in mine]
            assert point["scores"][name] == pytest.approx(np.mean(correct))


def test_layers_below_the_adapters_hand_on_the_gradient_and_are_not_kept(tiny_model_path, pairs, tmp_path):
    """What they compute depends on the vectors, so that it is not the same when token ids come again."""
    changes = WAYS["embedding, from pairs"] | {
        "model": {"path": str(tiny_model_path), "lora": {"r": 4, "alpha": 8, "layers": "upper-half"}},
        "train": {"steps": 30, "pairs_per_step": 8, "lr": 1e-2},
    }
    moalign.sweep(small_config(tiny_model_path, pairs, **changes), tmp_path / "run")
    archive = Archive.open(tmp_path / "run")
    first, second = (steering.vectors(archive, archive.for_preference(name)) for name in NAMES)
    known = AutoModelForCausalLM.from_pretrained(tiny_model_path).get_input_embeddings().weight.detach()
    assert (torch.stack([first, second]).flatten(0, 1)[:, None] - known).abs().amax(-1).min() > 1e-3
    assert not list((tmp_path / "run" / "cache" / "lower").rglob("*.safetensors"))


def test_the_reference_reads_the_prompt_without_the_virtual_tokens(tiny_model_path, pairs, tmp_path):
    made = source(tiny_model_path, pairs, "embedding, from pairs", tmp_path)
    part, chosen = made.at(0)
    assert not made.cacheable
    assert len(chosen) == len(part.pairs) == 8
    pad = made.model.pad_id
    plain = [
        replace(each, ids=(each.ids[0], *each.ids[3:]), prompt_length=each.prompt_length - 2) for each in part.sequences
    ]
    assert all(each.ids[1:3] == (pad, pad) for each in part.sequences)
    assert all(each in made.dataset.sequences for each in plain)
    (expected,) = logps_under(made.model, plain, part.groups.tolist(), (None,))
    for found, own in zip(part.ref_logps, expected, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)


def test_what_a_round_recalls_of_its_policy_is_with_its_vectors(tiny_model_path, pairs, tmp_path):
    """Each response's old log-probabilities are those of plain transformers with the vectors of its preference."""
    made = source(tiny_model_path, pairs, "embedding, policy gradient", tmp_path)
    dataset, _ = made.at(3)  # of the second round; the first asks the base without vectors
    conditioning, base = made.conditioning, made.model.base
    own = first_values(conditioning.conditioner, conditioning.shape, made.seed, made.candidate)
    wanted = torch.from_numpy(dataset.preference).float()
    vectors = conditioning.of_rows(wanted, own).vectors
    assert len(np.unique(dataset.preference, axis=0)) == 10
    for row, sequence in enumerate(dataset.sequences):
        embedded = base.get_input_embeddings()(torch.tensor([sequence.ids]))
        embedded[0, 1 : 1 + vectors.shape[1]] = vectors[row]
        with torch.no_grad(), lora.active(made.model.policy, made.slot):
            logps = base(inputs_embeds=embedded, use_cache=False).logits[0].log_softmax(-1)
        places = range(sequence.prompt_length, len(sequence.ids))
        expected = [float(logps[at - 1, sequence.ids[at]]) for at in places]
        torch.testing.assert_close(
            torch.from_numpy(dataset.old_logps[row]), torch.tensor(expected), rtol=1e-4, atol=1e-5
        )


def test_generate_speaks_with_virtual_tokens_as_transformers_does(finished):
    directory = finished("embedding, from pairs")
    how = ("--prompt", "q1: ", "--json", "--temperature", "0", "--max-new-tokens", "6")
    done = command_line.moalign("generate", directory, "--prefer", "helpful=0.8,harmless=0.2", *how)
    assert done.returncode == 0, done.stderr
    assert "in front of every prompt: 2 virtual tokens" in done.stderr
    exported = moalign.open_run(directory).export(directory.parent / "spoken", helpful=0.8, harmless=0.2)
    vectors = load_file(exported / "preference_embedding.safetensors")["vectors"]
    archive = Archive.open(directory)
    tokenizer = AutoTokenizer.from_pretrained(archive.base)
    base = AutoModelForCausalLM.from_pretrained(archive.base, dtype=torch.float32)
    policy = PeftModel.from_pretrained(base, exported).eval()
    ids = Tokeniser.of(tokenizer).prompt("q1: ")
    embedded = base.get_input_embeddings()(torch.tensor([ids]))
    whole = torch.cat([embedded[:, :1], vectors[None], embedded[:, 1:]], 1)
    with torch.no_grad():
        output = policy.generate(inputs_embeds=whole, max_new_tokens=6, do_sample=False)
    assert json.loads(done.stdout)["response"] == tokenizer.decode(output[0], skip_special_tokens=True)


def test_an_export_has_the_vectors_beside_the_adapter(finished, tmp_path):
    directory = finished("embedding, from pairs")
    run_, archive = moalign.open_run(directory), Archive.open(directory)
    for name, merge in (("one", False), ("merged", True)):
        folder = run_.export(tmp_path / name, helpful=0.3, harmless=0.7, merge=merge)
        note = storage.read_json(folder / "moalign.json")
        expected = steering.vectors(archive, archive.for_preference({"helpful": 0.3, "harmless": 0.7}))
        assert torch.equal(load_file(folder / note["vectors"])["vectors"], expected)
    bundle = run_.bundle(tmp_path / "all", everything=True)
    for entry in bundle["adapters"]:
        found = load_file(tmp_path / "all" / entry["path"] / entry["vectors"])["vectors"]
        assert torch.equal(found, steering.vectors(archive, archive.of_candidate(entry["name"])))
    with pytest.raises(RunError, match="virtual tokens, which a peft model does not hold; `moalign generate` speaks"):
        run_.load(prefer="helpful")
    with pytest.raises(PreferenceError, match="told its preference by virtual tokens; ask it without a decoder"):
        run_.decoder("multi-objective", prefer="equal")
