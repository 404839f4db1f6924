"""Tables of numbers in text: a header, one row for each example, one column of targets."""

from __future__ import annotations

import csv
import itertools
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from isoflat.core.errors import DataError
from isoflat.core.render import enumerated, some
from isoflat.io.pairs import TARGETS
from isoflat.io.rows import Rows, check_room, evenly

_SEPARATORS = (",", ";", "\t")

_HEADER = "the first line must name the columns, and one of them y, target, label or class"

_WHOLE = re.compile(r"\s*[+-]?\d+\s*")


def read_csv(path: Path, split: str | None, examples: int | None) -> Rows:
    """Inputs and targets from a table in text.

    Args:
        path: path of the file: a header, then numbers; the column named y, target, label or class holds the targets, all
            others the inputs.
        split: name of the split, which such a file does not have; None.
        examples: number of examples to take; None for all.

    Returns:
        Inputs as float32; targets as class indices where all are whole numbers, else as float32.

    Raises:
        DataError: there is no such column, or a field is no number.
    """
    if split is not None:
        raise DataError(f"--split does not apply to {path}: name the file of that split")
    check_room(4 * path.stat().st_size, str(path))  # two characters or more become eight bytes
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            separator = max(_SEPARATORS, key=first.count)
            names = [name.strip() for name in next(csv.reader([first], delimiter=separator), [])]
            place = _place(names, path)
            start = file.tell()
            table = _read(file, separator, names, path)
            file.seek(start)
            written = _read(file, separator, names, path, dtype=np.str_, usecols=[place])[:, 0]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no table in plain text ({error}): save it as UTF-8 with commas") from error
    chosen, note = evenly(len(table), examples, str(path))
    inputs = torch.from_numpy(np.delete(table, place, axis=1).astype(np.float32))
    whole = all(map(_WHOLE.fullmatch, written.tolist()))
    targets = torch.from_numpy(table[:, place].astype(np.int64 if whole else np.float32))
    if note:
        inputs, targets = inputs[chosen], targets[chosen]
    what = f"{len(names) - 1} columns as float32 inputs, {names[place]!r} as targets"
    return Rows(inputs, targets, (what, *note))


def _place(names: Sequence[str], path: Path) -> int:
    """Place of the column of targets.

    Raises:
        DataError: the header does not tell.
    """
    if names and all(_is_number(name) for name in names):
        raise DataError(f"{path} has no header, so that nothing tells inputs from targets: {_HEADER}")
    if unnamed := [index for index, name in enumerate(names) if not name or name.startswith("Unnamed:")]:
        raise DataError(
            f"{path}: column {unnamed[0] + 1} has no name, and would count as an input: is it an index that pandas wrote? Save "
            "the table with index=False"
        )
    if twice := [name for name, group in itertools.groupby(sorted(names)) if len(list(group)) > 1]:
        raise DataError(f"{path}: two columns are named {twice[0]!r}: {_HEADER}")
    places = [index for index, name in enumerate(names) if name.lower() in TARGETS]
    if len(places) != 1:
        found = enumerated([names[index] for index in places]) or "none"
        raise DataError(f"{path}: of the columns {some(names)}, {found} could be the targets: {_HEADER}")
    if len(names) == 1:
        raise DataError(f"{path} has targets only: put the inputs into columns beside {names[0]!r}")
    return places[0]


def _read(file: TextIO, separator: str, names: Sequence[str], path: Path, **options: Any) -> np.ndarray:
    """The table below the header.

    Raises:
        DataError: a field is empty or no finite number, or rows differ in length.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty table is refused later, as data is everywhere
            table = np.loadtxt(file, delimiter=separator, comments=None, quotechar='"', ndmin=2, **options)
    except ValueError as error:
        raise DataError(
            f"{path}, below the header: {str(error).partition(';')[0].rstrip('.')}. Fill in what is missing, and write "
            "categories and classes as the numbers that the network was trained with"
        ) from error
    if not options and table.size and table.shape[1] != len(names):
        raise DataError(f"{path}: the header names {len(names)} columns, and the rows have {table.shape[1]}")
    if not options and not np.isfinite(table).all():
        row, column = np.argwhere(~np.isfinite(table))[0]
        raise DataError(f"{path}: {names[column]!r} is not finite in row {row + 1}: fill in what is missing")
    return table


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
