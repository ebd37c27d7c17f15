"""A decoder on the adapters of a run directory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moalign import door, lora, preference, storage
from moalign.api import Decoder
from moalign.config import Config
from moalign.decode import Decoding, Request
from moalign.engine import model as models
from moalign.engine.model import LanguageModel
from moalign.engine.rewards import Scorer
from moalign.errors import ConfigError, PreferenceError, RunError
from moalign.registry import Registry
from moalign.sweeps import front, neighbours
from moalign.types import Preference, Sample

Judge = Callable[[Sequence[Sample]], Sequence[float | None]]


def open_decoding(
    directory: Path,
    registry: Registry,
    name: str,
    options: Mapping[str, Any],
    prefer: object,
    *,
    values: Mapping[str, Any] | None = None,
    device: str = "cpu",
    warn: Callable[[str], None] = lambda what: None,
) -> Decoding:
    """A decoder by its name, with a run's base, the adapters that it hears, and the rewards of the run's objectives.

    ``prefer``: weights, as a configuration may have them; which candidates they fall between, and with what shares, is
    found as for a mix of adapters. Rewards are there where the decoder chooses among responses.

    Raises UnknownPluginError and ConfigError for name and options, PreferenceError where the decoder or the trained
    candidates have no answer to the preference, RunError for another base or an unknown candidate, ConfigError for a
    reward that is missing, CorruptFileError.
    """
    record = front.read_record(directory)
    config = Config.model_validate(record["config"])
    points = front.read(directory)["points"]
    names = config.objective_names
    named: dict[str, Preference] = {}
    for preset, value in config.preferences.items():
        named[preset] = preference.parse(value, names, named, where=f"preferences.{preset}")
    wanted = preference.parse(prefer, names, named)
    if wanted.kind != "weights":
        raise PreferenceError(f"a decoder is asked for weights, not for a preference of the kind {wanted.kind}")
    decoder = registry.build("decoder", name, options, f"decoder {name}", config.plugin_deadline)
    shares, why = _shares(wanted, points, names)
    request = Request(dict(zip(names, wanted.vector(names), strict=True)), shares, dict(values or {}))
    speakers = _speakers(decoder, request, why)
    rewards = None
    if door.call(decoder, "responses") != 1:
        weighty = [each for each, weight in request.preference.items() if weight]
        rewards = {each: _judge(each, config, registry, warn) for each in weighty}
    model, slots = _load(directory, config, record["base"], [each["id"] for each in points], speakers, device)
    return Decoding(decoder, request, model.policy, model.tokeniser.tokenizer, rewards, slots)


def _shares(wanted: Preference, points: Sequence[Mapping[str, Any]], names: tuple[str, ...]) -> tuple[Any, str]:
    """Trained candidates and the share of each, or none, and why: not every decoder needs them."""
    found = [(each["id"], preference.from_json(each["preference"], names)) for each in points if _is_trained(each)]
    trained = [(name, held) for name, held in found if held.kind == "weights"]
    try:
        shares = neighbours.barycentric(wanted.vector(names), [held.vector(names) for _, held in trained])
    except PreferenceError as error:
        return {}, str(error)
    return {name: share for (name, _), share in zip(trained, shares, strict=True) if share}, ""


def _is_trained(point: Mapping[str, Any]) -> bool:
    return point["kind"] == "trained"


def _speakers(decoder: Decoder, request: Request, why: str) -> list[str]:
    try:
        return [name for name in door.call(decoder, "speakers", request) if name is not None]
    except (PreferenceError, ConfigError) as error:
        raise type(error)(f"{error} ({why})" if why and not request.shares else str(error)) from None


def _judge(name: str, config: Config, registry: Registry, warn: Callable[[str], None]) -> Judge:
    spec = config.objectives[name]
    if spec.reward is None:
        raise ConfigError(f"objectives.{name} has no reward in this run, and the decoder chooses by rewards")
    key = f"objectives.{name}.reward"
    reward = registry.build("reward", spec.reward.name, spec.reward.options, key, config.plugin_deadline)
    scorer = Scorer(name, reward, spec, warn)

    def judge(samples: Sequence[Sample]) -> list[float | None]:
        return [None if math.isnan(score) else score for score in scorer.score(samples).values.tolist()]

    return judge


def _load(
    directory: Path, config: Config, base: str, ids: Sequence[str], wanted: Sequence[str], device: str
) -> tuple[LanguageModel, dict[str, str]]:
    """The base with an adapter for each of ``wanted``, side by side, and the names under which it has them."""
    for name in wanted:
        if name not in ids:
            raise RunError(f"{directory}: no candidate '{name}'; there are {', '.join(ids)}")
        storage.verify(directory / "candidates" / name)
    slots = {name: f"speaker-{number}" for number, name in enumerate(dict.fromkeys(wanted))}
    with door.kept_generators():  # adapters are filled with random numbers before they are read
        model = _filled(directory, config, base, slots, device)
    model.policy.requires_grad_(False)
    return model, slots


def _filled(directory: Path, config: Config, base: str, slots: Mapping[str, str], device: str) -> LanguageModel:
    model = models.load(config.model_directory, config.model, torch.device(device))
    if model.fingerprint != base:
        raise RunError(f"{config.model_directory}: not the base model that {directory} was trained on")
    if slots:
        lora.add_slots(model.policy, list(slots.values()))
        for name, slot in slots.items():
            lora.read(model.policy, slot, directory / "candidates" / name, base)
        lora.stack(model.policy, list(slots.values()))
    return model
