"""All that a plugin may import from moalign: the types, the plugin kinds, the hook marker, the errors.

A plugin is a frozen pydantic model: its fields are its keys in the configuration, its class attributes say what it
is, its methods compute. Fields are validated before any model is loaded, so a plugin's module should import torch
inside the functions that use it, not at the top.

A plugin says in the module of its entry point for which version of the hooks it is written: ``moalign_api_version = 1``
(without that line: for whichever is there). A moalign whose ``API_VERSION`` is lower reports it and does not load it. A
higher one loads it: within these hooks arguments are only ever added, and an implementation takes those that it names.
A hook that may be missing in an older moalign is marked ``@hookimpl(optionalhook=True)``.

The hooks, by the version that brought them:
1  ``register_objectives(register)``, ``register_combiners(register)``, ``register_rewards(register)``,
   ``register_searches(register)``, ``register_readers(register)``, ``register_observers(register)``
2  ``register_transforms(register)``
3  ``register_samplers(register)``, ``register_decoders(register)``
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import pluggy
from pydantic import BaseModel, ConfigDict, PrivateAttr

from moalign.api.quantities import (
    chosen_logps,
    figures,
    log_ratios,
    numbers,
    pair_log_ratios,
    pair_logits,
    pair_preference,
)
from moalign.api.sessions import SamplingSession, Watcher
from moalign.errors import (
    ConfigError,
    DataError,
    MoalignError,
    ModelError,
    PluginError,
    PreferenceError,
    RunError,
    TrainingError,
    UserError,
)
from moalign.types import (
    Batch,
    Candidate,
    Message,
    NextToken,
    Outcome,
    Pair,
    PairTerms,
    Preference,
    Record,
    Refusal,
    Request,
    Responses,
    Round,
    RunInfo,
    Sample,
    SamplerInfo,
    Sampling,
    Space,
)

if TYPE_CHECKING:
    from random import Random

    from torch import Tensor

API_VERSION = 3
ENTRY_POINT_GROUP = "moalign"

hookspec = pluggy.HookspecMarker("moalign")
hookimpl = pluggy.HookimplMarker("moalign")

Row = tuple[str, int, Mapping[str, Any]]  # file, line (or row number, from 1), the row's columns


class Plugin(BaseModel):
    """Base of every kind. Unknown keys are refused, fields cannot change after construction.

    The string below a field is what ``moalign plugins show`` says about it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    _origin: Any = PrivateAttr(default=None)  # where the registry found it, for messages

    requires: ClassVar[Mapping[str, str]] = {}
    """modules that the methods import, and what to install for each: {"wandb": "moalign[wandb]"}; one that is missing
    is reported before a model is loaded"""


