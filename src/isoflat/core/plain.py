"""Results as plain values that JSON can hold, and checks of values that were read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError


@cache
def kinds(of: Any) -> TypeAdapter[Any]:
    """The adapter of a type, made once."""
    from pydantic import TypeAdapter

    return TypeAdapter(of)


def first_fault(error: ValidationError) -> str:
    """The first fault that pydantic found in a value: where, and what is wrong there."""
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'result'}: {first['msg']}"


def plain(value: Any) -> Any:
    """Fields of a dataclass by name, enumerations as their values, tuples as lists; what has a `to_dict` is written by it.

    >>> from isoflat.core.table import Omission
    >>> plain({"left out": (Omission("tic", "auto", "no classes", "small"),)})
    {'left out': [{'measure': 'tic', 'geometry': 'auto', 'reason': 'no classes', 'label': 'small'}]}
    """
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if is_dataclass(value):
        return attributes(value)
    if isinstance(value, StrEnum):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, (tuple, list)) else value


def attributes(value: Any, *names: str) -> dict[str, Any]:
    """Attributes of these names, in this order, as `plain` values; all fields of a dataclass where none is named."""
    return {name: plain(getattr(value, name)) for name in names or (part.name for part in fields(value))}


def numbers(value: Any, *names: str) -> dict[str, float | str | None]:
    """Attributes that may be infinite, which JSON has no number for: as text there.

    >>> from isoflat.core.comparison import Ratio
    >>> numbers(Ratio(2.0, 1.0, math.inf), "value", "upper")
    {'value': 2.0, 'upper': 'inf'}
    """
    found = {name: getattr(value, name) for name in names}
    return {name: part if part is None or math.isfinite(part) else str(part) for name, part in found.items()}
