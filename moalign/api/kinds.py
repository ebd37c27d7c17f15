"""The kinds that are a method or two: reward, transform, search, reader, observer, sampler, decoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from moalign.api.decoding import NextToken, Request
from moalign.api.plugin import Plugin
from moalign.api.sessions import SamplingSession, Watcher
from moalign.batch import Responses
from moalign.types import Candidate, Outcome, Record, Refusal, RunInfo, Sample, SamplerInfo, Space

if TYPE_CHECKING:
    from random import Random

    from torch import Tensor

Row = tuple[str, int, Mapping[str, Any]]  # file, line (or row number, from 1), the row's columns


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

    def pessimistic(self) -> bool:
        """Whether doubt makes a score smaller. With ``direction: min`` it would make it better, and is refused."""
        return False


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

    later_kinds: ClassVar[frozenset[str]] = frozenset()
    """kinds of preferences that only its later proposals have, such as {"thresholds"}; with two objectives and more the
    combiner is asked about these before anything is trained"""
    supposes_weighted_sums: ClassVar[bool] = False
    """whether it takes the policy trained for weights to have the largest weighted sum of all; users are warned where
    the combiner does not declare ``weighted_sums``"""

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> Sequence[Candidate]:
        """The next candidates; none when the search is over.

        A pure function of its arguments, so that a resumed run replays it; ``rng`` starts from the same seed at every
        call.
        """
        raise NotImplementedError

    def later_changes(self, space: Space) -> Sequence[Mapping[str, Any]]:
        """Changes that later candidates may have, such as both ends of a range; each is tried before anything is
        trained, and what does not work is the user's error."""
        return ()

    def reason(self, space: Space) -> str:
        """What it does in this space and why, in one line for people; "" where its name and options say it."""
        return ""


class Reader(Plugin):
    """The format of a dataset: rows -> records. moalign itself parses JSON, JSONL, CSV and Parquet into rows.

    ``general``: a reader of tables from anywhere, such as all with certain columns; ``auto`` takes it only where no
    reader of one dataset's format recognises the row.
    """

    general: ClassVar[bool] = False

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
