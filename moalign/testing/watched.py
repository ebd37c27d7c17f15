"""What a plugin must leave as it is: the copies that it is handed, and whether they are the same afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from typing import Any


def copied(value: Any) -> Any:
    """A tensor, or tensors in frozen data and mappings, with memory of their own, the graph kept; plain data too."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.clone()
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: copied(getattr(value, each.name)) for each in fields(value)})
    if isinstance(value, Mapping):
        return {name: copied(each) for name, each in value.items()}
    return deepcopy(value)


def unchanged(before: Any, after: Any) -> bool:
    """To the last bit; NaN is the same as NaN."""
    import torch

    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        alike = before.shape == after.shape and before.dtype == after.dtype
        return alike and bool(torch.isclose(before, after, rtol=0, atol=0, equal_nan=True).all())
    if is_dataclass(before):
        return type(before) is type(after) and not changed_fields(before, after)
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        return before.keys() == after.keys() and all(unchanged(each, after[name]) for name, each in before.items())
    return type(before) is type(after) and bool(before == after)


def changed_fields(before: Any, after: Any) -> list[str]:
    """Names of the fields of two batches or the like that differ."""
    names = [each.name for each in fields(before)]
    return [name for name in names if not unchanged(getattr(before, name), getattr(after, name))]
