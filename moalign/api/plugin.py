"""The base of every kind of plugin, and how one is registered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, PrivateAttr


class Plugin(BaseModel):
    """Base of every kind. Unknown keys are refused, fields cannot change after construction.

    The string below a field is what ``moalign plugins show`` says about it. A field whose type is a kind, such as
    ``reward: Reward``, is a plugin of that kind, which the configuration names with its options as everywhere.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    _origin: Any = PrivateAttr(default=None)  # where the registry found it, for messages

    requires: ClassVar[Mapping[str, str]] = {}
    """modules that the methods import, and what to install for each: {"wandb": "moalign[wandb]"}; one that is missing
    is reported before a model is loaded"""


class Register(Protocol):
    """Given to a ``register_*`` hook; call it once per plugin.

    ``target`` is the class, or better "module:Class", which is imported only when somebody uses it.
    """

    def __call__(self, name: str, target: str | type[Plugin], *, summary: str, paper: str = "") -> None: ...
