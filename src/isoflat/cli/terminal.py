"""Printing to a terminal, with signs of life on standard error: names from files come out visible, never as commands."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console

from isoflat.core.fitted import literal
from isoflat.core.render import WIDTH, columns, visible


def console() -> Console:
    """A console on standard output, as wide as the terminal or as the variable COLUMNS says."""
    return Console(highlight=False, width=columns())


def say(screen: Console, text: object, style: str = "") -> None:
    """Print a sentence: wrapped at words where there is a width, in one line where a program may read it."""
    screen.print(literal(text, style), soft_wrap=screen.width >= WIDTH)


def notes(screen: Console, texts: Iterable[str]) -> None:
    """Print what a reader must know, each text once."""
    for text in dict.fromkeys(texts):
        say(screen, f"note: {text}", "yellow")


def complain(text: str, prefix: str = "error") -> None:
    """Write one line on standard error."""
    sys.stderr.write(f"{prefix}: {visible(text)}\n")


def interactive() -> bool:
    """True where standard error is a terminal, which can show a moving bar."""
    return sys.stderr.isatty()


def step(text: str, hidden: bool = False) -> None:
    """Say what is done now; at once, and not on a terminal, where a bar says it.

    Args:
        text: what is done.
        hidden: say nothing.
    """
    if not hidden and not interactive():
        sys.stderr.write(f"{visible(text)}\n")
        sys.stderr.flush()
