"""What leaves a run directory: an adapter for plain peft, a merged model for plain transformers, or a bundle of
adapters with a manifest (docs/bundle.md). Each appears whole or not at all, and needs nothing of ours to be loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from moalign import lora, preference, storage
from moalign.engine import model as models
from moalign.errors import RunError
from moalign.lora import mixing, ordinary
from moalign.lora.mixing import Adapter, Truncation
from moalign.sweeps import front, steering
from moalign.sweeps.archive import Archive, Mix

NOTE = "moalign.json"
BUNDLE = "bundle.json"
FORMAT = {"format": "moalign-bundle", "version": 1}
GENERATION = "generation_config.json"
VECTORS = "preference_embedding.safetensors"
USE_OF_VECTORS = (
    "input embeddings (inputs_embeds) that follow the first token of every prompt where that is the tokenizer's BOS, "
    "and else stand in front of it"
)


@dataclass(frozen=True)
class Exported:
    """What was written: an adapter of rank ``r``, or a model; ``lost``: what a smaller rank than its own lost of it."""

    r: int
    lost: Truncation


def write_adapter(archive: Archive, mix: Mix, to: Path, *, base: str | None = None, r: int | None = None) -> Exported:
    """The adapter of a mix as a folder that ``PeftModel.from_pretrained`` loads; the base model is not needed for it.

    ``base``: what the adapter is to call its base model, if not as the run does. Raises RunError where ``to`` holds
    something already.
    """
    made, lost = steering.adapter(archive, mix, r)
    with _new(archive, to) as folder:
        mixing.write(_calling(made, archive, base), folder)
        told = _told(archive, mix, folder)
        storage.write_json(folder / NOTE, _note(archive, mix, made, lost) | told)
    return Exported(made.r, lost)


def write_merged(
    archive: Archive, mix: Mix, to: Path, *, base: str | None = None, r: int | None = None, dtype: str = "stored"
) -> Exported:
    """The base with a mix merged into it, and the tokenizer: a folder that transformers loads.

    ``dtype``: of the written weights; "stored": that of the base's own files, whichever the run trained on.
    """
    made, lost = steering.adapter(archive, mix, r)
    with _new(archive, to) as folder:
        merged = ordinary.merge(ordinary.attach(_base_in(archive, base, dtype), made))
        _save(merged, folder)
        models.load_tokenizer(base or archive.base).save_pretrained(folder)
        kind = {"merged": True, "dtype": str(merged.dtype).removeprefix("torch.")}
        told = _told(archive, mix, folder)
        storage.write_json(folder / NOTE, _note(archive, mix, made, lost) | told | kind)
    return Exported(made.r, lost)


def _base_in(archive: Archive, base: str | None, dtype: str) -> Any:
    """The base model, known to be the run's, in another precision than the one in which that can be seen."""
    device = torch.device("cpu")
    loaded = steering.verified_base(archive, base, device)
    if dtype == str(loaded.dtype).removeprefix("torch."):
        return loaded
    del loaded  # two of them at once may be too much
    return models.load_base(base or archive.base, dtype, device)


def _new(archive: Archive, to: Path) -> AbstractContextManager[Path]:
    """``to`` as a new folder. Raises RunError where it holds something, or lies in the run, which is not to grow."""
    if to.resolve().is_relative_to(archive.directory.resolve()):
        raise RunError(f"{to} lies in the run directory {archive.directory}, which is to stay as it is; choose another")
    return storage.new_directory(to)


def _save(model: Any, folder: Path) -> None:
    """With the generation settings that came with the base, also those that transformers would refuse to write."""
    settings = json.loads(model.generation_config.to_json_string())
    model.generation_config = type(model.generation_config)()
    model.save_pretrained(folder)
    storage.write_json(folder / GENERATION, settings)


def write_bundle(archive: Archive, to: Path, *, everything: bool = False, base: str | None = None) -> dict[str, Any]:
    """The front's adapters (``everything``: also the dominated ones), each in a folder, and ``bundle.json``; returns
    the content of the latter."""
    result = front.read(archive.directory)
    points = [point for point in result["points"] if everything or not point["dominated"]]
    archive.finished()  # or it says why there is nothing
    with _new(archive, to) as folder:
        entries = [_bundled(archive, point, base, folder) for point in points]
        content = _manifest(archive, result, entries, base)
        storage.write_json(folder / BUNDLE, content)
    return content


def _bundled(archive: Archive, point: Mapping[str, Any], base: str | None, folder: Path) -> dict[str, Any]:
    """Write one adapter; its entry in the manifest."""
    made, _ = steering.adapter(archive, Mix({point["id"]: 1.0}))
    place = f"adapters/{point['id']}"
    mixing.write(_calling(made, archive, base), folder / place)
    kept = ("preference", "scores", "stderr", "kl", "kind", "parents", "dominated")
    return {
        "name": point["id"],
        "path": place,
        "sha256": storage.sha256_of(folder / place / lora.WEIGHTS_FILE),
        **_told(archive, Mix({point["id"]: 1.0}), folder / place),
        **_form(made),
        **{key: point[key] for key in kept},
    }


def _manifest(
    archive: Archive, result: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], base: str | None
) -> dict[str, Any]:
    return {
        **FORMAT,
        "moalign": metadata.version("moalign"),
        "run": archive.record.get("id"),
        "base": _base(archive, base) | {"measured": result["base"]},
        "objectives": result["objectives"],
        "evaluation": result["evaluation"],
        "largest_r": max(entry["r"] for entry in entries),
        "adapters": list(entries),
    }


def _calling(adapter: Adapter, archive: Archive, base: str | None) -> Adapter:
    """The adapter with the base model's name that others are to find it by."""
    named = {"base_model_name_or_path": base or archive.base}
    return replace(adapter, config={**adapter.config, **named})


def _base(archive: Archive, base: str | None) -> dict[str, Any]:
    return {"name": base or archive.base, "fingerprint": archive.record["base"]}


def _told(archive: Archive, mix: Mix, folder: Path) -> dict[str, Any]:
    """What of a point stands in front of every prompt: the text, and a file of vectors, which is written."""
    vectors = steering.vectors(archive, mix)
    if vectors is not None:
        storage.write_tensors(folder / VECTORS, {"vectors": vectors}, {"use": USE_OF_VECTORS})
    return {"text": steering.text(archive, mix), "vectors": None if vectors is None else VECTORS}


def _form(adapter: Adapter) -> dict[str, Any]:
    return {"r": adapter.r, "alpha": adapter.alpha, "rslora": adapter.rslora}


def _note(archive: Archive, mix: Mix, adapter: Adapter, lost: Truncation) -> dict[str, Any]:
    """Where an exported adapter or model comes from, for whoever finds it later."""
    return {
        "moalign": metadata.version("moalign"),
        "run": archive.record.get("id"),
        "base": {"fingerprint": archive.record["base"]},
        "shares": dict(mix.shares),
        "preference": None if mix.wanted is None else preference.to_json(mix.wanted),
        "draw": None if mix.draw is None else asdict(mix.draw),
        "lost_to_rank": lost.total,
        **_form(adapter),
    }
