"""The same from Python as from the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moalign import config as configuration
from moalign import registry, storage
from moalign.config import Config
from moalign.errors import RunError
from moalign.sweeps import callables, front
from moalign.sweeps.callables import RewardFunction
from moalign.sweeps.observe import Observer

if TYPE_CHECKING:
    from moalign.decode import Decoding


@dataclass(frozen=True)
class Run:
    """A run directory, finished or not."""

    directory: Path

    @property
    def front(self) -> dict[str, Any]:
        """The content of ``front.json``: objectives, points with scores, hypervolume and its reference point."""
        return front.read(self.directory)

    def load(self, candidate: str) -> tuple[Any, Any]:
        """(peft model, tokenizer) of one point of the front, by its id, on the CPU.

        Raises RunError for an unknown id or where the base is not the one that the run trained on.
        """
        import torch

        from moalign import lora
        from moalign.engine import model as models

        record = front.read_record(self.directory)
        settings = Config.model_validate(record["config"])
        ids = [point["id"] for point in self.front["points"]]
        if candidate not in ids:
            raise RunError(f"{self.directory}: no candidate '{candidate}'; there are {', '.join(ids)}")
        folder = self.directory / "candidates" / candidate
        storage.verify(folder)
        loaded = models.load(settings.model_directory, settings.model, torch.device("cpu"))
        lora.read(loaded.policy, models.TRAINED, folder, record["base"])
        if loaded.fingerprint != record["base"]:
            raise RunError(f"{settings.model_directory}: not the base model that {self.directory} was trained on")
        return loaded.policy, loaded.tokeniser.tokenizer

    def decoder(
        self,
        name: str,
        *,
        prefer: str | Mapping[str, Any],
        values: Mapping[str, Any] | None = None,
        device: str = "cpu",
        **options: Any,
    ) -> Decoding:
        """A decoder by its name, on this run's adapters and rewards, for a preference between the trained ones.

        ``options`` are the decoder's own, ``values``: objective -> a function of hidden states, for decoders that ask
        what is still to be expected of it. ``.generate(prompts)`` samples; ``.processor(mask)`` is for transformers.

        Raises UnknownPluginError, ConfigError, PreferenceError and RunError; see ``sweeps.decoding``.
        """
        from moalign.sweeps.decoding import open_decoding

        return open_decoding(self.directory, registry.discover(), name, options, prefer, values=values, device=device)


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
