"""What a model does with its input, found out by trying: that our reading of its head is right, and whether several
responses may lie behind one prompt in one row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moalign.data.tokenise import Sequence as TokenSequence
from moalign.engine.decoding import decode
from moalign.engine.layout import Layout, lay_out, one_by_one
from moalign.engine.lower import Copies, copied
from moalign.engine.lower_cache import LowerCache
from moalign.errors import ModelError

if TYPE_CHECKING:
    from moalign.engine.model import LanguageModel

LENGTHS = ((9, (7, 1, 5)), (4, (12,)), (1, (3, 6)))  # of prompts and their responses
ROWS = ((0, 1, 2), (3,), (4, 5))


@torch.no_grad()
def check_against_own_logits(model: LanguageModel, path: str) -> None:
    """The model's own forward pass, with its own padding mask, must agree with ours.

    Raises ModelError where it scales or caps its logits in a way that we do not know.
    """
    sequences = _sequences(model, salt=0)
    layout = one_by_one(sequences, model.pad_id).to(model.device)
    ours = model.response_logps(layout)
    lengths = torch.tensor([len(sequence.ids) - 1 for sequence in sequences], device=model.device)
    padding = (torch.arange(layout.input_ids.shape[1], device=model.device) < lengths[:, None]).long()
    logits = model.policy(input_ids=layout.input_ids, attention_mask=padding, use_cache=False).logits
    scored = logits.flatten(0, 1)[layout.source].float().log_softmax(-1)
    theirs = layout.place(scored.gather(-1, layout.labels[:, None])[:, 0])
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    if not torch.allclose(ours, theirs, atol=tolerance, rtol=tolerance):
        raise ModelError(
            f"{path}: log-probabilities from hidden states differ from the model's own logits by up to "
            f"{(ours - theirs).abs().max():.3g}; its output head does something that moalign does not know"
        )


@torch.no_grad()
def why_not_shared(model: LanguageModel) -> str | None:
    """The reason why responses to one prompt cannot lie in one row of this model's input; None where they can.

    Both layouts must give the same log-probabilities up to rounding, and what stands in the response before must not
    matter at all: recurrent layers, position biases made from the order in the row, and attention that ignores a
    prepared mask all fail one or the other.
    """
    single = model.dtype in (torch.float32, torch.float64)
    sequences = _sequences(model, salt=0)
    try:
        apart = model.response_logps(one_by_one(sequences, model.pad_id).to(model.device))
        together = model.response_logps(_together(sequences, model))
        others = [*_sequences(model, salt=1)[:1], *sequences[1:]]  # another first response behind the first prompt
        moved = model.response_logps(_together(others, model))
    except Exception as error:  # whatever a model raises for a mask or positions that it does not take
        return f"it does not take a prepared mask and positions ({_first_line(error)})"
    largest = float((apart - together).abs().max())
    if not largest <= (1e-4 if single else 0.1):
        return f"log-probabilities change by {largest:.2g} when responses to one prompt lie in one row"
    largest = float((together - moved)[1:].abs().max())
    if not largest <= (1e-6 if single else 1e-2):
        return f"a response changes the log-probabilities of the next one in its row by {largest:.2g}"
    return None


@torch.no_grad()
def why_not_cached(model: LanguageModel) -> str | None:
    """The reason why responses cannot go on from one computation of their prompt, rows leaving on the way; or None.

    What decoding with the cache says of given responses must be what one forward pass over them says.
    """
    sequences = _sequences(model, salt=0)
    expected = model.response_logps(one_by_one(sequences, model.pad_id).to(model.device))
    found = torch.zeros_like(expected)
    beyond, most = -1, max(len(sequence.response) for sequence in sequences)  # no token: where a response is over

    def given(scores: Tensor, position: int, rows: Tensor) -> Tensor:
        responses = [sequences[row].response for row in rows.tolist()]
        tokens = [response[position] if position < len(response) else beyond for response in responses]
        logps = scores.log_softmax(-1)
        for place, (row, token) in enumerate(zip(rows.tolist(), tokens, strict=True)):
            if token != beyond:
                found[row, sequences[row].prompt_length - 1 + position] = logps[place, token]
        return torch.tensor(tokens, device=scores.device)

    try:
        decode(model, [None], [sequence.prompt for sequence in sequences], given, most, {beyond})
    except Exception as error:  # whatever a model raises for a cache, a mask or positions that it does not take
        return f"its cache does not let rows be selected ({_first_line(error)})"
    largest = float((expected - found).abs().max())
    if not largest <= (1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1):
        return f"log-probabilities change by {largest:.2g} when responses go on from one computation of their prompt"
    return None


@torch.no_grad()
def copies_agree(model: LanguageModel, upper: Sequence[nn.Module]) -> bool:
    """Whether copying rows behind the lower layers gives what running them for every copy gives."""
    sequences = _sequences(model, salt=0)
    layout = one_by_one(sequences * 2, model.pad_id).to(model.device)
    copies = Copies.repeated(len(sequences), 2, model.device)
    try:
        with copied(upper, copies):
            found = model.response_logps(layout, copies)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    tolerance = 1e-4 if model.dtype in (torch.float32, torch.float64) else 5e-2
    return torch.allclose(found, model.response_logps(layout), rtol=tolerance, atol=tolerance)


@torch.no_grad()
def why_not_skipped(model: LanguageModel) -> str | None:
    """The reason why the layers below the adapters must run even where what they hand on is known; None: they need not.

    Layers that hand on more than hidden states, or look back at others', fail.
    """
    cache = LowerCache(model, limit=2**30)
    sequences = _sequences(model, salt=0)
    layouts = [one_by_one(sequences, model.pad_id, 8).to(model.device)]
    layouts += [_together(sequences, model)] if model.unshared is None else []
    for layout in layouts:
        expected = model.response_logps(layout)
        try:
            for _ in ("computed", "known"):
                with cache.skipping(layout):
                    found = model.response_logps(layout)
                largest = float((found - expected).abs().max())
                if not largest <= (1e-4 if model.dtype in (torch.float32, torch.float64) else 5e-2):
                    return f"log-probabilities change by {largest:.2g} when known hidden states are put in"
        except Exception as error:  # whatever a model raises for a layer that only hands on its input
            return f"its layers do more than hand on hidden states ({type(error).__name__})"
    return None


def longest_shared_row(config: Any) -> int | None:
    """The most positions that all layers see at once, where the configuration speaks of windows or chunks.

    Behind a prepared mask a model applies no window of its own, so that only rows within the window are sure.
    """
    sizes = [
        value
        for name, value in config.to_dict().items()
        if ("window" in name or "chunk" in name) and not name.endswith(("_layers", "_pattern", "_feed_forward"))
        if isinstance(value, int) and not isinstance(value, bool)
    ]
    return min((size for size in sizes if size > 0), default=None)


def _first_line(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def _sequences(model: LanguageModel, salt: int) -> list[TokenSequence]:
    vocabulary = model.head.weight.shape[0]
    made = []
    for number, (prompt, responses) in enumerate(LENGTHS):
        begin = [(5 + 31 * number + 7 * place) % vocabulary for place in range(prompt)]
        for turn, response in enumerate(responses):
            end = [(11 + 13 * turn + (3 + 2 * salt) * place + 17 * salt) % vocabulary for place in range(response)]
            made.append(TokenSequence((*begin, *end), prompt))
    return made


def _together(sequences: list[TokenSequence], model: LanguageModel) -> Layout:
    return lay_out(sequences, ROWS, model.pad_id).to(model.device)
