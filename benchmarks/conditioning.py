"""One model for any preference, in the demo's world: what it reaches for 21 preferences, beside candidates for each."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks import measure, tables
from benchmarks.decoding import front_of
from moalign import config, lora, recipes
from moalign.demo import world as worlds
from moalign.demo.enumeration import Enumeration, behind, enumerate_replies, reply_logps
from moalign.demo.world import World
from moalign.engine import model as models
from moalign.engine.model import TRAINED, LanguageModel
from moalign.lora import mixing
from moalign.registry import discover
from moalign.sweeps import front, run, steering
from moalign.sweeps.archive import Archive
from moalign.sweeps.observe import Observer

POINTS = 21
WAYS = "benchmarks/conditioning.yaml"


def main(
    way: Annotated[
        list[str] | None, typer.Option(help="may be repeated; default: all of benchmarks/conditioning.yaml")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="may be repeated; default 0 1 2")] = None,
    further: Annotated[
        list[str] | None, typer.Option("--set", help="key.path=value, for every sweep; may be repeated")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="of torch; default: torch's own choice")] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON, to which results are added; a Markdown table is written beside it")
    ] = None,
) -> None:
    """Each way is trained as benchmarks/conditioning.yaml says, and asked for 21 even preferences. By enumeration."""
    if threads:
        torch.set_num_threads(threads)
    console = Console()
    known: dict[str, list[str]] = yaml.safe_load(Path(WAYS).read_text())
    report = tables.begin("conditioning", measure.command_line("benchmarks.conditioning"), output)
    for each in seed or (0, 1, 2):
        for name in way or known:
            with console.status(f"{name}, seed {each}"):
                report["results"].append(reached(name, known[name], each, further or ()))
            if output is not None:
                text = tables.markdown("One model for any preference", report, _about(), [table_of(report["results"])])
                tables.write(output, report, text)
    tables.show([table_of(report["results"])], console)


def reached(name: str, changes: Sequence[str], seed: int, further: Sequence[str]) -> dict[str, Any]:
    """What one way reaches with one seed, and what it took."""
    with tempfile.TemporaryDirectory(prefix="moalign-conditioning-") as folder:
        directory = Path(folder) / "run"
        settings = config.from_mapping(yaml.safe_load(recipes.read("rebel")), [*changes, f"seed={seed}", *further])
        start = time.perf_counter()
        run.start(settings, directory, discover(), Observer())
        seconds = time.perf_counter() - start
        found = measured(directory)
    hardware = measure.hardware(torch.device("cpu"))
    return found | {"way": name, "changes": list(changes), "seed": seed, "seconds": seconds, "hardware": hardware}


@torch.no_grad()
def measured(directory: Path, points: int = POINTS) -> dict[str, Any]:
    """The run asked for even preferences, each answered by the adapter, and the text, that it has for it."""
    archive = Archive.open(directory)
    settings, trained = archive.config, [outcome for outcome in archive.history if outcome.kind == "trained"]
    world = worlds.tiny_world(objectives=settings.objective_names)
    model = models.load(settings.model_directory, settings.model, torch.device("cpu"))
    replies = enumerate_replies(model.tokeniser.tokenizer, world.prompts)
    with lora.active(model.policy, None):
        reference = reply_logps(model.policy, replies)
    weights = [place / (points - 1) for place in range(points)]
    policies = [_policy(archive, model, replies, world, weight) for weight in weights]
    expected = torch.stack([worlds.evaluate(world, policy, reference).expected for policy in policies])
    return front_of(world, reference, policies, weights) | {
        "expected": expected.tolist(),
        "spearman": {
            name: _spearman(expected[:, place], [weight if place == 0 else 1 - weight for weight in weights])
            for place, name in enumerate(world.objectives)
        },
        "trained": len(trained),
        "tokens": sum(point["tokens"] for point in front.read(directory)["points"]),
    }


def _policy(archive: Archive, model: LanguageModel, replies: Enumeration, world: World, weight: float) -> Tensor:
    """Log-probabilities of all replies of the policy that the run has for this weight of the first objective."""
    first, second = world.objectives
    mix = archive.for_preference({first: weight, second: 1 - weight})
    adapter, _ = steering.adapter(archive, mix, archive.config.model.lora.r)
    with tempfile.TemporaryDirectory() as folder:
        mixing.write(adapter, Path(folder))
        lora.read(model.policy, TRAINED, Path(folder), model.fingerprint)
    text = steering.text(archive, mix)
    if text:
        replies = enumerate_replies(model.tokeniser.tokenizer, world.prompts, partial(behind, model.tokeniser, text))
    with lora.active(model.policy, TRAINED):
        return reply_logps(model.policy, replies)


def _spearman(scores: Tensor, asked: Sequence[float]) -> float:
    return float(spearmanr(asked, scores.numpy()).statistic)


def table_of(results: Sequence[Mapping[str, Any]]) -> tables.Table:
    """A row for each way, over its seeds."""
    rows = []
    for way in dict.fromkeys(result["way"] for result in results):
        found = [result for result in results if result["way"] == way]
        cells = [tables.mean([each[key] for each in found]) for key in ("front_share", "front_share_worst")]
        cells += [
            tables.mean([statistics.mean(each["own"]) for each in found]),
            tables.mean([min(each["own"]) for each in found]),
        ]
        cells += [f"{min(min(each['spearman'].values()) for each in found):.3f}"]
        cells += [f"{found[0]['trained']}", f"{statistics.mean(each['tokens'] for each in found) / 1e3:.0f}"]
        cells += [f"{statistics.mean(each['seconds'] for each in found):.0f}", str(len(found))]
        rows.append([way, *cells])
    columns = ["asked for 21 preferences", "front share", "worst served", "own policy", "its worst"]
    columns += ["least Spearman", "trained", "thousand tokens", "seconds", "seeds"]
    return tables.Table("21 preferences", columns, rows)


def _about() -> list[str]:
    return [
        "Front share is the best of the points for each of 21 preferences; `own policy` is the mean over the 21 of "
        "what the policy asked for each gains, as a share of the possible gain. `least Spearman` is the smallest rank "
        "correlation, over objectives and seeds, of asked weight and expected reward. Tokens are response tokens "
        "trained on, seconds those of the whole sweep, evaluation of its points among them. ±: standard deviation over "
        "the seeds.",
    ]


if __name__ == "__main__":
    typer.run(main)
