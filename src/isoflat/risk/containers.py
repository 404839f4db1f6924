"""Batches that are objects: packed sequences, dataclasses, graphs, and whatever else holds tensors as attributes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

DEPTH = 3
"""Objects within objects that are looked into."""

_CLOSED = (str, bytes, int, float, complex, type, FunctionType, MethodType, ModuleType, nn.Module, torch.Generator)
"""Kinds of objects whose attributes are no part of a batch."""


def held(value: Any) -> Iterator[Any]:
    """Parts of an object that may hold tensors; nothing for an object that holds none.

    >>> from types import SimpleNamespace
    >>> list(held(SimpleNamespace(x=torch.zeros(2), name="a")))
    [tensor([0., 0.]), 'a']
    """
    if _has_tensors(value):
        yield from _attributes(value).values()


def is_object(value: Any) -> bool:
    """Test of whether a batch, or a part of one, is an object with tensors in it, whose rows nobody knows."""
    return isinstance(value, PackedSequence) or (not is_dataclass(value) and _has_tensors(value))


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same kind of object with changed parts; the object itself is left alone, and returned where it holds no tensors.

    Args:
        value: object.
        change: function of each part; what it returns takes the part's place.

    >>> from types import SimpleNamespace
    >>> batch = SimpleNamespace(x=torch.zeros(1))
    >>> mapped(batch, lambda part: part + 1).x, batch.x
    (tensor([1.]), tensor([0.]))
    """
    if isinstance(value, PackedSequence):  # the sizes of its steps stay on the host
        data, sizes, *orders = value
        return PackedSequence(change(data), sizes, *(None if order is None else change(order) for order in orders))
    if not _has_tensors(value):
        return value
    made = copy.copy(value)
    if _keeps_books(value):
        return made.apply(change)
    for name, part in _attributes(value).items():
        object.__setattr__(made, name, change(part))  # of frozen dataclasses too
    return made


def zipped(values: Sequence[Any], join: Callable[[list[Any]], Any]) -> Any:
    """A dataclass whose parts are joined from those of several; the first of anything else.

    Args:
        values: objects of one kind.
        join: function of the parts of all of them that have one name.
    """
    first = values[0]
    if not is_dataclass(first) or not _has_tensors(first):
        return first
    made = copy.copy(first)
    for name in _attributes(first):
        object.__setattr__(made, name, join([getattr(value, name) for value in values]))
    return made


def _keeps_books(value: Any) -> bool:
    """Test of whether an object changes its tensors by itself, as graphs of torch_geometric do."""
    return all(callable(getattr(value, name, None)) for name in ("to", "apply", "to_dict"))


def _attributes(value: Any) -> dict[str, Any]:
    """Parts of an object by name."""
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return dict(value.to_dict() if _keeps_books(value) else vars(value))


def _has_tensors(value: Any, depth: int = DEPTH) -> bool:
    """Test of whether an object, not a container of Python's own, holds tensors."""
    if isinstance(value, _CLOSED) or value is None or not (hasattr(value, "__dict__") or is_dataclass(value)):
        return False
    return any(_is_tensor_or_holds(part, depth) for part in _attributes(value).values())


def _is_tensor_or_holds(part: Any, depth: int) -> bool:
    if isinstance(part, Tensor | np.ndarray | PackedSequence):
        return True
    if isinstance(part, dict):
        return any(_is_tensor_or_holds(value, depth) for value in part.values())
    if isinstance(part, list | tuple):
        return any(_is_tensor_or_holds(value, depth) for value in part)
    return depth > 1 and _has_tensors(part, depth - 1)
