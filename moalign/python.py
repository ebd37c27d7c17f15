"""The same from Python as from the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moalign import config as configuration
from moalign import registry
from moalign.config import Config
from moalign.errors import PreferenceError, RunError
from moalign.sweeps import callables, dtypes, front
from moalign.sweeps.archive import Archive, Mix
from moalign.sweeps.callables import RewardFunction
from moalign.sweeps.observe import Observer
from moalign.types import Preference

if TYPE_CHECKING:
    from moalign.decode import Decoding
    from moalign.reward_models.trained import TrainedRewardModel
    from moalign.sweeps.choice import Choice


@dataclass(frozen=True)
class Run:
    """A run directory, finished or not."""

    directory: Path

    @property
    def front(self) -> dict[str, Any]:
        """The content of ``front.json``: objectives, points with scores, hypervolume and its reference point."""
        return front.read(self.directory)

    def load(
        self,
        candidate: str | None = None,
        *,
        prefer: str | Mapping[str, Any] | Preference | None = None,
        posterior: float | None = None,
        draw: int | None = None,
        base: str | Path | None = None,
        rank: int | None = None,
        device: str = "cpu",
        **weights: float,
    ) -> tuple[Any, Any]:
        """(peft model, tokenizer) of a point of the front, by its id or by a preference; both are as peft and
        transformers make them, the model in evaluation mode.

        ``run.load("w-0.50-0.50")``, ``run.load(helpful=0.7, harmless=0.3)``, or ``run.load(prefer="careful")`` for
        whatever a configuration may have as a preference. Where a candidate was trained for just that, it is that one;
        between trained candidates their adapters are mixed in delta space by barycentric coordinates, exactly, unless
        ``rank`` asks for the nearest of a smaller rank. ``base``: where the base model is now, if not where the run
        says. Needs the run directory and the base model, not the data.

        ``posterior=0.1, draw=3``, of a run with ``train.posterior``: not the adapters are mixed but their posteriors
        combined by the same shares, and an adapter is drawn, each weight within its central interval of this
        probability; 0 is the mean. Where the run's model is told its preference in text, ``run.text`` says it.

        Raises RunError for an unknown id, where candidates have no posterior, where the base is not the one that the
        run trained on, or where virtual tokens tell the run's model its preference, which no peft adapter holds;
        PreferenceError for a preference that the trained candidates do not enclose, CorruptFileError where a file is
        not what was written.
        """
        from moalign.sweeps import steering

        archive = Archive.open(self.directory)
        mix = archive.drawn(self._mix(archive, candidate, prefer, weights), posterior, draw)
        if steering.vectors(archive, mix) is not None:
            raise RunError(
                f"{self.directory}: its model is told its preference by virtual tokens, which a peft model does not "
                "hold; `moalign generate` speaks with them, and `export` writes them beside the adapter"
            )
        return steering.load(archive, mix, base=None if base is None else str(base), r=rank, device=device)

    def text(
        self,
        candidate: str | None = None,
        *,
        prefer: str | Mapping[str, Any] | Preference | None = None,
        **weights: float,
    ) -> str:
        """What has to stand in front of every prompt to a point of the front, named as for ``load``; "" where its
        adapter is all that tells the model its preference. With a chat template it belongs into the system prompt.
        """
        from moalign.sweeps import steering

        archive = Archive.open(self.directory)
        return steering.text(archive, self._mix(archive, candidate, prefer, weights))

    def select(
        self,
        *,
        at_least: str | Mapping[str, float] | None = None,
        at_most: str | Mapping[str, float] | None = None,
        maximise: str | None = None,
        knee: bool = False,
        nearest: str | Mapping[str, float] | None = None,
        best: str | Mapping[str, Any] | None = None,
    ) -> Choice:
        """The point of the front that ``moalign select`` would choose: its ``id``, the reason, and what else there is
        to say. Bounds, and one of maximise, knee, nearest and best.

        Raises PreferenceError where no point keeps the bounds, with what can be reached.
        """
        from moalign.sweeps import choice

        content = self.front
        wish = choice.wish(
            content, at_least=at_least, at_most=at_most, maximise=maximise, knee=knee, nearest=nearest, best=best
        )
        return choice.choose(content, wish)

    def export(
        self,
        to: str | Path,
        candidate: str | None = None,
        *,
        prefer: str | Mapping[str, Any] | Preference | None = None,
        posterior: float | None = None,
        draw: int | None = None,
        merge: bool = False,
        rank: int | None = None,
        dtype: str = "stored",
        base: str | Path | None = None,
        **weights: float,
    ) -> Path:
        """Write a point, named as for ``load``, into a new folder as ``moalign export`` does: a peft adapter, or with
        ``merge`` a transformers model and its tokenizer, in the base's own precision or in ``dtype``. Returns ``to``.

        Raises UserError for a ``dtype`` that is none, or without ``merge``, and as ``load`` does.
        """
        dtypes.check(dtype, merge)
        from moalign.sweeps import export

        archive = Archive.open(self.directory)
        mix = archive.drawn(self._mix(archive, candidate, prefer, weights), posterior, draw)
        where, name = Path(to), None if base is None else str(base)
        if merge:
            export.write_merged(archive, mix, where, base=name, r=rank, dtype=dtype)
        else:
            export.write_adapter(archive, mix, where, base=name, r=rank)
        return where

    def bundle(self, to: str | Path, *, everything: bool = False, base: str | Path | None = None) -> dict[str, Any]:
        """Write the front's adapters (``everything``: also the dominated ones) and ``bundle.json`` into a new folder;
        returns the content of the latter (docs/bundle.md)."""
        from moalign.sweeps import export

        archive = Archive.open(self.directory)
        return export.write_bundle(archive, Path(to), everything=everything, base=None if base is None else str(base))

    def _mix(self, archive: Archive, candidate: str | None, prefer: object, weights: Mapping[str, float]) -> Mix:
        if sum((candidate is not None, prefer is not None, bool(weights))) != 1:
            raise PreferenceError("give one of: the id of a candidate, prefer=..., or weights such as helpful=0.7")
        if candidate is not None:
            return archive.of_candidate(candidate)
        return archive.for_preference(weights if prefer is None else prefer)

    def decoder(
        self,
        name: str,
        *,
        prefer: str | Mapping[str, Any] | Preference,
        values: Mapping[str, Any] | None = None,
        rewards: Mapping[str, RewardFunction] | None = None,
        base: str | Path | None = None,
        device: str = "cpu",
        **options: Any,
    ) -> Decoding:
        """A decoder by its name, on this run's adapters and rewards, for a preference between the trained ones.

        ``options`` are the decoder's own, ``values``: objective -> a function of hidden states, for decoders that ask
        what is still to be expected of it. ``.generate(prompts)`` samples; ``.processor(mask)`` is for transformers.

        A decoder that chooses among responses asks the rewards that ``run.json`` names, with the options that stand
        there: read it first if the directory is somebody else's. ``rewards``: functions, as for ``moalign.sweep``, in
        the place of these. ``base``: where the base model is now, if not where the run says.

        Raises UnknownPluginError, ConfigError, PreferenceError and RunError; see ``sweeps.decoding``.
        """
        from moalign.sweeps.decoding import open_decoding

        return open_decoding(
            self.directory,
            registry.discover(),
            name,
            options,
            prefer,
            values=values,
            rewards=rewards,
            base=None if base is None else str(base),
            device=device,
        )


def sweep(
    config: str | Path | Mapping[str, Any] | Config,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    observer: Observer | None = None,
    rewards: Mapping[str, RewardFunction] | None = None,
) -> Run:
    """Train the front that a configuration describes, as ``moalign sweep`` does; returns the run.

    ``config`` is a file, a mapping or a Config; ``out`` defaults to runs/NAME, and is needed without a file.
    ``rewards``: for objectives that the configuration has without a reward, functions of samples, each with prompt and
    response, that return one score per sample or None; coroutine functions, too. See ``moalign.api.Reward``.
    """
    from moalign.sweeps import run

    if isinstance(config, str | Path):
        settings = configuration.load(config, overrides)
        out = out or Path("runs") / Path(config).stem
    else:
        settings = config if isinstance(config, Config) else configuration.from_mapping(config, overrides)
    if out is None:
        raise RunError("out: without a configuration file there is no name for the run directory; give one")
    settings = callables.chosen(settings, rewards or {})
    installed = callables.installed(registry.discover(), rewards or {})
    run.start(settings, Path(out), installed, observer or Observer())
    finish(Path(out), observer or Observer())
    return Run(Path(out))


def train_reward_model(
    config: str | Path | Mapping[str, Any],
    out: str | Path,
    overrides: Sequence[str] = (),
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Train the reward model that a configuration (a file or a mapping) describes into the new directory ``out``, as
    ``moalign reward-model train`` does; returns its report.

    Raises ConfigError, DataError, RunError where ``out`` holds something, and TrainingError.
    """
    from moalign.reward_models import config as reward_models
    from moalign.reward_models import training

    if isinstance(config, str | Path):
        settings = reward_models.load(config, overrides)
    else:
        settings = reward_models.from_mapping(config, overrides)
    return training.train(settings, Path(out), registry.discover(), observer or Observer())


