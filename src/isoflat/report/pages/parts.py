"""Parts that pages share: paragraphs, warnings, provenance, and texts from files made fit to be shown."""

from __future__ import annotations

import warnings as python_warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from isoflat.core.estimate import Estimate, interval
from isoflat.core.record import Record
from isoflat.core.render import visible
from isoflat.core.table import Omission
from isoflat.report import tables
from isoflat.report.document import Definitions, Grid, Plate, Prose, Section
from isoflat.report.drawing import markup
from isoflat.report.figures import Panel, strips

COLOPHON = "Made by isoflat. This file is complete in itself: it loads nothing and runs nothing."
"""Last line of every page."""

Pairs = tuple[tuple[str, str], ...]
"""Definitions with explanations, or names with values."""

INTERVAL = (
    "Confidence interval",
    "An interval that contains the exact number for these weights and these data, with the stated confidence over the "
    "solver’s random start. The digit in brackets is the uncertainty of the last digit shown. It says nothing of other "
    "seeds, data or architectures.",
)
STATIONARITY = (
    "Stationarity",
    "A bound b on how far the number is from the exact Riemannian curvature because the gradient has not vanished, "
    "relative to the number. Small means: close enough to a minimum.",
)
COST = (
    "Hessian-vector products, gradient passes",
    "The cost: products of the Hessian with a vector over all of the data, and the whole measurement in units of one "
    "gradient over the same data, timed in the same run.",
)
RANK_TEST = (
    "Rank test",
    "Two-sided Mann-Whitney test, exact where there are no ties: the permutation test of ranks. Networks, not data "
    "points, are counted, so that the smallest p is limited by the number of seeds.",
)

WARNINGS = "Warnings"
"""Title of the section of warnings."""


def closing(reading: Pairs, numbers: Sequence[Grid], told: Sequence[Prose], provenance: Pairs) -> tuple[Section, ...]:
    """Sections with which every page ends.

    Args:
        reading: terms and explanations.
        numbers: every number with its interval and cost.
        told: warnings.
        provenance: names and values.
    """
    return (
        Section("How to read this", (Definitions(reading),)),
        *([Section("Every number with its confidence interval and cost", tuple(numbers))] if numbers else []),
        Section(WARNINGS, tuple(told)),
        Section("Provenance", (Definitions(provenance),)),
    )


def warning_blocks(told: Iterable[str], none: str = "every number converged") -> tuple[Prose, ...]:
    """Warnings, each once.

    Args:
        told: texts of the warnings.
        none: statement that is printed where there are none.
    """
    return tuple(Prose(text) for text in dict.fromkeys(told)) or (Prose(f"None: {none}."),)


def is_none(block: object) -> bool:
    """True for the paragraph that says that there are no warnings."""
    return isinstance(block, Prose) and block.text.startswith("None: ")


def unconverged(records: Iterable[Record]) -> list[str]:
    """A sentence for each number that did not converge."""
    return [
        f"{row.label}, {row.measure} ({row.geometry}) did not converge: {interval(row.estimate)}."
        for row in records
        if not row.estimate.converged
    ]


def missing(omitted: Iterable[Omission]) -> list[str]:
    """A sentence for each number that is not there."""
    return [f"{part.label}: {part}" for part in omitted]


def listed(values: Mapping[str, object]) -> str:
    """Names with their values in a line; what is None is left out.

    >>> listed({"seed": 3, "dtype": None, "rtol": 0.01})
    'seed 3, rtol 0.01'
    """
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)


def hashes(records: Iterable[Record]) -> str:
    """Hashes of the data that was measured on, each once."""
    return ", ".join(dict.fromkeys(row.data_hash for row in records))


def groups(records: Iterable[Record]) -> str:
    """Geometries with the hashes of the symmetries they divide out, each once."""
    return "; ".join(dict.fromkeys(f"{row.geometry}: {row.group_hash}" for row in records))


def origins(records: Sequence[Record]) -> Pairs:
    """Names and values of the symmetry groups and versions behind records."""
    return (("Groups", groups(records)), *tables.versions(records))


NAME, TEXT = 48, 600
"""Characters of a name and of a text that a page shows."""

DRAWN, TITLE = 26, 64
"""Characters of a name beside a figure, and of what stands over it."""

STRIPS, PANELS = 40, 6
"""Strips that fit into a panel, and panels that fit into a figure."""

MARGIN, ROOM = 1.05, 3.0
"""Factors by which an axis goes beyond the ends of intervals, and by which it is stretched for them at most."""

