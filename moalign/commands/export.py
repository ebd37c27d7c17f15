"""``moalign export``: adapters, merged models and bundles that need nothing of ours to be loaded."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from moalign.commands import steered
from moalign.commands.steered import Base, Candidate, Posterior, Prefer, Rank, Run, Seed
from moalign.errors import UserError
from moalign.sweeps import dtypes

# What vLLM takes for --max-lora-rank, in all versions that have it; larger ranks it does not serve.
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def export(
    run_directory: Run,
    to: Annotated[Path, typer.Option(metavar="DIR", help="Where to write it: a new or empty folder.")],
    prefer: Prefer = None,
    candidate: Candidate = None,
    posterior: Posterior = None,
    draw: Seed = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write base and adapter as one model, with its tokenizer.")
    ] = False,
    rank: Rank = None,
    dtype: Annotated[
        str, typer.Option(help="Of a merged model's weights: stored (as the base's files), float32, bfloat16, float16.")
    ] = "stored",
    base: Base = None,
    bundle: Annotated[bool, typer.Option("--bundle", help="Write all adapters of the front, with a manifest.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="With --bundle: the dominated ones as well.")] = False,
) -> None:
    """Write an adapter for peft, a merged model for transformers, or a bundle of adapters for a server such as vLLM."""
    point = prefer or candidate or posterior is not None or draw is not None
    _refuse_contradictions(bool(point), merge, rank, dtype, bundle, everything)
    if bundle:
        _bundle(run_directory, to, everything, base)
        return
    archive, mix = steered.chosen(run_directory, prefer, candidate, posterior, draw)
    steered.say(mix)
    if merge:
        steered.phase("loading the model and merging")
    from moalign.sweeps import export as exporting
    from moalign.sweeps import steering

    if merge:
        written = exporting.write_merged(archive, mix, to, base=base, r=rank, dtype=dtype)
    else:
        written = exporting.write_adapter(archive, mix, to, base=base, r=rank)
    if rank is not None:
        _plain(f"rank {written.r} loses {100 * written.lost.total:.3g} % of the update (Frobenius norm)")
    load = "AutoModelForCausalLM.from_pretrained" if merge else "PeftModel.from_pretrained"
    if text := steering.text(archive, mix):
        steered.note(f"it is told its preference in text, which has to stand in front of every prompt: {text!r}")
    what = "model and tokenizer" if merge else f"adapter of rank {written.r}"
    _plain(f"{what}, for {load}: {to}")
    if (to / exporting.VECTORS).exists():
        _plain(f"what tells it the preference: {to / exporting.VECTORS}, {exporting.USE_OF_VECTORS}")


def _bundle(run_directory: Path, to: Path, everything: bool, base: str | None) -> None:
    from moalign.sweeps import export as exporting
    from moalign.sweeps.archive import Archive

    archive = Archive.open(run_directory)
    steered.note_unfinished(run_directory)
    content = exporting.write_bundle(archive, to, everything=everything, base=base)
    count = len(content["adapters"])
    _plain(f"{count} adapter{'s' * (count > 1)}, largest rank {content['largest_r']}: {to / exporting.BUNDLE}\n")
    if any(entry["text"] for entry in content["adapters"]):
        steered.note("the model is told its preference in text: before every prompt stands the `text` of bundle.json")
    _plain(serving(content, to, base or archive.base))


def _refuse_contradictions(
    point: bool, merge: bool, rank: int | None, dtype: str, bundle: bool, everything: bool
) -> None:
    dtypes.check(dtype, merge)
    if bundle and (point or merge or rank is not None):
        raise UserError(
            "--bundle writes the adapters of the front as they are, without --prefer, --candidate, --posterior, "
            "--merge or --rank"
        )
    if everything and not bundle:
        raise UserError("--all is for bundles; add --bundle")


def serving(content: Mapping[str, Any], folder: Path, base: str) -> str:
    """The command with which vLLM serves a bundle, each adapter under its name."""
    largest = content["largest_r"]
    rank = next((served for served in SERVED_RANKS if served >= largest), largest)
    modules = " ".join(_module(entry["name"], folder / entry["path"]) for entry in content["adapters"])
    command = f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {rank} --lora-modules {modules}"
    return command if largest <= SERVED_RANKS[-1] else f"{command}\n# vLLM serves ranks up to {SERVED_RANKS[-1]}"


def _module(name: str, path: Path) -> str:
    """name=path, or in JSON where an equals sign within would be taken for the one between."""
    plain = f"{name}={path}"
    return shlex.quote(json.dumps({"name": name, "path": str(path)}) if plain.count("=") > 1 else plain)


def _plain(text: str) -> None:
    """Long lines are left to the terminal, so that commands and paths stay whole where the output is a file."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
