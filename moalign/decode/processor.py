"""A decoder as transformers' LogitsProcessor, for any call of ``generate`` in anybody's code."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from moalign import door
from moalign.api import Decoder, NextToken, Request
from moalign.decode.speakers import Speakers
from moalign.door import origin
from moalign.errors import ConfigError, PluginError


class DecoderProcessor(LogitsProcessor):
    """Puts a decoder's log-probabilities in the place of the model's scores; sampling, beams and streaming stay.

    The speakers have a cache of their own, so that generate's pass over the active adapter is one more a token. What
    processors before this one forbid (-inf) stays forbidden; penalties, which change the model's own scores, are lost.
    """

    def __init__(self, decoder: Decoder, request: Request, speakers: Speakers) -> None:
        self.decoder, self.request, self.speakers = decoder, request, speakers

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        found = scores_of(self.decoder, self.request, self.speakers, input_ids)
        found = found.log_softmax(-1, dtype=torch.float32).to(scores.dtype)  # beams add them up
        return found.masked_fill(scores == float("-inf"), float("-inf"))


def processor(
    decoder: Decoder,
    request: Request,
    model: Any,
    attention_mask: Tensor | None = None,
    slots: Mapping[str, str] | None = None,
) -> DecoderProcessor:
    """For one call ``model.generate(input_ids, attention_mask=..., logits_processor=[this])``.

    ``attention_mask`` [N,T] of the prompts, where rows are padded (on the left): a processor is not shown it.
    ``slots``: under which names the model has the candidates' adapters, where these are others.

    Raises ConfigError for a decoder that chooses among several responses, and for adapters that the model has not;
    PreferenceError where the decoder has no meaning for the request.
    """
    several = door.call(decoder, "responses")
    if several != 1:
        who = origin(decoder).who
        raise ConfigError(f"{who} chooses among {several} responses, which no processor can; call decode.generate")
    return DecoderProcessor(decoder, request, speakers_of(decoder, request, model, attention_mask, slots))


def speakers_of(
    decoder: Decoder, request: Request, model: Any, attention_mask: Tensor | None, slots: Mapping[str, str] | None
) -> Speakers:
    """Those whom the decoder wants to hear, ready to be heard."""
    return Speakers(model, heard(decoder, request), attention_mask, slots)


def heard(decoder: Decoder, request: Request) -> list[str | None]:
    """Whom the decoder wants to hear. Raises PluginError for what is no list of candidates."""
    wanted = door.call(decoder, "speakers", request)
    if (
        isinstance(wanted, str)
        or not isinstance(wanted, Collection)
        or not all(name is None or isinstance(name, str) for name in wanted)
        or not wanted
    ):
        raise PluginError(f"{origin(decoder).who}, in speakers: {wanted!r}; return names of candidates, None: the base")
    return list(wanted)


def scores_of(decoder: Decoder, request: Request, speakers: Speakers, ids: Tensor) -> Tensor:
    """The decoder's scores [N,V] of what follows ``ids`` [N,T].

    Raises PluginError where they are not one score, finite or -inf, for each token, or forbid all of them.
    """
    logits = speakers.hear(ids)
    at = NextToken(ids=ids, logits=logits, past=speakers.past, ahead=speakers.ahead)
    with torch.no_grad():
        found = door.call(decoder, "scores", request, at)
    if problem := _problem(found, logits):
        raise PluginError(f"{origin(decoder).who}, in scores: {problem}")
    return found


def _problem(found: Any, logits: Tensor) -> str | None:
    if not isinstance(found, Tensor):
        return f"it returned {type(found).__name__}, not a tensor"
    if found.shape != logits.shape[1:]:
        return f"it returned {list(found.shape)}, not [N,V] = {list(logits.shape[1:])}"
    if not found.is_floating_point() or found.device != logits.device:
        return f"it returned {found.dtype} on {found.device}, not floating-point numbers on {logits.device}"
    if bool((found.isnan() | (found == float("inf"))).any()):
        return "a score is NaN or inf; -inf forbids a token"
    if bool((found == float("-inf")).all(-1).any()):
        return "every token is forbidden (-inf)"
    return None
