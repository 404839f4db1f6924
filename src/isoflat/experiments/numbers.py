"""The three numbers that demonstrations compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from isoflat.core.record import Record
from isoflat.core.table import Table


@final
@dataclass(frozen=True)
class Number:
    """A measure in a geometry, with its name in sentences.

    Attributes:
        name: short, for files and keys.
        measure: catalogue name.
        geometry: catalogue name.
        words: in a sentence, without article.
        title: over a figure.
    """

    name: str
    measure: str
    geometry: str
    words: str
    title: str

    def of(self, table: Table) -> Record:
        """Its record in a table."""
        return table[self.measure, self.geometry]


CANONICAL = Number(
    "canonical",
    "quotient_spectral_norm",
    "auto",
    "canonical number",
    "The canonical number: ‖D H D‖ at the canonical representative",
)
PAPER = Number(
    "paper",
    "quotient_spectral_norm",
    "layerwise",
    "paper's number",
    "The paper’s number: ‖D H D‖, each layer in units of its own norm",
)
PLAIN = Number(
    "plain",
    "hessian_spectral_norm",
    "euclidean",
    "plain Hessian norm",
    "The plain number: ‖H‖, in the weights as they are stored",
)

NUMBERS = (CANONICAL, PAPER, PLAIN)
MEASURES = ("quotient_spectral_norm", "hessian_spectral_norm")
GEOMETRIES = ("auto", "layerwise")
"""What to ask `measure_all` for: the plain norm has a geometry of its own."""
