"""Tables and lists for a terminal: they fit its width, and names from files come out visible, never as markup or commands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import final

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.padding import Padding
from rich.table import Table as Grid
from rich.text import Text

from isoflat.core.render import visible

GAPS = (2, 1)
"""Blanks between columns; the second where the first leave no room."""

FOLDED = 24
"""Columns of a terminal that a word takes at most; longer ones, such as paths, are folded. Numbers never are."""


def literal(text: object, style: str = "") -> Text:
    """Visible text for a rich console, never read as markup."""
    return Text(visible(text), style=style)


def fact_list(rows: Iterable[tuple[str, object]]) -> Grid:
    """Names and values in two columns."""
    grid = Grid.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(literal(name), literal(value))
    return grid


@final
@dataclass(frozen=True)
class FittedTable:
    """A table as wide as the terminal: lines break between words, and where even that needs more room, rows become lists.

    Attributes:
        heads: heads of the columns.
        rows: cells, one per column; `Text` keeps its style.
        title: line above the table.
        words: number of leading columns that hold words; the others hold numbers and are set flush right.
        sections: rows after which a line is drawn.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str | Text]]
    title: str = ""
    words: int = 1
    sections: frozenset[int] = field(default_factory=frozenset)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A grid where it fits, lists where it does not."""
        if self.title:
            yield literal(self.title, "bold")
        fitting = ((gap, self.widths(options.max_width, gap)) for gap in GAPS)
        yield next((self._grid(widths, gap) for gap, widths in fitting if widths is not None), self._lists())

    def widths(self, room: int, gap: int) -> list[int] | None:
        """Widths of the columns; None where words would have to be cut.

        Args:
            room: columns of the terminal.
            gap: blanks between columns.
        """
        columns = list(zip(self.heads, *self.rows, strict=True))
        natural = [max(_longest(cell, "\n") for cell in column) for column in columns]
        least = [
            min(max(_longest(cell, None) for cell in column), FOLDED if place < self.words else room)
            for place, column in enumerate(columns)
        ]
        free = room - gap * (len(columns) - 1)
        if sum(least) > free:
            return None
        while sum(natural) > free:
            widest = max(range(len(columns)), key=lambda place: natural[place] - least[place])
            natural[widest] -= 1
        return natural

    def _grid(self, widths: Sequence[int], gap: int) -> Grid:
        grid = Grid(
            box=box.SIMPLE_HEAD, header_style="bold", show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0)
        )
        for place, (head, width) in enumerate(zip(self.heads, widths, strict=True)):
            grid.add_column(
                literal(head), width=width, justify="left" if place < self.words else "right", overflow="fold"
            )
        for place, row in enumerate(self.rows):
            grid.add_row(*map(_text, row), end_section=place in self.sections)
        return grid

    def _lists(self) -> Group:
        """The first cell of each row, and under it the others with their heads."""
        parts = []
        for row in self.rows:
            texts = (str(cell).replace("\n", " ") for cell in row[1:])
            parts += [_text(row[0]), Padding(fact_list(zip(self.heads[1:], texts, strict=True)), (0, 0, 0, 2))]
        return Group(*parts)


def _longest(cell: str | Text, apart: str | None) -> int:
    """Width of the longest part of a cell."""
    return max((cell_len(part) for part in str(cell).split(apart)), default=0)


def _text(cell: str | Text) -> Text:
    """A cell as it is printed; line breaks of ours stay."""
    return cell if isinstance(cell, Text) else Text("\n").join(literal(line) for line in cell.split("\n"))


def item(head: str, *lines: str) -> Group:
    """A name, and lines about it below."""
    return Group(literal(head, "bold"), *(Padding(literal(line), (0, 0, 0, 2)) for line in lines if line))
