"""Text from files and models, as people can read it."""

from __future__ import annotations

import unicodedata

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


def some(names: object, limit: int = 4) -> str:
    """How many names there are, and the first few, each cut to a readable length.

    >>> some(["a", "b", "c"], limit=2)
    '3 (a, b, ...)'
    """
    listed = [str(name) for name in names]  # pyrefly: ignore
    short = [name if len(name) <= 80 else f"{name[:77]}..." for name in listed[:limit]]
    return f"{len(listed)} ({', '.join(short)}{', ...' if len(listed) > limit else ''})"
