"""What the tiny assistant can reach at all: gradient ascent on the exact w.f with the default adapter, no sampling.

``python -m moalign.demo.ceiling ceiling.json`` makes the shipped file again, in minutes on one core. The ascent uses
the held-out prompts themselves: this is a bound to compare methods with, not a method.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moalign.demo import world as worlds
from moalign.demo.enumeration import Enumeration, enumerate_replies, reply_logps
from moalign.demo.world import World

MODEL_DIRECTORY = Path(__file__).parent / "tiny-assistant"
RANK, ALPHA, TARGETS = 8, 16, "all-linear"
STEPS, LEARNING_RATE, DIVISIONS = 160, 5e-3, 8


def compute(world: World, divisions: int = DIVISIONS, steps: int = STEPS) -> dict[str, Any]:
    """Shares and points of adapters trained on the exact objective, one for each of an even grid of weights."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIRECTORY)
    everything = enumerate_replies(tokenizer, world.prompts)
    single = [enumerate_replies(tokenizer, [prompt]) for prompt in world.prompts]
    with torch.no_grad():
        reference = reply_logps(_load(), everything)
    points: list[dict[str, Any]] = []
    values: list[Tensor] = []
    for weights in worlds.even_weights(len(world.objectives), divisions):
        model = _with_adapter(seed=len(points))
        _ascend(model, world, single, reference, weights, steps)
        with torch.no_grad():
            value = worlds.evaluate(world, reply_logps(model, everything), reference)
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
    return {
        "objectives": list(world.objectives),
        "beta": world.beta,
        "adapter": {"r": RANK, "alpha": ALPHA, "targets": TARGETS},
        "steps": steps,
        "front_share": shares.front_share,
        "front_share_worst": shares.front_share_worst,
        "hypervolume_share": shares.hypervolume_share,
        "points": points,
    }


def _ascend(
    model: PeftModel,
    world: World,
    single: Sequence[Enumeration],
    reference: Tensor,
    weights: Sequence[float],
    steps: int,
) -> None:
    """Adam on -w.f, one prompt's exact gradient a step, prompts in turn; the rate rises, then falls to 0."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    base = worlds.outcomes(reference)
    direction = torch.tensor(weights, dtype=torch.float64)
    for step in range(steps):
        turn = step % len(single)
        here = World(world.prompts[turn : turn + 1], world.objectives, world.rewards[turn : turn + 1], world.beta)
        policy = worlds.outcomes(reply_logps(model, single[turn]))
        f, _, _ = worlds.values(here, policy, base[turn : turn + 1])
        optimizer.zero_grad()
        (-(direction @ f)).backward()
        optimizer.step()
        schedule.step()


def _load() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIRECTORY, dtype=torch.float32)


def _with_adapter(seed: int) -> PeftModel:
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(_load(), config)


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = compute(worlds.tiny_world())
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print({name: share for name, share in result.items() if "share" in name})
