"""Finding measures and geometries by name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from functools import cache
from importlib import import_module, resources
from importlib.metadata import entry_points
from importlib.util import find_spec

from isoflat.core.catalogue import entries
from isoflat.core.errors import UnknownName, UsageError
from isoflat.geometry.base import Geometry
from isoflat.measures.base import Measure
from isoflat.measures.synonyms import geometries_meant, measures_meant

GROUP = "isoflat.measures"
"""Entry points of other packages that name a `Measure`."""


@cache
def measures() -> dict[str, Measure]:
    """Every measure by name: one file in `measures.entries` each, and those of other packages (`GROUP`).

    A measure of another package that cannot be loaded, or has a name that is taken, is left out with a warning.

    >>> "quotient_spectral_norm" in measures()
    True
    """
    found: dict[str, Measure] = dict(entries("isoflat.measures.entries", "MEASURE"))
    for point in entry_points(group=GROUP):
        try:
            entry = point.load()
        except Exception as error:  # noqa: BLE001  whatever another package raises must not take ours away
            warnings.warn(f"the measure {point.name!r} ({point.value}) cannot be loaded: {error}", stacklevel=2)
            continue
        if not isinstance(entry, Measure) or entry.name in found:
            why = f"there is a {entry.name!r} already" if isinstance(entry, Measure) else "it is no isoflat.Measure"
            warnings.warn(f"the measure {point.name!r} ({point.value}) is left out: {why}", stacklevel=2)
            continue
        found[entry.name] = entry
    return dict(sorted(found.items()))


def bibtex(chosen: Iterable[Measure]) -> tuple[str, ...]:
    """BibTeX entries of the works that measures name, each once; those of other packages' measures are their own affair.

    >>> [entry.partition(",")[0] for entry in bibtex([find_measure("quotient_sharpness")])]
    ['@misc{rangamani2019', '@inproceedings{keskar2017']
    """
    text = resources.files("isoflat.measures").joinpath("references.bib").read_text(encoding="utf-8")
    known = {entry.partition("{")[2].partition(",")[0]: entry for entry in text.splitlines() if entry.startswith("@")}
    named = (key for entry in chosen for key in re.findall(r"\b[a-z]+\d{4}\b", entry.reference))
    return tuple(known[key] for key in dict.fromkeys(named) if key in known)


def geometries() -> dict[str, Geometry]:
    """Every geometry by name.

    >>> list(geometries())
    ['auto', 'elementwise', 'euclidean', 'layerwise']
    """
    return entries("isoflat.geometry", "GEOMETRY")


def find_measure(measure: str | Measure) -> Measure:
    """A measure by name, with its options in brackets where they differ from the defaults.

    Raises:
        UnknownName: no such measure; the nearest names are offered.
        UsageError: the options cannot be read.

    >>> find_measure("quotient_sharpness(epsilon=1)").options
    {'epsilon': 1.0}
    """
    if isinstance(measure, Measure):
        return measure
    if not isinstance(measure, str):
        raise UsageError(f"a measure is a name in the catalogue (isoflat measures), got {type(measure).__name__}")
    parts = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", measure)
    name, inside = (parts[1], parts[2]) if parts else (measure, None)
    found = _own(name) or measures().get(name)
    if found is None:
        raise UnknownName("measure", name, measures(), measures_meant(name))
    options = {}
    for item in filter(None, (piece.strip() for piece in (inside or "").split(","))):
        pair = re.fullmatch(r"(\w+)\s*=\s*([-+.\deE]+)", item)
        try:
            options[pair[1]] = float(pair[2])  # pyrefly: ignore
        except (TypeError, ValueError):
            raise UsageError(f"cannot read option {item!r} of {name}: expected {name}(option=number)") from None
    return found.with_options(**options)


def _own(name: str) -> Measure | None:
    """A measure of this package from its own file, so that one name does not load all the others."""
    module = f"isoflat.measures.entries.{name}"
    if not name.isidentifier() or find_spec(module) is None:
        return None
    return getattr(import_module(module), "MEASURE", None)


def find_geometry(name: str | Geometry) -> Geometry:
    """A geometry by name.

    Raises:
        UnknownName: no such geometry; the nearest names are offered.
    """
    if isinstance(name, Geometry):
        return name
    if not isinstance(name, str):
        raise UsageError(f"a geometry is one of {', '.join(geometries())}, got {type(name).__name__}")
    if name not in geometries():
        raise UnknownName("geometry", name, geometries(), geometries_meant(name))
    return geometries()[name]
