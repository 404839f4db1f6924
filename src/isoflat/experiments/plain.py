"""Dataclasses as plain values that JSON can hold, and back again with every part of its kind."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import TypeAdapter


@cache
def kinds(of: Any) -> TypeAdapter[Any]:
    """The adapter of a type, made once."""
    return TypeAdapter(of)


def plain(value: Any) -> dict[str, Any]:
    """Fields of a dataclass by name: enumerations as their values, tuples as lists.

    >>> from isoflat.core.table import Omission
    >>> plain(Omission("tic", "auto", "no classes", "small"))
    {'measure': 'tic', 'geometry': 'auto', 'reason': 'no classes', 'label': 'small'}
    """
    # Whole numbers stand where fractions are declared, and stay whole: pydantic would warn of each.
    return kinds(type(value)).dump_python(value, mode="json", warnings=False)
