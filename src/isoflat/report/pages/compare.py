"""The page of `isoflat compare`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from isoflat.core import render
from isoflat.core.comparison import Basis, Comparison, Difference
from isoflat.core.estimate import interval
from isoflat.core.record import Record
from isoflat.report import tables
from isoflat.report.document import Grid, Page, Plate, Prose, Section
from isoflat.report.figures import Panel
from isoflat.report.pages import parts
from isoflat.report.pages.parts import COLOPHON, INTERVAL, TEXT, brief, drawable, names, plates, tame

READING = (
    ("Difference", "The first network’s number minus the second’s, with the interval that it lies in. A network is called "
     "flatter only where this interval leaves 0 out; else it is a tie, however far the values are apart."),
    ("Basis", "“Two intervals”: those of both numbers set against each other. “The same probes”: both networks were asked the "
     "same random questions, and differ answer by answer. “Identical weights”: nothing differs to the last bit. "
     "“Uncertified”: one number has no upper end, so that nothing is decided."),
    ("Rank", "The best and the worst place that a network can have, 1 for the flattest; one number where they are the same."),
    INTERVAL,
)  # fmt: skip


def page(comparison: Comparison, subject: Mapping[str, Any]) -> Page:
    """Page of a comparison, ready to be rendered.

    Args:
        comparison: the comparison.
        subject: its networks, data and loss, as in the JSON of `isoflat compare`.
    """
    found = tamed(comparison)
    first, *others = found.sentences
    point = found.rows[0].point
    return Page(
        title="isoflat compare",
        headline=first,
        lead=tuple(others),
        facts=(
            ("Networks", str(len(found.networks))),
            ("Reference", found.reference),
            ("Examples", str(point.examples)),
            ("Entries", str(point.parameters)),
            ("Time", f"{math.fsum(row.estimate.cost.seconds for row in found.rows):.1f} s"),
        ),
        sections=(
            Section("Who is flatter?", tuple(blocks(found))),
            *parts.closing(
                READING,
                tables.measurements(found.rows, "Networks"),
                warnings(found, subject),
                provenance(found.rows, subject),
            ),
        ),
        colophon=COLOPHON,
    )


def tamed(comparison: Comparison) -> Comparison:
    """Comparison with texts that a page can show, each network under a name of its own."""
    own = names(comparison.networks)
    return Comparison(
        rows=tuple(tame(row, own[row.label]) for row in comparison.rows),
        differences=tuple(
            replace(
                gap,
                measure=brief(gap.measure),
                geometry=brief(gap.geometry),
                first=own.get(gap.first, brief(gap.first)),
                second=own.get(gap.second, brief(gap.second)),
                remedy=brief(gap.remedy, TEXT),
            )
            for gap in comparison.differences
        ),
        reference=own[comparison.reference],
        notes=tuple(brief(note, TEXT) for note in comparison.notes),
    )


def blocks(comparison: Comparison) -> list[Grid | Plate]:
    """The figure, then for each number its ranking and its differences.

    Args:
        comparison: the comparison, with texts that a page can show (`tamed`).
    """
    made: list[Grid | Plate] = list(_figures(comparison))
    for number in comparison.numbers:
        made += [_ranking(comparison, number), _differences(comparison, number)]
    return made


def warnings(comparison: Comparison, subject: Mapping[str, Any]) -> tuple[Prose, ...]:
    """Warnings to read before a comparison is believed."""
    loading = subject.get("notes")
    told = [*parts.unconverged(comparison.rows), *comparison.notes, *comparison.remarks]
    told += [brief(note, TEXT) for note in loading] if isinstance(loading, list) else []
    return parts.warning_blocks(told)


def provenance(rows: Sequence[Record], subject: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Names and values that say what was measured, how, and by which versions."""
    named = (
        (name.replace("_", " ").capitalize(), _told(value))
        for name, value in subject.items()
        if name != "notes" and value not in (None, [], "")
    )
    return (
        *((brief(name), text) for name, text in named),
        ("Settings", "; ".join(dict.fromkeys(_told(row.settings) for row in rows))),
        ("Data hash", parts.hashes(rows)),
        *parts.origins(rows),
    )


def _told(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{brief(key)} {brief(inner)}" for key, inner in value.items())
    return ", ".join(map(brief, value)) if isinstance(value, (list, tuple)) else brief(value, TEXT)


def _figures(comparison: Comparison) -> tuple[Plate, ...]:
    panels = []
    for measure, geometry in comparison.numbers:
        rows = [row for row in comparison.rows if (row.measure, row.geometry) == (measure, geometry)]
        if all(drawable(row.estimate) for row in rows):
            panels.append(Panel(f"{measure} ({geometry})", tuple((row.label, (row.estimate,)) for row in rows)))
    caption = "Every network’s number with its confidence interval, which is often narrower than the dot. The bar marks the value."
    return plates(panels, caption, " ".join(comparison.sentences))


def _ranking(comparison: Comparison, number: tuple[str, str]) -> Grid:
    """One line for each network, flattest first."""
    places = comparison.ranks(number)
    way = "lower" if comparison.lower_is_flatter(number) else "higher"
    return Grid(
        f"{number[0]} ({number[1]}): {way} is flatter. Flattest first.",
        ("network", "rank", "loss", "accuracy", "value", "interval"),
        tuple(
            (
                row.label,
                "–".join(map(str, dict.fromkeys(places[row.label]))),
                f"{row.point.loss:.4g}",
                "–" if row.point.accuracy is None else f"{row.point.accuracy:.4g}",
                str(row.estimate) + ("" if row.estimate.converged else " (not converged)"),
                interval(row.estimate),
            )
            for row in comparison.ranking(number)
        ),
    )


def _differences(comparison: Comparison, number: tuple[str, str]) -> Grid:
    gaps = [gap for gap in comparison if (gap.measure, gap.geometry) == number]
    return Grid(
        f"Differences by {number[0]} ({number[1]}): the first network minus the second.",
        ("first", "second", "the first is", "difference", "interval", "confidence", "ratio", "basis"),
        tuple(
            (
                gap.first,
                gap.second,
                str(gap.verdict),
                str(gap),
                bounds(gap),
                f"{gap.confidence:.7g}",
                "–" if gap.ratio is None else str(gap.ratio),
                str(gap.basis),
            )
            for gap in gaps
        ),
        text=3,
    )


def bounds(gap: Difference) -> str:
    """The interval of a difference, in brackets.

    >>> bounds(Difference("quotient_trace", "auto", True, "b", "a", -3.0, -4.0, -2.5, 0.95, Basis.PROBES))
    '[-4.00000, -2.50000]'
    """
    if gap.basis is Basis.IDENTICAL:
        return "exactly 0"
    if not math.isfinite(gap.lower) or not math.isfinite(gap.upper):
        return "unknown"
    return render.bounds(gap.lower, gap.upper)
