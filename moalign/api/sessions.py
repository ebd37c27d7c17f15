"""What plugins return that lasts for a run, and is free to hold state such as an open file or a loaded model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from moalign.types import Candidate, Outcome, Sampling


class Watcher:
    """Hears what happens in a run; made by an Observer, and free to hold state such as an open file.

    It is told in plain data that is its own copy. What it raises is reported once, it is then closed and hears no more,
    and the run goes on as if it had never been there. After a resume the steps of candidates that were under way come
    again, with the same numbers.
    """

    def on_step(self, candidate: Candidate, step: int, metrics: Mapping[str, Any]) -> None:
        """A step was taken; ``step`` counts from 0 for each candidate, and several may be under way in turn.

        ``metrics``: ``loss``, ``gradient_norm``, ``kl_estimate``, ``tokens``, ``OBJECTIVE/loss`` and so on; a number
        that is not finite is text, as in JSON. See ``numbers``.
        """

    def on_candidate_end(self, outcome: Outcome) -> None:
        """A candidate is done, and on disk, or has failed. See ``figures``."""

    def on_run_end(self, front: Mapping[str, Any]) -> None:
        """All candidates have ended; ``front`` is the content of ``front.json``."""

    def close(self) -> None:
        """Always the last call, also when the run was interrupted."""


class SamplingSession:
    """Samples for one run; made by a Sampler, and free to hold state such as a loaded model."""

    def sample(
        self, adapters: Sequence[Path | None], prompts: Sequence[Sequence[int]], how: Sampling
    ) -> Sequence[Sequence[Sequence[Sequence[int]]]]:
        """Token ids, by adapter, prompt and sample: ``how.samples`` responses to each prompt under each adapter.

        ``adapters``: folders as peft writes them, which are gone after the call; None: the untouched base. ``prompts``:
        token ids, with everything that belongs before a response. A response has at least one token, and less than
        ``how.max_new_tokens`` only where its last one is a stop token.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Always the last call, also when the run was interrupted."""
