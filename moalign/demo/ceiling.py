"""What the tiny assistant can reach at all: gradient ascent on the exact w.f with the default adapter, no sampling.

``python -m moalign.demo.ceiling ceiling.json`` makes the shipped file again, in a quarter of an hour on one core: for
each world of ``GRIDS``, and for the second world's utility. The ascent uses the held-out prompts themselves: this is a
bound to compare methods with, not a method.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moalign.demo import utility
from moalign.demo import world as worlds
from moalign.demo.enumeration import Enumeration, enumerate_replies, reply_logps
from moalign.demo.world import World

MODEL_DIRECTORY = Path(__file__).parent / "tiny-assistant"
RANK, ALPHA, TARGETS = 8, 16, "all-linear"
STEPS, LEARNING_RATE = 160, 5e-3
GRIDS = {("helpful", "harmless"): 8, ("helpful", "harmless", "concise"): 4}  # divisions of the weights: 9 and 15 points

Gain = Callable[[World, Tensor, Tensor], Tensor]  # of a policy's and the reference's outcomes [P,R+1]; differentiable


def compute(world: World, divisions: int, steps: int = STEPS) -> dict[str, Any]:
    """Shares and points of adapters trained on the exact objective, one for each of an even grid of weights."""
    everything, single, reference = _enumerated(world)
    points: list[dict[str, Any]] = []
    values: list[Tensor] = []
    for weights in worlds.even_weights(len(world.objectives), divisions):
        policy = _ascended(world, everything, single, reference, _weighted(weights), steps, seed=len(points))
        value = worlds.evaluate(world, policy, reference)
        values.append(value.f)
        points.append(
            {
                "weights": dict(zip(world.objectives, weights, strict=True)),
                "f": dict(zip(world.objectives, value.f.tolist(), strict=True)),
                "expected": dict(zip(world.objectives, value.expected.tolist(), strict=True)),
                "kl": value.kl,
                "mass": value.mass,
            }
        )
        print(points[-1], flush=True)
    shares = worlds.shares(world, reference, torch.stack(values))
    return _about(world, steps) | {
        "front_share": shares.front_share,
        "front_share_worst": shares.front_share_worst,
        "hypervolume_share": shares.hypervolume_share,
        "points": points,
    }


def compute_utility(world: World, steps: int = STEPS) -> dict[str, Any]:
    """The same for the utility of ``utility``: an adapter for each of its targets, and the share that it reaches."""
    everything, single, reference = _enumerated(world)
    points: list[dict[str, Any]] = []
    for targets in utility.TARGETS:
        gain = partial(utility.expected, targets=targets)
        policy = _ascended(world, everything, single, reference, gain, steps, seed=len(points))
        share = utility.share(world, targets, policy, reference)
        points.append({"targets": dict(zip(world.objectives, targets, strict=True)), "share": share})
        print(points[-1], flush=True)
    reached = [point["share"] for point in points]
    return _about(world, steps) | {
        "share": sum(reached) / len(reached),
        "share_worst": min(reached),
        "points": points,
    }


def _about(world: World, steps: int) -> dict[str, Any]:
    return {
        "objectives": list(world.objectives),
        "beta": world.beta,
        "adapter": {"r": RANK, "alpha": ALPHA, "targets": TARGETS},
        "steps": steps,
    }


def _enumerated(world: World) -> tuple[Enumeration, list[Enumeration], Tensor]:
    """All prompts' replies, each prompt's alone, and the base's log-probabilities of all [P,R]."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIRECTORY)
    everything = enumerate_replies(tokenizer, world.prompts)
    with torch.no_grad():
        reference = reply_logps(_load(), everything)
    return everything, [enumerate_replies(tokenizer, [prompt]) for prompt in world.prompts], reference


def _weighted(weights: Sequence[float]) -> Gain:
    direction = torch.tensor(weights, dtype=torch.float64)
    return lambda world, policy, reference: direction @ worlds.values(world, policy, reference)[0]


def _ascended(
    world: World,
    everything: Enumeration,
    single: Sequence[Enumeration],
    reference: Tensor,
    gain: Gain,
    steps: int,
    seed: int,
) -> Tensor:
    """Log-probabilities of all replies [P,R] of an adapter after Adam on -gain, one prompt's exact gradient a step.

    Prompts take turns; the rate rises, then falls to 0.
    """
    model = _with_adapter(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    base = worlds.outcomes(reference)
    for step in range(steps):
        turn = step % len(single)
        here = World(world.prompts[turn : turn + 1], world.objectives, world.rewards[turn : turn + 1], world.beta)
        policy = worlds.outcomes(reply_logps(model, single[turn]))
        optimizer.zero_grad()
        (-gain(here, policy, base[turn : turn + 1])).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return reply_logps(model, everything)


def _load() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIRECTORY, dtype=torch.float32)


def _with_adapter(seed: int) -> PeftModel:
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(_load(), config)


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = [compute(worlds.tiny_world(objectives=names), divisions) for names, divisions in GRIDS.items()]
    results.append(compute_utility(utility.second_world()))
    Path(sys.argv[1]).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for result in results:
        print(result["objectives"], {name: share for name, share in result.items() if "share" in name})
