"""``moalign data check``: what a reader understood of a file, before anything is trained on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moalign import registry
from moalign.errors import ConfigError

app = typer.Typer(no_args_is_help=True)


@app.callback()
def group() -> None:
    """Look at data before training on it."""


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="JSONL, JSON, CSV or Parquet.")],
    reader: Annotated[str, typer.Option(help="A reader by name; auto asks each about the first row.")] = "auto",
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of the reader, e.g. prompt=question.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Take reader, objectives and directions from a configuration.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A model directory: count its tokens as well.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Counts per objective, ties, conflicts between objectives, lengths, and what was refused with file and line."""
    from moalign import config as configuration  # YAML and all settings, which only this group of commands needs
    from moalign.config import PluginChoice
    from moalign.data import check as checking
    from moalign.data.loading import read_file
    from moalign.sweeps.plan import readers_for

    settings = configuration.load(config) if config is not None else None
    choice = PluginChoice(name=reader, **_options(option or []))
    if settings is not None and reader == "auto" and not option:
        choice = settings.data.reader
    objectives = settings.objective_names if settings is not None else ()
    directions = {name: spec.direction for name, spec in settings.objectives.items()} if settings else None
    deadline = settings.plugin_deadline if settings is not None else configuration.PLUGIN_DEADLINE
    readers = readers_for(choice, registry.discover(), deadline)
    loaded = read_file(str(file), readers, objectives, malformed="skip")
    tokeniser = None
    if tokenizer is not None:
        from moalign.data.tokenise import Tokeniser
        from moalign.engine.model import load_tokenizer

        built_in = tokenizer == configuration.BUILT_IN_MODEL
        directory = str(configuration.BUILT_IN_DIRECTORY / tokenizer) if built_in else tokenizer
        if not Path(directory).is_dir():
            raise ConfigError(f"--tokenizer: no such directory: {tokenizer}")
        tokeniser = Tokeniser.of(load_tokenizer(directory))
    report = checking.examine(loaded.records, loaded.refusals, objectives, directions=directions, tokeniser=tokeniser)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        Console().print(checking.render(report))


def _options(pairs: list[str]) -> dict[str, object]:
    import yaml

    options: dict[str, object] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--option {pair}: write it as key=value")
        if key == "name":
            raise ConfigError(f"--option {pair}: the reader's name goes to --reader")
        try:
            options[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--option {pair}: the value is not valid YAML: {error}") from None
    return options
