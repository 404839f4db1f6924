"""Parts of a report: plain text, tables and drawings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from isoflat.core.errors import UsageError


@final
@dataclass(frozen=True)
class Prose:
    """A paragraph of plain text; markup in it is shown, never obeyed."""

    text: str


@final
@dataclass(frozen=True)
class Definitions:
    """Definitions with their explanations, or names with their values."""

    items: tuple[tuple[str, str], ...]


@final
@dataclass(frozen=True)
class Grid:
    """A table of text.

    Attributes:
        caption: line that says what the table shows.
        columns: heads of the columns.
        rows: cells of each row, one per column.
        text: number of leading columns that hold words; the others hold numbers and are set flush right.
        note: remark below the table.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: int = 1
    note: str = ""

    def __post_init__(self) -> None:
        """Refuse ragged rows."""
        if ragged := [row for row in self.rows if len(row) != len(self.columns)]:
            raise UsageError(f"expected {len(self.columns)} cells per row ({self.columns}), got {ragged[0]}")


@final
@dataclass(frozen=True)
class Plate:
    """A drawing with its caption.

    Attributes:
        caption: text that says what the drawing shows and how to read it.
        alternative: the same for those who cannot see it.
        svg: inline markup made by `report.drawing`, the only markup that a page takes over as it is.
    """

    caption: str
    alternative: str
    svg: str


@final
@dataclass(frozen=True)
class Section:
    """A heading with the blocks under it."""

    title: str
    blocks: tuple[Prose | Definitions | Grid | Plate, ...]


@final
@dataclass(frozen=True)
class Page:
    """A whole report.

    Attributes:
        title: the command whose result it shows.
        headline: the main result, in a sentence.
        lead: further results, a sentence each.
        facts: a handful of names and values for orientation.
        sections: everything else.
        colophon: the last line.
    """

    title: str
    headline: str
    lead: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    sections: tuple[Section, ...] = field(default_factory=tuple)
    colophon: str = ""
