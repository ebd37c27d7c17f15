"""Make the tiny assistant again: ``python -m moalign.demo.make_checkpoint DIRECTORY``; minutes on one core."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moalign.demo import grammar
from moalign.demo.enumeration import enumerate_replies, reply_logps
from moalign.errors import MoalignError

BEGIN, END, PADDING = "<bos>", "<eos>", "<pad>"
LAYERS = 2
STEPS, ROWS, LEARNING_RATE, SEED = 2800, 64, 4e-3, 0
LEAST_MASS = 0.99  # of probability on the enumerated replies, the mean over held-out prompts


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the grammar (with the space before it), and the 256 bytes for everything else.

    Any text round-trips exactly, and each reply of the grammar has exactly one tokenisation that sampling will find.
    Encoding begins with the begin token; the end token is never added to a text.
    """
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\S+|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    texts = [text for prompt in grammar.PROMPTS for text in (prompt, *grammar.replies(prompt))]
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    letters = set(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [PADDING, BEGIN, END, *sorted(letters), *sorted(words - letters)]
    backend = Tokenizer(models.BPE({word: index for index, word in enumerate(vocabulary)}, [], ignore_merges=True))
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, vocabulary.index(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, layers: int = LAYERS) -> LlamaForCausalLM:
    """About half a million untrained parameters; few layers, because a small step costs its number of calls."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.08,  # about 1 / sqrt(hidden_size): keeps tokens apart, so that adapters can tell them apart
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int = STEPS) -> None:
    """Maximum likelihood of reply and end token given the prompt, on fresh text at every step."""
    random = Random(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        rows = [_row(tokenizer, *grammar.sample(random)) for _ in range(ROWS)]
        ids, labels = (pad_sequence(list(column), batch_first=True) for column in zip(*rows, strict=True))
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]  # padding stands right: causality hides it
        scored = labels[:, 1:] != 0
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[scored]), labels[:, 1:][scored])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    model.eval()


def _row(tokenizer: PreTrainedTokenizerFast, prompt: str, reply: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and labels with 0 (padding, which no reply holds) where nothing is to be learned."""
    begin = tokenizer(prompt)["input_ids"]
    answer = [*tokenizer(reply, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(begin + answer), torch.tensor([0] * len(begin) + answer)


def main(directory: Path, layers: int = LAYERS, steps: int = STEPS) -> None:
    """Write the checkpoint, as float16; raise MoalignError where too little mass is on the grammar."""
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, layers)
    train(model, tokenizer, steps)
    model.half().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    shipped = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        logps = reply_logps(shipped, enumerate_replies(tokenizer, grammar.HELD_OUT_PROMPTS))
    mass = logps.double().exp().sum(1)
    print(f"{shipped.num_parameters()} parameters, mass {mass.mean():.4f}, least {mass.min():.4f}")
    if mass.mean() < LEAST_MASS:
        raise MoalignError(f"only {mass.mean():.4f} of the mass is inside the grammar, not {LEAST_MASS}; train longer")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
