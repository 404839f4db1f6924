"""`isoflat measures`: the catalogue."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as Grid

from isoflat.cli.terminal import console, plain

if TYPE_CHECKING:
    from collections.abc import Mapping

    from isoflat.measures.base import Measure


def measures(
    name: Annotated[str | None, typer.Argument(help="Print the card of one measure.")] = None,
    table: Annotated[
        bool, typer.Option("--table", help="Attack every claim of invariance, and print what each edit does.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Cards and table as a page.")] = False,
    bibtex: Annotated[bool, typer.Option("--bibtex", help="What they come from, as BibTeX entries.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")] = False,
) -> None:
    """List every measure with its formula, reference, units and invariances."""
    from isoflat.measures import catalogue

    chosen = catalogue.measures() if name is None else {name: catalogue.find_measure(name)}
    if bibtex:
        sys.stdout.write("".join(f"{entry}\n" for entry in catalogue.bibtex(chosen.values())))
        return
    if table or markdown:
        _show_table(chosen, as_json, markdown)
        return
    if as_json:
        content: dict[str, Any] = {"measures": [card(entry) for entry in chosen.values()]}
        if name is None:
            content["geometries"] = [
                {"name": place.name, "title": place.title, "group": place.group, "version": place.version}
                for place in catalogue.geometries().values()
            ]
        sys.stdout.write(json.dumps(content, allow_nan=False) + "\n")
        return
    screen = console()
    if name is not None:
        _show_card(screen, chosen[name])
        return
    grid = Grid(header_style="bold")
    grid.add_column("measure", no_wrap=True)
    for head in ("formula", "units", "invariant under", "reference"):
        grid.add_column(head, overflow="fold")
    for entry in chosen.values():
        grid.add_row(*map(plain, (entry.label, entry.formula, entry.units, _briefly(entry), entry.reference)))
    screen.print(grid)
    places = Grid("geometry", "metric", "spectra invariant to", header_style="bold")
    for place in catalogue.geometries().values():
        places.add_row(*map(plain, (place.name, place.title, place.group)))
    screen.print(places)


def _show_table(chosen: Mapping[str, Measure], as_json: bool, markdown: bool) -> None:
    """Claims and drifts, measured now, in every geometry that a measure has."""
    from tqdm.auto import tqdm

    from isoflat.measures.catalogue import geometries
    from isoflat.report.catalogue import cell, page
    from isoflat.testing import Invariance, batches, drifts_of

    found = {}
    bar = tqdm(batches(chosen.values()), desc="attacking", leave=False, disable=as_json or not sys.stderr.isatty())
    for name, place, entries in bar:
        for entry, row in zip(entries, drifts_of(entries, place).values(), strict=True):
            found[entry.name, name or str(entry.geometry)] = row
    found = dict(sorted(found.items()))
    if as_json:
        rows = [
            {"measure": name, "geometry": place, "drifts": {str(kind): vars(drift) for kind, drift in row.items()}}
            for (name, place), row in found.items()
        ]
        sys.stdout.write(json.dumps({"table": rows}, allow_nan=False) + "\n")
        return
    if markdown:
        sys.stdout.write(page(list(chosen.values()), list(geometries().values()), found))
        return
    grid = Grid(
        header_style="bold",
        caption="largest change over the smaller value, under edits that keep the function; ✓ claimed",
    )
    for head in ("measure", "geometry", *map(str, Invariance)):
        grid.add_column(head, no_wrap=True)
    for (name, place), row in found.items():
        grid.add_row(*map(plain, (name, place, *(cell(row[kind]) for kind in Invariance))))
    console().print(grid)


def card(entry: Measure) -> dict[str, Any]:
    """Everything the catalogue says about a measure, as plain values."""
    return {
        "name": entry.name,
        "formula": entry.formula,
        "definition": entry.definition,
        "reference": entry.reference,
        "units": entry.units,
        "direction": str(entry.direction),
        "loss_degree": entry.loss_degree,
        "geometry": entry.geometry,
        "invariant_under": _claims(entry),
        "options": dict(entry.options),
        "pitfalls": entry.pitfalls,
        "provisional": entry.provisional,
        "version": entry.version,
    }


def _show_card(screen: Console, entry: Measure) -> None:
    content = card(entry) | {
        "invariant_under": _in_words(entry),
        "geometry": entry.geometry or "any",
        "options": ", ".join(f"{key} = {value:g}" for key, value in entry.options.items()) or "none",
        "loss_degree": "no power" if entry.loss_degree is None else f"{entry.loss_degree:g}",
    }
    grid = Grid.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in content.items():
        if value == "":
            continue
        grid.add_row(plain(key.replace("_", " ")), plain(value))
    screen.print(grid)


def _claims(entry: Measure) -> dict[str, str]:
    """Invariances by geometry, in words: the geometry's, unless the measure has its own."""
    from isoflat.measures.catalogue import geometries

    places = [entry.geometry] if entry.geometry else list(geometries())
    if entry.own is None:
        return {place: geometries()[place].group for place in places}
    return dict.fromkeys(places, ", ".join(sorted(entry.own)))


def _in_words(entry: Measure) -> str:
    return " | ".join(f"{place}: {group}" for place, group in _claims(entry).items())


def _briefly(entry: Measure) -> str:
    """Where a geometry decides, the table below the measures says what it is invariant to."""
    if entry.own is not None:
        return ", ".join(sorted(entry.own))
    return f"as {entry.geometry}" if entry.geometry else "as the geometry"
