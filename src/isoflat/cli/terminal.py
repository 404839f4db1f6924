"""Printing to a terminal: names from files and models come out visible, never as commands to it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from isoflat.core.render import visible

WIDTH = 160
"""Columns where the output is no terminal and COLUMNS does not say, so that a table in a log keeps its rows."""


def plain(text: object, style: str = "") -> Text:
    """Visible text for a rich console, never read as markup."""
    return Text(visible(text), style=style)


def console() -> Console:
    """A console on standard output, as wide as the terminal or as the variable COLUMNS says."""
    found = Console(highlight=False)
    return found if found.is_terminal or "COLUMNS" in os.environ else Console(highlight=False, width=WIDTH)


def say(screen: Console, text: object, style: str = "") -> None:
    """Print a sentence: wrapped at words where there is a width, in one line where a program may read it."""
    screen.print(plain(text, style), soft_wrap=screen.width >= WIDTH)


def notes(screen: Console, texts: Iterable[str]) -> None:
    """Print what a reader must know, each text once."""
    for text in dict.fromkeys(texts):
        say(screen, f"note: {text}", "yellow")


def facts(rows: Iterable[tuple[str, object]]) -> Grid:
    """Names and values in two columns."""
    grid = Grid.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(plain(name), plain(value))
    return grid


def complain(text: str, prefix: str = "error") -> None:
    """Write one line on standard error."""
    sys.stderr.write(f"{prefix}: {visible(text)}\n")
