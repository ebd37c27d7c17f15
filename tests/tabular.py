"""A policy that is a table of logits, on a language so small that every response can be listed; all in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from moalign.api import Batch, Objective, PairTerms, Tokens


@dataclass(frozen=True)
class Language:
    """``choices``: of each state. A response is the (state, token) of each of its steps."""

    choices: tuple[int, ...]
    responses: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def width(self) -> int:
        return max(map(len, self.responses))

    @property
    def mask(self) -> Tensor:
        """[R,T]"""
        lengths = torch.tensor([len(response) for response in self.responses])
        return (torch.arange(self.width) < lengths[:, None]).double()

    def parameters(self, seed: int) -> Tensor:
        """The logits of all states, one after the other."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(sum(self.choices), generator=generator, dtype=torch.float64).requires_grad_()

    def fitted(self, logps: Tensor) -> Tensor:
        """The logits with which the responses have these log-probabilities [R], where states belong to a tree."""
        mass = [torch.zeros(choices, dtype=torch.float64) for choices in self.choices]
        for probability, response in zip(logps.exp(), self.responses, strict=True):
            for state, token in response:
                mass[state][token] += probability
        return torch.cat(mass).log().requires_grad_()

    def greedy(self, parameters: Tensor) -> int:
        """The response whose every token is the likeliest in its state."""
        likeliest = [int(logits.argmax()) for logits in parameters.split(self.choices)]
        return next(
            number
            for number, response in enumerate(self.responses)
            if all(token == likeliest[state] for state, token in response)
        )

    def logps(self, parameters: Tensor) -> Tensor:
        """[R,T], 0 where a response has ended; differentiable."""
        tables = [logits.log_softmax(-1) for logits in parameters.split(self.choices)]
        end = parameters.new_zeros(())
        rows = [[tables[state][token] for state, token in response] for response in self.responses]
        return torch.stack([torch.stack(row + [end] * (self.width - len(row))) for row in rows])

    def entropies(self, parameters: Tensor) -> Tensor:
        """[R,T], of the choice at each step of a response, 0 where it has ended; differentiable."""
        tables = [logits.log_softmax(-1) for logits in parameters.split(self.choices)]
        own = [-(table.exp() * table).sum() for table in tables]
        end = parameters.new_zeros(())
        rows = [[own[state] for state, _ in response] for response in self.responses]
        return torch.stack([torch.stack(row + [end] * (self.width - len(row))) for row in rows])

    def distributions(self, parameters: Tensor) -> Tensor:
        """[R,T,V], of the choice at each step, 0 where a response has ended; of languages whose states have V each."""
        tables = torch.stack([logits.log_softmax(-1) for logits in parameters.split(self.choices)])
        end = torch.zeros_like(tables[0])
        rows = [[tables[state] for state, _ in response] for response in self.responses]
        return torch.stack([torch.stack(row + [end] * (self.width - len(row))) for row in rows])


# "c" ends at once; "a" and "b" go on with three and two tokens.
SPEECH = Language(
    (3, 3, 2),
    (((0, 2),), *(((0, 0), (1, token)) for token in range(3)), *(((0, 1), (2, token)) for token in range(2))),
)
# The same with three tokens after each.
EVEN = Language((3, 3, 3), (((0, 2),), *(((0, first), (1 + first, token)) for first in range(2) for token in range(3))))
DIE = Language((5,), tuple(((0, face),) for face in range(5)))
REWARDS = torch.tensor([0.3, -0.5, 1.7, 0.9, 0.0, 0.4], dtype=torch.float64)
MORE_REWARDS = torch.cat([REWARDS, torch.tensor([0.7], dtype=torch.float64)])


def plain_terms(count: int) -> PairTerms:
    one = torch.ones(count, dtype=torch.float64)
    return PairTerms(one, torch.zeros_like(one), one)


