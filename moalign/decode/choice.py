"""A decoder by its name."""

from __future__ import annotations

from typing import Any

from moalign import registry
from moalign.api import Decoder


def build(name: str, **options: Any) -> Decoder:
    """The installed decoder with its options validated.

    Raises UnknownPluginError (which names the nearest), ConfigError for options, PluginError.
    """
    built: Decoder = registry.discover().build("decoder", name, options, f"decoder {name}")
    return built
