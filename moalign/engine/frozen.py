"""What a pass knows before any policy that is trained has run: whose pairs stand in it, and what stays as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moalign import lora
from moalign.batch import Batch
from moalign.data.batching import collate, collate_views
from moalign.data.dataset import PairDataset
from moalign.data.tokenise import Sequence as TokenSequence
from moalign.engine.model import LanguageModel
from moalign.engine.passes import PairPass
from moalign.engine.reference_policy import BASE, FrozenPolicy
from moalign.engine.scoring import LogpCache
from moalign.engine.trainee import Job, Trainee
from moalign.ops import TokenLogps


@dataclass(frozen=True)
class Share:
    """One candidate's pairs in a pass; its gradient is the mean over the ``pairs_in_step`` of the whole step, weighted
    where the dataset has ``weights``: these times ``scale``, which makes their mean over the step 1.

    ``mismatched``: see Batch; None where nobody asks. ``judge``: the objective that judged all of them, where the
    gradient of each is found by itself; the ``pairs_in_step`` are then those that it judged.
    """

    trainee: Trainee
    dataset: PairDataset
    part: PairPass
    pairs_in_step: int
    mismatched: float | None = None
    judge: int | None = None
    scale: float = 1.0

    def weights(self, like: Tensor) -> Tensor | None:
        """Of the pairs of the pass, [P], as this tensor is; None where all count alike."""
        known = self.dataset.weights
        if known is None:
            return None
        return torch.from_numpy(known[self.part.pairs] * self.scale).to(like)

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
        known = share.dataset.ref_logps
        self.ref_logps = None if known is None else self._placed(known, share)
        self._spread: dict[str, Tensor] = {}
        self._readers = Counter[str]()  # of these, who have not had them yet
        old, weighed = share.dataset.old_logps, share.dataset.token_advantages
        self.old_logps = None if old is None else self._placed(old, share)
        self.token_advantages = None if weighed is None else self._placed(weighed, share)
        self.of_tokens = {name: self._placed(values, share) for name, values in share.dataset.known.items()}

    def _placed(self, values: Sequence[np.ndarray], share: Share) -> Tensor:
        """Of all sequences of the dataset, those of this pass; [N,T]."""
        return self.layout.place_known([values[index] for index in share.part.sequences])

    def prepare(self, trainee: Trainee) -> None:
        """Run the frozen policies that the candidate needs, before the trained ones run."""
        if needs_reference(trainee.job):
            self.reference(trainee)
        if "base" in trainee.job.needs:
            self.base(trainee)
        for each in trainee.job.margins_from.values():
            self.logps(FrozenPolicy(each.adapter, each.identity))
        for guide in trainee.job.guides.values():
            self.logps(guide)
        self._prepare_distributions(trainee)

    def distributions(self, trainee: Trainee) -> dict[str, Tensor]:
        """Of all frozen policies that a loss reads whole, by name, [S,V] each; never kept beyond the pass.

        Ask once, after ``prepare``. They are large: the last who reads one has it, and others have copies.
        """
        found = {}
        for name, policy in _read_whole(trainee).items():
            self._readers[policy.identity] -= 1
            last = self._readers[policy.identity] == 0
            found[name] = self._spread.pop(policy.identity) if last else self._spread[policy.identity].clone()
        return found

    def _prepare_distributions(self, trainee: Trainee) -> None:
        for policy in _read_whole(trainee).values():
            self._readers[policy.identity] += 1
            if policy.identity not in self._spread:
                with lora.active(self.cache.model.policy, policy.adapter):
                    states = self.cache.model.response_states(self.layout)
                    self._spread[policy.identity] = self.cache.model.distributions(states)

    def reference(self, trainee: Trainee) -> Tensor:
        """Under the candidate's reference, [N,T]: as its round has it, where that is known."""
        return self.logps(trainee.compared_with) if self.ref_logps is None else self.ref_logps.clone()

    def base(self, trainee: Trainee) -> Tensor:
        """Under the untouched base, [N,T]."""
        return self.reference(trainee) if trainee.compared_with == BASE else self.logps(BASE)

    def logps(self, policy: FrozenPolicy) -> Tensor:
        """Under a frozen policy, [N,T]."""
        identity = policy.identity
        if identity not in self._logps:
            with self.cache.skipping(self.layout, keep=self.keep):
                how = {"keep": self.keep and policy.fixed}
                found = self.cache.logps(self.sequences, self.layout, policy.adapter, identity, **how)
            self._logps[identity] = found
        return self._logps[identity].clone()  # a plugin that writes into its batch must not reach another's

    def batch(self, share: Share, scored: TokenLogps, hidden: Tensor | None) -> Batch:
        job, pairs, logps = share.trainee.job, self.known["pairs"], scored.logps
        reference = self.reference(share.trainee) if needs_reference(job) else None
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
            preferred=self.known["preferred"].clone() if "preferred" in self.known else None,
            hidden=hidden,
            parameters={name: values.clone() for name, values in share.trainee.owned.items()},
            mismatched=None if share.mismatched is None else logps.new_full((len(logps),), share.mismatched),
            base_logps=self.base(share.trainee) if "base" in job.needs else None,
            guides={name: self.logps(each) for name, each in job.guides.items()},
            views={name: rows.clone() for name, rows in self.views.items()},
        )

    def _preference(self, job: Job, device: torch.device) -> Tensor:
        """For which each row counts, [N,M]."""
        if "preference" in self.known:
            return self.known["preference"].clone()
        return torch.tensor(job.preference, device=device).expand(len(self.sequences), -1)

    def _rewards(self, job: Job, reference: Tensor | None) -> Tensor | None:
        """Scores per row and objective [N,M] where something needs them: from the data, or from frozen adapters. What
        they say of sampled pairs that another number has labelled, the metrics tell (``loss_of``)."""
        if job.needs.isdisjoint({"margins", "rewards"}) and not job.labels_rounds:
            return None
        rewards = self.known["rewards"].clone()
        for index, frozen in job.margins_from.items():
            assert reference is not None
            own = self.logps(FrozenPolicy(frozen.adapter, frozen.identity))
            rewards[:, index] = frozen.beta * (own - reference).sum(-1)
        return rewards


def _read_whole(trainee: Trainee) -> dict[str, FrozenPolicy]:
    """The frozen policies whose distributions the candidate's loss reads, by name."""
    job = trainee.job
    if "distributions" not in job.needs:
        return {}
    return dict(job.guides) | ({"reference": trainee.compared_with} if "reference" in job.needs else {})


def needs_reference(job: Job) -> bool:
    return "reference" in job.needs or bool(job.margins_from)
