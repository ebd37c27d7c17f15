"""What both engines train: a small Llama with random weights, pairs with lengths of a given kind, one LoRA setting."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from random import Random

SPECIALS = ("<pad>", "</s>", "<unk>")
SHORTEST_SHARE = 0.1  # of the longest dialogue


@dataclass(frozen=True)
class Task:
    """Model and data sizes, batch, and what is optimised. Row lengths are in tokens, prompt and response together.

    ``lengths``: "uniform" (every row ``longest``, a quarter of it prompt) or "dialogue" (prompts are three quarters of
    the row, lengths from a tenth of ``longest`` to ``longest``, evenly on a logarithmic scale). ``adapted``: which of
    the layers get adapters, as ``model.lora.layers`` has it.
    """

    lengths: str
    longest: int
    hidden: int = 256
    layers: int = 4
    vocabulary: int = 32000
    pairs_per_step: int = 8
    warmup: int = 3
    steps: int = 8
    rank: int = 16
    lr: float = 1e-3
    beta: float = 0.1
    dtype: str = "float32"
    seed: int = 0
    adapted: str | float = "all"

    @property
    def all_steps(self) -> int:
        return self.warmup + self.steps


def write_model(task: Task, directory: Path) -> None:
    """A checkpoint and its tokenizer of whole words "t3" .. "t31999", one token each, without a BOS token."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    words = {word: number for number, word in enumerate(SPECIALS)}
    words |= {f"t{number}": number for number in range(len(SPECIALS), task.vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=10**9
    )
    heads = max(1, task.hidden // 64)
    torch.manual_seed(task.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=task.vocabulary,
            hidden_size=task.hidden,
            intermediate_size=16 * math.ceil(task.hidden / 6),
            num_hidden_layers=task.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=max(2048, task.longest),
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.to(getattr(torch, task.dtype)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_pairs(task: Task, training: Path, held_out: Path) -> None:
    """As many pairs as one epoch of all steps needs; held out is one pair, which nothing here looks at."""
    rng = Random(task.seed)
    count = task.pairs_per_step * task.all_steps
    training.write_text("".join(_pair(task, rng, number) for number in range(count)))
    held_out.write_text(_pair(task, rng, count))


def _pair(task: Task, rng: Random, number: int) -> str:
    prompt, chosen, rejected = _lengths(task, rng)
    # two words that number the pair keep all prompts apart, whatever is drawn
    base = task.vocabulary - len(SPECIALS)
    numbered = [len(SPECIALS) + number // base % base, len(SPECIALS) + number % base]
    texts = {
        "prompt": numbered + _draw(task, rng, prompt - len(numbered)),
        "chosen": _draw(task, rng, chosen - 1),  # both engines add the end token
        "rejected": _draw(task, rng, rejected - 1),
    }
    row = {name: " ".join(f"t{token}" for token in tokens) for name, tokens in texts.items()}
    return json.dumps(row | {"objective": "better"}) + "\n"


def _lengths(task: Task, rng: Random) -> tuple[int, int, int]:
    """Tokens of prompt, chosen and rejected response (end tokens counted)."""
    if task.lengths == "uniform":
        prompt = task.longest // 4
        return prompt, task.longest - prompt, task.longest - prompt
    row = task.longest * math.exp(math.log(SHORTEST_SHARE) * rng.random())
    prompt = round(0.75 * row)
    responses = (round(row) - prompt, round((row - prompt) * rng.uniform(0.5, 1.0)))
    first, second = responses if rng.random() < 0.5 else responses[::-1]
    return max(3, prompt), max(2, first), max(2, second)


def _draw(task: Task, rng: Random, count: int) -> list[int]:
    return [rng.randrange(len(SPECIALS), task.vocabulary) for _ in range(count)]