SMALLEST, LARGEST = 1e-100, 1e100
"""Limits between which a value can be drawn on a logarithmic axis."""


def brief(text: object, most: int = NAME) -> str:
    r"""The text without control characters, and without its middle where it is long.

    >>> brief("a" * 200, 11), brief("small\nbatch")
    ('aaaaa…aaaaa', 'small\\nbatch')
    """
    whole = visible(str(text))
    half = (most - 1) // 2
    return whole if len(whole) <= most else f"{whole[:half]}…{whole[-half:]}"


def names(labels: Sequence[str]) -> dict[str, str]:
    """Brief names, each once.

    >>> names(["b" * 200 + "x" * 60, "b" * 201 + "x" * 60])["b" * 201 + "x" * 60][-4:]
    ' (2)'
    """
    found: dict[str, str] = {}
    taken: set[str] = set()
    for label in dict.fromkeys(labels):
        short = brief(label)
        name, count = short, 1
        while name in taken:
            count += 1
            name = f"{short} ({count})"
        taken.add(name)
        found[label] = name
    return found


def tame(record: Record, label: str) -> Record:
    """The record with texts that a page can show.

    Args:
        record: the record as it was read.
        label: name of its network on the page.
    """
    return replace(
        record,
        label=label,
        measure=brief(record.measure),
        geometry=brief(record.geometry),
        group=brief(record.group, TEXT),
        group_hash=brief(record.group_hash),
        model_hash=brief(record.model_hash),
        data_hash=brief(record.data_hash),
        settings={brief(key): brief(value) for key, value in record.settings.items()},
        versions={brief(key): brief(value) for key, value in record.versions.items()},
        estimate=replace(record.estimate, notes=tuple(brief(note, TEXT) for note in record.estimate.notes)),
    )


def drawable(estimate: Estimate) -> bool:
    """True where a number can stand on a logarithmic axis."""
    return SMALLEST < estimate.value < LARGEST


@contextmanager
def literally() -> Iterator[None]:
    """Context in which letters that Matplotlib's own font lacks are no fault: the page's fonts show them."""
    with python_warnings.catch_warnings():
        python_warnings.filterwarnings("ignore", category=UserWarning, module="matplotlib")
        python_warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        yield


def plates(panels: Sequence[Panel], caption: str, alternative: str) -> tuple[Plate, ...]:
    """Figures of strips, as high as their names need.

    Args:
        panels: all numbers of which are `drawable`.
        caption: caption of each figure.
        alternative: the same for those who cannot see it.
    """
    made = []
    for start in range(0, len(panels), PANELS):
        shown = [_short(panel) for panel in panels[start : start + PANELS]]
        heights = [max(1.45, 0.7 + 0.24 * len(panel.groups)) for panel in shown]
        with literally():
            figure = strips(shown)
            for axes, panel in zip(figure.axes, shown, strict=True):
                axes.set_xlim(*_reach(panel, axes.get_xlim()))
            gridspec = figure.axes[0].get_gridspec()
            if gridspec is not None:
                gridspec.set_height_ratios(heights)
            figure.set_size_inches(7.2, 0.55 + sum(heights))
            made.append(Plate(caption, alternative, markup(figure, f"strips{start}")))
    return tuple(made)


def _reach(panel: Panel, limits: tuple[float, float]) -> tuple[float, float]:
    """Limits of an axis that hold the intervals as well, as far as they leave the numbers room."""
    low, high = limits
    every = [estimate for _, group in panel.groups for estimate in group]
    ends = [end for estimate in every for end in (estimate.lower / MARGIN, estimate.upper * MARGIN)]
    near = [end for end in ends if low / ROOM <= end <= high * ROOM]
    return min([low, *near]), max([high, *near])


def _short(panel: Panel) -> Panel:
    """Names that leave room for the dots; one strip for all where there are too many; ends that run out of the figure."""
    groups = panel.groups
    values = [estimate.value for _, group in groups for estimate in group]
    low, high = min(values) / ROOM**2, max(values) * ROOM**2
    if len(groups) > STRIPS:
        groups = (("all networks", tuple(estimate for _, group in groups for estimate in group)),)
    return Panel(
        brief(panel.title, TITLE),
        tuple(
            (brief(name, DRAWN), tuple(_within(estimate, low, high) for estimate in group)) for name, group in groups
        ),
    )


def _within(estimate: Estimate, low: float, high: float) -> Estimate:
    """Estimate with ends that an axis can hold: none is infinite, zero or negative."""
    return replace(estimate, lower=max(estimate.lower, low), upper=min(estimate.upper, high))
