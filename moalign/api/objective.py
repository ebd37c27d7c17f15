"""The kind objective: a loss, and what it needs of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from moalign.api.plugin import Plugin
from moalign.batch import Batch, PairTerms, TokenAdvantages, Tokens
from moalign.errors import PluginError
from moalign.types import Sample

if TYPE_CHECKING:
    from torch import Generator, Tensor


class Objective(Plugin):
    """A loss on token log-probabilities.

    ``needs`` names what the engine must supply, and it supplies nothing else:
    "pairs"      labelled pairs, chosen before rejected
    "margins"    pairs in any order, with the reward difference of every objective (``terms.difference``)
    "reference"  log-probabilities under the reference
    "base"       beside "reference": those under the untouched base, where the reference may be another
    "groups"     responses with rewards, which the policy has sampled, several for each prompt, or, without rollouts, as
                 the data has them; each has an advantage (``advantages``)
    "old_logps"  log-probabilities under the policy that sampled them; only with rollouts
    "entropy"    the entropy of every next token, with a gradient
    "token_advantages"  beside "groups": each token has an advantage of its own (``token_advantages``); with rollouts
    "hidden"     the hidden states that predict the response tokens
    "distributions"  log-probabilities of the whole vocabulary at each response token, of the policy, of the guides and,
                 with "reference", of that: never kept, and 4 bytes each for S response tokens of a pass times V
    "greedy"     with "groups": the signal of the policy's greedy response to each prompt, which is never trained on;
                 only with rollouts
    "rewards"    with "groups": each objective's reward of every response
    "mismatched" the mean log-ratio of responses behind prompts that they are not to (``Batch.mismatched``), which costs
                 two more forward passes of each step
    "reference_responses"  beside "pairs" or "margins": a response of the reference to each prompt, whose rows are
                 ``Batch.views["reference"]``. With pairs of the data it is one of the untouched base, sampled once with
                 the run's seed before anything is trained; with rollouts one of the reference as it is in the round,
                 and where the policy that sampled the round is the reference, the first that it gave
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs"})
    needs_with: ClassVar[Mapping[str, frozenset[str]]] = {}
    """what options need beside, where they are set: {"bonus": frozenset({"entropy"})} asks for the entropy unless the
    field ``bonus`` is 0, none or false"""
    shiftable: ClassVar[bool] = True
    """whether the loss reads ``terms.scale`` and ``terms.margin``, so that every combiner can reach it"""
    linear: ClassVar[bool] = True
    """with "groups": whether a response's loss is its advantage times a function of that response alone, but for what
    no advantage changes; else there are no gradients of single objectives to compare (``Combiner.needs_gram``)"""
    symmetric: ClassVar[bool] = False
    """with "pairs" in ``needs``: whether no label is read, so that a pair may come either way round"""
    detaches: ClassVar[bool] = False
    """whether a part is detached on purpose, so that the gradient is not the derivative of the value"""

    @property
    def wants(self) -> frozenset[str]:
        """``needs``, and what ``needs_with`` adds for the options as they are: what the engine supplies."""
        if unknown := self.needs_with.keys() - type(self).model_fields.keys():
            raise PluginError(f"{type(self).__name__}: needs_with has '{min(unknown)}', which is no field of the class")
        return frozenset(self.needs).union(*(more for name, more in self.needs_with.items() if getattr(self, name)))

    def kl_price(self) -> float:
        """What a nat of KL(policy || reference) costs at the loss's optimum, in units of the combined reward; 0 where
        nothing prices it, or in another unit. Of losses that learn from rewards: for ``evaluate.kl_price: auto``.

        By default ``beta``, where the loss compares with the reference.
        """
        return float(getattr(self, "beta", 0.0)) if "reference" in self.wants else 0.0

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        """float32 [P], one value per pair, never reduced and without ``terms.weight``, which the engine applies.

        With "groups" in ``needs`` [N], one value per row, and all terms [N] are those of a pair that nothing changes.
        """
        raise NotImplementedError

    def advantages(self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None) -> Tensor:
        """How much each response counts, [N] like all arguments; asked only where ``needs`` has "groups".

        ``signal``: the combiner's, of all responses of a round; ``groups``: those to one prompt share a number;
        ``log_ratios``: log pi - log pi_ref of the response under the policy that sampled it, None unless ``needs`` has
        "reference". All float64, and no gradient goes through. Without rollouts the responses of the data are the only
        round, and their log-ratios are 0: they count as the reference's own.

        With "greedy" in ``needs`` a fourth argument comes, ``greedy: Tensor | None = None``: for each response the
        signal of the greedy response to its prompt, [N].
        """
        raise NotImplementedError

    def measure(self, batch: Batch) -> Mapping[str, Tensor]:
        """What is to be known of each token under the policy that sampled it, such as values; float32 [N,T] by name.

        Asked once in a round, part by part and without a gradient, before anything is trained on it, where ``needs``
        has "token_advantages". The batch has no advantages and nothing known yet; its ``logps`` are the old ones.
        """
        return {}

    def token_advantages(self, signal: Tensor, groups: Tensor, tokens: Tokens) -> TokenAdvantages:
        """How much each token counts, in place of ``advantages`` where ``needs`` has "token_advantages".

        ``signal`` and ``groups`` [N] as there, of all responses of a round. No gradient goes through.
        """
        raise NotImplementedError

    def guides(self) -> Mapping[str, str]:
        """Frozen adapters whose token log-probabilities the loss reads in ``Batch.guides``: names, and their folders.

        Where a loss with "token_advantages" in ``needs`` has a ``measure`` of its own, it is this that finds them
        there, once in a round, and the loss finds what that has returned.

        The name is that of the option which holds the folder, and the value follows from the options alone. A folder
        is an adapter of the run's own base as moalign writes it, such as a candidate of another run. Where its path has
        ``{candidate}`` in it, the id of whoever is trained takes that place.
        """
        return {}

    def companion(self) -> Objective | None:
        """A loss that trains a second adapter beside the candidate's, such as a reward model that learns from the
        responses' outcomes; None: there is none. Only beside "token_advantages".

        It needs "groups", and may need "reference". It is trained on the same responses in the same steps, with the
        candidate's settings and the learning rate times ``lr_factor("companion")``; its batch has what ``known`` of
        this loss says, and neither advantages nor parameters. ``measure`` finds log-probabilities under it, as it is
        when the round has been sampled, in ``Batch.guides["companion"]``. It begins as the base, or as the companion
        of the adapter from which training starts, and is written beside the candidate's adapter.
        """
        return None

    def passages(self) -> Mapping[str, str]:
        """Passages of sampled responses that ``token_advantages`` is to find, such as an answer or the steps to it:
        names, and regular expressions of Python's ``re``.

        ``Tokens.passages`` then says in which match of the response's text each token stands. A match is its first
        group, where the expression has one. The value follows from the options alone.
        """
        return {}

    def views(self, chosen: Sample, rejected: Sample) -> Mapping[str, Sample]:
        """Further sequences that the loss reads of a pair: prompts and responses by name, a pure function of the pair.

        Asked once for each pair, of the data or of a round of sampled responses. They are tokenised as the pair is, run
        in the same pass, and their rows stand in ``Batch.views``; they are no units of their own. A view with the
        pair's own prompt stands behind that prompt as it was cut for the pair, and one that says what a side of the
        pair says has its tokens, as they were sampled. Pairs that lack a view which others have, or whose view cannot
        be tokenised within data.max_length, are left out and counted. The name "reference" is the engine's.
        """
        return {}

    def parameters(self, width: int, generator: Generator) -> Mapping[str, Tensor]:
        """First values of tensors that the loss owns, by name; float32 on the CPU. ``width``: of a hidden state.

        Each candidate trains its own from the same first values, with the step that trains its adapter: same optimizer
        and schedule, but a gradient norm apart, with the same limit. They are written beside the adapter, and a
        candidate that starts from another's adapter goes on with them. ``generator``: for all that is drawn.
        """
        return {}

    def lr_factor(self, name: str) -> float:
        """What the learning rate of the adapter is multiplied by for the parameter ``name``, or for "companion"."""
        return 1.0
