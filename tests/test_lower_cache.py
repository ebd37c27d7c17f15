"""Hidden states below the adapters: rows that come again skip the lower layers, and get what these would compute."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from architectures import GPT, SHARING, SMALL
from plain_training import trainable
from sweeps import small_config, write_pairs
from test_layout import random_sequences
from test_shared_prefix import load  # noqa: F401
from test_together import ALIKE, jobs, largest, noting, result

from moalign import lora, registry, storage
from moalign.engine import shards
from moalign.engine.layout import Layout, lay_out, one_by_one
from moalign.engine.lower import Copies, copied
from moalign.engine.lower_cache import LowerCache
from moalign.engine.model import TRAINED, LanguageModel
from moalign.engine.passes import pack
from moalign.engine.scoring import LogpCache
from moalign.engine.train import train_together
from moalign.engine.trainee import Job, Trainee
from moalign.lora import Mixture
from moalign.sweeps.candidate import batch_source, slots
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import Workshop, open_workshop

DEEP = {"num_hidden_layers": 4}
KINDS: dict[str, dict[str, Any]] = {
    kind: options | ({"n_layer": 4} if options is GPT else DEEP) for kind, options in SHARING.items()
}
TARGETS = {"gpt2": ["c_attn", "c_fc"]}
LARGE = 2**30


@pytest.fixture(scope="module")
def llama(load) -> LanguageModel:  # noqa: F811
    return learned(load("llama", KINDS["llama"], layers="upper-half"))


def learned(model: LanguageModel) -> LanguageModel:
    """With adapters that change something."""
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable(model.policy, TRAINED).values():
        parameter.data.normal_(std=0.1, generator=generator)
    return model


def layouts(model: LanguageModel) -> list[Layout]:
    """A row each, with padding, and responses that share a row with their prompt."""
    sequences = random_sequences(0)
    shared = lay_out(sequences, pack(sequences, replace(model.packing, attention=0.0)), model.pad_id)
    assert shared.segments is not None
    return [one_by_one(sequences, model.pad_id, multiple=8), shared]


def logps(model: LanguageModel, layout: Layout, cache: LowerCache | None = None) -> torch.Tensor:
    if cache is None:
        return model.response_logps(layout).detach()
    with cache.skipping(layout):
        return model.response_logps(layout).detach()


@contextmanager
def counted(model: LanguageModel):
    """Runs of what is inside the layers: [those below the adapters, the others]."""
    runs = [0, 0]

    def count(place: int) -> Any:
        def hook(*_: Any) -> None:
            runs[place] += 1

        return hook

    stack = list(model.base.model.layers)
    hooks = [
        layer.self_attn.register_forward_hook(count(int(number >= len(model.lower))))
        for number, layer in enumerate(stack)
    ]
    try:
        yield runs
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_known_gives_what_is_computed(load, kind, tmp_path):  # noqa: F811
    model = learned(load(kind, KINDS[kind], TARGETS.get(kind, "all-linear"), layers="upper-half"))
    assert len(model.lower) == len(model.upper) == 2 and model.unskipped is None
    cache = LowerCache(model, tmp_path, LARGE)
    for number, layout in enumerate(layouts(model)):
        expected = logps(model, layout)
        first = logps(model, layout, cache)
        assert cache.skipped == number  # the other layout's rows are not these
        assert torch.equal(logps(model, layout, cache), first)
        assert cache.skipped == number + 1
        torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(logps(model, layout), expected)  # nothing stays behind


UNSKIPPABLE: dict[str, tuple[dict[str, Any], Any, str]] = {
    "falcon": ({"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 102, "alibi": False},
               ["query_key_value"], "its layers do more than hand on hidden states"),
    "bloom": ({"hidden_size": 32, "n_layer": 4, "n_head": 4, "vocab_size": 102},
              ["query_key_value"], "rows cannot be copied behind its lower layers"),
    "llama": (SMALL | {"num_hidden_layers": 1}, "all-linear", "no layer lies below all adapters"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNSKIPPABLE)
def test_a_model_whose_layers_cannot_be_skipped_says_why(load, kind):  # noqa: F811
    options, targets, reason = UNSKIPPABLE[kind]
    model = load(kind, options, targets, layers="upper-half")
    assert model.lower == () and (model.unskipped or "").startswith(reason)


def test_layers_that_look_back_at_others_are_found_out(load, monkeypatch):  # noqa: F811
    """A stack whose upper layers also read what a lower layer has left behind."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward, left = LlamaDecoderLayer.forward, {}

    def looking_back(self, hidden_states, *args, **kwargs):
        output = forward(self, hidden_states, *args, **kwargs)
        if self.self_attn.layer_idx == 0:
            left["first"] = output.roll(1, -1) * torch.randint(1, 9, ())  # never twice the same
        return output + left["first"] if self.self_attn.layer_idx == 3 else output

    monkeypatch.setattr(LlamaDecoderLayer, "forward", looking_back)
    monkeypatch.setattr("moalign.engine.probe.check_against_own_logits", lambda *_: None)
    monkeypatch.setattr("moalign.engine.probe.copies_agree", lambda *_: True)
    model = load("llama", KINDS["llama"], layers="upper-half")
    assert model.lower == () and "log-probabilities change by" in (model.unskipped or "")