@dataclass(frozen=True)
class Situation:
    """A policy, the one that samples, and the reference; ``rewards`` of the responses; further frozen policies."""

    language: Language
    policy: Tensor
    sampler: Tensor
    reference: Tensor
    rewards: Tensor
    guides: Mapping[str, Tensor] = field(default_factory=dict)

    def losses(self, objective: Objective, drawn: Tensor) -> Tensor:
        """The losses [K,G] of groups of responses, ``drawn`` [K,G], with advantages as the engine makes them."""
        language, rows = self.language, drawn.flatten()
        count = len(rows)
        groups = torch.arange(count) // drawn.shape[1]
        old, reference = (language.logps(p.detach()) for p in (self.sampler, self.reference))
        batch = Batch(
            logps=language.logps(self.policy)[rows],
            mask=language.mask[rows],
            pairs=torch.arange(count)[:, None].expand(-1, 2),
            pair_objective=torch.full((count,), -1),
            preference=torch.ones(count, 1, dtype=torch.float64),
            strength=torch.ones(count, dtype=torch.float64),
            groups=groups,
            ref_logps=reference[rows],
            old_logps=old[rows],
            entropy=language.entropies(self.policy)[rows] if "entropy" in objective.wants else None,
            guides={name: language.logps(each.detach())[rows] for name, each in self.guides.items()},
            distributions=self.distributions(rows) if "distributions" in objective.wants else {},
        )
        batch = replace(batch, **self.weighed(objective, batch, rows))
        return objective.loss(batch, plain_terms(count)).view_as(drawn)

    def weighed(self, objective: Objective, batch: Batch, rows: Tensor) -> dict[str, Any]:
        """The advantages of the responses, or of their tokens."""
        signal = self.rewards[rows]
        assert batch.old_logps is not None and batch.ref_logps is not None
        if "token_advantages" in objective.wants:
            tokens = Tokens(batch.mask, torch.ones(len(rows), dtype=torch.bool), batch.old_logps, batch.ref_logps)
            given = objective.token_advantages(signal, batch.groups, tokens)
            return {"token_advantages": given.advantages, "known": given.known}
        ratios = (batch.old_logps - batch.ref_logps).sum(-1)
        likeliest = self.rewards[self.language.greedy(self.sampler)].expand(len(rows))
        greedy = [likeliest] if "greedy" in objective.needs else []
        return {"advantages": objective.advantages(signal, batch.groups, ratios, *greedy)}

    def distributions(self, rows: Tensor) -> dict[str, Tensor]:
        """[S,V] each, of policy, reference and guides at the tokens of these responses."""
        frozen = {"reference": self.reference.detach()} | {name: each.detach() for name, each in self.guides.items()}
        tokens = self.language.mask[rows] > 0
        return {
            name: self.language.distributions(each)[rows][tokens]
            for name, each in ({"policy": self.policy} | frozen).items()
        }

    def expected_gradient(self, objective: Objective, size: int) -> Tensor:
        """Of the mean loss of a group, over all groups of ``size`` responses that the sampler can draw."""
        every = torch.tensor(list(product(range(len(self.rewards)), repeat=size)))
        weight = self.language.logps(self.sampler.detach()).sum(-1)[every].sum(-1).exp()
        return self.gradient((weight * self.losses(objective, every).mean(-1)).sum())

    def gradient(self, value: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(value, self.policy)
        return found

    def expected(self, values: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """E over the policy's own responses of values(log-probabilities under policy and reference, [R,T]) [R]."""
        own, reference = self.language.logps(self.policy), self.language.logps(self.reference.detach())
        return (own.sum(-1).exp() * values(own, reference)).sum()

    def reward(self) -> Tensor:
        return self.expected(lambda own, reference: self.rewards)

    def divergence(self) -> Tensor:
        """KL(policy || reference) of whole responses."""
        return self.expected(lambda own, reference: (own - reference).sum(-1))

    def divergence_of_tokens(self, forward: bool) -> Tensor:
        """KL of the next token, either way round, summed over the states as often as the sampler comes there."""
        visits = visits_of(self.language, self.language.logps(self.sampler.detach()).sum(-1).exp().tolist())
        total = self.policy.new_zeros(())
        own, others = (p.split(self.language.choices) for p in (self.policy, self.reference.detach()))
        for often, mine, other in zip(visits, own, others, strict=True):
            first, second = (other, mine) if forward else (mine, other)
            p, q = first.log_softmax(-1), second.log_softmax(-1)
            total = total + often * (p.exp() * (p - q)).sum()
        return total

    def entropy_of_tokens(self) -> Tensor:
        """Of the next token, summed over the states as often as the sampler comes there."""
        visits = visits_of(self.language, self.language.logps(self.sampler.detach()).sum(-1).exp().tolist())
        tables = [own.log_softmax(-1) for own in self.policy.split(self.language.choices)]
        found = [-often * (table.exp() * table).sum() for often, table in zip(visits, tables, strict=True)]
        return torch.stack(found).sum()


def visits_of(language: Language, probabilities: Sequence[float]) -> list[float]:
    """How often each state is met in a response, on average."""
    visits = [0.0] * len(language.choices)
    for probability, response in zip(probabilities, language.responses, strict=True):
        for state, _ in response:
            visits[state] += probability
    return visits


def on_policy(language: Language, rewards: Tensor = REWARDS, seed: int = 0) -> Situation:
    """The policy samples for itself and differs from the reference."""
    policy = language.parameters(seed)
    return Situation(language, policy, policy, language.parameters(seed + 1), rewards[: len(language.responses)])
