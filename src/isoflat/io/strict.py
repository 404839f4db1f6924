"""Strict JSON: a value is always written as the same text, and is read back as it was."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from isoflat.core.errors import UsageError

DIGITS = 24
"""Number of hexadecimal digits of an address: 96 bits, so that no two cells share one by chance."""

_ADDRESS = re.compile(f"[0-9a-f]{{{DIGITS}}}")


def address(settings: Mapping[str, Any]) -> str:
    """Address of a cell with these settings: the first 24 hex digits of the SHA-256 of their strict JSON.

    Args:
        settings: everything that decides the result, the hash of the data and the versions included.

    Raises:
        UsageError: JSON cannot hold the settings as they are.

    >>> address({"seed": 0, "width": 16}) == address({"width": 16, "seed": 0})
    True
    >>> address({"seed": 0.0})
    'e6731c04ce97f94cbce8e570'
    """
    return short_hash(canonical_json(settings, "settings"))


def is_address(name: str) -> bool:
    """Tell whether a name is an address, which has no dots and no slashes.

    >>> is_address("../../etc/passwd")
    False
    """
    return _ADDRESS.fullmatch(name) is not None


def canonical_json(value: Any, what: str) -> str:
    """A value as a line of ASCII JSON: names in order, no spaces, floats so that they return bit for bit.

    Args:
        value: mappings with text as names, sequences, text, numbers, truth values and None.
        what: name of the value, for messages.

    Raises:
        UsageError: there is something else in the value, such as NaN or a tensor.

    >>> canonical_json({"b": (0.1, None), "a": True}, "settings")
    '{"a":true,"b":[0.1,null]}'
    """
    try:
        return json.dumps(_plain(value, what), allow_nan=False, sort_keys=True, separators=(",", ":"))
    except RecursionError:
        raise UsageError(f"{what}: too deeply nested, or part of itself; a store holds plain JSON") from None


def short_hash(text: str) -> str:
    """The first 24 hex digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def parse_json(text: bytes) -> Any:
    """A value from strict JSON.

    Raises:
        ValueError: the text is damaged, or holds NaN, infinity, or a name that appears twice.
    """
    try:
        return json.loads(text.decode(), parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("too deeply nested") from None


def flattened(value: Any, name: str) -> dict[str, Any]:
    """Unfold mappings within mappings into one with dotted names; a name with a dot of its own is quoted.

    >>> flattened({"net": {"width": 16, "0.bias": True}, "seeds": [1, 2]}, "settings")
    {'settings.net.width': 16, 'settings.net."0.bias"': True, 'settings.seeds': [1, 2]}
    """
    if not isinstance(value, Mapping):
        return {name: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flattened(inner, f"{name}.{json.dumps(key) if '.' in key else key}")
    return found


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{where} is {value}: a store holds finite numbers only; leave it out, or write None")
    if isinstance(value, int) and abs(value) >= 1 << 64:
        raise UsageError(f"{where} is an integer beyond 64 bits: write it as text")
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, Mapping):
        if other := [key for key in value if not isinstance(key, str)]:
            raise UsageError(f"{where}: names must be text, got {other[0]!r}: write str({other[0]!r})")
        return {key: _plain(inner, f"{where}.{key}") for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, f"{where}[{place}]") for place, inner in enumerate(value)]
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise UsageError(f"{where} is a {kind}: a store holds text, numbers, truth values, None, lists and mappings only")


def _no_number(token: str) -> float:
    raise ValueError(f"{token} is no number in JSON")


def _finite(token: str) -> float:
    value = float(token)
    if not math.isfinite(value):
        raise ValueError(f"{token} is beyond what a number can hold")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name appears twice")
    return found
