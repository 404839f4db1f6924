"""Results that isoflat wrote to a folder, read with suspicion: each file on its own, anything else refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

from pydantic import ValidationError

from isoflat.core.comparison import Comparison
from isoflat.core.errors import DataError, IsoflatError, UsageError
from isoflat.core.plain import adapter
from isoflat.core.record import Record
from isoflat.core.table import Omission
from isoflat.experiments.store import Artifact, Refused, Store
from isoflat.experiments.store.main import MARKER
from isoflat.io.strict import parse

LARGEST = 1 << 28
"""Bytes that a file of results may take."""

STORE = "store"
"""The folder in which experiments keep their cells."""

MALFORMED = (IsoflatError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""What reading a result raises where its parts are not of the kind they should be."""

_RECORD = {"schema", "measure", "geometry", "estimate", "point"}
_OMISSION = {"measure", "geometry", "reason", "label"}
_STUDIED = {"outcome", "sentences", "relations", "networks"}
_REPRODUCED = {"recipe", "data", "summaries", "networks"}


@final
@dataclass(frozen=True)
class StoredNumber:
    """A number that was read.

    Attributes:
        record: the number.
        source: file that holds it, as seen from the folder.
        place: where in the file.
        cell: whether it is a cell of a store.
    """

    record: Record
    source: str
    place: str = ""
    cell: bool = False

    @property
    def label(self) -> str:
        """Name of its network; if it has none, the name of the file.

        A file of cells has a hash for a name, which is as good.
        """
        return self.record.label or Path(self.source).stem


@final
@dataclass(frozen=True)
class Contest:
    """A comparison that was read.

    Attributes:
        comparison: what it found.
        subject: what was compared.
        source: file that holds it.
    """

    comparison: Comparison
    subject: Mapping[str, Any]
    source: str


@final
@dataclass(frozen=True)
class Reproduced:
    """A result of `isoflat reproduce` that was read.

    Attributes:
        content: of the file.
        source: the file.
    """

    content: Mapping[str, Any]
    source: Path


@final
@dataclass(frozen=True)
class Studied:
    """A result of `isoflat study` that was read; its numbers are in other files of the folder.

    Attributes:
        sentences: what it said.
        left_out: networks that it did not use, with reasons.
        source: file that holds it.
        content: of the file.
    """

    sentences: tuple[str, ...]
    left_out: tuple[str, ...]
    source: str
    content: Mapping[str, Any]


Item = StoredNumber | Contest | Reproduced | Studied | Omission | Refused


@final
@dataclass(frozen=True)
class Results:
    """Everything that a folder holds.

    Attributes:
        folder: that was read.
        found: numbers, each once.
        contests: comparisons.
        reproduced: results of experiments.
        studied: results of studies.
        cells: of the store.
        omitted: numbers that are not there, with reasons.
        refused: files, or parts of them, that are damaged or foreign.
        files: that were read.
    """

    folder: Path
    found: tuple[StoredNumber, ...]
    contests: tuple[Contest, ...]
    reproduced: tuple[Reproduced, ...]
    studied: tuple[Studied, ...]
    cells: tuple[Artifact, ...]
    omitted: tuple[Omission, ...]
    refused: tuple[Refused, ...]
    files: tuple[Path, ...]


def read(folder: Path) -> Results:
    """Results in a folder, and in the store that it is or has.

    Raises:
        UsageError: it is no folder, or nothing in it can be read.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder: name one that isoflat demo, reproduce or study has written")
    try:
        files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".jsonl")]
    except OSError as error:
        raise UsageError(f"{folder} cannot be read ({error.strerror or error}): check its permissions") from error
    files = [path for path in files if path.name != MARKER and not path.name.startswith(".")]
    items: list[Item] = [item for path in files for item in _file(path, folder)]
    cells: list[Artifact] = []
    for place in (folder, folder / STORE):
        if place.is_dir() and (place == folder) <= (place / MARKER).exists():
            more, refused = _store(place)
            cells += more
            items += refused
            items += [item for cell in more for item in _cell(cell, place, folder)]
    return _results(folder, items, cells, files)


def read_file(path: Path) -> Results:
    """Results in one file.

    Raises:
        UsageError: there is no such file.
    """
    if not path.is_file():
        raise UsageError(f"{path} is no file: name a result of isoflat measure, compare, reproduce or study")
    return _results(path.parent, list(_file(path, path.parent)), [], [path])


def _results(folder: Path, items: Sequence[Item], cells: Sequence[Artifact], files: Sequence[Path]) -> Results:
    return Results(
        folder,
        _once(item for item in items if isinstance(item, StoredNumber)),
        tuple(item for item in items if isinstance(item, Contest)),
        tuple(item for item in items if isinstance(item, Reproduced)),
        tuple(item for item in items if isinstance(item, Studied)),
        tuple(cells),
        tuple(dict.fromkeys(item for item in items if isinstance(item, Omission))),
        tuple(item for item in items if isinstance(item, Refused)),
        (*files, *(folder / found.source for found in items if isinstance(found, StoredNumber))),
    )


def _once(found: Iterable[StoredNumber]) -> tuple[StoredNumber, ...]:
    """Numbers without those that another file has told before; in a store they may have another label."""
    first: dict[str, StoredNumber] = {}
    told: set[str] = set()
    for number in found:
        bare = identity(replace(number.record, label=""))
        if not number.cell or bare not in told:
            first.setdefault(identity(number.record), number)
        if not number.cell:
            told.add(bare)
    return tuple(first.values())


def identity(record: Record) -> str:
    """The same for the same record, however its settings are ordered."""
    return json.dumps(record.to_dict(), sort_keys=True)


def checked(record: Record) -> Record:
    """The record, every part of which is of its kind, and which can be written as text.

    Raises:
        ValueError: one is not.
    """
    sound = adapter(Record).validate_python(asdict(record))
    json.dumps(sound.to_dict(), allow_nan=False, ensure_ascii=False).encode()
    return sound


def why(error: BaseException) -> str:
    """Reason for refusing a result, in a few words."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'result'}: {first['msg']}"
    return f"{error} is missing" if isinstance(error, KeyError) else f"{error}" or type(error).__name__


