"""vLLM as the place where sampled responses come from. Nothing here imports vLLM before a run asks for responses."""

from moalign.api import Register, hookimpl

moalign_api_version = 3


@hookimpl
def register_samplers(register: Register) -> None:
    register(
        "vllm",
        "moalign_vllm.sampler:VLLM",
        summary="responses from vLLM, all candidates' adapters in one call",
        paper="arXiv:2309.06180",
    )
