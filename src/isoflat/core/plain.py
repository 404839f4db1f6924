"""Results as plain values that JSON can hold, and checks of values that were read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING, Any

from isoflat.core.errors import UsageError

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError


@cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    """Pydantic's adapter of a type, which is made once."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def first_fault(error: ValidationError) -> str:
    """The first fault that pydantic found in a value: where, and what is wrong there."""
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'result'}: {first['msg']}"


def plain(value: Any) -> Any:
    """A value as JSON can hold it: by its own `to_dict`, else dataclasses as their fields, enumerations as values, tuples as lists.

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


def json_numbers(value: Any, *names: str) -> dict[str, float | str | None]:
    """Attributes that are numbers; infinite ones, which JSON does not have, as text.

    >>> from isoflat.core.comparison import Ratio
    >>> json_numbers(Ratio(2.0, 1.0, math.inf), "value", "upper")
    {'value': 2.0, 'upper': 'inf'}
    """
    found = {name: getattr(value, name) for name in names}
    return {name: part if part is None or math.isfinite(part) else str(part) for name, part in found.items()}


def check_schema(data: Mapping[str, Any], what: str, schema: int, remedy: str = "measure again") -> None:
    """Refuse a result that was written with another JSON layout.

    Args:
        data: the result as it was read.
        what: its kind, in words.
        schema: version of the layout that is understood.
        remedy: advice where it is another.

    Raises:
        UsageError: it is another.
    """
    if data.get("schema") != schema:
        raise UsageError(f"expected a {what} of schema {schema}, got {data.get('schema')!r}; {remedy}")
