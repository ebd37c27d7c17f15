"""The frozen layers below the first adapter compute the same for every candidate: each row passes them once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Copies:
    """Which of a pass's B rows are the same below the adapters: row b is a copy of row ``first[of[b]]``.

    ``first[U]``  a row of each kind
    ``of[B]``     the kind of each row
    """

    first: Tensor
    of: Tensor

    @classmethod
    def repeated(cls, rows: int, times: int, device: torch.device) -> Copies:
        """So many rows, and then all of them again."""
        first = torch.arange(rows, device=device)
        return cls(first, first.repeat(times))


def split(base: nn.Module) -> tuple[tuple[nn.Module, ...], tuple[nn.Module, ...]]:
    """The model's layers below the first one with an adapter, and those from it on.

    Both are empty where adapters are elsewhere or in all layers.
    """
    adapted = [name for name, module in base.named_modules() if isinstance(module, LoraLayer)]
    for name, stack in base.named_modules():
        if isinstance(stack, nn.ModuleList) and adapted and all(each.startswith(f"{name}.") for each in adapted):
            first = min(int(each[len(name) + 1 :].split(".")[0]) for each in adapted)
            return (tuple(stack)[:first], tuple(stack)[first:]) if first else ((), ())
    return (), ()


@contextmanager
def copied(layers: Sequence[nn.Module], copies: Copies) -> Iterator[None]:
    """Within the context a batch of one row of each kind becomes the whole pass at the first of the layers.

    The backward pass belongs in it too: with gradient checkpointing it runs layers again.
    """
    kinds = len(copies.first)

    def expand(value: Any) -> Any:
        if isinstance(value, Tensor):  # masks, positions and hidden states begin with the rows; 1 row is broadcast
            return value.index_select(0, copies.of) if value.ndim > 1 and len(value) == kinds else value
        if isinstance(value, tuple | list):
            return type(value)(expand(each) for each in value)
        return value

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return tuple(expand(each) for each in args), {name: expand(each) for name, each in kwargs.items()}

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replaced(
    below: Sequence[nn.Module], first: nn.Module, known: Callable[[], bool], states: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Within the context the layers ``below`` hand on their input where ``known()``, and run where it is False.

    Either way ``states(hidden)`` is what the layer above them, ``first``, gets for what reaches it. With gradient
    checkpointing it is asked again in backward, and must answer the same.
    """

    def unless_known(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not known():
                return forward(*args, **kwargs)
            return args[0] if args else kwargs["hidden_states"]

        return run

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (states(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": states(kwargs["hidden_states"])}

    own = [vars(layer).get("forward") for layer in below]  # set by others on this very module, if at all
    for layer in below:
        layer.forward = unless_known(layer.forward)
    hook = first.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        for layer, forward in zip(below, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
