"""What rewards that ask a sequence classifier share: how it is loaded, what it reads, and its logits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from moalign.api import DataError, ModelError, Reward, Sample
from moalign_plugins.rewards._models import LOCAL, Dtype, device_and_dtype, most_tokens, window
from moalign_plugins.rewards._tokens import Joining, Lost

if TYPE_CHECKING:
    from torch import Tensor

Read = Literal["auto", "text", "pair", "conversation", "response", "tokens"]


class FromClassifier(Reward):
    """The options of a reward that reads logits of sequence classifiers."""

    deterministic: ClassVar[bool] = False  # the last bits depend on who shares a padded batch

    head: int | str | None = None
    """index, or name in the model's id2label; not needed where there is one"""
    read: Read = "auto"
    """of a prompt that is text: prompt and response as one text; as the tokenizer's pair of texts; as a conversation,
    through the chat template; or the response alone. Of any prompt, tokens: those of the prompt, where there is a chat
    template through it, then those of the response, and the token that ends one: as moalign trains. auto: tokens where
    the model's config.json asks for it, as of `moalign reward-model train`, else text"""
    max_length: int | None = Field(default=None, ge=1)
    """tokens; default: as many as the model was trained on, where its config.json says so, as of `moalign reward-model
    train`, else as many as the tokenizer and the model say they take"""
    lose: Lost | Literal["auto"] = "auto"
    """of what is longer: nothing, it is not scored; or its beginning, which is the prompt's, or its end. Of a pair, the
    beginning or end of whichever text is the longer one. auto: as moalign trains where tokens are read, so the
    beginning, else nothing"""
    batch_size: int = Field(default=8, ge=1)
    device: str = "auto"
    """auto: an accelerator where there is one, else the CPU"""
    dtype: Dtype = "auto"
    """auto: as stored on an accelerator, float32 on a CPU"""

    def models(self) -> tuple[str, ...]:
        """The directories that are asked."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _has_the_head(self) -> Self:
        for path in self.models():
            names = _names_in(path)
            if names is not None:
                try:
                    head_of(names, self.head)
                except ValueError as error:
                    raise ValueError(f"{error}, in {path}") from None
        return self

    def logits(self, path: str, samples: Sequence[Sample]) -> list[float | None]:
        """Of the head of the classifier in that directory; None where a sample is too long."""
        classifier = classifier_of(str(Path(path).expanduser()), self.device, self.dtype)
        head = classifier.head(self.head)
        asked = tuple((_canonical(sample.prompt), sample.response) for sample in samples)
        read = classifier.read if self.read == "auto" else self.read
        lose: Lost = ("beginning" if read == "tokens" else "nothing") if self.lose == "auto" else self.lose
        logits = classifier.logits(asked, read, self.max_length, lose, self.batch_size)
        return [None if row is None else row[head] for row in logits]


HEADS = "regression_layer.weight"
MIXED = (HEADS, "gating.", "reward_transform_matrix")  # what ArmoRM has beside, and its own code reads


@lru_cache(maxsize=16)  # an ensemble asks one after the other, again and again
def classifier_of(path: str, device: str, dtype: str) -> Classifier:
    """Loaded once. Raises ModelError where a weight is missing, which transformers would fill with random numbers, and
    where one is left over, without which the logits are others."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    place, dtype = device_and_dtype(device, dtype)
    try:
        heads = regression_heads(path)
        number = {} if heads is None else {"num_labels": len(heads)}
        tokenizer = AutoTokenizer.from_pretrained(path, **LOCAL)
        with _without_report():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                path, use_safetensors=True, dtype=dtype, output_loading_info=True, **number, **LOCAL
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{path}: cannot be read as a sequence classifier: {error}") from error
    absent = sorted(info["missing_keys"]) + sorted(str(each[0]) for each in info["mismatched_keys"])
    known: tuple[str, ...] = ("lm_head.",)
    if heads is not None and absent == ["score.weight"] and model.score.weight.shape == heads.shape:
        model.score.weight.data.copy_(heads)
        absent, known = [], (*known, *MIXED)
    unread = [name for name in sorted(info["unexpected_keys"]) if not name.startswith(known)]
    also = f"{', '.join(unread)} in them is for code of its own, which is not run" if unread else ""
    if absent:
        fault = f"is no trained sequence classifier, its files have no weights for {', '.join(absent)}"
        raise ModelError(f"{path}: {fault}{'; ' if also else ''}{also}")
    if unread:
        raise ModelError(f"{path}: its logits would not be those that were trained: {also}")
    return Classifier(path, tokenizer, model.eval().requires_grad_(False).to(place))


def regression_heads(path: str) -> Tensor | None:
    """The heads [M,D] of a model in the form of ArmoRM (arXiv 2406.12845), one for each of its objectives; else None.

    What it mixes them with, its ``gating`` network, is for code of its own: a head is asked for itself.
    """
    from safetensors import safe_open

    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            if HEADS in tensors.keys():  # noqa: SIM118  (it is no mapping)
                return tensors.get_tensor(HEADS)
    return None


