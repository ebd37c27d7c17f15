"""The scores of a reward model that `moalign reward-model train` wrote, whatever its form."""

from __future__ import annotations

import ast
import importlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from moalign.api import Batch, Combining, ModelError, Reward, RewardModel, Sample
from moalign_plugins import reward_models
from moalign_plugins.rewards._models import LOCAL, Dtype, device_and_dtype, window
from moalign_plugins.rewards._tokens import Joining
from moalign_plugins.rewards._written import (
    ADAPTER,
    RECORD,
    Written,
    check_names,
    fingerprint,
    record_of,
    verify,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

REGISTRATION = {
    "name": "trained-reward-model",
    "class": "TrainedRewardModel",
    "summary": "the score of a reward model trained with moalign, of any form and with all its members",
    "paper": "arXiv:2310.02743",
}
BLOCK = re.compile(r"^REGISTRATION = (\{$.*?^\})$", re.MULTILINE | re.DOTALL)


class TrainedRewardModel(Combining, Reward):
    """One head of base, adapters and heads in the directory, the members combined as the reward `ensemble` does.

    For forms that ship with moalign; from Python ``moalign.open_reward_model`` takes all. A head points up, also one of
    an objective that was trained with ``direction: min``: use it with ``direction: max``. The base is loaded once for
    all members. Files that are not what was written, by MANIFEST.json, and another base than was trained on are
    refused. Samples are read as in training: a prompt that is too long loses its beginning, and it abstains where the
    response is empty or too long, or holds a special token. Safetensors only, no remote code, nothing is downloaded.
    """

    deterministic: ClassVar[bool] = False  # the last bits depend on who shares a padded batch

    path: str
    """a directory with a reward_model.json"""
    head: str | None = Field(default=None, validate_default=True)
    """the name of an objective; not needed where there is one"""
    base: str | None = None
    """the directory of the base model and its tokenizer, if it is not where it was in training"""
    batch_size: int = Field(default=8, ge=1)
    device: str = "auto"
    """auto: an accelerator where there is one, else the CPU"""
    dtype: Dtype = "auto"
    """of the base; auto: that of training"""

    @field_validator("path")
    @classmethod
    def _is_a_reward_model(cls, path: str) -> str:
        if not (Path(path).expanduser() / RECORD).is_file():
            raise ValueError(f"no directory with a {RECORD}: {path}")
        try:
            _form(path, dict(record_of(path).form))
        except ModelError as error:
            raise ValueError(str(error)) from error
        return path

    @field_validator("head")
    @classmethod
    def _is_an_objective(cls, head: str | None, others: ValidationInfo) -> str | None:
        if "path" in others.data:
            try:
                column_of(head, record_of(others.data["path"]).objectives)
            except ModelError as error:
                raise ValueError(str(error)) from error
        return head

    def score(self, samples: Sequence[Sample]) -> list[float | None]:
        judge = _judge(str(Path(self.path).expanduser()), self.base, self.device, self.dtype)
        column = column_of(self.head, judge.objectives)
        encoded = [judge.joining.ids(each.prompt, each.response, judge.most, "beginning") for each in samples]
        found: list[float | None] = [None] * len(samples)
        fitting = [(index, each) for index, each in enumerate(encoded) if each is not None]
        fitting.sort(key=lambda each: len(each[1][0]))
        for start in range(0, len(fitting), self.batch_size):
            part = fitting[start : start + self.batch_size]
            rows = judge.scores([each for _, each in part], column)
            for (index, _), members in zip(part, rows, strict=True):
                found[index] = self.combined(members)
        return found


@lru_cache(maxsize=2)
def _judge(path: str, base: str | None, device: str, dtype: str) -> _Judge:
    """Loaded once. Raises ModelError where a file is not what was written, and for another base."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    verify(path)
    record = record_of(path)
    form, where = _form(path, dict(record.form)), base or record.base_directory
    place, _ = device_and_dtype(device, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **LOCAL)
        model = AutoModelForCausalLM.from_pretrained(where, use_safetensors=True, dtype=record.dtype, **LOCAL)
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise ModelError(f"{path}: cannot be read as a reward model on {where}: {error}") from error
    if fingerprint(model) != record.base:
        raise ModelError(f"{path}: was trained on another base model than {where}; name its directory with base")
    width = model.get_output_embeddings().weight.shape[1]
    if dtype != "auto":
        model = model.to(getattr(torch, dtype))
    policy = _with_adapters(model, path, record)
    policy = policy.eval().requires_grad_(False).to(place)
    heads = _heads(path, record, form, width, place)
    most = min(record.max_length, window(model.config))
    return _Judge(path, form, record.objectives, policy, heads, Joining(tokenizer, record.end, where), most)


def _with_adapters(model: Any, path: str, record: Written) -> Any:
    """A peft model with one adapter for each member, every tensor of whose file has its place, and none is left out."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    policy: Any = None
    for name in record.members:
        folder = Path(path) / name / "adapter"
        try:
            if policy is None:
                policy = PeftModel.from_pretrained(model, folder, adapter_name=name)
            else:
                policy.load_adapter(folder, adapter_name=name)
            found = load_file(Path(path) / name / ADAPTER)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"{folder}: cannot be read as an adapter: {error}") from error
        expected = get_peft_model_state_dict(policy, adapter_name=name, save_embedding_layers=False)
        check_names(found, expected, Path(path) / name / ADAPTER)
    return policy


