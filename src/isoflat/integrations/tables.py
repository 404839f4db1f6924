"""Flat rows for spreadsheets and data frames."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from isoflat.core.errors import UsageError

SETTINGS, RESULT = "settings.", "result."
"""What the names of a row begin with, as a store of cells writes them."""

EXACT = 1 << 53
"""Whole numbers up to here are the same as fractions of 64 bits."""


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    r"""One line per row, numbers in full; a column for every name in any row, in the order they first appear.

    Args:
        rows: text, numbers, truth values and None by name; where a row lacks a name its cell is empty.

    Raises:
        UsageError: a value is none of these.

    >>> to_csv([{"a": 1, "b": "=1+1"}, {"a": 0.1, "c": None}])
    "a,b,c\n1,'=1+1,\n0.1,,\n"
    """
    names = _names(rows)
    return "".join(_line(cells) for cells in (names, *([row.get(name) for name in names] for row in rows)))


def to_parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The same as a Parquet file; a column that mixes kinds, other than whole numbers and fractions, becomes text.

    Args:
        rows: text, numbers, truth values and None by name; where a row lacks a name its cell is null.

    Raises:
        UsageError: a value is none of these, or pyarrow is not installed.
    """
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UsageError(f"Parquet files need pyarrow: pip install 'isoflat[images]' ({error})") from error

    types = {bool: arrow.bool_(), int: arrow.int64(), float: arrow.float64(), str: arrow.string()}
    columns = {}
    for name in _names(rows):
        kind, values = _one_kind([row.get(name) for row in rows])
        columns[name] = arrow.array(values, types[kind])
    buffer = io.BytesIO()
    parquet.write_table(arrow.table(columns), buffer)
    return buffer.getvalue()


class Parts(NamedTuple):
    """A row as trackers of experiments want it.

    Attributes:
        name: for the run: the label among its settings, or its address.
        settings: what was asked for, by names without `settings.`.
        numbers: what came out, by names without `result.`.
        texts: what else is there, truth values included, by the names of the row; nothing that is None.
    """

    name: str
    settings: dict[str, Any]
    numbers: dict[str, float]
    texts: dict[str, str]


def parts(row: Mapping[str, Any]) -> Parts:
    """Settings, numbers and texts of a row.

    Raises:
        UsageError: a value is no text, number, truth value or None.

    >>> parts({"address": "0a", "settings.seed": 0, "result.loss": 0.5, "result.reached": True})
    Parts(name='0a', settings={'seed': 0}, numbers={'loss': 0.5}, texts={'address': '0a', 'result.reached': 'True'})
    """
    _names([row])
    settings = {name.removeprefix(SETTINGS): value for name, value in row.items() if name.startswith(SETTINGS)}
    others = {name: value for name, value in row.items() if not name.startswith(SETTINGS)}
    numbers = {name.removeprefix(RESULT): value for name, value in others.items() if _kind(value) in (int, float)}
    texts = {name: str(value) for name, value in others.items() if _kind(value) in (str, bool)}
    return Parts(str(settings.get("label") or row.get("address") or "row"), settings, numbers, texts)


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of all columns, in the order in which they first appear."""
    for row in rows:
        for name, value in row.items():
            if value is not None and _kind(value) is None:
                raise UsageError(
                    f"{name} is a {type(value).__name__}: a table holds text, numbers and truth values only"
                )
    return list(dict.fromkeys(name for row in rows for name in row))


def _kind(value: Any) -> type | None:
    """Truth values come first: to Python they are whole numbers."""
    return next((kind for kind in (bool, int, float, str) if isinstance(value, kind)), None)


def _one_kind(values: Sequence[Any]) -> tuple[type, list[Any]]:
    """Values of a column brought to one kind that loses nothing: their own, fractions, or text."""
    kinds = {_kind(value) for value in values if value is not None}
    whole = [value for value in values if _kind(value) is int]
    if kinds == {int} and all(-(1 << 63) <= value < 1 << 63 for value in whole):
        kind = int
    elif kinds == {int, float} and all(abs(value) <= EXACT for value in whole):
        kind = float
    else:
        kind = bool if kinds == {bool} else float if kinds == {float} else str
    return kind, [None if value is None else kind(value) for value in values]


def _line(values: Sequence[Any]) -> str:
    """A line of CSV. Before Python 3.13 a carriage return is quoted only if it is part of what ends a line."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\r\n").writerow([_cell(value) for value in values])
    return buffer.getvalue().removesuffix("\r\n") + "\n"


def _cell(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula is marked as text."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
