"""Results on disk: whole or not at all, and never over something else."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from isoflat.cli.terminal import console
from isoflat.core.errors import UsageError


def claim(path: Path | None, force: bool, option: str = "--out") -> None:
    """Refuse an output path that could not be written later, before anything is computed.

    Args:
        path: where the result will go; None for nowhere.
        force: whether an existing file may be replaced.
        option: that named it.

    Raises:
        UsageError: it exists, is no plain file, or its folder is missing or cannot be written.
    """
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder: give a file name")
    if os.path.lexists(path) and not force:
        raise UsageError(f"{option} {path} exists already: choose another name, or replace it with --force")
    if not path.parent.is_dir():
        raise UsageError(f"{option} {path}: the folder {path.parent} does not exist; create it first")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{option} {path}: no permission to write in {path.parent}")


def save(path: Path, content: str | bytes, force: bool, option: str = "--out") -> None:
    """Write a file in one step: a reader sees the old content or the new, never a part.

    Args:
        path: where.
        content: all of it; text becomes UTF-8.
        force: whether an existing file may be replaced.
        option: that named the path.

    Raises:
        UsageError: the path was taken meanwhile, or the disk refuses; what was there is untouched.
    """
    claim(path, force, option)
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".isoflat-", suffix=".part", delete=False) as file:
            temporary = Path(file.name)
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_masked())  # as any file of the user's, and not for the owner alone
        temporary.replace(path)
    except OSError as error:
        raise UsageError(
            f"{option} {path} could not be written ({error.strerror}); nothing was changed there"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _masked() -> int:
    """Permissions that this process leaves out of new files."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


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
