"""The plugins of the distribution ``misbehaving`` with which one model is trained alone."""

from __future__ import annotations

from misbehaving import do, spoilt

from moalign import api


class Wish(api.Conditioner):
    """A gate for each rank direction; misbehaves when it is asked for them."""

    by = "gates"
    how: str = ""

    def parameters(self, shape, generator):
        import torch

        return {"weight": torch.zeros(shape.objectives, shape.layers * shape.rank)}

    def gates(self, preference, parameters, shape):
        do(self.how)
        if self.how == "mutates inputs":
            preference.zero_()
        gates = 1 + preference @ parameters["weight"]
        return spoilt(gates.view(len(preference), shape.layers, shape.rank), self.how)


class Judge(api.RewardModel):
    """Linear heads on pairs; misbehaves in the loss."""

    how: str = ""

    def parameters(self, width, objectives, generator):
        import torch

        return {"head": torch.zeros(len(objectives), width)}

    def scores(self, batch):
        return batch.final @ batch.parameters["head"].T

    def loss(self, batch):
        do(self.how)
        if self.how == "mutates inputs":
            batch.strength.zero_()
        chosen, rejected = self.scores(batch)[batch.pairs].unbind(1)
        difference = (chosen - rejected).gather(1, batch.pair_objective[:, None]).squeeze(1)
        return spoilt((1 - difference) ** 2, self.how)
