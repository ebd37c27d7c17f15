"""A run as somebody sees it who steers by it: its record, what became of its candidates, and which of them a preference
is made of. Read from the run directory alone, and without torch, so that what is refused is refused at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moalign import preference
from moalign.config import Config
from moalign.errors import PreferenceError, RunError, UserError
from moalign.sweeps import conditions, front, journal, neighbours, outcomes
from moalign.types import Outcome, Preference


@dataclass(frozen=True)
class Draw:
    """Of weights from a posterior: each within the interval at the middle that has the probability ``mass``."""

    mass: float
    seed: int = 0


@dataclass(frozen=True)
class Mix:
    """Candidates and the share of each, which sum to 1; ``wanted``: the preference that they stand for, if one was
    asked for. ``conditioned``: the one candidate is a model for all preferences, and is asked for this one. ``draw``:
    not the adapters are mixed but their posteriors combined, and an adapter is drawn."""

    shares: Mapping[str, float]
    wanted: Preference | None = None
    conditioned: bool = False
    draw: Draw | None = None

    @property
    def text(self) -> str:
        """For people: whose adapters, how much of each."""
        if self.conditioned:
            return "the one model of the run, asked for it"
        parts = " + ".join(f"{share:.4g} of {name}" for name, share in self.shares.items())
        if self.draw is not None:
            what = f"draw {self.draw.seed} within mass {self.draw.mass:g}" if self.draw.mass else "the mean"
            return f"{what} of the posterior {parts}"
        return f"the adapter of {next(iter(self.shares))}" if len(self.shares) == 1 else parts


@dataclass(frozen=True)
class Archive:
    """What of a run is needed to steer by it."""

    directory: Path
    record: Mapping[str, Any]
    config: Config
    history: tuple[Outcome, ...]

    @classmethod
    def open(cls, directory: Path) -> Archive:
        """Raises RunError where it is no run directory, CorruptFileError where record or journal are damaged."""
        record = front.read_record(directory)
        events = journal.of_run(directory)
        with front.as_written(directory):
            config = Config.model_validate(record["config"])
            history = outcomes.history(events, config.objective_names)
            for key in ("base", "tokenizer", "device"):
                if not isinstance(record[key], str):
                    raise TypeError(f"{key} is no text")
        return cls(directory, record, config, tuple(history))

    @property
    def base(self) -> str:
        """Where the run has its base model from."""
        return self.config.model_directory

    @property
    def presets(self) -> dict[str, Preference]:
        """The preferences that the configuration names."""
        found: dict[str, Preference] = {}
        for name, value in self.config.preferences.items():
            found[name] = preference.parse(value, self.config.objective_names, found, where=f"preferences.{name}")
        return found

    def finished(self) -> tuple[str, ...]:
        """The ids of all candidates that have an adapter. Raises RunError with the reason where there is none."""
        done = tuple(outcome.id for outcome in self.history if outcome.status == "done")
        failed = [outcome for outcome in self.history if outcome.status == "failed"]
        if failed and not done:
            first = failed[0]
            raise RunError(f"{self.directory}: every candidate failed; the first, {first.id}: {first.error}")
        if not done:
            raise RunError(f"{self.directory}: no candidate is finished yet; `moalign resume` goes on with the run")
        return done

    def of_candidate(self, candidate: str) -> Mix:
        """One point of the run by its id. Raises RunError with the ids that there are, or why it has no adapter."""
        for outcome in self.history:
            if outcome.id == candidate and outcome.status == "done":
                return Mix({candidate: 1.0})
            if outcome.id == candidate:
                ended = "was skipped" if outcome.status == "skipped" else "failed"
                raise RunError(f"{self.directory}: the candidate '{candidate}' {ended}: {outcome.error}")
        raise RunError(f"{self.directory}: no candidate '{candidate}'; there are {', '.join(self.finished())}")

    def for_preference(self, prefer: object) -> Mix:
        """What a preference is made of: the candidate trained for it, or the neighbours between which it lies; of a run
        that trained one model for all preferences, that model.

        ``prefer``: anything that ``preference.parse`` takes, also a name from the configuration. Raises
        PreferenceError, RunError where no candidate is finished.
        """
        names = self.config.objective_names
        wanted = preference.parse(prefer, names, self.presets, where="prefer")
        self.finished()
        if self.config.condition is not None:
            return self._of_model(wanted)
        return Mix(neighbours.asked(wanted, names, self.history), wanted)

    def drawn(self, mix: Mix, mass: float | None, seed: int | None) -> Mix:
        """The mix as a draw from the combined posteriors of its candidates; as it is where no ``mass`` is given.

        Raises UserError for a mass that is none or a draw without one, RunError where candidates have no posterior.
        """
        if mass is None:
            if seed is not None:
                raise UserError(f"draw {seed}: say from how much of the posterior, such as --posterior 0.1")
            return mix
        if not 0 <= mass < 1:
            raise UserError(f"posterior {mass}: a probability from 0 (its mean) to below 1; all of it has no bounds")
        if self.config.condition is not None:
            raise RunError(f"{self.directory}: its one model knows every preference itself, and has no posterior")
        if self.config.train.posterior is None:
            raise RunError(
                f"{self.directory}: its candidates were trained without a posterior; train them with train.posterior, "
                "such as 0.25"
            )
        for outcome in self.history:
            if outcome.id in mix.shares and outcome.kind != "trained":
                raise RunError(
                    f"{self.directory}: the candidate '{outcome.id}' was not trained but {outcome.kind}, so it has no "
                    "posterior; ask for its preference between trained ones, or for one of these"
                )
        return replace(mix, draw=Draw(mass, seed or 0))

    def _of_model(self, wanted: Preference) -> Mix:
        """The run's one model, asked for a preference. Raises PreferenceError for one that it cannot be told."""
        if wanted.kind == "thresholds":
            raise PreferenceError(
                f"{preference.format(wanted)}: the model of this run is told weights or a direction; `moalign select "
                "--at-least` finds a point that keeps to thresholds"
            )
        return replace(self.of_candidate(conditions.MODEL), wanted=wanted, conditioned=True)
