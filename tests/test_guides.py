"""Losses that read a frozen adapter beside the reference: TGDPO as mathematics, and in runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from interruptions import StopAfterCandidates, break_off_and_resume
from sweeps import contents, small_config, write_pairs
from test_objectives import make_batch, terms_of

from moalign import lora, registry, storage
from moalign.engine import train as loop
from moalign.errors import ConfigError, RunError
from moalign.sweeps import guides, plan, run
from moalign.sweeps.observe import Observer
from moalign.sweeps.workshop import open_workshop
from moalign.testing import check_objective
from moalign_plugins.objectives.dpo import DPO
from moalign_plugins.objectives.tgdpo import TGDPO

GUIDED = "candidates/w-1.00-0.00"


def guided(batch, seed=1):
    """The batch with a guide that differs from policy and reference."""
    generator = torch.Generator().manual_seed(seed)
    values = -2 * torch.rand(batch.mask.shape, generator=generator, dtype=batch.mask.dtype) * batch.mask
    return dataclasses.replace(batch, guides={"guide": values})


@pytest.mark.parametrize("loss", [TGDPO(guide="x"), TGDPO(guide="x", alpha=3.0, beta=0.7)], ids=repr)
def test_it_conforms(loss):
    check_objective(loss, prompts=2, tokens=3)


def test_tgdpo_is_the_sum_over_tokens_as_it_is_written():
    batch = guided(make_batch())
    beta, alpha, expected = 0.3, 0.8, []
    with torch.no_grad():
        for chosen, rejected in batch.pairs.tolist():
            total = 0.0
            for row, sign in ((chosen, 1), (rejected, -1)):
                for t in range(int(batch.mask[row].sum())):
                    g = beta * (batch.guides["guide"][row, t] - batch.ref_logps[row, t])
                    a = batch.logps[row, t] - batch.ref_logps[row, t]
                    total += sign * beta * (1 + sign * alpha * g) * a
            expected.append(torch.log1p(torch.exp(-total)))
    value = TGDPO(guide="x", beta=beta, alpha=alpha).loss(batch, terms_of(batch))
    torch.testing.assert_close(value, torch.stack(expected), rtol=1e-13, atol=0)


@pytest.mark.parametrize("case", ["alpha is 0", "the guide is the reference"])
def test_tgdpo_without_guidance_is_dpo(case):
    batch = guided(make_batch())
    loss = TGDPO(guide="x", beta=0.3, alpha=0.0)
    if case != "alpha is 0":
        batch, loss = dataclasses.replace(batch, guides={"guide": batch.ref_logps}), TGDPO(guide="x", beta=0.3)
    terms = terms_of(batch, scale=1.7, margin=0.4)
    torch.testing.assert_close(loss.loss(batch, terms), DPO(beta=0.3).loss(batch, terms), rtol=1e-14, atol=0)
    assert loss.guides() == ({} if case == "alpha is 0" else {"guide": "x"})


def test_what_the_guide_likes_weighs_more_in_the_chosen_and_less_in_the_rejected_response():
    """d z / d logps of a token is beta (1 + alpha g) and -beta (1 - alpha g); below 0 and above nothing is cut off."""
    batch = guided(make_batch())
    likes = batch.ref_logps + torch.tensor([4.0, -40.0, 0.0, 40.0, -4.0]) * batch.mask
    batch = dataclasses.replace(batch, guides={"guide": likes})
    loss, terms = TGDPO(guide="x", beta=0.5, alpha=0.25), terms_of(batch)
    value = loss.loss(batch, terms)
    (gradient,) = torch.autograd.grad(value.sum(), batch.logps)
    slope = torch.expm1(-value.detach())  # d(-log sigmoid z)/dz = sigmoid(z) - 1 = e^-L - 1
    g = 0.5 * torch.tensor([4.0, -40.0, 0.0, 40.0, -4.0], dtype=torch.float64)
    for pair, (chosen, rejected) in enumerate(batch.pairs.tolist()):
        for row, sign in ((chosen, 1), (rejected, -1)):
            expected = slope[pair] * sign * 0.5 * (1 + sign * 0.25 * g) * batch.mask[row]
            torch.testing.assert_close(gradient[row], expected, rtol=1e-11, atol=1e-13)


def test_gradcheck_with_masks():
    batch, loss = guided(make_batch()), TGDPO(guide="x", beta=0.4)
    terms = terms_of(batch, scale=1.7, margin=0.4)
    assert torch.autograd.gradcheck(
        lambda logps: loss.loss(dataclasses.replace(batch, logps=logps), terms), (batch.logps,)
    )


# --- in runs --------------------------------------------------------------------------------------------------------


def settings_of(model_path, folder: Path, guide: Path, **changes):
    pairs = write_pairs(folder / "pairs.jsonl")
    loss = {"name": "tgdpo", "guide": str(guide)} | changes.pop("loss", {})
    return small_config(model_path, pairs, loss=loss, search={"name": "grid", "points": 2}, **changes)


def test_a_run_trains_with_a_guide_and_resumes_bitwise(tiny_model_path, small_run, tmp_path):
    settings = settings_of(tiny_model_path, tmp_path, small_run / GUIDED, train={"steps": 3, "lr": 1e-2, "together": 1})
    registered = registry.discover()
    run.start(settings, tmp_path / "whole", registered, Observer())
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert set(record["guides"]) == {"guide"} and len(record["guides"]["guide"]) == 64

    parts = break_off_and_resume(settings, tmp_path / "parts", StopAfterCandidates())
    assert contents(parts) == contents(tmp_path / "whole")


def test_the_loss_sees_the_guides_log_probabilities(tiny_model_path, small_run, tmp_path, monkeypatch):
    """Those of peft's own model with this adapter, which is of another rank than the run's; loaded once."""
    seen = []
    loss_of = loop.loss_of

    def looking(batch, job, *others):
        seen.append(batch)
        return loss_of(batch, job, *others)

    monkeypatch.setattr(loop, "loss_of", looking)
    lora_settings = {"path": str(tiny_model_path), "lora": {"r": 2, "alpha": 8}}
    settings = settings_of(
        tiny_model_path,
        tmp_path,
        small_run / GUIDED,
        model=lora_settings,
        train={"steps": 1, "together": 1, "pairs_per_step": 4},
    )
    run.start(settings, tmp_path / "run", registry.discover(), Observer())
    assert seen and all(batch.guides.keys() == {"guide"} for batch in seen)
    batch = seen[0]
    assert float(((batch.guides["guide"] - batch.ref_logps) * batch.mask).abs().max()) > 1e-3
    assert not (batch.guides["guide"] * (1 - batch.mask)).any()
    workshop = open_workshop(plan.prepare(settings, registry.discover()), Path(), Observer(), keep_cache=False)
    guide = workshop.guides_of(workshop.plan.objective)["guide"]
    assert workshop.guides_of(workshop.plan.objective)["guide"] is guide
    train = workshop.material.train
    own = lora.weights(workshop.model.policy, guide.adapter)
    assert {len(tensor) for name, tensor in own.items() if "lora_A" in name} == {4}
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_path), small_run / GUIDED)
    sums = []
    for sequence in train.sequences:
        ids = torch.tensor([sequence.ids])
        with torch.no_grad():
            scores = plain(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        sums.append(float(scores[sequence.prompt_length - 1 :].sum()))
    totals = batch.guides["guide"].sum(-1).tolist()
    assert all(min(abs(total - each) for each in sums) < 1e-3 for total in totals)


@pytest.mark.parametrize("file", guides.FILES)
def test_a_folder_without_an_adapter_is_refused_before_anything_is_loaded(file, tiny_model_path, small_run, tmp_path):
    folder = shutil.copytree(small_run / GUIDED, tmp_path / "guide")
    (folder / file).unlink()
    message = rf"loss\.guide: no {file} in .*guide; give the folder of an adapter of the same base model"
    with pytest.raises(ConfigError, match=message):
        plan.prepare(settings_of(tiny_model_path, tmp_path, folder), registry.discover())


def test_an_adapter_of_another_base_is_refused(tiny_model_path, small_run, tmp_path):
    folder = shutil.copytree(small_run / GUIDED, tmp_path / "guide")
    file = folder / lora.WEIGHTS_FILE
    storage.write_tensors(file, storage.read_tensors(file), {"base": "0" * 64})
    settings = settings_of(tiny_model_path, tmp_path, folder)
    message = r"loss\.guide: .*this adapter was trained on another base model; give an adapter that moalign wrote"
    with pytest.raises(ConfigError, match=message):
        run.start(settings, tmp_path / "run", registry.discover(), Observer())


def test_a_run_whose_guide_is_another_by_now_does_not_go_on(tiny_model_path, small_run, tmp_path):
    folder = shutil.copytree(small_run / GUIDED, tmp_path / "guide")
    settings = settings_of(tiny_model_path, tmp_path, folder, train={"steps": 1, "together": 1})
    run.start(settings, tmp_path / "run", registry.discover(), Observer())
    shutil.rmtree(folder)
    shutil.copytree(small_run / "candidates/w-0.00-1.00", folder)
    with pytest.raises(RunError, match=r"an adapter that the loss names changed since this run was started"):
        run.resume(tmp_path / "run", registry.discover(), Observer())


def test_each_candidate_can_have_a_guide_of_its_own(tiny_model_path, small_run, tmp_path, monkeypatch):
    """Each is what it is with that guide alone; and none lies about when its candidate is done."""
    each, how = small_run / "candidates" / "{candidate}", {"train": {"steps": 2, "lr": 1e-2, "together": 1}}
    settings, registered = settings_of(tiny_model_path, tmp_path, each, **how), registry.discover()
    loaded = []
    load = guides.load
    monkeypatch.setattr(guides, "load", lambda *about: loaded.append(about[1:3]) or load(*about))
    run.start(settings, tmp_path / "each", registered, Observer())
    assert [(folder.name, slot) for folder, slot in loaded] == [("w-1.00-0.00", "guide0"), ("w-0.00-1.00", "guide0")]
    for name in ("w-1.00-0.00", "w-0.00-1.00"):
        alone = settings_of(tiny_model_path, tmp_path, small_run / "candidates" / name, **how)
        run.start(alone, tmp_path / name, registered, Observer())
        own, same = (tmp_path / each / "candidates" / name / lora.WEIGHTS_FILE for each in ("each", name))
        # known log-probabilities come from batches laid out otherwise; with the other guide they are 1e-2 apart
        torch.testing.assert_close(storage.read_tensors(own), storage.read_tensors(same), rtol=0, atol=1e-5)
    parts = break_off_and_resume(settings, tmp_path / "parts", StopAfterCandidates())
    assert contents(parts) == contents(tmp_path / "each")


def test_a_candidate_without_a_guide_of_its_own_is_named_before_a_model_is_loaded(tiny_model_path, small_run, tmp_path):
    shutil.copytree(small_run / GUIDED, tmp_path / "w-1.00-0.00")
    settings = settings_of(tiny_model_path, tmp_path, tmp_path / "{candidate}")
    with pytest.raises(ConfigError, match=r"loss\.guide: no adapter_config\.json in .*/w-0\.00-1\.00; give the folder"):
        run.start(settings, tmp_path / "run", registry.discover(), Observer())
    assert not (tmp_path / "run").exists()


def test_guides_of_single_candidates_are_known_again(tiny_model_path, small_run, tmp_path):
    for name in ("w-1.00-0.00", "w-0.00-1.00"):
        shutil.copytree(small_run / "candidates" / name, tmp_path / name)
    settings = settings_of(tiny_model_path, tmp_path, tmp_path / "{candidate}", train={"steps": 1, "together": 1})
    run.start(settings, tmp_path / "run", registry.discover(), Observer())
    run.resume(tmp_path / "run", registry.discover(), Observer())
    shutil.rmtree(tmp_path / "w-0.00-1.00")
    shutil.copytree(small_run / GUIDED, tmp_path / "w-0.00-1.00")
    with pytest.raises(RunError, match=r"an adapter that the loss names changed since this run was started"):
        run.resume(tmp_path / "run", registry.discover(), Observer())


def test_a_conditioner_has_no_place_for_a_guide(tiny_model_path, small_run, tmp_path):
    settings = settings_of(tiny_model_path, tmp_path, small_run / GUIDED, condition="soup")
    with pytest.raises(ConfigError, match=r"condition: loss 'tgdpo' reads another policy"):
        plan.prepare(settings, registry.discover())
