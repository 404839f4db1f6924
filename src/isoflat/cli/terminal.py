"""Printing to a terminal, with signs of life on standard error: names from files come out visible, never as commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console

from isoflat.core.fitted import literal
from isoflat.core.render import WIDTH, columns, visible


def console() -> Console:
    """A console on standard output, as wide as the terminal or as the variable COLUMNS says."""
    return Console(highlight=False, width=columns())


def say(screen: Console, text: object, style: str = "") -> None:
    """Print a sentence: wrapped at words where there is a width, in one line where a program may read it."""
    screen.print(literal(text, style), soft_wrap=screen.width >= WIDTH)


def entry(screen: Console, head: str, text: str, width: int, style: str = "dim") -> None:
    """Print a head in a column of this width and a text beside it, in one line where a program may read it."""
    screen.print(literal(f"{head:<{width}}", style) + literal(text), soft_wrap=screen.width >= WIDTH)


def write_json(content: Any) -> None:
    """Write strict JSON on standard output, in one line."""
    sys.stdout.write(f"{json.dumps(content, allow_nan=False)}\n")


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
    """Say at once which step begins; not on a terminal, where a bar says it.

    Args:
        text: the step that begins.
        hidden: True to say nothing.
    """
    if not hidden and not interactive():
        sys.stderr.write(f"{visible(text)}\n")
        sys.stderr.flush()