_Sentences = tuple[str, ...]


def _store(place: Path) -> tuple[tuple[Artifact, ...], tuple[Refused, ...]]:
    if not (place / MARKER).exists():  # opening it would make it a store
        return (), (Refused(place, f"{place} is no store: {MARKER} is not in it; move it away"),)
    try:
        return Store.open(place).cells()
    except (UsageError, OSError) as error:
        return (), (Refused(place, f"{place}: {error}"),)


def _cell(cell: Artifact, place: Path, folder: Path) -> Iterator[Item]:
    path = place / "cells" / f"{cell.address}.json"
    for item in _within(cell.result, path, folder):
        yield replace(item, cell=True) if isinstance(item, StoredNumber) else item


def _file(path: Path, folder: Path) -> Iterator[Item]:
    try:
        text = _content(path)
        if path.suffix == ".jsonl":
            yield from _lines(text, path, folder)
            return
        content = parse(text)
    except (OSError, DataError, ValueError) as error:
        yield Refused(path, f"{path} is refused: {getattr(error, 'strerror', None) or error}")
        return
    if isinstance(content, dict) and content.keys() >= _REPRODUCED:
        yield Reproduced(content, path)
    elif isinstance(content, dict) and content.keys() >= _STUDIED:
        yield _study(content, path, folder)
        yield from _within(content, path, folder)
    elif isinstance(content, dict) and "differences" in content:
        yield _contest(content, path, folder)
    else:
        items = list(_within(content, path, folder))
        yield from items or [Refused(path, f"{path} is refused: no number in it was written by isoflat")]


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise DataError("it is no plain file")
    if path.stat().st_size > LARGEST:
        raise DataError(f"it takes more than {LARGEST} bytes")
    return path.read_bytes()


def _lines(text: bytes, path: Path, folder: Path) -> Iterator[Item]:
    """Read a file with a record in each line; of its faults, the first is told."""
    faults: list[str] = []
    lines = [(place, line) for place, line in enumerate(text.split(b"\n"), 1) if line.strip()]
    for place, line in lines:
        try:
            content = parse(line)
            yield StoredNumber(checked(Record.from_dict(content)), _name(path, folder), f"line {place}")
        except MALFORMED as error:
            faults.append(f"line {place} is refused: {why(error)}")
    if faults or not lines:
        more = f" ({len(faults)} of {len(lines)} lines are refused)" if len(faults) > 1 else ""
        yield Refused(path, f"{path}: {faults[0] if faults else 'it is empty'}{more}")


def _contest(content: Mapping[str, Any], path: Path, folder: Path) -> Contest | Refused:
    try:
        found = adapter(Comparison).validate_python(asdict(Comparison.from_dict(content)))
        rows = tuple(checked(row) for row in found.rows)
        json.dumps([found.sentences, content.get("subject")], ensure_ascii=False).encode()  # and every pair is there
        known = {(label, number) for label in found.networks for number in found.numbers}
        if {(row.label, (row.measure, row.geometry)) for row in rows} != known:
            raise UsageError("not every network has every number")
    except MALFORMED as error:
        return Refused(path, f"{path} is refused, as a comparison: {why(error)}")
    subject = content.get("subject")
    return Contest(found, subject if isinstance(subject, dict) else {}, _name(path, folder))


def _study(content: Mapping[str, Any], path: Path, folder: Path) -> Studied | Refused:
    try:
        sentences = adapter(_Sentences).validate_python(content["sentences"])
        gone = [f"{part['label']}: {part['reason']}" for part in content.get("left_out", ())]
        json.dumps([sentences, gone], ensure_ascii=False).encode()
    except MALFORMED as error:
        return Refused(path, f"{path} is refused, as a study: {why(error)}")
    return Studied(sentences, tuple(gone), _name(path, folder), content)


def _within(content: Any, path: Path, folder: Path) -> Iterator[StoredNumber | Omission | Refused]:
    """Records and omissions anywhere in a value; what lies in them is theirs."""
    left: list[tuple[str, Any]] = [("", content)]
    while left:
        place, value = left.pop()
        if isinstance(value, dict) and value.keys() >= _RECORD:
            try:
                yield StoredNumber(checked(Record.from_dict(value)), _name(path, folder), place)
            except MALFORMED as error:
                yield Refused(path, f"{path}: {place or 'its number'} is refused: {why(error)}")
        elif isinstance(value, dict) and value.keys() == _OMISSION and all(isinstance(v, str) for v in value.values()):
            yield Omission(**value)
        elif isinstance(value, (dict, list)):
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            parts = [(f"{place}.{key}".strip("."), part) for key, part in inner if isinstance(part, (dict, list))]
            left += reversed(parts)


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
