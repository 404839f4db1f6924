"""`isoflat measures`: the catalogue."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from isoflat.cli.terminal import console, interactive, say, step, write_json
from isoflat.core.fitted import FittedTable, fact_list, item, literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from isoflat.measures.base import Measure


SENTENCE = 120
"""Characters of a definition that the list shows whole."""


def measures(
    name: Annotated[str | None, typer.Argument(help="Print the card of one measure.")] = None,
    table: Annotated[
        bool, typer.Option("--table", help="Attack every claim of invariance, and print what each edit does.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Cards and table as a page.")] = False,
    bibtex: Annotated[
        bool, typer.Option("--bibtex", help="The works that measures are from, as BibTeX entries.")
    ] = False,
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
        write_json(content)
        return
    screen = console()
    if name is not None:
        _show_card(screen, chosen[name])
        return
    for listed in chosen.values():
        screen.print(item(listed.label, _sentence(listed), _briefly(listed)))
    screen.print(literal("\nGeometries, in which a measure is taken", "bold"))
    for place in catalogue.geometries().values():
        screen.print(item(place.name, f"{place.title}.", f"invariant to: {place.group}"))
    say(screen, "\nisoflat measures NAME tells formula, units, reference and pitfalls of one of them.")


def _sentence(measure: Measure) -> str:
    """The definition, up to the first colon where it is long."""
    text = measure.definition
    return text if len(text) <= SENTENCE or ": " not in text else f"{text.partition(': ')[0]}."


def _show_table(chosen: Mapping[str, Measure], as_json: bool, markdown: bool) -> None:
    """Claims and drifts, measured now, in every geometry that a measure has."""
    from tqdm.auto import tqdm

    from isoflat.measures.catalogue import geometries
    from isoflat.report.catalogue import cell, page
    from isoflat.testing import Invariance, batches, drifts_of

    found = {}
    bar = tqdm(batches(chosen.values()), desc="attacking", leave=False, disable=as_json or not interactive())
    for name, place, entries in bar:
        step(f"attacking {len(entries)} measures ({name or place})", as_json)
        for entry, row in zip(entries, drifts_of(entries, place).values(), strict=True):
            found[entry.name, name or str(entry.geometry)] = row
    found = dict(sorted(found.items()))
    if as_json:
        rows = [
            {"measure": name, "geometry": place, "drifts": {str(kind): vars(drift) for kind, drift in row.items()}}
            for (name, place), row in found.items()
        ]
        write_json({"table": rows})
        return
    if markdown:
        sys.stdout.write(page(list(chosen.values()), list(geometries().values()), found))
        return
    rows = [(name, place, *(cell(row[kind]) for kind in Invariance)) for (name, place), row in found.items()]
    screen = console()
    screen.print(FittedTable(("measure", "geometry", *map(str, Invariance)), rows, words=2))
    say(screen, "largest change over the smaller value, under edits that keep the function; ✓ claimed", "dim")


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
        "invariant_under": " | ".join(f"{place}: {group}" for place, group in _claims(entry).items()),
        "geometry": entry.geometry or "any",
        "options": ", ".join(f"{key} = {value:g}" for key, value in entry.options.items()) or "none",
        "loss_degree": "no power" if entry.loss_degree is None else f"{entry.loss_degree:g}",
    }
    screen.print(fact_list((key.replace("_", " "), value) for key, value in content.items() if value != ""))


def _claims(entry: Measure) -> dict[str, str]:
    """Invariances by geometry, in words: the geometry's, unless the measure has its own."""
    from isoflat.measures.catalogue import geometries

    places = [entry.geometry] if entry.geometry else list(geometries())
    if entry.own_claims is None:
        return {place: geometries()[place].group for place in places}
    return dict.fromkeys(places, ", ".join(sorted(entry.own_claims)))


def _briefly(measure: Measure) -> str:
    """Invariances in a line; where a geometry decides, the list below the measures says what it is invariant to."""
    if measure.own_claims is not None:
        return f"invariant to: {', '.join(sorted(measure.own_claims)) or 'nothing that is claimed'}"
    return f"as invariant as {measure.geometry or 'the geometry it is measured in'}, below"