def test_lower_layers_do_not_run_where_all_rows_are_known(llama):
    cache = LowerCache(llama, limit=LARGE)
    layout, _ = layouts(llama)
    with counted(llama) as runs:
        logps(llama, layout, cache)
        assert runs == [2, 2]
        logps(llama, layout, cache)
        assert runs == [2, 4]
        longer = one_by_one([*random_sequences(0), *random_sequences(1)], llama.pad_id)
        logps(llama, longer, cache)
        assert runs == [4, 6]
        logps(llama, longer, cache)
        assert runs == [4, 8]


def test_known_values_stay_where_others_are_missing(llama, monkeypatch):
    """So that nothing depends on what an interrupted run had already written."""
    cache = LowerCache(llama, limit=LARGE)
    sequences = random_sequences(0)
    both = one_by_one(sequences, llama.pad_id)
    logps(llama, one_by_one(sequences[:2], llama.pad_id), cache)
    for key in cache._unsaved:
        cache._unsaved[key] += 0.5  # as rounding in another company would, only larger
    partly = logps(llama, both, cache)
    assert torch.equal(logps(llama, both, cache), partly) and cache.skipped == 1
    plain = logps(llama, both)
    assert not torch.allclose(partly[:2], plain[:2], atol=1e-3)
    assert torch.equal(partly[2:], plain[2:])


def test_a_resumed_process_reads_from_disk(llama, tmp_path):
    first = LowerCache(llama, tmp_path, LARGE)
    values = [logps(llama, layout, first) for layout in layouts(llama)]
    first.save()
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    again = LowerCache(llama, tmp_path, LARGE)
    with counted(llama) as runs:
        for layout, value in zip(layouts(llama), values, strict=True):
            assert torch.equal(logps(llama, layout, again), value)
    assert runs == [0, 4]


def test_another_base_depth_or_number_of_threads_is_no_hit(llama, tmp_path, monkeypatch):
    cache = LowerCache(llama, tmp_path, LARGE)
    layout, _ = layouts(llama)
    logps(llama, layout, cache)
    cache.save()
    deeper = replace(llama, lower=(*llama.lower, llama.upper[0]), upper=llama.upper[1:])
    for model in (replace(llama, fingerprint="another"), deeper):
        other = LowerCache(model, tmp_path, LARGE)
        logps(model, layout, other)
        assert other.skipped == 0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    other = LowerCache(llama, tmp_path, LARGE)
    logps(llama, layout, other)
    assert other.skipped == 0


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("damage", ["value", "key", "cut", "empty", "other shape", "other tensors", "gone"])
def test_what_is_damaged_is_computed_anew(llama, tmp_path, damage, early):
    """Whether the tables were read before (``early``) or after."""
    layout, _ = layouts(llama)
    cache = LowerCache(llama, tmp_path, LARGE)
    expected = logps(llama, layout, cache)
    cache.save()
    (file,) = tmp_path.rglob("*.safetensors")
    before = LowerCache(llama, tmp_path, LARGE)
    spoil(file, damage)
    again = before if early else LowerCache(llama, tmp_path, LARGE)
    assert torch.equal(logps(llama, layout, again), expected)
    assert again.skipped == (early and damage in ("key", "other shape"))
    again.save()
    mended = LowerCache(llama, tmp_path, LARGE)  # finds at least what is written now
    assert torch.equal(logps(llama, layout, mended), expected)
    mended.save()
    whole = LowerCache(llama, tmp_path, LARGE)
    assert torch.equal(logps(llama, layout, whole), expected)
    assert whole.skipped == 1


