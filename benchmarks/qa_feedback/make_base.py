"""Make the small base model of this benchmark from the data's own text: language modelling of passages and human
answers, then supervised fine-tuning on the answers. Of the held-out questions nothing is seen, not even their passages.

    python benchmarks/qa_feedback/make_base.py --data DIR --out DIR [--minutes 6.5] [--seed 0]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moalign import storage
from moalign.data.loading import load_records
from moalign.data.rows import read_rows
from moalign.data.split import split
from moalign.data.tokenise import Tokeniser
from moalign.seeds import derive
from moalign_plugins.readers.qa_feedback import QAFeedback

BEGIN, END, PADDING = "<s>", "</s>", "<pad>"
VOCABULARY = 4096
BLOCK, BLOCKS_PER_STEP = 256, 2  # tokens in a row of text, rows in a step: with so little text, many small steps
ANSWERS_PER_STEP = 8
LEARNING_RATE = {"text": 3e-3, "answers": 5e-4}
STEPS_PER_MINUTE = {"text": 470, "answers": 190}  # about, on one core; a constant, so that --minutes fixes the steps
SHARE = {"text": 0.82, "answers": 0.18}  # of the minutes
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """A prompt as the sweep will write it, and one human answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Text:
    passages: tuple[str, ...]
    training: tuple[Example, ...]
    held_out: tuple[Example, ...]


Row = tuple[Tensor, Tensor]  # input ids and labels, both [tokens]; label i is the token that position i predicts


def read(file: Path, passages: int, seed: int, held_out: float) -> Text:
    """The text of ``feedback.json``, split by question as ``moalign sweep`` splits it for this seed and share."""
    rows = {line: row for _, line, row in read_rows(file)}
    records = load_records(file, QAFeedback(passages=passages)).records
    training, unseen = split(records, seed, held_out)

    def examples(some: Sequence[Any]) -> tuple[Example, ...]:
        return tuple(Example(record.prompt, answer) for record in some for answer in human_answers(rows[record.line]))

    hidden = {text for record in unseen for text in passage_texts(rows[record.line])}
    seen = {text: None for record in training for text in passage_texts(rows[record.line])}
    return Text(tuple(text for text in seen if text not in hidden), examples(training), examples(unseen))


def human_answers(row: Any) -> list[str]:
    """The written answer and, where there is one, the corrected model answer."""
    texts = [row["gold"].strip(), row["feedback"]["corrected-prediction"].strip()]
    return [text for text in texts if text]


