"""A stand-in for vLLM with the arguments and results of the real one, as far as the sampler uses it.

The signatures were read from vLLM's sources around version 0.26 (``LLM``, ``SamplingParams``, ``LoRARequest``,
``CompletionOutput``); an argument that the real one does not have is an error here too. What is behind them is
transformers and peft on a CPU, one response after the other: no part of vLLM runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest

ENGINE_ARGUMENTS = {  # of EngineArgs, to which LLM hands on what it does not name itself
    "enable_lora", "max_loras", "max_lora_rank", "max_cpu_loras", "lora_dtype", "fully_sharded_loras", "max_model_len",
    "max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching", "generation_config", "load_format",
    "disable_log_stats", "block_size", "kv_cache_dtype", "distributed_executor_backend", "pipeline_parallel_size",
    "data_parallel_size", "enable_sleep_mode", "enable_chunked_prefill", "async_scheduling", "served_model_name",
}  # fmt: skip
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")


@dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None

    def __post_init__(self) -> None:
        if self.temperature == 0 and self.n != 1:
            raise ValueError(f"n must be 1 when using greedy sampling, got {self.n}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63 - self.n:
            raise ValueError("the seed of a sample, seed + its index, must fit into 64 bits")


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None
    logprobs: Any
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: LoRARequest | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


@dataclass
class Core:
    running: bool = True

    def shutdown(self) -> None:
        self.running = False


@dataclass
class Engine:
    engine_core: Core = field(default_factory=Core)


class LLM:
    made: list[LLM] = []  # noqa: RUF012  (so that a test can look at them)

    def __init__(
        self,
        model: str,
        *,
        runner: str = "auto",
        convert: str = "auto",
        tokenizer: str | None = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        allowed_local_media_path: str = "",
        allowed_media_domains: list[str] | None = None,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        quantization: str | None = None,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        chat_template: str | None = None,
        seed: int = 0,
        gpu_memory_utilization: float = 0.9,
        cpu_offload_gb: float = 0,
        enforce_eager: bool = False,
        disable_custom_all_reduce: bool = False,
        hf_token: bool | str | None = None,
        hf_overrides: Any = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
        pooler_config: Any = None,
        kv_cache_memory_bytes: int | None = None,
        compilation_config: Any = None,
        logits_processors: Any = None,
        **kwargs: Any,
    ) -> None:
        unknown = sorted(set(kwargs) - ENGINE_ARGUMENTS)
        if unknown:
            raise TypeError(f"EngineArgs.__init__() got an unexpected keyword argument '{unknown[0]}'")
        if kwargs.get("enable_lora") and kwargs.get("max_lora_rank", 16) not in LORA_RANKS:
            raise ValueError(f"max_lora_rank ({kwargs['max_lora_rank']}) must be one of {LORA_RANKS}.")
        if dtype not in DTYPES:
            raise ValueError(f"Unknown dtype: {dtype}")
        self.arguments = {"model": model, "dtype": dtype, "skip_tokenizer_init": skip_tokenizer_init, "seed": seed}
        self.arguments |= {"gpu_memory_utilization": gpu_memory_utilization, "enforce_eager": enforce_eager} | kwargs
        self.llm_engine = Engine()
        self.calls: list[tuple[list[Any], list[SamplingParams], list[LoRARequest | None]]] = []
        self._scores: dict[tuple[int, ...], Any] = {}  # of the policy that was asked last
        self.made.append(self)

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Sequence[LoRARequest | None] | LoRARequest | None = None,
        priority: list[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        count = len(prompts)
        plain = sampling_params if isinstance(sampling_params, Sequence) else [sampling_params] * count
        params = [each or SamplingParams() for each in plain]
        loras = list(lora_request) if isinstance(lora_request, Sequence) else [lora_request] * count
        if len(params) != count or len(loras) != count:
            raise ValueError("The lengths of prompts, params and lora_request must be the same.")
        self.calls.append((list(prompts), params, loras))
        return [
            RequestOutput(str(number), prompt["prompt_token_ids"], self._outputs(prompt["prompt_token_ids"], how, lora))
            for number, (prompt, how, lora) in enumerate(zip(prompts, params, loras, strict=True))
        ]

    def _outputs(self, prompt: list[int], how: SamplingParams, lora: LoRARequest | None) -> list[CompletionOutput]:
        policy = self._policy(lora)
        outputs = [self._output(policy, prompt, how, number, lora) for number in range(how.n)]
        return outputs[::-1]  # whoever is done first

    def _output(
        self, policy: Any, prompt: list[int], how: SamplingParams, number: int, lora: LoRARequest | None
    ) -> CompletionOutput:
        import torch
        from transformers import GenerationConfig

        generator = torch.Generator().manual_seed((how.seed or 0) + number)
        ids, stops = list(prompt), how.stop_token_ids or []
        config = GenerationConfig(max_new_tokens=1, eos_token_id=stops or None, pad_token_id=0)
        config.output_logits, config.return_dict_in_generate = True, True
        while len(ids) < len(prompt) + (how.max_tokens or 16):
            if (known := tuple(ids)) not in self._scores:
                given = torch.tensor([ids])
                mask = torch.ones_like(given)
                found = policy.generate(input_ids=given, attention_mask=mask, generation_config=config)
                self._scores[known] = found.logits[0][0].double()
            ids.append(self._token(self._scores[known], how, generator))
            if ids[-1] in stops:
                reason = {"finish_reason": "stop", "stop_reason": ids[-1]}
                return CompletionOutput(number, "", ids[len(prompt) :], None, None, lora_request=lora, **reason)  # type: ignore[arg-type]
        return CompletionOutput(number, "", ids[len(prompt) :], None, None, "length", None, lora)

    @staticmethod
    def _token(logits: Any, how: SamplingParams, generator: Any) -> int:
        import torch

        if how.temperature == 0:
            return int(logits.argmax())
        likely, ids = (logits / how.temperature).softmax(-1).sort(descending=True)
        likely[likely.cumsum(-1) - likely >= how.top_p] = 0.0
        return int(ids[torch.multinomial(likely, 1, generator=generator)])

    def _policy(self, lora: LoRARequest | None) -> Any:
        """The base anew, so that nothing of another adapter is left in it."""
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        key = None if lora is None else lora.lora_path
        if getattr(self, "_last", None) != key or not hasattr(self, "_held"):
            base = AutoModelForCausalLM.from_pretrained(str(self.arguments["model"]), dtype="float32")
            self._held = base if key is None else PeftModel.from_pretrained(base, Path(key))
            self._last, self._scores = key, {}
        return self._held.eval()