class Objective(Plugin):
    """A loss on token log-probabilities.

    ``needs`` names what the engine must supply, and it supplies nothing else:
    "pairs"      labelled pairs, chosen before rejected
    "margins"    pairs in any order, with the reward difference of every objective (``terms.difference``)
    "reference"  log-probabilities under the reference
    "groups"     responses that the policy has sampled, several for each prompt; each has an advantage (``advantages``)
    "old_logps"  log-probabilities under the policy that sampled them
    "greedy"     with "groups": the signal of the policy's greedy response to each prompt, which is never trained on
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs"})
    shiftable: ClassVar[bool] = True
    """whether the loss reads ``terms.scale`` and ``terms.margin``, so that every combiner can reach it"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        """float32 [P], one value per pair, never reduced and without ``terms.weight``, which the engine applies.

        With "groups" in ``needs`` [N], one value per row, and all terms [N] are those of a pair that nothing changes.
        """
        raise NotImplementedError

    def advantages(self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None) -> Tensor:
        """How much each response counts, [N] like all arguments; asked only where ``needs`` has "groups".

        ``signal``: the combiner's, of all responses of a round; ``groups``: those to one prompt share a number;
        ``log_ratios``: log pi - log pi_ref of the response under the policy that sampled it, None unless ``needs`` has
        "reference". All float64, and no gradient goes through.

        With "greedy" in ``needs`` a fourth argument comes, ``greedy: Tensor | None = None``: for each response the
        signal of the greedy response to its prompt, [N].
        """
        raise NotImplementedError


class Combiner(Plugin):
    """Many objectives and a preference -> one signal.

    ``accepts`` says which pairs the rule has a meaning for: "labelled" (one objective judged the pair) and "scored"
    (every objective scored both responses, as regression losses use them). "groups": the rule combines the rewards of
    sampled responses (``signal``).
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"labelled", "scored"})
    weighs_judges: ClassVar[bool] = False
    """whether a pair judged by an objective without weight has weight 0; then it takes no place in a step"""
    monotone: ClassVar[bool] = True
    """whether a larger reward never makes the result smaller, where no weight is negative"""
    reward_range: ClassVar[tuple[float, float]] = (float("-inf"), float("inf"))
    """the rewards that the rule has a meaning for"""
    pointwise: ClassVar[bool] = True
    """whether a response's ``signal`` depends on no other response, given the state; else there is none for a greedy
    response beside the samples, and losses that need one are refused"""
    needs_gram: ClassVar[bool] = False
    """whether ``observe`` reads the inner products of the objectives' gradients (``Round.gram``)"""

    def check(self, preference: Preference) -> None:
        """Raise PreferenceError where this rule has no meaning for the preference. Called before a model is loaded."""

    def needs(self, preference: Preference) -> frozenset[str]:
        """What ``pair_terms`` reads beside the pairs: empty, or {"margins"}."""
        return frozenset()

    def pair_terms(self, batch: Batch) -> PairTerms:
        """Scale, margin and weight of every pair; see PairTerms."""
        raise NotImplementedError

    def scalarise(self, rewards: Tensor, preference: Tensor) -> Tensor:
        """rewards [..., M], preference [..., M] -> [...]; NaN where a reward that carries weight is unknown."""
        raise NotImplementedError

    def init(self, preference: Preference) -> Mapping[str, Any]:
        """The state with which a candidate's training begins, as plain data; for rules that adapt.

        The preference's values stand in the order of the objectives. Numbers in the state, and in mappings in it, are
        among the metrics, as ``combine/NAME`` and ``combine/NAME/KEY``.
        """
        return {}

    def observe(self, state: Mapping[str, Any], seen: Round) -> Mapping[str, Any]:
        """The state after a round of sampled responses, before ``signal`` is asked for them; a new one."""
        return state

    def signal(self, rewards: Tensor, preference: Tensor, groups: Tensor, state: Mapping[str, Any]) -> Tensor:
        """One number for each sampled response: rewards [N,M], preference [N,M], groups [N] -> [N].

        All are float64 but the groups, which are whole numbers: those of one prompt share one. A preference of
        thresholds has NaN for the objectives without one. The rewards are as transforms left them.
        """
        return self.scalarise(rewards, preference)

    def multiplier(self, state: Mapping[str, Any]) -> float:
        """What all advantages are multiplied by; a factor on rewards would be lost where they are standardised."""
        return 1.0


