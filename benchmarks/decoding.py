"""What decoding two trained candidates together reaches, in the demo's world, whose best front is known exactly."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console
from torch import Tensor, nn

from benchmarks import measure, tables
from moalign import config, lora, recipes
from moalign.api import Decoder, NextToken, Request
from moalign.decode import build
from moalign.demo import world as worlds
from moalign.demo.enumeration import Enumeration, enumerate_replies, reply_logps
from moalign.demo.world import World
from moalign.engine import model as models
from moalign.engine.model import TRAINED, LanguageModel
from moalign.lora import mixing
from moalign.registry import discover
from moalign.sweeps import front, run
from moalign.sweeps.observe import Observer

CHANGES = ("search.points=2", "train.together=2")
POINTS = 11

Policy = Callable[[float], Tensor]  # weight of the first objective -> log-probabilities of all replies [P,R]


class Spoken(nn.Module):
    """A model whose logits are what a decoder makes of several speakers, at every position at once."""

    def __init__(self, model: LanguageModel, slots: Mapping[str, str], decoder: Decoder, request: Request) -> None:
        super().__init__()
        self.held, self.slots, self.decoder, self.request = [model], slots, decoder, request

    def forward(self, **inputs: Any) -> Any:
        (model,) = self.held
        heard = []
        for name in self.decoder.speakers(self.request):
            with lora.active(model.policy, None if name is None else self.slots[name]):
                heard.append(model.policy(**inputs).logits)
        shape = heard[0].shape
        logits = torch.stack([each.flatten(0, 1) for each in heard])
        nothing = torch.zeros(len(heard), logits.shape[1], dtype=torch.float64)
        at = NextToken(inputs["input_ids"].flatten()[:, None], logits, nothing, _cannot_look)
        return SimpleNamespace(logits=self.decoder.scores(self.request, at).view(shape))


def _cannot_look(tokens: Tensor) -> Tensor:
    raise NotImplementedError("what stands ahead is no part of the trees")


def main(
    seed: Annotated[list[int] | None, typer.Option(min=0, help="may be repeated; default 0 1")] = None,
    further: Annotated[
        list[str] | None, typer.Option("--set", help="key.path=value, for the sweep; may be repeated")
    ] = None,
    divergence: Annotated[
        list[str] | None, typer.Option(help="of multi-objective decoding; may be repeated; default reverse-kl")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="of torch; default: torch's own choice")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON; a Markdown table is written beside it")] = None,
) -> None:
    """Two candidates are trained, one for each objective; what follows needs no training. All by enumeration."""
    if threads:
        torch.set_num_threads(threads)
    console = Console()
    report = tables.begin("decoding", measure.command_line("benchmarks.decoding"), None)
    for each in seed or (0, 1):
        with console.status(f"seed {each}"):
            report["results"].append(reached(each, further or (), divergence or ["reverse-kl"]))
        if output is not None:
            tables.write(output, report, tables.markdown("Decoding", report, _about(), [table_of(report["results"])]))
    tables.show([table_of(report["results"])], console)


def reached(seed: int, further: Sequence[str], divergences: Sequence[str]) -> dict[str, Any]:
    """Front share, its worst, and where each preference's own policy stands, for every way."""
    with tempfile.TemporaryDirectory(prefix="moalign-decoding-") as folder:
        directory = Path(folder) / "run"
        changes = (*CHANGES, f"seed={seed}", *further)
        settings = config.from_mapping(yaml.safe_load(recipes.read("rebel")), changes)
        start = time.perf_counter()
        run.start(settings, directory, discover(), Observer())
        seconds = time.perf_counter() - start
        found = measured(directory, divergences)
    return found | {"seed": seed, "changes": list(changes), "seconds": seconds} | _hardware()


def _hardware() -> dict[str, Any]:
    return {"hardware": measure.hardware(torch.device("cpu"))}


@torch.no_grad()
def measured(directory: Path, divergences: Sequence[str], points: int = POINTS) -> dict[str, Any]:
    """Of a run directory with a candidate for each of two objectives."""
    record = front.read_record(directory)
    settings = config.Config.model_validate(record["config"])
    world = worlds.tiny_world(objectives=settings.objective_names)
    model = models.load(settings.model_directory, settings.model, torch.device("cpu"))
    replies = enumerate_replies(model.tokeniser.tokenizer, world.prompts)
    trained = {
        point["preference"]["values"][world.objectives[0]]: point["id"] for point in front.read(directory)["points"]
    }
    ends = [trained[1.0], trained[0.0]]
    slots = dict(zip(ends, ("first", "second"), strict=True))
    lora.add_slots(model.policy, list(slots.values()))
    for name, slot in slots.items():
        lora.read(model.policy, slot, directory / "candidates" / name, model.fingerprint)
    with lora.active(model.policy, None):
        reference = reply_logps(model.policy, replies)
    weights = [place / (points - 1) for place in range(points)]
    ways = {
        name: [policy(weight) for weight in weights]
        for name, policy in _ways(model, directory, ends, slots, replies, divergences).items()
    }
    found = {name: front_of(world, reference, policies, weights) for name, policies in ways.items()}
    one_hot = [ways["adapters mixed (soup)"][-1], ways["adapters mixed (soup)"][0]]
    found["the two candidates alone"] = front_of(world, reference, one_hot, [1.0, 0.0])
    found["mix of whole replies (not to be sampled)"] = _whole(world, reference, one_hot, weights)
    return {"ways": found, "weights": weights}


