"""The configuration: one validated, frozen value. What a plugin's options mean, the plugin says."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from moalign.errors import ConfigError
from moalign.validation import explain

BUILT_IN_MODEL = "tiny-assistant"
BUILT_IN_DIRECTORY = Path(__file__).parent / "demo"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class PluginChoice(Section):
    """A plugin by name, with its own options beside the name."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Choice = Annotated[PluginChoice, BeforeValidator(_named)]  # "grid" is short for {name: grid}


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str | Mapping) else value


Chain = Annotated[tuple[Choice, ...], BeforeValidator(_listed)]  # one alone needs no list


class LoraSettings(Section):
    r: int = Field(default=8, ge=1)
    """rank"""
    alpha: float = Field(default=16.0, gt=0)
    """the update is scaled by alpha / r"""
    targets: str | tuple[str, ...] = "all-linear"
    """as peft resolves them: all-linear, a list of names, or a regular expression"""
    layers: Literal["all", "upper-half"] | Annotated[float, Field(gt=0, le=1)] = "all"
    """the share of the layers, from the top, that get adapters; those below run once for all candidates of a pass"""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """on the adapter's input; a function of (seed, candidate, step)"""
    rslora: bool = False
    """scale by alpha / sqrt(r) instead"""


class ModelSettings(Section):
    path: str = BUILT_IN_MODEL
    """a directory or hub name in the transformers format, or tiny-assistant"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """of the frozen base; auto: as stored on an accelerator, float32 on a CPU. Adapters are always float32"""
    lora: LoraSettings = LoraSettings()


class ObjectiveSettings(Section):
    direction: Literal["max", "min"] = "max"
    """min: scores are negated once, when they are read"""
    reward: Choice | None = None
    """a reward plugin that scores responses for this objective"""
    on_error: Literal["stop", "skip_sample", "skip_objective"] = "stop"
    """where the reward raises, or returns NaN, infinity or the wrong number of scores: stop, which fails the candidate;
    skip_sample leaves such samples unscored, after a call that fails as a whole has been made for each alone;
    skip_objective takes it for constant in this round of sampled responses, and is stop elsewhere. All is counted in
    the metrics. A call that never returns is plugin_deadline's matter"""
    transform: Chain = ()
    """what shapes the rewards of sampled responses, one after the other, before they are combined; they are larger is
    better by then, whatever the direction, and what is evaluated stays as it was"""


class DataSettings(Section):
    path: str = BUILT_IN_MODEL
    """JSONL, JSON, CSV or Parquet; or tiny-assistant, for the prompts of the demo's world"""
    held_out_path: str | None = None
    """a second file for evaluation, instead of setting aside a share of the first"""
    reader: Choice = PluginChoice(name="auto")
    """how rows become records; auto asks every reader about the first row"""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """share of the groups (prompts, questions) that is kept for evaluation and never trained on"""
    max_length: int = Field(default=512, ge=8)
    """tokens of prompt and response; a longer prompt loses its beginning, counted and reported"""
    malformed: Literal["error", "skip"] = "error"
    """what to do with rows that cannot be read: stop, or count and report them"""
    margins: Literal["auto", "scores", "reward", "implicit"] = "auto"
    """where reward differences come from: scores in the data, reward plugins, or the one-hot adapters trained first"""


class RolloutSettings(Section):
    samples: int = Field(default=4, ge=2)
    """responses per prompt"""
    prompts: int = Field(default=64, ge=1)
    """prompts that are sampled in a round"""
    rounds: int = Field(default=4, ge=1)
    """how often fresh samples are drawn from the policy, at even distances; the first round samples the base"""
    prompts_per_step: int = Field(default=8, ge=1)
    """groups in a training step; replaces train.pairs_per_step"""
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    """sample from the likeliest tokens alone that have this much of the probability together; 1: from all"""
    max_new_tokens: int = Field(default=64, ge=1)
    sampler: Choice | None = None
    """a plugin that samples the responses; none: moalign itself. Evaluation is always moalign's own"""


PLUGIN_DEADLINE = 600.0  # seconds


class EarlyStopSettings(Section):
    every: int = Field(default=25, ge=1)
    """steps between looks at the held-out loss; one look costs a forward pass over all held-out pairs"""
    patience: int = Field(default=3, ge=1)
    """so many looks in a row without a loss strictly below the lowest one end the candidate"""


