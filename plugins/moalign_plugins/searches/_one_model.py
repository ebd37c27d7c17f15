"""Searches that do not go with `condition`, where a run trains one model and a search only asks it."""

from __future__ import annotations

from moalign.api import ConfigError, Space


def refuse(space: Space, search: str, why: str) -> None:
    """Raise ConfigError where there is but one model. ``why``: what the search wants instead."""
    if space.conditioned:
        raise ConfigError(
            f"search: '{search}' {why}, and with condition one model is trained and only asked for preferences; use "
            "grid, riesz, sobol, random, listed, optimistic-linear-support or auto"
        )
