"""Plain frozen data that flows between the parts. Nothing here computes, and nothing here imports torch.

Shapes: N sequences, T tokens, P pairs, M objectives, D the width of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor


# --- preferences and candidates -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Preference:
    """What somebody wants from the objectives, keyed by objective name.

    ``weights``    non-negative, sum 1.
    ``direction``  a vector of length 1; components may be negative.
    ``thresholds`` lower bounds (in the direction of the objective); the objectives not named are to be maximised.

    ``values`` holds one number per objective in the order of the objectives (``thresholds``: only those bounded).
    """

    kind: Literal["weights", "direction", "thresholds"]
    values: Mapping[str, float]
    name: str | None = None

    def vector(self, objectives: tuple[str, ...]) -> tuple[float, ...]:
        """The values as a tuple in the order of ``objectives``; NaN for an objective without a threshold."""
        if self.kind == "thresholds":
            return tuple(self.values.get(name, float("nan")) for name in objectives)
        return tuple(self.values[name] for name in objectives)


@dataclass(frozen=True, slots=True)
class Space:
    """What a search may choose from: the objectives' names in order, and the preferences that the user named.

    ``steps``: of training, as the configuration has it; a candidate's ``changes`` may say otherwise.
    ``together``: how many candidates one pass over the base holds, as far as that is known; proposing so many costs
    no more time than fewer.
    ``base``: scores of the untouched model, ``reference_point``: of the hypervolume; empty before they are known.
    ``kl_price``: what a nat of KL costs, in rewards; 0 where nothing prices it.
    ``affordable``: how many trainings of all steps the budget still pays, ``budget``: how many it paid at first, by the
    first estimate, which stays what it is; None without a budget, or before that was made.
    ``conditioned``: one model is trained for many preferences, and asked for what is proposed.
    ``seed``: the configuration's; a candidate's ``changes`` may name another.
    """

    objectives: tuple[str, ...]
    preferences: Mapping[str, Preference] = field(default_factory=dict)
    steps: int = 1
    together: int = 1
    base: Mapping[str, float] = field(default_factory=dict)
    reference_point: Mapping[str, float] = field(default_factory=dict)
    kl_price: float = 0.0
    affordable: float | None = None
    budget: float | None = None
    conditioned: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """One point of the front to be: an id that is also a folder name, its preference, and whom it builds on.

    ``parents``: the finished candidate from whose adapter the training starts; empty: from fresh weights.
    ``mixed``: not trained, but put together from the adapters of its trained neighbours in preference, or by
    ``shares``: finished candidates, and how much of what each adds to the base goes into the mix, or into the adapter
    from which the training starts; they need not sum to 1. Several numbers for one are for as many blocks of layers,
    of equal size, from the bottom.
    ``conditioned``: not trained either, but its parent, which is trained for many preferences, asked for this one.
    ``changes``: where it is trained differently from the configuration: {"train.steps": 60, "loss.beta": 0.2,
    "model.lora.r": 4}, with the keys of ``train``, the loss's own options, the adapter's rank (not above the
    configuration's) and alpha, and ``seed``.
    """

    id: str
    preference: Preference
    parents: tuple[str, ...] = ()
    mixed: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)
    conditioned: bool = False
    shares: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict)

    @property
    def kind(self) -> Literal["trained", "mixed", "conditioned"]:
        """What becomes of it."""
        return "conditioned" if self.conditioned else "mixed" if self.mixed else "trained"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a candidate. ``scores`` are larger-is-better per objective, ``stderr`` beside them.

    ``skipped``: not trained, because the budget did not suffice.
    ``kl`` is KL(policy || base) in nats per response, estimated on the policy's own samples (None: not measured).
    ``parents``: whose adapters it was made from, with the share of each; where it was trained, the one it started from.
    ``changes`` are the candidate's.
    """

    id: str
    status: Literal["done", "failed", "skipped"]
    preference: Preference
    scores: Mapping[str, float] = field(default_factory=dict)
    stderr: Mapping[str, float] = field(default_factory=dict)
    kl: float | None = None
    tokens: int = 0
    checksum: str | None = None
    error: str | None = None
    details: Mapping[str, float] = field(default_factory=dict)
    kind: Literal["trained", "mixed", "conditioned"] = "trained"
    parents: Mapping[str, float] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What an observer is told of the run that it watches.

    ``id``: 16 hexadecimal digits, the run's own and the same after a resume. ``directory`` is absolute. ``config``:
    the configuration as plain data. ``finished``: candidates that are in the journal already.
    """

    id: str
    directory: Path
    config: Mapping[str, Any]
    objectives: tuple[str, ...]
    finished: int = 0


# --- data -----------------------------------------------------------------------------------------------------------

Message = Mapping[str, str]  # {"role": ..., "content": ...}


@dataclass(frozen=True, slots=True)
class Pair:
    """A judgement between two responses of one record, by index. ``strength`` 0 is a tie."""

    chosen: int
    rejected: int
    strength: float = 1.0


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt with its responses and all that is known about them.

    ``prompt``   text, or messages of a conversation.
    ``scores``   objective -> one number per response, None where unknown (never NaN).
    ``pairs``    objective -> judgements; ties are kept (strength 0).
    ``group``    records of one group never stand on both sides of the training / held-out split.
    ``file``, ``line``  where it was read.
    """

    prompt: str | tuple[Message, ...]
    responses: tuple[str, ...]
    scores: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    pairs: Mapping[str, tuple[Pair, ...]] = field(default_factory=dict)
    group: str = ""
    file: str = ""
    line: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row, a response or a pair that was not taken: where it stood and why. Counted and reported."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A response to be scored by a reward: the prompt as it was given, and the response's text."""

    prompt: str | tuple[Message, ...]
    response: str


# --- what a loss sees -----------------------------------------------------------------------------------------------


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
    ``guides``            by name, ``logps`` under the frozen adapters that ``Objective.guides`` names, [N,T] each
    ``distributions``     by name, log-probabilities of all V tokens at each of the S response tokens, in the order of
                          ``mask.nonzero()``, [S,V] each: "policy", with the graph, "reference" where it is needed, and
                          the guides by their names. None of them unless the objective needs "distributions"
    ``views``             by name, int64 [P] each: the row of each pair's further sequence that ``Objective.views``, or
                          a need, has asked for; among the N rows, with rewards of NaN

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
class AdapterShape:
    """Linear layers that carry the adapter, its rank, and the number of objectives. For vectors also ``width`` and
    ``spread`` (standard deviation) of the base's embeddings, for first values ``embeddings`` [V,D] of some tokens."""

    layers: int
    rank: int
    objectives: int
    width: int = 0
    spread: float = 0.0
    embeddings: Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Tokens:
    """What there is to know of the tokens of a round's sampled responses, for losses that weigh each token.

    All float64 on the CPU but ``ended``; column t is about the response's own token t, and T is the longest response.

    ``mask[N,T]``       1 at response tokens, the end-of-sequence token among them
    ``ended[N]``        bool; False where the response was cut at rollouts.max_new_tokens
    ``old_logps[N,T]``  log-probabilities under the policy that sampled; None unless the objective needs "old_logps"
    ``ref_logps[N,T]``  the same under the reference; None unless it needs "reference"
    ``measured``        what ``Objective.measure`` found, by name, [N,T] each

    All are 0 where ``mask`` is 0.
    """

    mask: Tensor
    ended: Tensor
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    measured: Mapping[str, Tensor] = field(default_factory=dict)


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
class SamplerInfo:
    """What a sampler starts with.

    ``model``: directory or hub name of the untouched base; ``dtype``: of its weights as moalign computes, such as
    "float32"; ``vocabulary``: token ids are below; ``rank``: that no adapter exceeds.
    """

    model: str
    dtype: str
    vocabulary: int
    rank: int


@dataclass(frozen=True, slots=True)
class Sampling:
    """How responses are to be sampled: ``samples`` to each prompt, of at most ``max_new_tokens`` tokens.

    A response ends with the first of ``stop_token_ids``, which is a part of it. ``temperature`` 0: the likeliest token
    each time. ``top_p``: of the likeliest tokens alone that have this much of the probability together. ``seed``: what
    is drawn should follow from it, and be the same for all adapters.
    """

    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    seed: int


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