class TrainSettings(Section):
    steps: int = Field(default=200, ge=1)
    pairs_per_step: int = Field(default=16, ge=1)
    tokens_per_pass: int | None = Field(default=None, ge=1)
    """tokens in one forward pass, padding among them; smaller saves memory and changes no result, except that the
    pairs of one prompt always share a pass. Default: about what half a GPU's memory holds, or 4 GiB on a CPU"""
    together: Literal["auto"] | PositiveInt = "auto"
    """candidates that share each pass over the base; auto: as many as a short measurement finds fastest"""
    lr: float = Field(default=2e-4, gt=0)
    warmup: float = Field(default=0.1, ge=0, le=1)
    """share of the steps over which the learning rate rises linearly"""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """after the warm-up"""
    weight_decay: float = Field(default=0.0, ge=0)
    max_gradient_norm: float = Field(default=1.0, gt=0)
    gradient_checkpointing: bool = False
    early_stop: EarlyStopSettings | None = None
    """end a candidate whose own loss on the held-out pairs no longer falls, and keep the weights of its best look, also
    where all steps were taken. Scores on the same pairs are then a little too good: the pairs chose the weights"""
    posterior: float | None = Field(default=None, gt=0, le=1)
    """share of the steps, the last ones, over whose weights mean and deviation are kept beside each adapter"""

    @property
    def posterior_steps(self) -> int:
        """How many of the last steps that is; 0 where no posterior is kept."""
        return 0 if self.posterior is None else _last(self.posterior, self.steps)

    @field_validator("posterior")
    @classmethod
    def _deviates(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is None:
            return None
        if info.data.get("early_stop") is not None:
            raise ValueError(
                "with train.early_stop the last steps are those after the best weights, and it is not known before "
                "which they will be; leave one of the two out"
            )
        steps = info.data.get("steps")  # none where that key is wrong itself
        if steps is not None and _last(value, steps) < 2:
            raise ValueError(f"this is one step of {steps}, and the weights after one step have no deviation")
        return value


def _last(share: float, steps: int) -> int:
    return math.ceil(share * steps - 1e-9)  # 0.1 of 30 steps are 3, whatever floats make of it


class EvaluateSettings(Section):
    kind: Literal["auto", "generate", "preference"] = "auto"
    """generate: reward of sampled responses; preference: accuracy on held-out pairs; auto: the first where it can"""
    samples: int = Field(default=4, ge=1)
    """responses per held-out prompt, for rewards and for the KL estimate"""
    prompts: int | None = Field(default=None, ge=1)
    """at most so many held-out prompts; default all"""
    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    reference_point: Literal["base"] | dict[str, float] = "base"
    """of the hypervolume: the untouched model's scores, or one number per objective"""


class Shared(Section):
    """What every kind of training reads: the base model, the objectives' names, the data."""

    model: ModelSettings = ModelSettings()
    objectives: Mapping[str, Section] = Field(min_length=1)
    """named; the order does not matter"""
    data: DataSettings = DataSettings()
    plugin_deadline: float | None = Field(default=PLUGIN_DEADLINE, gt=0)
    """seconds that one call into a plugin may take before the command line cuts it off; null: any time"""
    seed: int = Field(default=0, ge=0, lt=2**32)

    @model_validator(mode="before")
    @classmethod
    def _null_objectives(cls, value: Any) -> Any:
        """``helpful:`` with nothing behind it is an objective with the defaults."""
        if isinstance(value, Mapping) and isinstance(value.get("objectives"), Mapping):
            objectives = {name: {} if spec is None else spec for name, spec in value["objectives"].items()}
            return {**value, "objectives": objectives}
        return value

    @property
    def model_directory(self) -> str:
        """Where the base model is loaded from."""
        built_in = self.model.path == BUILT_IN_MODEL
        return str(BUILT_IN_DIRECTORY / BUILT_IN_MODEL) if built_in else self.model.path

    @property
    def data_paths(self) -> tuple[str, str | None]:
        """The training file and the held-out file, if there is one of its own."""
        if self.data.path == BUILT_IN_MODEL:
            return str(BUILT_IN_DIRECTORY / "prompts-train.jsonl"), str(BUILT_IN_DIRECTORY / "prompts-held-out.jsonl")
        return self.data.path, self.data.held_out_path

    @property
    def objective_names(self) -> tuple[str, ...]:
        """Sorted, so that nothing depends on the order in the file."""
        return tuple(sorted(self.objectives))

    def digest(self) -> str:
        """sha256 over the canonical form; equal for configurations that mean the same."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


class Config(Shared):
    objectives: dict[str, ObjectiveSettings] = Field(min_length=1)
    """named; the order does not matter"""
    preferences: dict[str, Any] = {}
    """named preferences, for the search `listed` and for the command line"""
    rollouts: RolloutSettings | None = None
    """sample responses from the policy and score them, instead of training on the responses in the data"""
    loss: Choice = PluginChoice(name="dpo")
    combine: Choice = PluginChoice(name="linear")
    condition: Choice | None = None
    """train one model for many preferences, which learns of them this way; the search's candidates are then what it is
    asked for. none: a candidate is trained for each"""
    search: Choice = PluginChoice(name="grid")
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    observers: tuple[Choice, ...] = ()
    """who watches, such as trackers; they change no result, and a resume does not compare them"""


Kind = TypeVar("Kind", bound=Shared)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML (or JSON) file, apply ``key.path=value`` overrides, validate, make file paths absolute.

    Raises ConfigError naming file and line for bad YAML, and every bad key for bad content.
    """
    return from_mapping(read(path), overrides, where=str(Path(path)))


def read(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) file. Raises ConfigError naming file and line."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; `moalign init {file}` writes a starter configuration") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    try:
        content = yaml.load(text, Loader=_UniqueKeyLoader)  # a SafeLoader: plain data, no objects
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark else str(file)
        raise ConfigError(f"{place}: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: a configuration is a mapping of keys, this is {type(content).__name__}")
    return content


