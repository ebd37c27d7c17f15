"""A decoder on the adapters of a run directory, all of which are checked as for a mix: nothing in there is trusted."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moalign import door, preference
from moalign.api import Decoder
from moalign.config import Config
from moalign.decode import Decoding, Request
from moalign.decode.processor import heard
from moalign.engine.rewards import Scorer
from moalign.errors import ConfigError, PreferenceError
from moalign.registry import Registry
from moalign.sweeps import callables, neighbours, side_by_side, steering
from moalign.sweeps.archive import Archive
from moalign.sweeps.callables import RewardFunction
from moalign.types import Preference, Sample

log = logging.getLogger(__name__)

ONE_MODEL = "this run trained one model for all preferences; ask it without a decoder"

Judge = Callable[[Sequence[Sample]], Sequence[float | None]]


def open_decoding(
    directory: Path,
    registry: Registry,
    name: str,
    options: Mapping[str, Any],
    prefer: object,
    *,
    values: Mapping[str, Any] | None = None,
    rewards: Mapping[str, RewardFunction] | None = None,
    base: str | None = None,
    device: str = "cpu",
) -> Decoding:
    """A decoder by its name, with a run's base, the adapters that it hears, and rewards of the run's objectives.

    ``prefer``: weights, as a configuration may have them; which candidates they fall between, and with what shares, is
    found as for a mix of adapters. Rewards are there where the decoder chooses among responses: those that ``run.json``
    names, with the options that stand there, but for the objectives of ``rewards``, whose functions are asked instead.
    ``base``: where the base model is now, if not where the run says.

    Raises UnknownPluginError and ConfigError for name and options, PreferenceError where the decoder or the trained
    candidates have no answer to the preference, RunError for another base or an unknown candidate, ConfigError for a
    reward that is missing, UserError for a device that is not there, CorruptFileError.
    """
    archive = Archive.open(directory)
    names = archive.config.objective_names
    wanted = preference.parse(prefer, names, archive.presets, where="prefer")
    if wanted.kind != "weights":
        raise PreferenceError(f"a decoder is asked for weights, not for a preference of the kind {wanted.kind}")
    if how := steering.told_in_prompt(archive):
        raise PreferenceError(
            f"decoders hear candidates by their adapters, and the model of this run is told its preference {how}; "
            "ask it without a decoder"
        )
    conditional = archive.config.condition is not None
    config = callables.replaced(archive.config, rewards or {})
    registry = callables.installed(registry, rewards or {})
    where = steering.place(device)
    decoder = registry.build("decoder", name, options, f"decoder {name}", config.plugin_deadline)
    shares, why = ({}, ONE_MODEL) if conditional else _shares(archive, wanted)
    request = Request(dict(zip(names, wanted.vector(names), strict=True)), shares, dict(values or {}))
    speakers = _speakers(decoder, request, why)
    judges = None
    if door.call(decoder, "responses") != 1:
        weighty = [each for each, weight in request.preference.items() if weight]
        judges = {each: _judge(each, config, registry, rewards or {}) for each in weighty}
    model, slots = side_by_side.load(archive, speakers, base, where)
    return Decoding(decoder, request, model.policy, model.tokeniser.tokenizer, judges, slots)


def _shares(archive: Archive, wanted: Preference) -> tuple[dict[str, float], str]:
    """Trained candidates and the share of each, or none, and why: not every decoder needs them."""
    try:
        return neighbours.asked(wanted, archive.config.objective_names, archive.history), ""
    except PreferenceError as error:
        return {}, str(error)


def _speakers(decoder: Decoder, request: Request, why: str) -> list[str]:
    try:
        return [name for name in heard(decoder, request) if name is not None]
    except (PreferenceError, ConfigError) as error:
        raise type(error)(f"{error} ({why})" if why and not request.shares else str(error)) from None


def _judge(name: str, config: Config, registry: Registry, given: Mapping[str, RewardFunction]) -> Judge:
    spec = config.objectives[name]
    if spec.reward is None:
        raise ConfigError(f"objectives.{name} has no reward in this run, and the decoder chooses by rewards")
    if callables.is_callable(config, name) and name not in given:
        cure = f'give the same to run.decoder: rewards={{"{name}": ...}}'
        raise ConfigError(f"objectives.{name}: its reward was a Python callable, which is not in the run; {cure}")
    key = f"objectives.{name}.reward"
    reward = registry.build("reward", spec.reward.name, spec.reward.options, key, config.plugin_deadline)
    scorer = Scorer(name, reward, spec, log.warning)

    def judge(samples: Sequence[Sample]) -> list[float | None]:
        return [None if math.isnan(score) else score for score in scorer.score(samples).values.tolist()]

    return judge
