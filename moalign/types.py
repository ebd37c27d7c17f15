"""Plain frozen data that flows between the parts. Nothing here computes, and nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    pass


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
    ``weighted_sums``: whether candidates with weights are trained for the weighted sums of the rewards.
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
    weighted_sums: bool = True
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


# --- sampling ------------------------------------------------------------------------------------------------------


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
