"""Losses that reach for the model by themselves, turned towards a copy of it.

A loss may call the user's model by a name of its own surroundings, or add a penalty on its weights. Evaluated on a copy, it
must read the copy. Functions keep their code; what they close over, and the global names they use, are replaced where they
are parts of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T")

DEPTH = 6
"""Levels of functions, containers and objects that are looked through."""

_OTHERS = ("torch", "numpy", "builtins", "isoflat")
"""Packages whose functions and objects know nothing of the user's by name."""


def rebound(value: T, memo: Mapping[int, Any]) -> T:
    """The value with copies in the place of what was copied; itself where it reaches for nothing of that.

    Args:
        value: a loss, a function, a container, an object.
        memo: copies by `id` of the originals, as `copy.deepcopy` leaves them.

    >>> net = nn.Linear(1, 1)
    >>> memo: dict[int, Any] = {}
    >>> twin = copy.deepcopy(net, memo)
    >>> rebound([net], memo)[0] is twin
    True
    """
    return _Turning(memo).turned(value, DEPTH)


class _Turning:
    def __init__(self, memo: Mapping[int, Any]) -> None:
        self.memo = memo
        self.under_way: set[int] = set()

    def turned(self, value: Any, depth: int) -> Any:
        """The value, or what stands for it."""
        if isinstance(value, nn.Module | Tensor) and id(value) in self.memo:
            return self.memo[id(value)]
        if depth == 0 or id(value) in self.under_way:
            return value
        self.under_way.add(id(value))
        try:
            return self._inside(value, depth - 1)
        finally:
            self.under_way.discard(id(value))

    def _inside(self, value: Any, depth: int) -> Any:
        if isinstance(value, FunctionType):
            return self._function(value, depth)
        if isinstance(value, MethodType):
            owner = self.turned(value.__self__, depth)
            return value if owner is value.__self__ else MethodType(value.__func__, owner)
        if isinstance(value, partial):
            parts = self.turned((value.func, value.args, value.keywords), depth)
            return (
                partial(parts[0], *parts[1], **parts[2])
                if parts[0] is not value.func or self._differ((value.args, value.keywords), parts[1:])
                else value
            )
        if isinstance(value, list | tuple):
            made = [self.turned(item, depth) for item in value]
            if not self._differ(value, made):
                return value
            return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
        if isinstance(value, dict):
            made = {key: self.turned(item, depth) for key, item in value.items()}
            return made if self._differ(value.values(), made.values()) else value
        return self._object(value, depth)

    def _object(self, value: Any, depth: int) -> Any:
        if isinstance(value, type) or not hasattr(value, "__dict__"):
            return value
        if is_dataclass(value):
            held = {field.name: getattr(value, field.name) for field in fields(value)}
            made = {name: self.turned(item, depth) for name, item in held.items()}
            new = {name: item for name, item in made.items() if item is not held[name]}
            return replace(value, **new) if new else value
        if type(value).__module__.partition(".")[0] in _OTHERS and not isinstance(value, nn.Module):
            return value
        made = {name: self.turned(item, depth) for name, item in vars(value).items()}
        if not self._differ(vars(value).values(), made.values()):
            return value
        twin = copy.copy(value)
        twin.__dict__.update(made)
        return twin

    def _function(self, function: FunctionType, depth: int) -> FunctionType:
        cells = function.__closure__ or ()
        held = [_content(cell) for cell in cells]
        turned = [self.turned(item, depth) for item in held]
        defaults = self.turned(function.__defaults__, depth)
        named = self.turned(function.__kwdefaults__, depth)
        globals_ = function.__globals__
        changed = {}
        if (function.__module__ or "").partition(".")[0] not in _OTHERS:
            used = {name: globals_[name] for name in _names(function.__code__) if name in globals_}
            changed = {name: made for name, item in used.items() if (made := self.turned(item, depth)) is not item}
        same = not self._differ(held, turned) and defaults is function.__defaults__ and named is function.__kwdefaults__
        if same and not changed:
            return function
        closure = tuple(
            cell if old is new else CellType(new) for cell, old, new in zip(cells, held, turned, strict=True)
        )
        made = FunctionType(
            function.__code__, {**globals_, **changed} if changed else globals_, function.__name__, defaults, closure
        )
        made.__kwdefaults__ = named
        made.__dict__.update(vars(function))
        return made

    @staticmethod
    def _differ(old: Any, new: Any) -> bool:
        return any(before is not after for before, after in zip(old, new, strict=True))


def _content(cell: CellType) -> Any:
    """Content of a cell; None for one that is still empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _names(code: CodeType) -> Iterator[str]:
    """Names that code uses, and the code inside it."""
    yield from code.co_names
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _names(part)