def spoil(file: Path, damage: str) -> None:
    data = file.read_bytes()
    key, place = list(shards.places(file).items())[2]
    if damage == "gone":
        file.unlink()
        return
    if damage == "other tensors":
        storage.write_tensors(file, {"keys": torch.zeros(20, dtype=torch.uint8), "counts": torch.tensor([3])})
        return
    at = data.index(key) if damage == "key" else place.offset + 3
    file.write_bytes(
        {
            "cut": data[: place.offset + 5],
            "empty": b"",
            "other shape": data.replace(b",32],", b",16],", 1),
        }.get(damage, data[:at] + bytes([data[at] ^ 8]) + data[at + 1 :])
    )
    assert file.read_bytes() != data


def test_the_limit_is_kept_and_what_is_in_does_not_depend_on_interruptions(llama, tmp_path):
    limit = 20_000
    sequences = [sequence for seed in range(6) for sequence in random_sequences(seed)]
    passes = [one_by_one(sequences[start : start + 3], llama.pad_id) for start in range(0, len(sequences), 3)]

    def kept(directory: Path) -> dict[bytes, torch.Tensor]:
        files = list(directory.rglob("*.safetensors"))
        assert 0 < sum(file.stat().st_size for file in files) <= limit
        return {key: value for file in files for key, value in shards.read(file).items()}

    cache = LowerCache(llama, tmp_path / "unbroken", limit)
    for layout in passes * 2:
        logps(llama, layout, cache)
    cache.save()
    unbroken = kept(tmp_path / "unbroken")
    rows = sum(len(layout.lengths) for layout in passes)
    assert 3 < len(unbroken) < rows and 1 <= cache.skipped < len(passes)
    for end in (1, 3, len(passes)):
        cache = LowerCache(llama, tmp_path / "broken", limit)
        for layout in passes[:end]:
            logps(llama, layout, cache)
            cache.save()  # a file for each pass
    broken = kept(tmp_path / "broken")
    assert broken.keys() == unbroken.keys()
    assert all(torch.equal(broken[key], unbroken[key]) for key in broken)


