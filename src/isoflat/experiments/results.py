"""Results that isoflat wrote to a folder, read with suspicion: a file that is damaged or foreign is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

from pydantic import ValidationError

from isoflat.core.comparison import Comparison
from isoflat.core.errors import DataError, IsoflatError, UsageError
from isoflat.core.plain import adapter, first_fault
from isoflat.core.record import Record
from isoflat.core.table import Omission
from isoflat.experiments.store import Artifact, Refused, Store
from isoflat.experiments.store.main import MARKER
from isoflat.io.strict import parse_json

LARGEST = 1 << 28
"""Largest number of bytes of a file of results."""

STORE = "store"
"""The folder in which experiments keep their cells."""

MALFORMED = (IsoflatError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""Errors that reading a result raises where its parts are not of the type they should be."""

_RECORD = {"schema", "measure", "geometry", "estimate", "point"}
_OMISSION = {"measure", "geometry", "reason", "label"}
_STUDIED = {"outcome", "sentences", "relations", "networks"}
_REPRODUCED = {"recipe", "data", "summaries", "networks"}


@final
@dataclass(frozen=True)
class StoredNumber:
    """A number that was read from a file.

    Attributes:
        record: record of the number.
        source: path of the file, as seen from the folder.
        place: position within the file, such as "line 3".
        cell: whether the file is a cell of a store.
    """

    record: Record
    source: str
    place: str = ""
    cell: bool = False

    @property
    def label(self) -> str:
        """Name of the network; the name of the file where the network has none."""
        return self.record.label or Path(self.source).stem


@final
@dataclass(frozen=True)
class StoredComparison:
    """A comparison that was read from a file.

    Attributes:
        comparison: the comparison.
        subject: names of what was compared, and how it was loaded.
        source: path of the file, as seen from the folder.
    """

    comparison: Comparison
    subject: Mapping[str, Any]
    source: str


@final
@dataclass(frozen=True)
class StoredReproduction:
    """A result of `isoflat reproduce` that was read.

    Attributes:
        content: the whole content of the file.
    """

    content: Mapping[str, Any]


@final
@dataclass(frozen=True)
class StoredStudy:
    """A result of `isoflat study` that was read; its numbers are in other files of the folder.

    Attributes:
        sentences: sentences that say what was found.
        left_out: networks that were left out, with reasons.
        source: path of the file, as seen from the folder.
        content: the whole content of the file.
    """

    sentences: tuple[str, ...]
    left_out: tuple[str, ...]
    source: str
    content: Mapping[str, Any]


Item = StoredNumber | StoredComparison | StoredReproduction | StoredStudy | Omission | Refused


@final
@dataclass(frozen=True)
class Results:
    """All results in a folder.

    Attributes:
        folder: the folder that was read.
        found: numbers, each once.
        comparisons: results of `isoflat compare`.
        reproduced: results of `isoflat reproduce`.
        studied: results of `isoflat study`.
        cells: cells of the store.
        omitted: numbers that could not be measured, with reasons.
        refused: files, or parts of them, that are damaged or foreign.
        files: files that were read.
    """

    folder: Path
    found: tuple[StoredNumber, ...]
    comparisons: tuple[StoredComparison, ...]
    reproduced: tuple[StoredReproduction, ...]
    studied: tuple[StoredStudy, ...]
    cells: tuple[Artifact, ...]
    omitted: tuple[Omission, ...]
    refused: tuple[Refused, ...]
    files: tuple[Path, ...]


def read_results(folder: Path) -> Results:
    """Read the results in a folder, and in the store that it is or has.

    Raises:
        UsageError: there is no such folder, or nothing in it can be read.
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


def read_results_file(path: Path) -> Results:
    """Read the results in one file.

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
        tuple(item for item in items if isinstance(item, StoredComparison)),
        tuple(item for item in items if isinstance(item, StoredReproduction)),
        tuple(item for item in items if isinstance(item, StoredStudy)),
        tuple(cells),
        tuple(dict.fromkeys(item for item in items if isinstance(item, Omission))),
        tuple(item for item in items if isinstance(item, Refused)),
        (*files, *(folder / found.source for found in items if isinstance(found, StoredNumber))),
    )


def _once(found: Iterable[StoredNumber]) -> tuple[StoredNumber, ...]:
    """Numbers, each once: those of a store are left out where another file has them, perhaps under another label."""
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
    """A text that is the same for equal records, however their settings are ordered."""
    return json.dumps(record.to_dict(), sort_keys=True)


def checked(record: Record) -> Record:
    """The record, after every part of it was checked.

    Raises:
        ValueError: a part is of the wrong type, or cannot be written as text.
    """
    sound = adapter(Record).validate_python(asdict(record))
    json.dumps(sound.to_dict(), allow_nan=False, ensure_ascii=False).encode()
    return sound


def why(error: BaseException) -> str:
    """Reason for refusing a result, in a few words."""
    if isinstance(error, ValidationError):
        return first_fault(error)
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
        content = parse_json(text)
    except (OSError, DataError, ValueError) as error:
        yield Refused(path, f"{path} is refused: {getattr(error, 'strerror', None) or error}")
        return
    if isinstance(content, dict) and content.keys() >= _REPRODUCED:
        yield StoredReproduction(content)
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
    """Read a file with a record in each line; only the first of its faults is named."""
    faults: list[str] = []
    lines = [(place, line) for place, line in enumerate(text.split(b"\n"), 1) if line.strip()]
    for place, line in lines:
        try:
            content = parse_json(line)
            yield StoredNumber(checked(Record.from_dict(content)), _name(path, folder), f"line {place}")
        except MALFORMED as error:
            faults.append(f"line {place} is refused: {why(error)}")
    if faults or not lines:
        more = f" ({len(faults)} of {len(lines)} lines are refused)" if len(faults) > 1 else ""
        yield Refused(path, f"{path}: {faults[0] if faults else 'it is empty'}{more}")


def _contest(content: Mapping[str, Any], path: Path, folder: Path) -> StoredComparison | Refused:
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
    return StoredComparison(found, subject if isinstance(subject, dict) else {}, _name(path, folder))


def _study(content: Mapping[str, Any], path: Path, folder: Path) -> StoredStudy | Refused:
    try:
        sentences = adapter(_Sentences).validate_python(content["sentences"])
        gone = [f"{part['label']}: {part['reason']}" for part in content.get("left_out", ())]
        json.dumps([sentences, gone], ensure_ascii=False).encode()
    except MALFORMED as error:
        return Refused(path, f"{path} is refused, as a study: {why(error)}")
    return StoredStudy(sentences, tuple(gone), _name(path, folder), content)


def _within(content: Any, path: Path, folder: Path) -> Iterator[StoredNumber | Omission | Refused]:
    """Find records and omissions anywhere in a value; nothing is looked for within a record."""
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
