"""Records side by side."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from isoflat.core import render
from isoflat.core.errors import UsageError
from isoflat.core.estimate import value_over_interval
from isoflat.core.plain import attributes
from isoflat.core.record import Record

if TYPE_CHECKING:
    from pandas import DataFrame  # pyrefly: ignore
    from rich.console import Group


@final
@dataclass(frozen=True)
class Omission:
    """A number that was asked for and could not be measured.

    Attributes:
        measure: catalogue name.
        geometry: name of the metric.
        reason: why, and what to do about it.
        label: the user's name of the network.
    """

    measure: str
    geometry: str
    reason: str
    label: str = ""

    def __str__(self) -> str:
        """Measure, geometry and reason in a line."""
        return f"{self.measure} ({self.geometry}): {self.reason}"


@final
@dataclass(frozen=True)
class Table(render.Printed):
    """One row per measured number; prints itself on a terminal and in a notebook.

    Attributes:
        rows: the measured numbers.
        omitted: numbers that were asked for and could not be measured.
    """

    rows: tuple[Record, ...]
    omitted: tuple[Omission, ...] = ()

    def __iter__(self) -> Iterator[Record]:
        """The rows."""
        return iter(self.rows)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, key: int | str | tuple[str, str]) -> Record:
        """A row by position, the first one of a measure by name, or the one of a measure in a geometry."""
        if isinstance(key, int):
            return self.rows[key]
        if isinstance(key, tuple):
            return next(row for row in self.rows if (row.measure, row.geometry) == key)
        return next(row for row in self.rows if row.measure == key)

    def __rich__(self) -> Group:
        """Draw the rows, and below them what was not measured."""
        from rich.console import Group

        from isoflat.core.fitted import FittedTable, literal

        heads = (
            "network",
            "measure",
            "geometry",
            "value and interval",
            "converged",
            "stationarity",
            "products, gradient passes",
        )
        unnamed = not any(row.label for row in self.rows)
        rows = [_cells(row)[unnamed:] for row in self.rows]
        notes = (literal(f"not measured: {part}", "yellow") for part in self.omitted)
        return Group(FittedTable(heads[unnamed:], rows, words=3 - unnamed), *notes)

    def only(self, asked: Collection[tuple[str, str]]) -> Table:
        """Rows and omissions of these measures in these geometries."""
        return Table(
            tuple(row for row in self.rows if (row.measure, row.geometry) in asked),
            tuple(part for part in self.omitted if (part.measure, part.geometry) in asked),
        )

    def flat(self) -> list[dict[str, Any]]:
        """One dictionary per row, without any nesting: the same names in every row but for settings and versions.

        Settings and versions are named `settings.seed` and `versions.torch`; numbers are floats, infinite ones too.
        """
        return [_flat(row) for row in self.rows]

    def to_pandas(self) -> DataFrame:
        """A data frame with a line per row and the columns of `flat`.

        Raises:
            UsageError: pandas is not installed.
        """
        try:
            import pandas  # pyrefly: ignore
        except ImportError as error:
            raise UsageError(f"data frames need pandas: pip install 'isoflat[pandas]' ({error})") from error
        return pandas.DataFrame(self.flat())

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return attributes(self)

    def to_json(self) -> str:
        """Strict JSON."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Table:
        """Inverse of `to_json`."""
        return Table.from_dict(json.loads(text))

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Table:
        """Inverse of `to_dict`."""
        omitted = data.get("omitted", ())  # none in tables from before there were any
        return Table(tuple(map(Record.from_dict, data["rows"])), tuple(Omission(**part) for part in omitted))


def _cells(row: Record) -> tuple[str, ...]:
    """The texts of one row."""
    estimate, ratio = row.estimate, row.stationarity_ratio
    return (
        row.label,
        row.measure,
        row.geometry,
        value_over_interval(estimate),
        "yes" if estimate.converged else "no",
        "–" if ratio is None else f"{ratio:.2g}",
        f"{estimate.cost.products}, {estimate.cost.gradient_passes:.1f}",
    )


def _flat(row: Record) -> dict[str, Any]:
    """Columns of one row of a data frame."""
    estimate = row.estimate
    return {
        **attributes(row, "label", "measure", "geometry"),
        **attributes(estimate, "value", "lower", "upper", "confidence", "converged", "residual", "standard_error"),
        "kind": str(estimate.kind),
        "notes": "; ".join(estimate.notes),
        **vars(estimate.cost),
        **vars(row.point),
        **attributes(row, "stationarity_ratio", "group", "group_hash", "model_hash", "data_hash"),
        **{f"settings.{name}": _cell(value) for name, value in row.settings.items()},
        **{f"versions.{name}": value for name, value in row.versions.items()},
    }


def _cell(value: Any) -> Any:
    """A setting as it is where it is a number or a text, and else as JSON."""
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value, sort_keys=True)