@contextmanager
def _without_report() -> Iterator[None]:
    """transformers' table of missing and unexpected weights, which are refused by name instead."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@dataclass
class Classifier:
    """A tokenizer and a model, and what they said to the last question, for objectives that ask for another head."""

    path: str
    tokenizer: Any
    model: Any
    _last: tuple[Any, list[list[float] | None]] | None = field(default=None, repr=False)

    @property
    def read(self) -> Read:
        """What ``auto`` means for this model."""
        return "tokens" if self._said.get("read") == "tokens" else "text"

    @property
    def _said(self) -> dict[str, Any]:
        """What moalign's training says of it in config.json; empty for models of others."""
        said = getattr(self.model.config, "moalign", None)
        return said if isinstance(said, dict) else {}

    def limit(self, read: Read) -> int:
        """How many tokens it takes where no option says it: of those that moalign joins, as in training."""
        trained = self._said.get("max_length")
        if read == "tokens" and isinstance(trained, int):
            return min(trained, window(self.model.config))
        return most_tokens(self.tokenizer, self.model.config)

    @property
    def end(self) -> int:
        """The token that ends a response. Raises ModelError where there is none."""
        known = self._said.get("end_token_id", self.tokenizer.eos_token_id)
        if not isinstance(known, int):
            raise ModelError(f"{self.path}: read: tokens: its tokenizer has no token that ends a response")
        return known

    def head(self, wanted: int | str | None) -> int:
        """The index of a head. Raises ModelError naming those that there are."""
        try:
            return head_of(self.model.config.id2label, wanted)
        except ValueError as error:
            raise ModelError(f"{self.path}: {error}") from None

    def logits(
        self, asked: tuple[Any, ...], read: Read, max_length: int | None, lose: Lost, batch_size: int
    ) -> list[list[float] | None]:
        """All heads' logits of each (prompt, response); None where it is too long."""
        question = (asked, read, max_length, lose, batch_size)
        if self._last is None or self._last[0] != question:
            self._last = question, self._computed(*question)
        return self._last[1]

    def _computed(
        self, asked: tuple[Any, ...], read: Read, max_length: int | None, lose: Lost, batch_size: int
    ) -> list[list[float] | None]:
        import torch

        limit = max_length or self.limit(read)
        encoded = [self._encoded(prompt, response, read, limit, lose) for prompt, response in asked]
        found: list[list[float] | None] = [None] * len(asked)
        fitting = [index for index, each in enumerate(encoded) if each is not None]
        fitting.sort(key=lambda index: len(encoded[index]["input_ids"]))
        rows = batch_size if self.model.config.get_text_config().pad_token_id is not None else 1
        for start in range(0, len(fitting), rows):
            batch = fitting[start : start + rows]
            with torch.no_grad():
                scored = self.model(**self._padded([encoded[index] for index in batch])).logits
            for index, row in zip(batch, scored.double().tolist(), strict=True):
                found[index] = row
        return found

    def _padded(self, rows: list[Any]) -> dict[str, Tensor]:
        """On the right, where no token that counts can see it; with the model's own padding."""
        import torch

        width = max(len(row["input_ids"]) for row in rows)
        padding = {"input_ids": self.model.config.get_text_config().pad_token_id or 0}
        return {
            name: torch.tensor([[*row[name], *[padding.get(name, 0)] * (width - len(row[name]))] for row in rows]).to(
                self.model.device
            )
            for name in rows[0]
        }

    def _encoded(self, prompt: Any, response: str, read: Read, limit: int, lose: Lost) -> Any:
        """What the tokenizer makes of it, cut as ``lose`` says; None where it does not fit, or is empty."""
        if read == "tokens":
            joined = Joining(self.tokenizer, self.end, self.path).ids(prompt, response, limit, lose)
            return None if joined is None else {"input_ids": joined[0]}
        texts = self._texts(prompt, response, read)
        special = read == "response" or (read != "conversation" and isinstance(prompt, str))  # a template has its own
        ids = self.tokenizer(*texts, add_special_tokens=special)
        if len(ids["input_ids"]) > limit and lose != "nothing":
            self.tokenizer.truncation_side = "left" if lose == "beginning" else "right"
            ids = self.tokenizer(*texts, add_special_tokens=special, truncation=True, max_length=limit)
        return dict(ids) if 0 < len(ids["input_ids"]) <= limit else None

    def _texts(self, prompt: Any, response: str, read: Read) -> tuple[str, ...]:
        """One text, or two for the tokenizer to put together."""
        from jinja2 import TemplateError

        if read == "response":
            return (response,)
        if isinstance(prompt, str) and read != "conversation":
            return (prompt, response) if read == "pair" else (prompt + response,)
        said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(each) for each in prompt]
        try:
            talk = [*said, {"role": "assistant", "content": response}]
            return (self.tokenizer.apply_chat_template(talk, tokenize=False),)
        except (TemplateError, ValueError) as error:
            raise DataError(f"{self.path}: its chat template does not take this conversation: {error}") from None


def head_of(names: Mapping[int, str], wanted: int | str | None) -> int:
    """The index of a head, by index or name. Raises ValueError naming those that there are."""
    if wanted is None and len(names) == 1:
        return 0
    if isinstance(wanted, int) and wanted in names:
        return wanted
    found = [index for index, name in names.items() if name == wanted]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"{index} ({name})" for index, name in sorted(names.items()))
    raise ValueError(f"head: {'choose one' if wanted is None else f'no {wanted!r}'} of {listed}")


def _names_in(path: str) -> dict[int, str] | None:
    """The heads that config.json names; None where it does not."""
    try:
        content = json.loads((Path(path).expanduser() / "config.json").read_text(encoding="utf-8"))
        return {int(index): str(name) for index, name in content["id2label"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _canonical(prompt: Any) -> Any:
    """A prompt that can be compared."""
    return prompt if isinstance(prompt, str) else tuple(tuple(sorted(each.items())) for each in prompt)
