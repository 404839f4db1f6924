"""Signs of life on standard error where it is a file or a pipe; on a terminal bars tell."""

from __future__ import annotations

import sys

from isoflat.core.render import visible


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
