"""What losses, rules and transforms see of a step or a round: tensors, as frozen data.

Shapes: N sequences, T tokens, P pairs, M objectives, D the width of the model. Nothing here computes or imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """What a loss sees. ``logps`` carries the gradient; everything else is constant, unless it is said below.

    ``logps[N,T]``        log-probability of each response token, 0 where ``mask`` is 0
    ``mask[N,T]``         1 at response tokens, the end-of-sequence token among them
    ``ref_logps[N,T]``    the same under the reference; None unless the objective needs "reference"
    ``base_logps[N,T]``   the same under the untouched base; None unless the objective needs "base"
    ``pairs[P,2]``        rows of (chosen, rejected)
    ``pair_objective[P]`` index of the objective that judged the pair, -1 where no single one did
    ``margins[P,M]``      r(chosen) - r(rejected) per objective; None unless something needs "margins"
    ``strength[P]``       strength of the judgement, as the data has it
    ``rewards[N,M]``      scores per row and objective, NaN where unknown, as transforms left them; None unless needed
    ``preference[N,M]``   the preference of the candidate that the row belongs to, see ``Preference.vector``
    ``preferred[P,M]``    share of an objective's judgements of the pair that prefer its first response, NaN where it
                          has none; None unless the combiner ``merges_judges``
    ``groups[N]``         rows of one prompt share a number
    ``advantages[N]``     how much better the response is than expected; None unless the objective needs "groups"
    ``old_logps[N,T]``    ``logps`` under the policy that sampled the response; None unless it needs "old_logps"
    ``entropy[N,T]``      entropy in nats of the policy's choice at each response token, given those before it, 0 where
                          ``mask`` is 0; None unless the objective needs "entropy"
    ``token_advantages[N,T]``  how much each token counts, 0 where ``mask`` is 0; None unless it needs
                          "token_advantages", and then ``advantages`` is None
    ``known``             what the objective knows of each token since its round was sampled, by name, [N,T] each
    ``hidden[N,T,D]``     the last hidden state, from which each response token is predicted, with the graph to the
                          adapters; 0 where ``mask`` is 0. None unless the objective needs "hidden"
    ``parameters``        the objective's own tensors by name; they carry a gradient as ``logps`` does
    ``final[N,D]``        the last hidden state of each whole sequence, with the graph to the adapters; reward models
    ``context[N,D]``      the hidden state at the end of each sequence's prompt, likewise
    ``objectives``        names of the M objectives, in the order of their columns
    ``mismatched[N]``     log pi - log pi_ref of the responses of a step to others of its prompts, summed over tokens:
                          their mean as the step begins, the same number for every row; None unless the objective
                          needs "mismatched"
    ``guides``            by name, ``logps`` under the frozen adapters that ``Objective.guides`` names, [N,T] each; with
                          "token_advantages" only where a round is measured; "companion": under the adapter that
                          ``Objective.companion`` trains
    ``distributions``     by name, log-probabilities of all V tokens at each of the S response tokens, in the order of
                          ``mask.nonzero()``, [S,V] each: "policy", with the graph, "reference" where it is needed, and
                          the guides by their names. None of them unless the objective needs "distributions"
    ``views``             by name, int64 [P] each: the row of each pair's further sequence that ``Objective.views``, or
                          a need, has asked for; among the N rows, with rewards of NaN where it is no response of a pair

    Where the objective needs "groups", each row is a unit of its own, and every pair names one row twice; the loss does
    not read ``pairs``.
    """

    logps: Tensor
    mask: Tensor
    pairs: Tensor
    pair_objective: Tensor
    preference: Tensor
    strength: Tensor
    groups: Tensor
    ref_logps: Tensor | None = None
    margins: Tensor | None = None
    rewards: Tensor | None = None
    advantages: Tensor | None = None
    old_logps: Tensor | None = None
    entropy: Tensor | None = None
    token_advantages: Tensor | None = None
    known: Mapping[str, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    final: Tensor | None = None
    context: Tensor | None = None
    objectives: tuple[str, ...] = ()
    mismatched: Tensor | None = None
    base_logps: Tensor | None = None
    preferred: Tensor | None = None
    guides: Mapping[str, Tensor] = field(default_factory=dict)
    distributions: Mapping[str, Tensor] = field(default_factory=dict)
    views: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PairTerms:
    """How a combiner turns many objectives into one signal for a pairwise loss, one number per pair.

    The loss sees ``scale * beta * (log-ratio of chosen - log-ratio of rejected) - margin``; the engine multiplies the
    loss of the pair by ``weight``. ``difference`` is the scalarised reward difference for regression losses (None
    where the objective does not need "margins"). ``reversed``: the weight with which the pair counts the other way
    round as well, with margin and difference of the other sign; None: not at all.
    """

    scale: Tensor
    margin: Tensor
    weight: Tensor
    difference: Tensor | None = None
    reversed: Tensor | None = None

    @classmethod
    def of_rows(cls, logps: Tensor) -> PairTerms:
        """Terms, as many as there are rows here, that change nothing: what a combiner has to say is in the advantages
        of responses, or in the labels of pairs."""
        one = logps.new_ones(len(logps))
        return cls(one, one * 0, one)


@dataclass(frozen=True, slots=True)
class StepLosses:
    """What was seen of one step on labelled pairs, for rules that weigh the objectives' losses.

    ``number``: of the step, from 0. ``losses[M]``: float64, mean loss of the step's pairs that each objective judged,
    NaN where it judged none. ``pairs[M]``: how many those are. ``preference[M]``: the candidate's, float64.
    ``objectives``: their names, in that order. ``gram[M,M]``: float64, inner products of the gradients of these mean
    losses, 0 where there is none; None unless the rule says ``needs_gram``.
    """

    number: int
    losses: Tensor
    pairs: Tensor
    preference: Tensor
    objectives: tuple[str, ...] = ()
    gram: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """What there is to know of the tokens of a round's sampled responses, for losses that weigh each token.

    All float64 on the CPU but ``ended``; column t is about the response's own token t, and T is the longest response.

    ``mask[N,T]``       1 at response tokens, the end-of-sequence token among them
    ``ended[N]``        bool; False where the response was cut at rollouts.max_new_tokens
    ``old_logps[N,T]``  log-probabilities under the policy that sampled; None unless the objective needs "old_logps"
    ``ref_logps[N,T]``  the same under the reference; None unless it needs "reference"
    ``measured``        what ``Objective.measure`` found, by name, [N,T] each
    ``number``          of the round, from 0
    ``passages``        in which match of a regular expression of ``Objective.passages``, by name, a token stands: 1 in
                        the first of the response, 2 in the next, 0 in none; [N,T] each

    All are 0 where ``mask`` is 0.
    """

    mask: Tensor
    ended: Tensor
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    measured: Mapping[str, Tensor] = field(default_factory=dict)
    number: int = 0
    passages: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TokenAdvantages:
    """How much each token of a round counts, and what else its loss is to know of it.

    ``advantages[N,T]``  multiplied by what the combiner says, as all advantages are
    ``known``            by name, [N,T] each, such as targets; the loss finds them in ``Batch.known``, as they are here
    ``figures``          for the metrics, as ``loss/NAME``

    The tensors are float64 on the CPU like ``Tokens``; what they hold where its ``mask`` is 0 does not matter.
    """

    advantages: Tensor
    known: Mapping[str, Tensor] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Responses:
    """What there is to know of a round's sampled responses beside their rewards, for transforms of these.

    ``number``          of the round, from 0
    ``groups[N]``       responses to one prompt share a number
    ``lengths[N]``      response tokens, the end-of-sequence token among them
    ``ended[N]``        bool; False where the response was cut at rollouts.max_new_tokens
    ``reference[N,R]``  what the objective's reward, and the transforms before this one, make of R responses of the
                        untouched base to the same prompt, float64; NaN where the reward abstained, but never in a
                        whole row. None unless the transform asks for references
    """

    number: int
    groups: Tensor
    lengths: Tensor
    ended: Tensor
    reference: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """What there is to know of a round's sampled responses, for filters of these.

    ``number``        of the round, from 0
    ``signal[N]``     the combined reward, float64: what the combiner makes of the rewards as transforms left them
    ``rewards[N,M]``  by objective, float64, larger is better, before any transform
    ``groups[N]``     responses to one prompt share a number
    ``lengths[N]``    response tokens, the end-of-sequence token among them
    ``ended[N]``      bool; False where the response was cut at rollouts.max_new_tokens
    ``texts``         the N responses
    ``objectives``    names of the M objectives, in the order of the rewards' columns
    """

    number: int
    signal: Tensor
    rewards: Tensor
    groups: Tensor
    lengths: Tensor
    ended: Tensor
    texts: tuple[str, ...]
    objectives: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Kept:
    """What a filter says of responses, or of pairs of them, one by one.

    ``weights``  float64, finite, not below 0: how often each counts; 0: it is left out
    ``reasons``  for each that is left out why, in a few words that are the same for all left out for it; "" for others
    ``figures``  for the metrics, as ``filter/NAME``, such as a threshold that was found
    """

    weights: Tensor
    reasons: tuple[str, ...]
    figures: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def where(cls, kept: Tensor, reason: str) -> Kept:
        """Those for which ``kept`` (bool) is true, once each; the others are left out for one reason."""
        return cls(kept.double(), tuple("" if each else reason for each in kept.tolist()))


@dataclass(frozen=True, slots=True)
class Round:
    """What was seen of one round of sampled responses, for rules that adapt.

    ``number``: from 0. ``rewards[N,M]``: of the responses, float64, larger is better, before any transform.
    ``groups[N]``: responses to one prompt share a number. ``start[M]``: mean rewards of the first round, before any
    training. ``objectives``: their names, in the order of the rewards. ``gram[M,M]``: inner products of the gradients
    that each objective alone has; None unless the rule says ``needs_gram``.
    """

    number: int
    rewards: Tensor
    groups: Tensor
    start: Tensor
    objectives: tuple[str, ...] = ()
    gram: Tensor | None = None


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """Linear layers that carry the adapter, its rank, and the number of objectives. For vectors also ``width`` and
    ``spread`` (standard deviation) of the base's embeddings, for first values ``embeddings`` [V,D] of some tokens."""

    layers: int
    rank: int
    objectives: int
    width: int = 0
    spread: float = 0.0
    embeddings: Tensor | None = field(default=None, compare=False, repr=False)
