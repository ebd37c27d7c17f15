"""What rewards that run a model of their own share: from where it is loaded, on what it runs, how much it takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def model_directory(path: str) -> str:
    """For a field's validator. Raises ValueError where there is no model."""
    if not (Path(path).expanduser() / "config.json").is_file():
        raise ValueError(f"no directory with a config.json: {path}")
    return path


def device_and_dtype(device: str, dtype: str) -> tuple[torch.device, str]:
    """``auto``: an accelerator where there is one; weights as stored there, float32 on a CPU."""
    import torch

    place = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
    return place, "float32" if dtype == "auto" and place.type == "cpu" else dtype


def window(config: Any) -> int:
    """How many tokens the model takes, a large number where it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 10**6


def most_tokens(tokenizer: Any, config: Any) -> int:
    """As many as tokenizer and model say they take."""
    return min(tokenizer.model_max_length or 10**6, window(config))