class Reward(Plugin):
    """Scores responses for one objective; larger is better.

    A sample's score is a function of the sample, so that samples of the same content are asked once in a run.
    """

    deterministic: ClassVar[bool] = True
    """whether a sample has the same score, to the last bit, at every call and whatever stands beside it; where not, as
    with padded batches of a model, only samples of one call are asked once"""

    def score(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        """One finite number per sample, or None to abstain; may be a coroutine function (``async def``)."""
        raise NotImplementedError


class Transform(Plugin):
    """Shapes the rewards of one objective before the combiner sees them; what is evaluated stays as it was.

    Transforms chain: each sees what the one before it made of the rewards.
    """

    monotone: ClassVar[bool] = True
    """whether of two responses to one prompt, alike in all else, the one with more reward never gets less"""
    pointwise: ClassVar[bool] = False
    """whether what a response gets depends on no other response and on no state; such a transform is applied to the
    base's responses too, where one that comes after it compares with them"""

    def references(self) -> int:
        """How many responses of the untouched base to each prompt it compares with (``about.reference``); 0: none."""
        return 0

    def init(self) -> Mapping[str, Any]:
        """The state with which a candidate's training begins, as plain data; for running statistics."""
        return {}

    def apply(self, rewards: Tensor, about: Responses, state: Mapping[str, Any]) -> tuple[Tensor, Mapping[str, Any]]:
        """The rewards of a round's responses as they are to count, finite float64 [N] like ``rewards``, and the state
        after this round. A function of its arguments, none of which it changes."""
        raise NotImplementedError


class Search(Plugin):
    """Which candidates next."""

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> Sequence[Candidate]:
        """The next candidates; none when the search is over.

        A pure function of its arguments, so that a resumed run replays it; ``rng`` starts from the same seed at every
        call.
        """
        raise NotImplementedError


class Reader(Plugin):
    """The format of a dataset: rows -> records. moalign itself parses JSON, JSONL, CSV and Parquet into rows."""

    def recognises(self, row: Mapping[str, Any]) -> bool:
        """Whether the first row of a file looks like this format; asked when the configuration says ``auto``."""
        return False

    def read(self, rows: Iterable[Row], objectives: Sequence[str]) -> Iterator[Record | Refusal]:
        """Records, and a Refusal for everything that was not taken.

        ``objectives`` are the names of the configuration; empty: whatever the file offers. Refusals are counted by the
        part of their reason before the first ": ".
        """
        raise NotImplementedError


class Observer(Plugin):
    """Watches runs, for trackers and tools. Its fields are options; the state of one run is in the Watcher.

    It cannot change a result, so a run may be resumed with other observers.
    """

    def on_run_start(self, run: RunInfo) -> Watcher:
        """Model and data are ready; open what is written to, and return who writes. Called again at a resume."""
        raise NotImplementedError


class Sampler(Plugin):
    """Where the responses of a round come from, in place of moalign's own sampling; for faster engines.

    What is trained and reported is computed by moalign, log-probabilities of the policy that sampled among it. A
    resumed run equals the unbroken one where the sampler says the same again.
    """

    deterministic: ClassVar[bool] = False
    """whether the same adapters, prompts and ``how`` get the same responses, whatever was asked before"""

    def start(self, info: SamplerInfo) -> SamplingSession:
        """Make ready; called once, when the first responses of a run are wanted."""
        raise NotImplementedError


class Decoder(Plugin):
    """Alignment at decoding time: what candidates that are trained already, or the base, say together.

    The host computes the model, keeps the caches and draws the noise; a decoder's methods are functions of their
    arguments.
    """

    def speakers(self, request: Request) -> Sequence[str | None]:
        """Under which candidates the next token's logits are wanted, in that order; None: the untouched base.

        Called before a model is loaded. Raises PreferenceError or ConfigError where the request has no meaning here.
        """
        raise NotImplementedError

    def scores(self, request: Request, at: NextToken) -> Tensor:
        """[N,V], whose softmax is what the next token is sampled from; -inf for a token that must not come."""
        return at.logits[0]

    def responses(self) -> int:
        """How many responses to a prompt are sampled, of which ``keep`` chooses one."""
        return 1

    def keep(self, request: Request, rewards: Tensor) -> int:
        """Which of the n responses to a prompt is given; asked only where there are several.

        ``rewards``: float64 [n,M] in the order of ``request.preference``, larger is better, NaN where unknown.
        """
        raise NotImplementedError


class Register(Protocol):
    """Given to a ``register_*`` hook; call it once per plugin.

    ``target`` is the class, or better "module:Class", which is imported only when somebody uses it.
    """

    def __call__(self, name: str, target: str | type[Plugin], *, summary: str, paper: str = "") -> None: ...


__all__ = [
    "API_VERSION",
    "ENTRY_POINT_GROUP",
    "Batch",
    "Candidate",
    "Combiner",
    "ConfigError",
    "DataError",
    "Decoder",
    "Message",
    "MoalignError",
    "ModelError",
    "NextToken",
    "Objective",
    "Observer",
    "Outcome",
    "Pair",
    "PairTerms",
    "Plugin",
    "PluginError",
    "Preference",
    "PreferenceError",
    "Reader",
    "Record",
    "Refusal",
    "Register",
    "Request",
    "Responses",
    "Reward",
    "Round",
    "Row",
    "RunError",
    "RunInfo",
    "Sample",
    "Sampler",
    "SamplerInfo",
    "Sampling",
    "SamplingSession",
    "Search",
    "Space",
    "TrainingError",
    "Transform",
    "UserError",
    "Watcher",
    "chosen_logps",
    "figures",
    "hookimpl",
    "hookspec",
    "log_ratios",
    "numbers",
    "pair_log_ratios",
    "pair_logits",
    "pair_preference",
]
