"""What offline losses learn from in the demo's world: the same sampled responses, as judged pairs and with scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Literal

from benchmarks.front_peers import HELD_OUT_RESPONSES, PROMPTS, RESPONSES, judged, sampled
from moalign.config import Config
from moalign.seeds import derive

Kind = Literal["pairs", "scores"]
READERS: dict[Kind, str] = {
    "pairs": "preference",
    "scores": "{name: columns, responses: responses, scores: {helpful: helpful, harmless: harmless}}",
}


def write(settings: Config, directory: Path, kind: Kind, noise: float, *, swapped: bool = False) -> tuple[str, ...]:
    """Write a training file, of whose labels the share ``noise`` is wrong, and a held-out file without a wrong one;
    returns the changes that name the two. A function of the configuration's seed; ``settings`` is one of ``judged``.
    ``swapped``: of pairs, the other one of the two is chosen everywhere.
    """
    from moalign.demo import grammar

    some = Random(derive(settings.seed, "prompts")).sample(grammar.TRAIN_PROMPTS, PROMPTS)
    for name, prompts, responses, wrong in (
        ("training", some, RESPONSES, noise),
        ("held-out", grammar.HELD_OUT_PROMPTS, HELD_OUT_RESPONSES, 0.0),
    ):
        make = partial(labelled, swapped=swapped) if kind == "pairs" else scored
        rows = make(settings, prompts, responses, derive(settings.seed, name), wrong)
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (
        f"data.path={directory}/training.jsonl",
        f"data.held_out_path={directory}/held-out.jsonl",
        f"data.reader={READERS[kind]}",
    )


def labelled(
    settings: Config, prompts: Sequence[str], responses: int, seed: int, noise: float, *, swapped: bool = False
) -> Iterator[dict[str, Any]]:
    """A row for each pair and objective; a wrong label is the other one, and so are all if they are ``swapped``."""
    rng = Random(derive(seed, "noise"))
    for pair in judged(settings, prompts, responses, seed):
        for objective in settings.objective_names:
            row = pair.row(objective)
            if (rng.random() < noise) != swapped:
                row = row | {"chosen": row["rejected"], "rejected": row["chosen"]}
            yield row | {"objective": objective}


def scored(
    settings: Config, prompts: Sequence[str], responses: int, seed: int, noise: float
) -> Iterator[dict[str, Any]]:
    """A row for each prompt, the same response once; a wrong score is that of another response to the prompt."""
    from moalign.demo import grammar

    rng = Random(derive(seed, "noise"))
    for prompt, texts in zip(prompts, sampled(settings, prompts, responses, seed), strict=True):
        each = list(dict.fromkeys(texts))
        row: dict[str, Any] = {"prompt": prompt, "responses": each}
        for objective in settings.objective_names:
            true = [grammar.score(prompt, text)[objective] for text in each]
            row[objective] = [
                rng.choice([*true[:place], *true[place + 1 :]]) if len(each) > 1 and rng.random() < noise else score
                for place, score in enumerate(true)
            ]
        yield row