def test_little_waits_in_memory(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("moalign.engine.lower_cache.SHARD_BYTES", 2000)
    cache = LowerCache(llama, tmp_path, LARGE)
    for seed in range(5):
        logps(llama, one_by_one(random_sequences(seed), llama.pad_id), cache)
        assert sum(value.nbytes for value in cache._unsaved.values()) < 2000 + 2 * 24 * 32 * 4
    assert len(list(tmp_path.rglob("*.safetensors"))) > 1


def test_a_full_disk_ends_the_run_with_an_error_that_names_the_file(llama, tmp_path):
    from moalign.errors import RunError

    cache = LowerCache(llama, tmp_path / "cache", LARGE)
    logps(llama, layouts(llama)[0], cache)
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(RunError, match="cache"):
        cache.save()


def test_copies_get_the_known_rows_too(llama):
    """Candidates together: rows are known once and copied behind."""
    names = slots(3)
    lora.add_slots(llama.policy, names)
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable(llama.policy, *names).values():
        parameter.data.normal_(std=0.1, generator=generator)
    sequences = random_sequences(0)
    rows = pack(sequences, replace(llama.packing, attention=0.0))
    layout = lay_out(sequences * 3, [[i + n * len(sequences) for i in row] for n in range(3) for row in rows], 0)
    cache, found = LowerCache(llama, limit=LARGE), []
    mixture = Mixture(tuple(names), (len(rows),) * 3)
    copies = Copies.repeated(len(rows), 3, llama.device)
    for known in (None, cache, cache):
        context = nullcontext() if known is None else known.skipping(layout, copies)
        with lora.mixed(llama.policy, mixture), context, copied(llama.upper, copies):
            found.append(llama.response_logps(layout, copies).detach())
    assert cache.skipped == 1
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(found[2], found[1])


# --- training -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


def settings_for(model_path: Path, pairs: Path, **train: Any) -> Any:
    return small_config(
        model_path,
        pairs,
        model={"path": str(model_path), "lora": {"r": 4, "alpha": 8, "layers": "upper-half", "dropout": 0.3}},
        train={"steps": 50, "pairs_per_step": 6, "lr": 2e-3} | train,
        loss={"name": "dpo", "beta": 0.3},
    )


@pytest.fixture(scope="module")
def workshop(tiny_model_path, pairs) -> Workshop:
    plan = prepare(settings_for(tiny_model_path, pairs), registry.discover())
    return open_workshop(plan, Path(), Observer(), keep_cache=False)


def trained(workshop: Workshop, all_jobs: list[Job], cache: LogpCache, cacheable: bool = True) -> tuple[Any, Any]:
    losses: list[list[float]] = [[] for _ in all_jobs]
    trainees = []
    for candidate, job, slot, mine in zip(ALIKE, all_jobs, slots(len(all_jobs)), losses, strict=False):
        drawn: Any = batch_source(candidate, workshop, slot)
        source = replace(drawn, cacheable=cacheable)
        trainees.append(Trainee(job, source, slot, noting(mine)))
    train_together(workshop.model, trainees, cache, Accelerator())
    return [result(workshop.model, workshop, trainee.slot) for trainee in trainees], losses


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("number", [1, 3])
def test_fifty_steps_with_known_rows_are_fifty_steps(workshop, tmp_path, number, checkpointing):
    model = workshop.model
    chosen = [
        replace(job, settings=job.settings.model_copy(update={"gradient_checkpointing": checkpointing}))
        for job in jobs(workshop, ALIKE)[:number]
    ]
    expected, losses = trained(workshop, chosen, LogpCache(model))
    for attempt in range(2):
        cache = LogpCache(model, lower=LowerCache(model, tmp_path, LARGE))
        with counted(model) as runs:
            found, mine = trained(workshop, chosen, cache)
        assert cache.lower is not None and cache.lower.skipped
        assert runs[0] == number if attempt else number < runs[0] < runs[1]  # ``result`` skips nothing
        for values, truth, my_losses, true_losses in zip(found, expected, mine, losses, strict=True):
            assert largest(values, truth) < 1e-5
            assert my_losses == pytest.approx(true_losses, abs=1e-5)
            assert true_losses[-1] < 0.9 * true_losses[0]


def test_candidates_with_different_rows_agree_too(workshop, tmp_path):
    """One of them cuts its steps into smaller passes."""
    model = workshop.model
    chosen = [
        replace(job, settings=job.settings.model_copy(update={"steps": 12, "tokens_per_pass": limit}))
        for job, limit in zip(jobs(workshop, ALIKE), (None, 60, None), strict=True)
    ]
    expected, _ = trained(workshop, chosen, LogpCache(model))
    for _ in range(2):
        found, _ = trained(workshop, chosen, LogpCache(model, lower=LowerCache(model, tmp_path, LARGE)))
        assert all(largest(*each) < 1e-5 for each in zip(found, expected, strict=True))


def test_what_is_sampled_is_not_kept(workshop, tmp_path):
    cache = LogpCache(workshop.model, lower=LowerCache(workshop.model, tmp_path, LARGE))
    trained(workshop, jobs(workshop, ALIKE)[:1], cache, cacheable=False)
    assert cache.lower is not None and cache.lower.skipped == 0 and not list(tmp_path.iterdir())