def passage_texts(row: Any) -> list[str]:
    return [" ".join(sentences[1:]) for sentences in row["passages"]]


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text round-trips. Encoding begins with the begin token; no chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[PADDING, BEGIN, END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, backend.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """About two and a half million untrained parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.06,  # about 1 / sqrt(192); the usual 0.02 learns more slowly at this width
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(derive(seed, "weights"))
    return LlamaForCausalLM(config)


def text_batches(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], seed: int) -> Iterator[list[Row]]:
    """Without end: the texts in a fresh order each time round, joined and cut into blocks."""
    encoded = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    blocks: list[Row] = []
    left: list[int] = []
    for round_number in range(2**31):
        order = Random(derive(seed, "text", round_number)).sample(range(len(encoded)), len(encoded))
        for index in order:
            left += encoded[index]
            while len(left) > BLOCK:
                ids = torch.tensor(left[: BLOCK + 1])
                blocks.append((ids[:-1], ids[1:]))
                left = left[BLOCK:]
            if len(blocks) >= BLOCKS_PER_STEP:
                yield blocks[:BLOCKS_PER_STEP]
                blocks = blocks[BLOCKS_PER_STEP:]


def answer_rows(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]) -> list[Row]:
    """Prompt and answer, tokenised as the sweep does it; only the answer and its end token are scored."""
    tokeniser = Tokeniser.of(tokenizer)
    rows = []
    for example in examples:
        prompt, answer = tokeniser.prompt(example.prompt), tokeniser.response(example.answer)
        if isinstance(answer, str):
            raise SystemExit(f"an answer cannot be trained on: {answer}: {example.answer[:80]!r}")
        ids = torch.tensor([*prompt, *answer])
        labels = ids[1:].clone()
        labels[: len(prompt) - 1] = IGNORED
        rows.append((ids[:-1], labels))
    return rows


def answer_batches(rows: Sequence[Row], seed: int) -> Iterator[list[Row]]:
    """Without end: every row once, then again in a fresh order."""
    for round_number in range(2**31):
        order = Random(derive(seed, "answers", round_number)).sample(range(len(rows)), len(rows))
        for start in range(0, len(order) - ANSWERS_PER_STEP + 1, ANSWERS_PER_STEP):
            yield [rows[index] for index in order[start : start + ANSWERS_PER_STEP]]


def negative_log_likelihood(model: LlamaForCausalLM, rows: Sequence[Row]) -> tuple[Tensor, int]:
    """Sum over the scored tokens, in nats, and their number. Padding stands right, where causality hides it."""
    ids = pad_sequence([ids for ids, _ in rows], batch_first=True)
    labels = pad_sequence([labels for _, labels in rows], batch_first=True, padding_value=IGNORED)
    scored = labels != IGNORED
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[scored]
    return cross_entropy(model.lm_head(hidden), labels[scored], reduction="sum"), int(scored.sum())


def train(model: LlamaForCausalLM, batches: Iterator[list[Row]], steps: int, rate: float, what: str) -> int:
    """AdamW with a linear warm-up and a cosine to nothing; returns the number of tokens trained on."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    model.train()
    start, trained = time.perf_counter(), 0
    for step in range(1, steps + 1):
        loss, tokens = negative_log_likelihood(model, next(batches))
        trained += tokens
        optimizer.zero_grad()
        (loss / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps:
            print(f"{what} {step}/{steps}: {loss.item() / tokens:.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    model.eval()
    return trained


@torch.no_grad()
def answer_loss(model: LlamaForCausalLM, rows: Sequence[Row]) -> float:
    """Mean negative log-likelihood per token of the answers, in nats."""
    model.eval()
    parts = [negative_log_likelihood(model, rows[start : start + 16]) for start in range(0, len(rows), 16)]
    return sum(loss.item() for loss, _ in parts) / sum(tokens for _, tokens in parts)


def make(data: Path, minutes: float, seed: int, held_out: float, passages: int) -> tuple[Any, Any, dict[str, Any]]:
    """(model, tokenizer, figures)."""
    started = time.perf_counter()
    text = read(data / "feedback.json", passages, seed, held_out)
    texts = [*text.passages, *(example.prompt + example.answer for example in text.training)]
    tokenizer = make_tokenizer(texts)
    model = make_model(tokenizer, seed)
    training, unseen = (answer_rows(tokenizer, examples) for examples in (text.training, text.held_out))
    batches = {
        "text": text_batches(tokenizer, texts, seed),
        "answers": answer_batches(training, seed),
    }
    losses = {"untrained": answer_loss(model, unseen)}
    tokens = {}
    for phase in batches:
        steps = max(round(minutes * SHARE[phase] * STEPS_PER_MINUTE[phase]), 1)
        tokens[phase] = train(model, batches[phase], steps, LEARNING_RATE[phase], phase)
        losses[f"after {phase}"] = answer_loss(model, unseen)
    figures = {
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "prompt": text.training[0].prompt,
        "seed": seed,
        "held_out": held_out,
        "minutes_asked": minutes,
        "seconds": round(time.perf_counter() - started),
        "passages": len(text.passages),
        "answers": {"training": len(training), "held-out": len(unseen)},
        "tokens": tokens,
        "held_out_loss": losses,
        "held_out_perplexity": {name: math.exp(loss) for name, loss in losses.items()},
        "training_loss": answer_loss(model, training),
    }
    return model, tokenizer, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder with feedback.json")
    parser.add_argument("--out", type=Path, required=True, help="where the model goes; must not exist")
    parser.add_argument("--minutes", type=float, default=6.5, help="on one core; fixes the number of steps")
    parser.add_argument("--seed", type=int, default=0, help="as in the sweep: it decides which questions are held out")
    parser.add_argument("--held-out", type=float, default=0.1, help="as data.held_out of the sweep")
    parser.add_argument("--passages", type=int, default=0, help="as data.reader.passages of the sweep")
    arguments = parser.parse_args()
    if arguments.out.exists():
        raise SystemExit(f"{arguments.out} exists; it is not overwritten")
    torch.set_num_threads(1)  # the order of additions, and with it the result, depends on the number of threads
    model, tokenizer, figures = make(
        arguments.data, arguments.minutes, arguments.seed, arguments.held_out, arguments.passages
    )
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    storage.write_json(arguments.out / "base.json", figures)
    print(storage.canonical_json(figures))


if __name__ == "__main__":
    main()
