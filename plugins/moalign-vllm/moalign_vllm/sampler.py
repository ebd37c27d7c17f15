"""The sampler: one vLLM engine for a run, each candidate's adapter a LoRA request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from moalign.api import ConfigError, Sampler, SamplerInfo, Sampling, SamplingSession
from pydantic import Field

if TYPE_CHECKING:
    from pathlib import Path

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the largest ranks that vLLM has kernels for
LARGEST_SEED = 2**63  # vLLM takes 64-bit integers


class VLLM(Sampler):
    """Samples with vLLM, prefix caching and continuous batching included; the base is loaded once more, by vLLM.

    What vLLM says depends on what else is in its batch, to rounding, so that a resumed run need not be the unbroken
    one to the last bit. Log-probabilities are moalign's own.
    """

    requires: ClassVar[Mapping[str, str]] = {"vllm": "moalign-vllm[vllm]"}

    dtype: Literal["same", "auto", "float32", "bfloat16", "float16"] = "same"
    """of vLLM's weights; same: as moalign computes, so that samples are as near to the policy as they can be"""
    gpu_memory_utilization: float = Field(default=0.3, gt=0, le=1)
    """share of the GPU's memory that vLLM takes for itself; the training needs the rest"""
    max_model_len: int | None = Field(default=None, ge=2)
    """tokens of prompt and response together; none: as the model has it"""
    max_loras: int = Field(default=8, ge=1)
    """adapters that are computed in one batch; of more candidates some wait"""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs over which vLLM spreads the base"""
    enforce_eager: bool = False
    """without CUDA graphs: slower, less memory"""

    def start(self, info: SamplerInfo) -> SamplingSession:
        from vllm import LLM

        rank = next((each for each in RANKS if each >= info.rank), None)
        if rank is None:
            raise ConfigError(f"model.lora.r: vLLM takes adapters of rank {RANKS[-1]} at most, not {info.rank}")
        return Session(
            LLM(
                model=info.model,
                dtype=info.dtype if self.dtype == "same" else self.dtype,
                skip_tokenizer_init=True,  # ids go in and come out
                trust_remote_code=False,
                seed=0,  # every request has its own
                gpu_memory_utilization=self.gpu_memory_utilization,
                max_model_len=self.max_model_len,
                tensor_parallel_size=self.tensor_parallel_size,
                enforce_eager=self.enforce_eager,
                enable_lora=True,
                max_loras=self.max_loras,
                max_lora_rank=rank,
                enable_prefix_caching=True,
                generation_config="vllm",  # not the model's own limits and penalties
            )
        )


class Session(SamplingSession):
    """``llm``: a vllm.LLM."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self._ids = count(1)  # of adapters; never used twice, so that vLLM keeps nothing of an earlier round

    def sample(
        self, adapters: Sequence[Path | None], prompts: Sequence[Sequence[int]], how: Sampling
    ) -> list[list[list[list[int]]]]:
        from vllm.lora.request import LoRARequest

        loras: list[Any] = []
        for folder in adapters:
            number = next(self._ids)
            loras.append(None if folder is None else LoRARequest(f"moalign-{number}", number, str(folder)))
        plain = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self.llm.generate(
            plain * len(adapters),
            [parameters(how, number) for number in range(len(prompts))] * len(adapters),
            use_tqdm=False,
            lora_request=[lora for lora in loras for _ in prompts],
        )
        said = [[list(each.token_ids) for each in _in_order(output)] for output in outputs]
        return [said[start : start + len(prompts)] for start in range(0, len(said), len(prompts))]

    def close(self) -> None:
        engine = getattr(self.llm, "llm_engine", None)
        core = getattr(engine, "engine_core", None)
        self.llm = None
        if core is not None:
            core.shutdown()  # else its process lives, and keeps its memory, until this one ends


def parameters(how: Sampling, prompt: int) -> Any:
    """vllm.SamplingParams for the prompt of this number; the same for every adapter, so that they share their noise.

    vLLM gives sample i of a request the seed ``seed + i``, so that prompts are ``samples`` apart.
    """
    from vllm import SamplingParams

    return SamplingParams(
        n=how.samples,
        temperature=how.temperature,
        top_p=how.top_p,
        seed=(how.seed + prompt * how.samples) % (LARGEST_SEED - how.samples),
        max_tokens=how.max_new_tokens,
        stop_token_ids=list(how.stop_token_ids),
        ignore_eos=True,  # the stop tokens are all that ends a response
        detokenize=False,
    )


def _in_order(output: Any) -> list[Any]:
    return sorted(output.outputs, key=lambda each: each.index)
