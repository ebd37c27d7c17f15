"""Conditioners and a reward model whose mistakes the authors' guide quotes, and what they are asked with."""

from __future__ import annotations

import random
from typing import Any

from moalign.api import Conditioner, RewardModel


class Worldly(Conditioner):
    def draw(self, objectives, rng):
        return super().draw(objectives, random)


class Doubling(Conditioner):
    def gates(self, preference, parameters, shape):
        return preference.mul_(2)


class Thurstone(RewardModel):
    def loss(self, batch):
        return batch.final.mul_(2).mean(-1)

    def scores(self, batch):
        return batch.final @ batch.parameters["heads"].T


def some_preferences() -> Any:
    import torch

    return torch.rand(2, 2)


def some_judgements() -> Any:
    from moalign.testing.judgements import judged

    needs, names = Thurstone.needs, ("harmless", "helpful")
    return judged(prompts=2, tokens=3, objectives=names, needs=needs, missing=False, seed=0, dtype=None)
