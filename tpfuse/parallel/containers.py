"""Tensors in what modules are given and give back: by themselves, or in tuples, lists, dicts, dataclasses, and others.

A container with a changed tensor is a new one of the same type; what holds none stays the very object it was.
"""

from __future__ import annotations

import copy
from collections import UserList, deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from torch import Tensor


def map_tensors(change: Callable[[Tensor], Tensor], value: Any, wanted: Callable[[Tensor], bool]) -> Any:
    """`value` with `change` applied to every wanted tensor in it. Objects of other types (caches, configurations) are
    left alone, and so is every container without a wanted tensor."""
    if isinstance(value, Tensor):
        return change(value) if wanted(value) else value
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if not any(wanted(tensor) for tensor in tensors_in(value)):
        return value
    if isinstance(value, tuple):
        items = [map_tensors(change, v, wanted) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if type(value) is list:
        return [map_tensors(change, v, wanted) for v in value]
    if type(value) is dict:
        return {k: map_tensors(change, v, wanted) for k, v in value.items()}
    return _with(value, {key: map_tensors(change, v, wanted) for key, v in _fields(value)})


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor that `map_tensors` would reach."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)
    else:
        for _, each in _fields(value):
            yield from tensors_in(each)


def _fields(value: Any) -> list[tuple[Any, Any]]:
    """What a container other than a tuple, a plain list and a plain dict holds, by key; nothing for other objects."""
    if hasattr(type(value), "__dataclass_fields__"):
        return [(name, getattr(value, name)) for name in type(value).__dataclass_fields__ if hasattr(value, name)]
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, (list, UserList, deque)):
        return list(enumerate(value))
    if type(value) is SimpleNamespace:
        return list(vars(value).items())
    return []


def _with(value: Any, new: dict[Any, Any]) -> Any:
    """A copy of a container with other contents under the same keys."""
    if type(value) is SimpleNamespace:
        return SimpleNamespace(**new)
    if type(value) is deque:
        return deque(list(new.values()), value.maxlen)
    copied = copy.copy(value)
    if hasattr(type(value), "__dataclass_fields__"):
        frozen = type(value).__dataclass_params__.frozen
        for name, each in new.items():
            # Hugging Face's outputs are dicts as well, and keep what is set in both.
            object.__setattr__(copied, name, each) if frozen else setattr(copied, name, each)
        return copied
    for key, each in new.items():
        copied[key] = each
    return copied
