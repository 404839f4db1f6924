"""A result where it was asked for: printed, and written to files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from isoflat.cli.terminal import console
from isoflat.io.files import save


def deliver(
    content: dict[str, Any],
    show: Callable[[Console], None],
    as_json: bool,
    out: Path | None = None,
    force: bool = False,
    also: Callable[[], None] = lambda: None,
) -> None:
    """Write a result where it was asked for, and print it.

    Args:
        content: the result, as JSON.
        show: prints it for people.
        as_json: print the JSON instead.
        out: a file for the JSON; None for none.
        force: whether an existing file may be replaced.
        also: writes what else there is.

    Raises:
        UsageError: the disk refuses; the result has been printed all the same.
    """
    text = f"{json.dumps(content, allow_nan=False)}\n"
    try:
        if out is not None:
            save(out, text, force)
        also()
    finally:  # where the disk refuses, the numbers still reach the user
        if as_json:
            sys.stdout.write(text)
        else:
            show(console())
