"""What a pass knows before any policy that is trained has run: whose pairs stand in it, and what stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moalign import lora
from moalign.data.batching import collate, collate_views
from moalign.data.dataset import PairDataset
from moalign.data.tokenise import Sequence as TokenSequence
from moalign.engine.model import LanguageModel
from moalign.engine.passes import PairPass
from moalign.engine.scoring import LogpCache
from moalign.engine.trainee import Job, Trainee
from moalign.ops import TokenLogps
from moalign.types import Batch


@dataclass(frozen=True)
class Share:
    """One candidate's pairs in a pass; its gradient is the mean over the ``pairs_in_step`` of the whole step."""

    trainee: Trainee
    dataset: PairDataset
    part: PairPass
    pairs_in_step: int

    @property
    def sequences(self) -> list[TokenSequence]:
        return [self.dataset.sequences[index] for index in self.part.sequences]


class Frozen:
    """What does not depend on the policy: how the rows lie, what is known of them, the reference's log-probabilities.

    Candidates with the same rows share it.
    """

    def __init__(self, model: LanguageModel, share: Share, cache: LogpCache):
        self.cache, self.keep = cache, share.trainee.source.cacheable
        self.sequences = share.sequences
        self.layout = model.lay_out(self.sequences, share.part.rows)
        collated = collate(share.dataset, share.part.pairs, share.part.sequences)
        self.known = {name: tensor.to(model.device) for name, tensor in collated.items()}
        views = collate_views(share.dataset, share.part.pairs, share.part.sequences)
        self.views = {name: rows.to(model.device) for name, rows in views.items()}
        self._logps: dict[str, Tensor] = {}
        self._spread: dict[str, Tensor] = {}
        if share.dataset.ref_logps is not None:
            self._logps[""] = self._placed(share.dataset.ref_logps, share)
        old, weighed = share.dataset.old_logps, share.dataset.token_advantages
        self.old_logps = None if old is None else self._placed(old, share)
        self.token_advantages = None if weighed is None else self._placed(weighed, share)
        self.of_tokens = {name: self._placed(values, share) for name, values in share.dataset.known.items()}

    def _placed(self, values: Sequence[np.ndarray], share: Share) -> Tensor:
        """Of all sequences of the dataset, those of this pass; [N,T]."""
        return self.layout.place_known([values[index] for index in share.part.sequences])

    def prepare(self, job: Job) -> None:
        """Run the frozen policies that the job needs, before the trained ones run."""
        if needs_reference(job):
            self.logps(None, "")
        for each in job.margins_from.values():
            self.logps(each.adapter, each.identity)
        for guide in job.guides.values():
            self.logps(guide.adapter, guide.identity)
        self.distributions(job)

    def distributions(self, job: Job) -> dict[str, Tensor]:
        """Of all frozen policies that a loss reads whole, by name, [S,V] each; never kept beyond the pass."""
        if "distributions" not in job.needs:
            return {}
        wanted: dict[str, tuple[str | None, str]]
        wanted = {name: (each.adapter, each.identity) for name, each in job.guides.items()}
        if "reference" in job.needs:
            wanted["reference"] = (None, "")
        for adapter, identity in wanted.values():
            if identity not in self._spread:
                with lora.active(self.cache.model.policy, adapter):
                    states = self.cache.model.response_states(self.layout)
                    self._spread[identity] = self.cache.model.distributions(states)
        return {name: self._spread[identity] for name, (_, identity) in wanted.items()}

    def logps(self, adapter: str | None, identity: str) -> Tensor:
        """Under a frozen adapter or (None) the reference, [N,T]."""
        if identity not in self._logps:
            with self.cache.skipping(self.layout, keep=self.keep):
                found = self.cache.logps(self.sequences, self.layout, adapter, identity, keep=self.keep)
            self._logps[identity] = found
        return self._logps[identity].clone()  # a plugin that writes into its batch must not reach another's

    def batch(self, share: Share, scored: TokenLogps, hidden: Tensor | None) -> Batch:
        job, pairs, logps = share.trainee.job, self.known["pairs"], scored.logps
        reference = self.logps(None, "") if needs_reference(job) else None
        rewards = self._rewards(job, reference)
        return Batch(
            logps=logps,
            mask=self.layout.mask.clone(),
            pairs=pairs.clone(),
            pair_objective=self.known["pair_objective"].clone(),
            preference=self._preference(job, logps.device),
            strength=self.known["strength"].clone(),
            groups=self.known["groups"].clone(),
            ref_logps=reference,
            rewards=rewards,
            margins=None if rewards is None else rewards[pairs[:, 0]] - rewards[pairs[:, 1]],
            advantages=self.known["advantages"].clone() if "advantages" in self.known else None,
            old_logps=None if self.old_logps is None else self.old_logps.clone(),
            entropy=scored.entropy if "entropy" in job.needs else None,
            token_advantages=None if self.token_advantages is None else self.token_advantages.clone(),
            known={name: values.clone() for name, values in self.of_tokens.items()},
            objectives=job.objectives,
            hidden=hidden,
            parameters={name: values.clone() for name, values in share.trainee.owned.items()},
            guides={name: self.logps(each.adapter, each.identity) for name, each in job.guides.items()},
            views={name: rows.clone() for name, rows in self.views.items()},
        )

    def _preference(self, job: Job, device: torch.device) -> Tensor:
        """For which each row counts, [N,M]."""
        if "preference" in self.known:
            return self.known["preference"].clone()
        return torch.tensor(job.preference, device=device).expand(len(self.sequences), -1)

    def _rewards(self, job: Job, reference: Tensor | None) -> Tensor | None:
        """Scores per row and objective [N,M] where something needs them: from the data, or from frozen adapters."""
        if job.needs.isdisjoint({"margins", "rewards"}):
            return None
        rewards = self.known["rewards"].clone()
        for index, frozen in job.margins_from.items():
            assert reference is not None
            rewards[:, index] = frozen.beta * (self.logps(frozen.adapter, frozen.identity) - reference).sum(-1)
        return rewards


def needs_reference(job: Job) -> bool:
    return "reference" in job.needs or bool(job.margins_from)
