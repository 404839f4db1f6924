"""The catalogue as a page: what every measure is, and what moves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from isoflat.geometry.base import Geometry, Invariance
from isoflat.measures.base import Measure
from isoflat.testing import Drift

INTRODUCTION = """# The catalogue

Every measure, as `isoflat measures NAME` prints it. This page is made by `make catalogue`; do not edit it.

E is the frame of the geometry that is measured in (`E Eᵀ` is its inverse metric): `euclidean` for the weights as numbers,
`layerwise` for the paper's metric, `elementwise` and `auto` at the canonical representative of the orbit. A measure that is
defined in one of them only is measured there. Where no claims stand, those of the geometry hold.
"""

TABLE = """## What moves which number

Small networks before and after edits that keep their function (`isoflat.testing`), measured in float64; `isoflat measures
--table` repeats it. Each cell is the largest change over the smaller value. ✓ is claimed: the change must be rounding, or lie
within the intervals of numbers with random probes. The others are not claimed, and are seen to move. – does not apply.
"""

ABSENT = """## What is not here

- *l-CFS* (Chatterjee and Mishchenko 2019, arXiv:1907.01991): training accuracy less that after flipping every signal value
  seen at most l times, in a logic circuit. A network of floating-point numbers has no such signals: any choice of bits and
  gates would make the number, not the network.
- Perturbation measures (SAM, box and PAC-Bayes sharpness by search) follow in a later part.
"""


def page(
    measures: Sequence[Measure],
    geometries: Sequence[Geometry],
    found: Mapping[tuple[str, str], Mapping[Invariance, Drift]],
) -> str:
    """Cards of all measures and geometries, and the table of claims, as Markdown.

    Args:
        measures: the measures, in the order of their cards.
        geometries: all geometries.
        found: drifts by measure and geometry.
    """
    parts = [INTRODUCTION, "## Geometries\n"]
    parts.append("\n".join(f"- `{place.name}`: {place.title}. Invariant to: {place.group}." for place in geometries))
    parts += ["\n## Measures\n", *map(_card, measures), TABLE, _table(found), "", ABSENT]
    return "\n".join(parts)


def _card(entry: Measure) -> str:
    lines = [f"### `{entry.name}`\n", f"{entry.definition}\n", f"$${entry.formula}$$\n"]
    claims = "as the geometry" if entry.own_claims is None else ", ".join(sorted(entry.own_claims)) or "nothing"
    facts = {
        "in": f"`{entry.geometry}` only" if entry.geometry else "any geometry",
        "invariant to": claims,
        "units": entry.units,
        "direction": str(entry.direction),
        "options": ", ".join(f"`{key}={value:g}`" for key, value in entry.options.items()),
        "reference": entry.reference,
        "pitfalls": entry.pitfalls,
        "provisional": entry.provisional,
    }
    return "\n".join([*lines, *(f"- *{key}*: {value}" for key, value in facts.items() if value), ""])


def _table(found: Mapping[tuple[str, str], Mapping[Invariance, Drift]]) -> str:
    head = ["measure", "geometry", *map(str, Invariance)]
    rows = [[f"`{name}`", place, *(cell(row[kind]) for kind in Invariance)] for (name, place), row in found.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def cell(drift: Drift) -> str:
    """A claim and what became of it, briefly.

    >>> cell(Drift(True, 1e-15, True)), cell(Drift(False, 40.0, False)), cell(Drift(True, 0.5, False))
    ('✓ 1e-15', '4e+01', '✓ 5e-01 FALSE')
    """
    seen = "–" if drift.worst is None else f"{drift.worst:.0e}"
    return f"{'✓ ' if drift.claimed and drift.worst is not None else ''}{seen}{'' if drift.true else ' FALSE'}"