def _heads(path: str, record: Written, form: RewardModel, width: int, place: torch.device) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    expected = form.parameters(width, record.objectives, torch.Generator().manual_seed(0))
    found = {}
    for name in record.members:
        file = Path(path) / name / "head.safetensors"
        try:
            found[name] = load_file(file, device=str(place))
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"{file}: cannot be read: {error}") from error
        check_names(found[name], expected, file)
    return found


def _form(path: str, choice: dict[str, Any]) -> RewardModel:
    """A form among the files of moalign's own, with its options. Raises ModelError where there is none of the name."""
    name = str(choice.pop("name", "")).removeprefix("moalign:")
    for file in sorted(Path(reward_models.__file__).parent.glob("[!_]*.py")):
        block = BLOCK.search(file.read_text(encoding="utf-8"))
        entry = {} if block is None else ast.literal_eval(block[1])
        if entry.get("name") == name:
            module = importlib.import_module(f"{reward_models.__name__}.{file.stem}")
            form: type[RewardModel] = getattr(module, entry["class"])
            if getattr(form, "scores_from_rewards", False):
                fault = "reads other scores of a sample, which a sweep does not give"
                raise ModelError(f"{path}: its form '{name}' {fault}; see moalign.open_reward_model(...).scores")
            try:
                return form.model_validate(choice)
            except ValidationError as error:
                raise ModelError(f"{path}: its form '{name}' does not take the options in {RECORD}: {error}") from error
    raise ModelError(f"{path}: its form '{name}' does not ship with moalign; see moalign.open_reward_model")


def column_of(head: str | None, objectives: Sequence[str]) -> int:
    """Raises ModelError naming those that there are."""
    if head is None and len(objectives) == 1:
        return 0
    if head not in objectives:
        raise ModelError(f"{'choose one' if head is None else f'no {head!r}'} of {', '.join(objectives)}")
    return objectives.index(head)


@dataclass(frozen=True)
class _Judge:
    """A base with an adapter and a head for each member, and how they read."""

    path: str
    form: RewardModel
    objectives: tuple[str, ...]
    policy: Any
    heads: Mapping[str, Mapping[str, Tensor]]
    joining: Joining
    most: int

    def scores(self, rows: Sequence[tuple[list[int], int]], column: int) -> list[list[float]]:
        """Of each row, what each member says."""
        import torch

        width = max(len(ids) for ids, _ in rows)
        device = self.policy.device
        ids = torch.tensor([[*own, *[own[-1]] * (width - len(own))] for own, _ in rows], device=device)
        lengths = torch.tensor([len(own) for own, _ in rows], device=device)
        prompts = torch.tensor([prompt for _, prompt in rows], device=device)
        places = torch.arange(width, device=device)
        counts = ((places >= prompts[:, None]) & (places < lengths[:, None])).float()[:, 1:]
        attention = (places < lengths[:, None]).long()
        found = []
        with torch.no_grad():
            reference = None
            if "reference" in self.form.needs:
                with self.policy.disable_adapter():
                    reference = self._states_and_logps(ids, attention, counts)[1]
            for name, head in self.heads.items():
                self.policy.set_adapter(name)
                states, logps = self._states_and_logps(ids, attention, counts)
                each = torch.arange(len(rows), device=device)
                final, context = states[each, lengths - 1], states[each, prompts - 1]
                batch = self._batch(head, final, context, logps, reference, counts)
                found.append(self.form.scores(batch)[:, column].double().tolist())
        return [list(members) for members in zip(*found, strict=True)]

    def _states_and_logps(self, ids: Tensor, attention: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """The last hidden states [N,T,D], and log-probabilities [N,T-1] of the responses where the form reads them."""
        import torch

        base = self.policy.get_base_model()
        if "logps" not in self.form.needs:
            states = base.base_model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
            return states.float(), torch.full_like(counts, math.nan)
        output = base(input_ids=ids, attention_mask=attention, use_cache=False, output_hidden_states=True)
        logps = output.logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        return output.hidden_states[-1].float(), logps * counts

    def _batch(
        self,
        head: Mapping[str, Tensor],
        final: Tensor,
        context: Tensor,
        logps: Tensor,
        reference: Tensor | None,
        counts: Tensor,
    ) -> Batch:
        """Of rows alone, without any judgement."""
        import torch

        number, width = len(final), len(self.objectives)
        nothing = torch.empty(0, dtype=torch.int64, device=final.device)
        return Batch(
            logps=logps,
            mask=counts,
            pairs=nothing.reshape(0, 2),
            pair_objective=nothing,
            preference=final.new_full((number, width), 1.0 / width),
            strength=final.new_empty(0),
            groups=torch.arange(number, device=final.device),
            ref_logps=reference,
            rewards=final.new_full((number, width), math.nan),
            parameters=head,
            final=final,
            context=context,
            objectives=self.objectives,
        )
