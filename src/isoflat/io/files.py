"""Files that are written whole or not at all, and locks that end with the process that holds them."""

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
        path: path of the file; its folder exists.
        content: content of the file; text becomes UTF-8.
        alone: whether no other process writes this path at the same time. The temporary file, whose name begins with a
            dot, then has the same name at each call, so that none is left over by killed processes.

    Raises:
        OSError: the disk refuses; a file that was there is untouched.

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
        path: path of the result; None for none.
        force: whether an existing file may be replaced.
        option: name of the path in messages.

    Raises:
        UsageError: the path exists, is no plain file, or its folder is missing or cannot be written.
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
        path: path of the result.
        content: content of the file; text becomes UTF-8.
        force: whether an existing file may be replaced.
        option: name of the path in messages.

    Raises:
        UsageError: the path was taken meanwhile, or the disk refuses; a file that was there is untouched.
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
        UsageError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be made ({error.strerror}): give the name of a folder") from error


def settle(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, so that a crash cannot undo an earlier step and keep a later one.

    Raises:
        OSError: the disk refuses.
    """
    if sys.platform == "win32":  # folders cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Hold an exclusive lock on a file, for as long as the block runs and no longer than this process lives.

    The file is never removed: removing it while another process opens it would let both in.

    Args:
        path: path of the file; made if it is not there.
        wait: whether to wait until no other process holds the lock; otherwise it is tried once.

    Yields:
        True if this process holds the lock.

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
        os.close(handle)  # which releases the lock


def check_locks() -> None:
    """Refuse a system on which two processes could not keep out of each other's way.

    Raises:
        UsageError: the system is Windows.
    """
    if sys.platform == "win32":
        raise UsageError("a store of cells needs flock, which Windows does not have: run this under WSL")


@contextmanager
def as_usage_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn an OSError of the block into a UsageError that says what to do.

    Args:
        path: path that is worked on, for the message.
        doing: name of the work, for the message: "writing a cell".

    Raises:
        UsageError: the system refuses.
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