def open_reward_model(directory: str | Path, base: str | Path | None = None, device: str = "cpu") -> TrainedRewardModel:
    """A reward model that ``train_reward_model`` wrote, of any form and with any number of members.

    ``.scores(samples)`` is [N,M]; ``.reward("helpful")`` is a function for ``sweep(rewards={"helpful": ...})``.
    ``base``: where the base model is now. Raises RunError where it is another one, CorruptFileError.
    """
    from moalign.reward_models.trained import load

    return load(Path(directory), registry.discover(), None if base is None else str(base), device)


def resume(
    directory: str | Path,
    accept_plugin_change: bool = False,
    observer: Observer | None = None,
    rewards: Mapping[str, RewardFunction] | None = None,
) -> Run:
    """Go on with an interrupted run, as ``moalign resume`` does; returns the run.

    Raises RunError where something that decides the result has changed; plugins of another version or file are let
    through with ``accept_plugin_change``. ``rewards``: the callables that the run was started with.
    """
    from moalign.sweeps import run

    watching = observer or Observer()
    installed = callables.installed(registry.discover(), rewards or {})
    run.resume(Path(directory), installed, watching, accept_plugin_change=accept_plugin_change)
    finish(Path(directory), watching)
    return Run(Path(directory))


def finish(directory: Path, observer: Observer) -> dict[str, Any]:
    """What follows every sweep: exact figures where the world is known, then picture and page; returns the front."""
    from moalign.demo import job
    from moalign.report.page import write_page

    result = job.measure(directory, observer) if job.is_known_world(directory) else front.read(directory)
    write_page(directory)
    return result


def open_run(directory: str | Path) -> Run:
    """A run that is already there. Raises RunError where there is none."""
    front.read_record(Path(directory))
    return Run(Path(directory))
