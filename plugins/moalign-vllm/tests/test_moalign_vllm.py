"""The sampler against a recorded interface of vLLM (``recorded/vllm``): it has not run against a real one, or a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from moalign.api import ConfigError, SamplerInfo, Sampling
from moalign.testing import check_sampler

from moalign_vllm.sampler import VLLM

HOW = Sampling(samples=2, temperature=0.7, top_p=0.9, max_new_tokens=5, stop_token_ids=(2, 7), seed=2**63 - 1)
INFO = SamplerInfo("a-model", "bfloat16", 100, 12)
RECORDED = Path(__file__).parent / "recorded"


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    """The stand-in, as if it were installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(RECORDED))
    import vllm

    assert str(RECORDED) in str(vllm.__file__)
    vllm.LLM.made.clear()
    yield vllm
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]


def test_conformance():
    check_sampler(VLLM())


def test_what_vllm_is_started_with(vllm):
    session = VLLM(max_loras=3, max_model_len=128).start(INFO)
    (llm,) = vllm.LLM.made
    given = llm.arguments
    assert given["model"] == "a-model" and given["dtype"] == "bfloat16" and given["max_model_len"] == 128
    assert given["enable_lora"] and given["max_loras"] == 3 and given["max_lora_rank"] == 16  # the next above 12
    assert given["skip_tokenizer_init"] and given["generation_config"] == "vllm"
    core = llm.llm_engine.engine_core
    session.close()
    assert not core.running
    VLLM(dtype="float16").start(INFO)
    assert vllm.LLM.made[-1].arguments["dtype"] == "float16"


def test_a_rank_that_vllm_has_no_kernels_for_is_refused():
    with pytest.raises(ConfigError, match="512 at most, not 513"):
        VLLM().start(SamplerInfo("a-model", "float32", 100, 513))


def test_what_a_request_becomes(vllm, tmp_path, monkeypatch):
    """Prompt by prompt within each adapter; adapters have numbers that never come again, prompts seeds of their own."""
    session = VLLM().start(INFO)
    (llm,) = vllm.LLM.made
    outputs = lambda self, prompt, how, lora: [  # noqa: E731
        vllm.CompletionOutput(index, "", [index + len(prompt), 2], None, None) for index in (1, 0)
    ]
    monkeypatch.setattr(vllm.LLM, "_outputs", outputs)
    found = session.sample([tmp_path / "a", None], [(5, 6), (5,)], HOW)
    assert found == [[[[2, 2], [3, 2]], [[1, 2], [2, 2]]]] * 2
    session.sample([tmp_path / "a"], [(5, 6)], HOW)
    (prompts, parameters, loras), (_, _, again) = llm.calls
    assert prompts == [{"prompt_token_ids": [5, 6]}, {"prompt_token_ids": [5]}] * 2
    assert [lora and (lora.lora_int_id, lora.lora_path) for lora in loras] == [(1, str(tmp_path / "a"))] * 2 + [
        None
    ] * 2
    assert [lora.lora_int_id for lora in again] == [3]
    first, second, *others = parameters
    assert (first.n, first.temperature, first.top_p, first.max_tokens) == (2, 0.7, 0.9, 5)
    assert first.stop_token_ids == [2, 7] and first.ignore_eos and not first.detokenize
    seeds = [{each.seed, each.seed + 1} for each in (first, second)]  # of both samples
    assert not seeds[0] & seeds[1] and [each.seed for each in others] == [first.seed, second.seed]
