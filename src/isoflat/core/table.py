"""Records side by side."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

from rich.console import Console, Group
from rich.table import Table as Grid
from rich.text import Text

from isoflat.core.estimate import Estimate, Kind
from isoflat.core.record import Record


@final
@dataclass(frozen=True)
class Omission:
    """A number that is not there.

    Attributes:
        measure: catalogue name.
        geometry: name of the metric.
        reason: why, and what to do about it.
        label: what the user calls the network.
    """

    measure: str
    geometry: str
    reason: str
    label: str = ""

    def __str__(self) -> str:
        """A line."""
        return f"{self.measure} ({self.geometry}): {self.reason}"


@final
@dataclass(frozen=True)
class Table:
    """One row per measured number; prints itself on a terminal and in a notebook.

    Attributes:
        rows: what was measured.
        omitted: what was asked for and does not apply.
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
        """For `rich.print`."""
        return Group(self._grid(), *(Text(f"not measured: {part}", style="yellow") for part in self.omitted))

    def _grid(self) -> Grid:
        grid = Grid(title=None, header_style="bold")
        labelled = any(row.label for row in self.rows)
        columns = ["network"] * labelled + ["measure", "geometry", "value", "enclosure", "converged", "b/value"]
        for column in [*columns, "products", "gradient passes"]:
            grid.add_column(column, justify="left" if column in ("network", "measure", "geometry") else "right")
        for row in self.rows:
            cost = row.estimate.cost
            grid.add_row(
                *([row.label] * labelled),
                row.measure,
                row.geometry,
                str(row.estimate),
                interval(row.estimate),
                "yes" if row.estimate.converged else "no",
                "–" if row.stationarity_ratio is None else f"{row.stationarity_ratio:.2g}",
                str(cost.products),
                f"{cost.gradient_passes:.1f}",
            )
        return grid

    def __str__(self) -> str:
        """Plain text, as wide as it needs to be."""
        console = Console(width=160, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def _repr_html_(self) -> str:
        """For notebooks."""
        console = Console(width=160, record=True, file=io.StringIO())
        console.print(self)
        return console.export_html(inline_styles=True, code_format="<pre style='line-height:1.3'>{code}</pre>")

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {"rows": [row.to_dict() for row in self.rows], "omitted": [dict(vars(part)) for part in self.omitted]}

    def to_json(self) -> str:
        """Strict JSON."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Table:
        """Inverse of `to_json`."""
        content = json.loads(text)
        omitted = tuple(
            Omission(**part) for part in content.get("omitted", ())
        )  # none in tables from before there were any
        return Table(tuple(Record.from_dict(row) for row in content["rows"]), omitted)


def interval(estimate: Estimate) -> str:
    """An interval in brackets, with the digits that tell its ends apart.

    >>> interval(Estimate(2.5, 2.5, 2.5013, 0.999, Kind.ENCLOSURE, True))
    '[2.50000, 2.50130]'
    """
    if estimate.kind is Kind.UNCERTIFIED:
        return f"residual {estimate.residual:.1e}" if estimate.residual is not None else "none"
    width = estimate.upper - estimate.lower
    if width == 0:
        return f"[{estimate.lower:.6g}, {estimate.upper:.6g}]"
    digits = 6
    for digits in range(6, 16):
        if float(f"{estimate.upper:.{digits}g}") - float(f"{estimate.lower:.{digits}g}") > 0.9 * width:
            break
    return f"[{_round_out(estimate.lower, digits, -1)}, {_round_out(estimate.upper, digits, 1)}]"


def _round_out(value: float, digits: int, direction: int) -> str:
    """Rounded outwards, so that what is printed still contains the number."""
    text = f"{value:#.{digits}g}"
    if (float(text) - value) * direction < 0:
        exponent = int(f"{value:.{digits - 1}e}".split("e")[1])
        text = f"{float(text) + direction * 10.0 ** (exponent - digits + 1):#.{digits}g}"
    return text
