"""Files that are whole or not there, and locks that end with the process that holds them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from isoflat.core.errors import UsageError


def replace(path: Path, content: bytes) -> None:
    """Write a file in one step that outlasts a crash: a reader sees the old content or the new, never a part.

    What a killed process leaves behind begins with a dot, and the next that writes here takes it over: one at a time.

    Raises:
        OSError: the disk refuses; what was there is untouched.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    settle(path.parent)


def settle(folder: Path) -> None:
    """Wait until the names in a folder are on the disk: a later step must not outlast a crash that an earlier did not.

    Raises:
        OSError: the disk refuses.
    """
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
    with told(path, "locking"):
        path.parent.mkdir(exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with told(path, "locking"):
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
def told(path: Path, doing: str) -> Iterator[None]:
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
