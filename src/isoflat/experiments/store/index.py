"""An index of the settings of all cells in one SQLite file: quick to look up, and always replaceable.

A row is used only if its settings hash to its address and the cell's file has the size and the time that the row says.
All else is read from the cells again. SQLite's write-ahead log needs shared memory, which network disks do not have:
the default journal is used, and one process at a time.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from isoflat.core.errors import DataError
from isoflat.experiments.store.artifact import Artifact, read
from isoflat.io.strict import address, canonical_json, is_address, parse_json

VERSION = 1
"""Version of the table; an index of another version is made anew."""

PATIENCE = 10.0
"""Seconds to wait for another program that has the index open."""

_TABLE = """
CREATE TABLE IF NOT EXISTS cells (
    address TEXT PRIMARY KEY, written TEXT NOT NULL, label TEXT NOT NULL, settings TEXT NOT NULL,
    mtime_ns INTEGER NOT NULL, size INTEGER NOT NULL
)
"""

_IN_MEMORY = ":memory:"


def note(file: Path, cell: Artifact, path: Path) -> None:
    """Add a cell that has just been finished to the index.

    Where the index cannot take it, nothing is lost: the next look-up sees that it is behind.

    Args:
        file: path of the index.
        cell: cell as read from `path`.
        path: path of the cell's JSON file.
    """
    try:
        with _opened(file) as index:
            _insert(index, cell, path)
    except sqlite3.Error:
        return


def settings(file: Path | None, cells: Path) -> dict[str, dict[str, Any]]:
    """Settings of every readable cell, by its address; the index is brought up to date on the way.

    Args:
        file: path of the index; made anew where it is missing or damaged. None for none, as on a disk that is read-only.
        cells: folder of the cells.
    """
    if file is not None:
        for attempt in (_bring_up_to_date, _make_anew):
            try:
                return attempt(file, cells)
            except (sqlite3.Error, OSError):
                continue  # damaged, or the disk refuses: the cells themselves are still there
    return _bring_up_to_date(_IN_MEMORY, cells)


def _make_anew(file: Path, cells: Path) -> dict[str, dict[str, Any]]:
    file.with_name(f"{file.name}-journal").unlink(missing_ok=True)  # first: it would be applied to the new file
    file.unlink(missing_ok=True)
    return _bring_up_to_date(file, cells)


def _bring_up_to_date(file: Path | str, cells: Path) -> dict[str, dict[str, Any]]:
    with _opened(file) as index:
        known = {row[0]: row[1:] for row in index.execute("SELECT address, mtime_ns, size, settings FROM cells")}
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(cells.glob("*.json")):
            if not is_address(path.stem):
                continue
            there = path.stat()
            trusted = _trusted(path.stem, known.get(path.stem), (there.st_mtime_ns, there.st_size))
            if trusted is None:
                cell = readable(path)
                if cell is None:
                    continue
                _insert(index, cell, path)
                trusted = cell.settings
            found[path.stem] = trusted
        index.executemany("DELETE FROM cells WHERE address = ?", [(gone,) for gone in known.keys() - found.keys()])
        return found


def _trusted(name: str, row: tuple[Any, ...] | None, there: tuple[int, int]) -> dict[str, Any] | None:
    """Settings from a row of the index; None where the row does not fit the cell's file."""
    if row is None or row[:2] != there:
        return None
    try:
        settings = parse_json(row[2].encode())
        return settings if isinstance(settings, dict) and address(settings) == name else None
    except (ValueError, AttributeError):  # no JSON, or no text at all
        return None


def readable(path: Path) -> Artifact | None:
    """The cell in a file; None where there is no such file, or it is damaged."""
    try:
        return read(path)
    except DataError:
        return None  # `Store.cells` names it


def _insert(index: sqlite3.Connection, cell: Artifact, path: Path) -> None:
    there = path.stat()
    label = cell.settings.get("label", "")
    index.execute(
        "INSERT OR REPLACE INTO cells VALUES (?, ?, ?, ?, ?, ?)",
        (
            cell.address,
            datetime.fromtimestamp(there.st_mtime, UTC).isoformat(),
            label if isinstance(label, str) else canonical_json(label, "label"),
            canonical_json(cell.settings, "settings"),
            there.st_mtime_ns,
            there.st_size,
        ),
    )


@contextmanager
def _opened(file: Path | str) -> Iterator[sqlite3.Connection]:
    """An index with its table; what the block writes is committed as one.

    Raises:
        sqlite3.Error: it is damaged, of another version, or cannot be written.
    """
    with closing(sqlite3.connect(file, timeout=PATIENCE)) as index:
        index.execute("PRAGMA synchronous = OFF")  # a crash of the machine may damage it: it is then made anew
        with index:
            index.execute("BEGIN IMMEDIATE")
            (version,) = index.execute("PRAGMA user_version").fetchone()
            if version not in (0, VERSION):
                raise sqlite3.DatabaseError(f"index of version {version}")
            index.execute(_TABLE)
            index.execute(f"PRAGMA user_version = {VERSION}")
            yield index
