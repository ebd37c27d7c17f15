"""A trained member as files: an ordinary sequence classifier where its head is linear, else adapter and head.

What is pooled: the hidden state of the last token, which in training is the token that ends a response
(``Tokeniser.end_id``); the ids of prompt and response are joined, and a prompt begins with the begin token where the
tokenizer has one. A classifier of transformers pools the last token that is not its padding, so the padding that is
written is never the end token, and whoever feeds it closes the ids with that token. ``config.json`` says so under
``moalign``, with ``max_length``, the tokens that prompt and response were cut to, which the reward
``sequence-classification`` follows by itself.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from moalign import disk, door, lora, storage
from moalign.data.tokenise import Sequence as TokenSequence
from moalign.data.tokenise import Tokeniser
from moalign.engine import judged
from moalign.engine import model as models
from moalign.engine.model import LanguageModel
from moalign.errors import ModelError, PluginError
from moalign.lora import mixing, ordinary
from moalign.reward_models.material import Material
from moalign.reward_models.members import Member
from moalign.reward_models.plan import Plan

ADAPTER, HEAD, METRICS = "adapter", "head.safetensors", "metrics.jsonl"
COMPARED = 8  # sequences on which the written classifier is compared with the trained model
NOT_LINEAR = "the form's scores are not linear in the last hidden state"
TOKENISED = 256  # samples, of training and of held-out data each, that the written tokenizer has to read as in training


def write_trained(folder: Path, model: LanguageModel, member: Member) -> None:
    """Adapter, head and metrics: all that training made."""
    lines = (json.dumps(line, sort_keys=True, allow_nan=False) + "\n" for line in member.metrics)
    storage.write_text(folder / METRICS, "".join(lines))
    lora.write(model.policy, member.slot, folder / ADAPTER, model.fingerprint)
    storage.write_tensors(folder / HEAD, member.parameters, {"base": model.fingerprint})


def write_classifier(
    folder: Path, model: LanguageModel, plan: Plan, member: Member, material: Material
) -> dict[str, Any]:
    """The classifier beside what ``write_trained`` wrote, where there is one; what it is, for ``reward_model.json``."""
    try:
        weights = linear_head(plan, member.parameters, model.width)
        if weights is None:
            return {"classifier": None, "why": NOT_LINEAR}
        tokenizer = written_tokenizer(model.tokeniser)
        _check_tokenizer(tokenizer, model.tokeniser, material)
        classifier = _classifier(folder / ADAPTER, model, plan, weights)
        largest = _largest_difference(classifier, model, plan, member, material)
    except Exception as error:  # what was trained is kept, whatever transformers makes of it
        return {"classifier": None, "why": str(error) or type(error).__name__}
    classifier.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"classifier": member.name, "largest_difference": largest}


def linear_head(plan: Plan, parameters: Mapping[str, Tensor], width: int) -> Tensor | None:
    """[M,D] of the form. Raises PluginError where it is of another shape."""
    found = door.call(plan.form, "head", parameters)
    expected = (len(plan.objectives), width)
    if found is not None and (not isinstance(found, Tensor) or tuple(found.shape) != expected):
        given = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise PluginError(
            f"{door.origin(plan.form).who}, in head: it must return {list(expected)} or None, not {given}"
        )
    return None if found is None else found.detach()


def _classifier(adapter: Path, model: LanguageModel, plan: Plan, weights: Tensor) -> Any:
    """transformers' own classifier over the merged base, on the CPU in the precision that was trained in.

    Raises ModelError where transformers has none for this architecture.
    """
    path, dtype = plan.config.model_directory, str(model.dtype).removeprefix("torch.")
    base = models.load_base(path, dtype, torch.device("cpu"))
    merged = ordinary.merge(ordinary.attach(base, mixing.read(adapter, alone=True)))
    config = merged.config
    config.num_labels = len(plan.objectives)
    config.id2label = dict(enumerate(plan.objectives))
    config.label2id = {name: index for index, name in enumerate(plan.objectives)}
    config.moalign = {
        "read": "tokens",
        "end_token_id": model.tokeniser.end_id,
        "max_length": plan.config.data.max_length,
    }
    for each in (config, config.get_text_config()):
        each.pad_token_id = padding(model.tokeniser)
    try:
        classifier: Any = AutoModelForSequenceClassification.from_config(config)
    except (ValueError, KeyError) as error:
        kind = type(merged).__name__
        raise ModelError(f"transformers has no sequence classifier for {kind}: {str(error).splitlines()[0]}") from None
    head = getattr(classifier, "score", None)
    if not isinstance(head, nn.Linear) or head.weight.shape != weights.shape or head.bias is not None:
        raise ModelError(f"the head of {type(classifier).__name__} is not one linear layer without bias, named score")
    classifier.base_model.load_state_dict(merged.base_model.state_dict())
    head.weight = nn.Parameter(weights.cpu().to(model.dtype), requires_grad=False)
    return classifier.to(model.dtype).eval()


def padding(tokeniser: Tokeniser) -> int:
    """An id that no sequence ends with, since the last token that is not padding is what counts."""
    found = special_padding(tokeniser)
    return found if found is not None else min({0, 1, 2} - {tokeniser.end_id, tokeniser.eos_id})


def special_padding(tokeniser: Tokeniser) -> int | None:
    """The first such id among the tokenizer's special and added tokens; None where all of them end sequences.

    An ordinary token is none: a tokenizer takes its padding for special, and would cut texts at it.
    """
    tokenizer = tokeniser.tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    named = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id)
    known = [*(each for each in named if each in special), *sorted(special)]
    return next((each for each in known if each not in (tokeniser.end_id, tokeniser.eos_id)), None)


def written_tokenizer(tokeniser: Tokeniser) -> Any:
    """A copy with the classifier's padding.

    Without any where only an ordinary token is left for it: to pad with the end token would move what is pooled.
    """
    tokenizer, found = copy.deepcopy(tokeniser.tokenizer), special_padding(tokeniser)
    if tokenizer.pad_token_id != found:
        tokenizer.pad_token = None if found is None else tokenizer.convert_ids_to_tokens(found)
    return tokenizer


def _check_tokenizer(tokenizer: Any, trained: Tokeniser, material: Material) -> None:
    """Raises ModelError where the tokenizer, written and read again, reads the data in another way than training."""
    with disk.scratch() as folder:
        tokenizer.save_pretrained(folder)
        written = Tokeniser.of(models.load_tokenizer(str(folder)))
    held_out = () if material.held_out is None else material.held_out.samples[:TOKENISED]
    for sample in (*held_out, *material.train.samples[:TOKENISED]):
        ids, own = (
            (each.end_id, each.prompt(sample.prompt), each.response(sample.response)) for each in (written, trained)
        )
        if ids != own:
            raise ModelError(
                f"the tokenizer, once written, reads the response {sample.response[:40]!r} or its prompt in another "
                "way than in training"
            )


@torch.no_grad()
def _largest_difference(classifier: Any, model: LanguageModel, plan: Plan, member: Member, material: Material) -> float:
    """Between the scores of the classifier and of the trained model, on the first held-out (or training) responses."""
    dataset = material.held_out or material.train
    sequences: list[TokenSequence] = list(dataset.sequences[:COMPARED])
    own = judged.scores(
        model, member.slot, plan.form, plan.objectives, member.parameters, sequences, range(len(sequences))
    )
    largest = 0.0
    for sequence, expected in zip(sequences, own, strict=True):
        logits = classifier(input_ids=torch.tensor([sequence.ids])).logits[0].double()
        largest = max(largest, float((logits - torch.from_numpy(expected)).abs().max()))
    return largest
