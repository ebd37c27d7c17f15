"""The sections of a configuration, each key with what it means."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

COLDEST = 1e-6  # temperature: logits divided by less overflow, and the likeliest token is certain long before
BUILT_IN_MODEL = "tiny-assistant"
BUILT_IN_DIRECTORY = Path(__file__).parents[1] / "demo"


def _types(annotation: Any) -> list[Any]:
    """All that an annotation is made of."""
    return [annotation, *(each for part in get_args(annotation) for each in _types(part))]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _as_it_was_meant(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads yes as true, which pydantic would take for 1, and 1e6 as text, which it would not take at all."""
        wanted = _types(cls.model_fields[info.field_name].annotation) if info.field_name else []
        if isinstance(value, bool) and (int in wanted or float in wanted) and bool not in wanted and Any not in wanted:
            raise ValueError("a number is wanted, not true or false")
        if isinstance(value, str) and int in wanted and str not in wanted and Any not in wanted:
            with suppress(ValueError, OverflowError):
                return int(float(value)) if float(value).is_integer() and "e" in value.lower() else value
        return value


class PluginChoice(Section):
    """A plugin by name, with its own options beside the name."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Choice = Annotated[PluginChoice, BeforeValidator(named)]  # "grid" is short for {name: grid}


class BudgetSettings(Section):
    tokens: int | None = Field(default=None, ge=1)
    """response tokens that are trained on, over all candidates"""
    minutes: float | None = Field(default=None, gt=0)
    """of training, sampling and evaluation, on this machine; a run that is resumed has used
    what its finished candidates took"""

    @model_validator(mode="after")
    def _one(self) -> BudgetSettings:
        if (self.tokens is None) == (self.minutes is None):
            raise ValueError("give either tokens or minutes, such as {tokens: 250000}")
        return self


class SearchChoice(PluginChoice):
    """A search with its options, and what it may spend."""

    name: str = "auto"
    budget: BudgetSettings | None = None

    @field_validator("budget", mode="before")
    @classmethod
    def _of_what(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, Mapping | BudgetSettings):
            raise ValueError("say of what: {tokens: 250000} or {minutes: 30}")
        return value


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
    """what shapes the rewards of responses that a loss takes one by one, or that are sampled, one after the other,
    before they are combined; they are larger is better by then, whatever the direction, and what is evaluated stays as
    it was"""


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
    """where rewards of responses in the data, or their differences, come from: scores in the data, reward plugins, or,
    for differences, the one-hot adapters trained first"""


class RolloutSettings(Section):
    samples: int = Field(default=4, ge=2)
    """responses per prompt"""
    prompts: int = Field(default=64, ge=1)
    """prompts that are sampled in a round"""
    rounds: int = Field(default=4, ge=1)
    """how often fresh samples are drawn from the policy, at even distances; the first round samples the base"""
    prompts_per_step: int = Field(default=8, ge=1)
    """groups in a training step; replaces train.pairs_per_step"""
    temperature: float = Field(default=1.0, ge=COLDEST)
    top_p: float = Field(default=1.0, gt=0, le=1)
    """sample from the likeliest tokens alone that have this much of the probability together; 1: from all"""
    max_new_tokens: int = Field(default=64, ge=1)
    pairs: Literal["all", "best-worst"] = "all"
    """of losses on labelled pairs: which of the pairs of responses to a prompt are trained on, the one with the larger
    combined reward as the chosen one. best-worst: the two that differ most. Ties are dropped and counted"""
    gap: float = Field(default=0.0, ge=0)
    """of such pairs, drop and count those whose combined rewards differ by less"""
    filter: Choice | None = None
    """a plugin that chooses which of the scored responses, or pairs of them, are trained on; none: all. Advantages are
    computed before it"""
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
    """of a loss that learns from single responses, about so many of these in place of pairs: a step has whole prompts,
    as many as have so many responses on average, and at least one. With rollouts, rollouts.prompts_per_step decides"""
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
    temperature: float = Field(default=1.0, ge=COLDEST)
    reference_point: Literal["base"] | dict[str, float] = "base"
    """of the hypervolume: the untouched model's scores, or one number per objective as fronts have it, so negated for
    one that is minimised"""
    kl_price: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    """what a nat of KL costs, in rewards, where a front is compared with what can be reached; auto: what the loss says,
    such as its beta, if it learns from rewards and compares with the base, else 0, and then nothing says how far the
    front is from the best"""


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
    reference: Choice | None = None
    """the policy that the loss compares with; none: the untouched base. KL that is evaluated stays that from the base
    """
    search: Annotated[SearchChoice, BeforeValidator(named)] = SearchChoice()
    """which preferences are trained; auto decides by the number of objectives and the budget. `budget: {tokens: N}` or
    `{minutes: N}` beside its options ends it in time"""
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    observers: tuple[Choice, ...] = ()
    """who watches, such as trackers; they change no result, and a resume does not compare them"""
