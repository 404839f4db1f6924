"""What is written to a terminal: names from files and models come out visible, never as commands to it."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

WIDTH = 160
"""Columns where the output is no terminal, so that a table in a log keeps its rows."""

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


def plain(text: object, style: str = "") -> Text:
    """Visible text for a rich console, never read as markup."""
    return Text(visible(text), style=style)


def console() -> Console:
    """Where results are printed: standard output."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=WIDTH)


def facts(rows: Iterable[tuple[str, object]]) -> Grid:
    """Names and values in two columns."""
    grid = Grid.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(plain(name), plain(value))
    return grid


def complain(text: str, prefix: str = "error") -> None:
    """One line on standard error."""
    sys.stderr.write(f"{prefix}: {visible(text)}\n")


def some(names: object, limit: int = 4) -> str:
    """How many names there are, and the first few, each cut to a readable length.

    >>> some(["a", "b", "c"], limit=2)
    '3 (a, b, ...)'
    """
    listed = [str(name) for name in names]  # pyrefly: ignore
    short = [name if len(name) <= 80 else f"{name[:77]}..." for name in listed[:limit]]
    return f"{len(listed)} ({', '.join(short)}{', ...' if len(listed) > limit else ''})"
