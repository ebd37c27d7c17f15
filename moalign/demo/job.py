"""The demo: an ordinary sweep on the tiny assistant, then every candidate measured exactly by enumeration."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from moalign import config, lora, recipes, storage
from moalign.config import BUILT_IN_MODEL, Config
from moalign.demo import world as worlds
from moalign.demo.enumeration import Enumeration, behind, enumerate_replies, reply_logps
from moalign.demo.world import Value, World
from moalign.engine import model as models
from moalign.engine.model import TRAINED, LanguageModel
from moalign.engine.row_conditions import RowConditions, conditioned, place_of_vectors, with_places
from moalign.errors import RunError
from moalign.registry import Registry
from moalign.sweeps import front, journal, outcomes, run, steering
from moalign.sweeps.archive import Archive
from moalign.sweeps.observe import Observer

RECIPE = "rebel"
CEILING = Path(__file__).parent / "ceiling.json"
EVALUATION = "exact E[reward] - beta KL by enumeration of every reply on the held-out prompts, no sampling"


def settings() -> Config:
    """The demo's configuration: the recipe that `moalign init --recipe rebel` writes."""
    return config.from_mapping(yaml.safe_load(recipes.read(RECIPE)))


def run_demo(directory: Path, registry: Registry, observer: Observer) -> dict[str, Any]:
    """Run the demo, or go on with it, and return its front with the shares of the exact one."""
    if (directory / "run.json").exists():
        if not is_known_world(directory):
            raise RunError(f"{directory} holds another run, not the demo; choose another --out")
        run.resume(directory, registry, observer)
    else:
        run.start(settings(), directory, registry, observer)
    return measure(directory, observer)


def is_known_world(directory: Path) -> bool:
    """Whether a run's objectives are the world's own, on its model and prompts, so that ``measure`` applies."""
    content = front.read_config(directory)
    rewards = [objective.reward for objective in content.objectives.values()]
    beta = content.loss.options.get("beta")
    if content.evaluate.prompts is not None:
        return False  # who evaluates on some of the prompts wants it quick
    if beta != worlds.BETA or any(objective.direction != "max" for objective in content.objectives.values()):
        return False
    own = all(reward is not None and reward.name == BUILT_IN_MODEL for reward in rewards)
    named = all(
        reward is not None and reward.options.get("objective") == name
        for name, reward in zip(content.objectives, rewards, strict=True)
    )
    return own and named and content.model.path == content.data.path == BUILT_IN_MODEL


@torch.no_grad()
def measure(directory: Path, observer: Observer) -> dict[str, Any]:
    """Enumerate every reply under every candidate; write ``world.json`` and the front made from it."""
    observer.on_phase("measuring every candidate exactly")
    content = front.read_config(directory)
    names = content.objective_names
    world = worlds.tiny_world(objectives=names)
    model = models.load(content.model_directory, content.model, torch.device("cpu"))
    tokenizer, archive = model.tokeniser.tokenizer, Archive.open(directory)
    replies = enumerate_replies(tokenizer, world.prompts)
    with lora.active(model.policy, None):
        reference = reply_logps(model.policy, replies)
    with front.as_written(directory):
        reached = outcomes.history(journal.of_run(directory), names)
    ids = [outcome.id for outcome in reached if outcome.status == "done"]
    values = {}
    for name in ids:
        point, read, conditions = archive.of_candidate(name), replies, None
        if text := steering.text(archive, point):
            read = enumerate_replies(tokenizer, world.prompts, partial(behind, model.tokeniser, text))
        if (vectors := steering.vectors(archive, point)) is not None:
            conditions = RowConditions(vectors=vectors[None], place=place_of_vectors(model.tokeniser))
            places = partial(with_places, number=len(vectors), tokeniser=model.tokeniser)
            read = enumerate_replies(tokenizer, world.prompts, asked=places)
        values[name] = _value(model, directory / "candidates" / name, world, read, reference, conditions)
    storage.write_json(directory / front.WORLD, _content(world, reference, values))
    return front.write(directory)


def _value(
    model: LanguageModel,
    folder: Path,
    world: World,
    replies: Enumeration,
    reference: torch.Tensor,
    conditions: RowConditions | None,
) -> Value:
    """``conditions``: of one row, the same for all."""
    lora.read(model.policy, TRAINED, folder, model.fingerprint)
    each = None if conditions is None else conditions.take([0] * len(replies.input_ids))
    with conditioned(model, TRAINED, each):
        return worlds.evaluate(world, reply_logps(model.policy, replies), reference)


def _content(world: World, reference: torch.Tensor, values: dict[str, Value]) -> dict[str, Any]:
    names = world.objectives
    shares = worlds.shares(world, reference, torch.stack([value.f for value in values.values()]))
    weights = worlds.even_weights(len(names), 20)
    exact = worlds.exact_front(world, reference, weights)
    return {
        "kl_price": world.beta,
        "points": {name: _point(names, value) for name, value in values.items()},
        "base": {"scores": _named(names, worlds.evaluate(world, reference, reference).f), "stderr": {}},
        "front": {
            "evaluation": EVALUATION,
            "front_share": shares.front_share,
            "front_share_worst": shares.front_share_worst,
            "hypervolume_share": shares.hypervolume_share,
            "exact_front": [
                {"weights": dict(zip(names, w, strict=True)), "scores": _named(names, f)}
                for w, f in zip(weights, exact, strict=True)
            ],
        }
        | _ceiling(names),
    }


def _point(names: tuple[str, ...], value: Value) -> dict[str, Any]:
    expected = {f"E {name}": reward for name, reward in _named(names, value.expected).items()}
    return {
        "scores": _named(names, value.f),
        "stderr": {},
        "kl": value.kl,
        "details": expected | {"well-formed": value.mass},
    }


def _named(names: tuple[str, ...], values: torch.Tensor) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))


def _ceiling(names: tuple[str, ...]) -> dict[str, Any]:
    """What gradient ascent on the exact front reaches with these adapters, computed once and shipped."""
    if not CEILING.exists():
        return {}
    for ceiling in storage.read_json(CEILING):
        if sorted(ceiling["objectives"]) == sorted(names) and "front_share" in ceiling:
            return {"ceiling": {key: ceiling[key] for key in ("front_share", "front_share_worst")}}
    return {}
