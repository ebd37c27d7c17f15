"""Train a language model for several objectives at once and get the whole trade-off back.

``run = moalign.sweep("config.yaml")``, then ``run.front`` and ``run.load(ID)``. Nothing heavy is imported before that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moalign.python import Run, open_reward_model, open_run, resume, sweep, train_reward_model

__all__ = ["Run", "open_reward_model", "open_run", "resume", "sweep", "train_reward_model"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'moalign' has no attribute {name!r}")
    from moalign import python

    return getattr(python, name)