def _ways(
    model: LanguageModel,
    directory: Path,
    ends: Sequence[str],
    slots: Mapping[str, str],
    replies: Enumeration,
    divergences: Sequence[str],
) -> dict[str, Policy]:
    adapters = [mixing.read(directory / "candidates" / name) for name in ends]

    def spoken(**options: Any) -> Policy:
        decoder = build("multi-objective", **options)

        def policy(weight: float) -> Tensor:
            request = Request(shares=dict(zip(ends, (weight, 1 - weight), strict=True)))
            return reply_logps(Spoken(model, slots, decoder, request), replies)

        return policy

    def soup(weight: float) -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            mix, _ = mixing.soup(adapters, (weight, 1 - weight), r=adapters[0].r)
            mixing.write(mix, Path(folder))
            lora.read(model.policy, TRAINED, Path(folder), model.fingerprint)
        with lora.active(model.policy, TRAINED):
            return reply_logps(model.policy, replies)

    mixed = {f"multi-objective decoding, {divergence}": spoken(divergence=divergence) for divergence in divergences}
    return mixed | {"adapters mixed (soup)": soup}


def front_of(world: World, reference: Tensor, policies: Sequence[Tensor], weights: Sequence[float]) -> dict[str, Any]:
    values = [worlds.evaluate(world, policy, reference) for policy in policies]
    shares = worlds.shares(world, reference, torch.stack([value.f for value in values]))
    return {
        "front_share": shares.front_share,
        "front_share_worst": shares.front_share_worst,
        "hypervolume_share": shares.hypervolume_share,
        "own": _own(world, reference, torch.stack([value.f for value in values]), weights),
        "f": [value.f.tolist() for value in values],
        "kl": [value.kl for value in values],
        "mass": min(value.mass for value in values),
    }


def _own(world: World, reference: Tensor, points: Tensor, weights: Sequence[float]) -> list[float]:
    """For each preference the share of the possible gain that its own policy has, whatever the others have."""
    base = worlds.outcomes(reference)
    origin = worlds.values(world, base, base)[0]
    found = []
    for point, weight in zip(points, weights, strict=True):
        vector = torch.tensor([weight, 1 - weight], dtype=torch.float64)
        most = worlds.best(world, base, vector.tolist())
        found.append(float((vector @ (point - origin)) / (most - vector @ origin)))
    return found


def _whole(world: World, reference: Tensor, ends: Sequence[Tensor], weights: Sequence[float]) -> dict[str, Any]:
    """pi_1(y)^w pi_2(y)^(1-w) / Z over whole replies: what token by token comes near to."""
    first, second = (worlds.outcomes(policy) for policy in ends)
    policies = [(weight * first + (1 - weight) * second).log_softmax(-1)[:, :-1] for weight in weights]
    return front_of(world, reference, policies, weights)


def table_of(results: Sequence[Mapping[str, Any]]) -> tables.Table:
    rows = []
    for way in results[0]["ways"]:
        found = [result["ways"][way] for result in results]
        cells = [tables.mean([each[key] for each in found]) for key in ("front_share", "front_share_worst")]
        cells += [
            tables.mean([statistics.mean(each["own"]) for each in found]),
            tables.mean([min(each["own"]) for each in found]),
        ]
        cells += [f"{min(each['mass'] for each in found):.3f}"]
        rows.append([way, *cells])
    columns = ["11 preferences from 2 candidates", "front share", "worst served", "own policy", "its worst", "mass"]
    seconds = ", ".join(f"{result['seconds']:.0f} s" for result in results)
    return tables.Table(f"{len(results)} seeds", columns, rows, [f"Training of the two candidates: {seconds}"])


def _about() -> list[str]:
    return [
        "Front share is the best of the points for each of 21 preferences; `own policy` is the mean over the 11 "
        "preferences of what the policy made for each gains, as a share of the possible gain. `mass` is the least "
        "probability of a well-formed reply."
    ]


if __name__ == "__main__":
    typer.run(main)
