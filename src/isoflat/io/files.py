"""Files that are whole or not there, and locks that end with the process that holds them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from isoflat.core.errors import UsageError


def write(path: Path, content: str | bytes, *, alone: bool = False) -> None:
    """Write a file in one step that outlasts a crash: a reader sees the old content or the new, never a part.

    Args:
        path: where; its folder exists.
        content: all of it; text becomes UTF-8.
        alone: whether nobody else writes this path at the same time. What a killed process left behind, whose name begins
            with a dot, is then taken over; otherwise every call has a name of its own.

    Raises:
        OSError: the disk refuses; what was there is untouched.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(Path(folder) / "result.json", "{}")
    ...     (Path(folder) / "result.json").read_text(), len(list(Path(folder).iterdir()))
    ('{}', 1)
    """
    part = path.with_name(f".{path.name}.{'' if alone else f'{uuid4().hex[:12]}.'}part")
    try:
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    settle(path.parent)


def claim(path: Path | None, force: bool = False, option: str = "--out") -> None:
    """Refuse an output path that could not be written later, before anything is computed.

    Args:
        path: where the result will go; None for nowhere.
        force: whether an existing file may be replaced.
        option: name by which messages call the path.

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


def save(path: Path, content: str | bytes, force: bool = False, option: str = "--out") -> None:
    """Write a result, unless its path is taken.

    Args:
        path: where.
        content: all of it; text becomes UTF-8.
        force: whether an existing file may be replaced.
        option: name by which messages call the path.

    Raises:
        UsageError: the path was taken meanwhile, or the disk refuses; what was there is untouched.
    """
    claim(path, force, option)
    try:
        write(path, content)
    except OSError as error:
        raise UsageError(
            f"{option} {path} could not be written ({error.strerror}); nothing was changed there"
        ) from error


def make_folder(folder: Path) -> None:
    """Make the folder of an experiment before anything is computed.

    Raises:
        UsageError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be made ({error.strerror}): give the name of a folder") from error


def settle(folder: Path) -> None:
    """Wait until the names in a folder are on the disk: a later step must not outlast a crash that an earlier did not.

    Raises:
        OSError: the disk refuses.
    """
    if sys.platform == "win32":  # which opens no folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Hold an exclusive lock on a file, for as long as the block runs and no longer than this process lives.

    The file is never removed: who removes it while another opens it would let two in.

    Args:
        path: made if it is not there.
        wait: for others to let go; otherwise say at once that there are some.

    Yields:
        Whether the lock is held.

    Raises:
        UsageError: this system or this disk has no such locks, or the file cannot be made.
    """
    with as_usage_errors(path, "locking"):
        path.parent.mkdir(exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with as_usage_errors(path, "locking"):
            held = _lock(handle, wait)
        yield held
    finally:
        os.close(handle)  # and with it goes the lock


def check_locks() -> None:
    """Refuse a system on which two processes could not keep out of each other's way.

    Raises:
        UsageError: it is Windows.
    """
    if sys.platform == "win32":
        raise UsageError("a store of cells needs flock, which Windows does not have: run this under WSL")


@contextmanager
def as_usage_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn what the system refuses into one line.

    Raises:
        UsageError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{path}: {doing} failed ({error.strerror or error}); check that the disk can be written and has room"
        ) from error


def _lock(handle: int, wait: bool) -> bool:
    check_locks()
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
