"""All that a plugin may import from moalign: the types, the plugin kinds, the hook marker, the errors.

A plugin is a frozen pydantic model: its fields are its keys in the configuration, its class attributes say what it
is, its methods compute. Fields are validated before any model is loaded, so a plugin's module should import torch
inside the functions that use it, not at the top.

A plugin says in the module of its entry point for which version of the hooks it is written: ``moalign_api_version = 1``
(without that line: for whichever is there). A moalign whose ``API_VERSION`` is lower reports it and does not load it. A
higher one loads it: within these hooks arguments are only ever added, and an implementation takes those that it names.
To a kind of plugin methods and attributes are only ever added, each with a default that changes nothing.
A hook that may be missing in an older moalign is marked ``@hookimpl(optionalhook=True)``.

The hooks, by the version that brought them:
1  ``register_objectives(register)``, ``register_combiners(register)``, ``register_rewards(register)``,
   ``register_searches(register)``, ``register_readers(register)``, ``register_observers(register)``
2  ``register_transforms(register)``
3  ``register_samplers(register)``, ``register_decoders(register)``
4  ``register_conditioners(register)``, ``register_reward_models(register)``, ``register_references(register)``
5  ``register_filters(register)``
"""

from __future__ import annotations

import pluggy

from moalign.api.combiner import Combiner
from moalign.api.combining import Combine, Combining
from moalign.api.conditioner import Conditioner
from moalign.api.decoding import NextToken, Request
from moalign.api.filter import Filter
from moalign.api.front import hypervolume, hypervolumes, non_dominated, values
from moalign.api.kinds import Decoder, Observer, Reader, Reward, Row, Sampler, Search, Transform
from moalign.api.objective import Objective
from moalign.api.plugin import Plugin, Register
from moalign.api.quantities import (
    chosen_logps,
    figures,
    log_ratios,
    numbers,
    pair_log_ratios,
    pair_logits,
    pair_preference,
)
from moalign.api.reference import Move, Progress, Reference
from moalign.api.reward_model import RewardModel
from moalign.api.sessions import SamplingSession, Watcher
from moalign.batch import (
    AdapterShape,
    Batch,
    Kept,
    PairTerms,
    Responses,
    Round,
    Sampled,
    StepLosses,
    TokenAdvantages,
    Tokens,
)
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
    Candidate,
    Message,
    Outcome,
    Pair,
    Preference,
    Record,
    Refusal,
    RunInfo,
    Sample,
    SamplerInfo,
    Sampling,
    Space,
)

API_VERSION = 5
ENTRY_POINT_GROUP = "moalign"

hookspec = pluggy.HookspecMarker("moalign")
hookimpl = pluggy.HookimplMarker("moalign")

__all__ = [
    "API_VERSION",
    "ENTRY_POINT_GROUP",
    "AdapterShape",
    "Batch",
    "Candidate",
    "Combine",
    "Combiner",
    "Combining",
    "Conditioner",
    "ConfigError",
    "DataError",
    "Decoder",
    "Filter",
    "Kept",
    "Message",
    "MoalignError",
    "ModelError",
    "Move",
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
    "Progress",
    "Reader",
    "Record",
    "Reference",
    "Refusal",
    "Register",
    "Request",
    "Responses",
    "Reward",
    "RewardModel",
    "Round",
    "Row",
    "RunError",
    "RunInfo",
    "Sample",
    "Sampled",
    "Sampler",
    "SamplerInfo",
    "Sampling",
    "SamplingSession",
    "Search",
    "Space",
    "StepLosses",
    "TokenAdvantages",
    "Tokens",
    "TrainingError",
    "Transform",
    "UserError",
    "Watcher",
    "chosen_logps",
    "figures",
    "hookimpl",
    "hookspec",
    "hypervolume",
    "hypervolumes",
    "log_ratios",
    "non_dominated",
    "numbers",
    "pair_log_ratios",
    "pair_logits",
    "pair_preference",
    "values",
]
