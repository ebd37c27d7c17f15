"""``moalign evaluate``: diagnostics of a finished run, of its policies and of the rewards that it trusts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from moalign.commands import steered
from moalign.commands.steered import Base, Candidate, Run


def evaluate(
    run_directory: Run,
    candidate: Candidate = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Labelled pairs in place of those that the run held out; all are used."),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            "--reward",
            metavar="NAME=PLUGIN",
            help="A reward in place of an objective's, or a further one, e.g. 'gold={name: length}'; several times.",
        ),
    ] = None,
    gold: Annotated[str | None, typer.Option(metavar="NAME", help="The reward that is meant.")] = None,
    proxy: Annotated[
        str | None, typer.Option(metavar="NAME", help="The reward that stands for it; default: every other one.")
    ] = None,
    correct: Annotated[
        float | None, typer.Option(metavar="NUMBER", help="Gold reward from which a response is right.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(metavar="NUMBER", help="Proxy reward from which a response is kept, with --correct.")
    ] = None,
    wished: Annotated[int, typer.Option(min=1, help="Right responses to a prompt that are enough.")] = 8,
    share: Annotated[
        float, typer.Option(metavar="SHARE", help="Of annotators who prefer the chosen response; data does not say.")
    ] = 0.75,
    beta: Annotated[
        list[float] | None,
        typer.Option(metavar="NUMBER", help="For the idealised accuracy; several times; default 0.01 to 10."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Responses to each prompt; default: as the run was evaluated.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the samples; default: the run's.")] = None,
    base: Base = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda; default: an accelerator if there is one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON object to this file too.")] = None,
) -> None:
    """Ask a run what its front does not say: ranking, over-optimisation, proxies, length, conflicts of objectives.

    It runs every candidate on the held-out pairs and prompts. Asks the rewards that run.json names: read it first if
    the directory is somebody else's.
    """
    from moalign import registry, storage
    from moalign.diagnostics.evaluation import evaluate as ask
    from moalign.diagnostics.question import Question, rewards_of
    from moalign.diagnostics.ranking import BETAS

    question = Question(
        candidate=candidate,
        data=data,
        rewards=rewards_of(reward or ()),
        proxy=proxy,
        gold=gold,
        threshold=threshold,
        correct=correct,
        wished=wished,
        share=share,
        betas=tuple(beta or BETAS),
        samples=samples,
        seed=seed,
        base=base,
        device=device or steered.device(),
    )
    steered.note_unfinished(run_directory)
    found = ask(run_directory, registry.discover(), question, steered.phase)
    if as_json:
        sys.stdout.write(storage.canonical_json(found))
    else:
        _print(Console(), found)
    if out is not None:
        storage.write_json(out, found)  # after it is shown: what was computed is not lost where nothing can be written
    if out is not None and not as_json:
        Console().print(f"all figures: {out}", highlight=False, markup=False, soft_wrap=True)


def _print(console: Console, found: Mapping[str, Any]) -> None:
    from moalign.report import evaluation, wording

    for table in evaluation.tables(found):
        console.print(table)
    for line in evaluation.lines(found):
        console.print(wording.printable(line), highlight=False, markup=False, soft_wrap=True)