def from_mapping(content: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "configuration") -> Config:
    """Validate a mapping as ``load`` does for a file."""
    return validated(Config, content, overrides, where)


def validated(kind: type[Kind], content: Mapping[str, Any], overrides: Sequence[str], where: str) -> Kind:
    """A mapping as a configuration of this kind, overridden, with absolute paths. Raises ConfigError."""
    try:
        merged: dict[str, Any] = json.loads(json.dumps(content, default=str))
    except (ValueError, RecursionError):
        raise ConfigError(f"{where}: an alias contains itself") from None
    for override in overrides:
        _override(merged, override, kind)
    try:
        config = kind.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(f"{where}:\n{explain(error, kind)}") from None
    for name in config.objectives:
        if not name.replace("-", "_").isidentifier():
            raise ConfigError(
                f"{where}: objectives.{name}: a name has letters, digits, '-' and '_' and starts with a letter"
            )
    return _absolute(config)


CHOICES = ("loss", "combine", "condition", "search", "reader", "reward", "transform", "sampler", "reward_model")


def _override(content: dict[str, Any], override: str, kind: type[Shared]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: write it as key.path=value, for example train.lr=1e-4")
    *parents, last = key.strip().split(".")
    target = content
    for depth, part in enumerate(parents):
        if isinstance(target.get(part), str) and part in CHOICES:
            target[part] = _named(target[part])
        default = kind.model_fields[part].default if depth == 0 and part in kind.model_fields else None
        inner = target.setdefault(part, {"name": default.name} if isinstance(default, PluginChoice) else {})
        if inner is None:
            inner = target[part] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {'.'.join(parents[: depth + 1])} is not a section")
        target = inner
    try:
        target[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from None


def _absolute(config: Kind) -> Kind:
    """File paths are relative to the current directory when read; a run must find them from anywhere later."""
    data, model = config.data, config.model
    paths = {
        key: os.path.abspath(Path(value).expanduser())
        for key, value in (("path", data.path), ("held_out_path", data.held_out_path))
        if value not in (None, BUILT_IN_MODEL)
    }
    data = data.model_copy(update=paths)
    local = Path(model.path).expanduser()
    if model.path != BUILT_IN_MODEL and (local.exists() or model.path.startswith((".", "/", "~"))):
        model = model.model_copy(update={"path": os.path.abspath(local)})
    return config.model_copy(update={"data": data, "model": model})


class _UniqueKeyLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a key written twice, where YAML would silently keep the last."""


def _mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if isinstance(key, str) and key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' stands twice", key_node.start_mark)
        seen.add(key if isinstance(key, str) else repr(key))
    loader.flatten_mapping(node)
    return dict(loader.construct_pairs(node))


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
