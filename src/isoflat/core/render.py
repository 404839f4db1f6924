"""Text for people: lists of names cut short, and characters that a terminal would obey spelled out."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories that move the cursor, change the direction of writing, or show nothing."""


def visible(text: object) -> str:
    r"""The text with control characters, escape sequences and marks of writing direction spelled out.

    >>> visible("layer\x1b[31m.weight\u202e\n")
    'layer\\x1b[31m.weight\\u202e\\n'
    """
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _UNSEEN else char for char in str(text)
    )


def some(names: Iterable[object], most: int = 6) -> str:
    """A few names, each cut to a readable length, and how many more.

    >>> some(["b", "a", "c"], most=2)
    'a, b and 1 more'
    """
    listed = sorted(map(str, names))
    short = [name if len(name) <= 80 else f"{name[:77]}..." for name in listed[:most]]
    return ", ".join(short) + (f" and {len(listed) - most} more" if len(listed) > most else "")
