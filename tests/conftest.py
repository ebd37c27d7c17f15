"""What all tests share. Nothing here imports torch, so that tests that need none stay quick."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

# The same examples in every run, so that a failure is about the change at hand; new ones, to look for more:
# MOALIGN_FUZZ_CASES=3000 pytest --hypothesis-profile=default tests/test_data_fuzz.py
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")

# Read when torch and transformers are first imported, by the tests and by the processes that they start: one thread
# each, because the tests run side by side, and no network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """A test that draws without a seed of its own draws the same numbers whichever tests ran before it."""
    import random
    import sys

    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama (2 layers, width 32) and its tokenizer of single characters, in the transformers format.

    The tokenizer knows printable ASCII and the line break, one token each; bos, eos and pad are distinct, and there is
    no chat template. Input and output embeddings are separate.
    """
    import string

    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("tiny-model")
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    characters = string.digits + string.ascii_letters + string.punctuation + " \n"
    vocabulary = {token: index for index, token in enumerate([*specials, *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Path:
    """A finished run on the random tiny model: w-1.00-0.00, w-0.00-1.00 and w-0.50-0.50 (harmless, helpful), rank 4,
    trained far enough to differ. Its data file is gone. To be read only: tests that change it take a copy."""
    from sweeps import small_config, write_pairs

    import moalign

    folder = tmp_path_factory.mktemp("small-run")
    pairs = write_pairs(folder / "pairs.jsonl")
    run = moalign.sweep(small_config(tiny_model_path, pairs), folder / "run")
    pairs.unlink()
    return run.directory
