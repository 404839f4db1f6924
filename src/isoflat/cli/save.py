"""Results on disk: whole or not at all, and never over something else."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from isoflat.core.errors import UsageError


def claim(path: Path | None, force: bool) -> None:
    """Refuse an output path that could not be written later, before anything is computed.

    Args:
        path: where the result will go; None for nowhere.
        force: whether an existing file may be replaced.

    Raises:
        UsageError: it exists, is no plain file, or its folder is missing or cannot be written.
    """
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"--out {path} is a folder: give a file name")
    if os.path.lexists(path) and not force:
        raise UsageError(f"--out {path} exists already: choose another name, or replace it with --force")
    if not path.parent.is_dir():
        raise UsageError(f"--out {path}: the folder {path.parent} does not exist; create it first")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"--out {path}: no permission to write in {path.parent}")


def save(path: Path, content: str | bytes, force: bool) -> None:
    """Write a file in one step: a reader sees the old content or the new, never a part.

    Args:
        path: where.
        content: all of it; text becomes UTF-8.
        force: whether an existing file may be replaced.

    Raises:
        UsageError: the path was taken meanwhile, or the disk refuses; what was there is untouched.
    """
    claim(path, force)
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".isoflat-", suffix=".part", delete=False) as file:
            temporary = Path(file.name)
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"--out {path} could not be written ({error.strerror}); nothing was changed there") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
