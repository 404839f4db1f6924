"""Numbers that experiments compare, and the three that every demonstration measures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

from isoflat.core.record import Record
from isoflat.core.table import Table
from isoflat.measures.base import Direction
from isoflat.measures.catalogue import find_measure


@final
@dataclass(frozen=True)
class Number:
    """A measure in a geometry, with its name in sentences.

    Attributes:
        name: short name, for files and keys.
        measure: name of the measure in the catalogue.
        geometry: name of the geometry in the catalogue.
        words: name of the number in a sentence, without article.
        title: heading of a figure of the number.
        logits: what the network's scores become before the loss, such as "normalised"; None to leave them as they are.
    """

    name: str
    measure: str
    geometry: str
    words: str
    title: str
    logits: str | None = None

    @property
    def sign(self) -> int:
        """1 where a higher number is sharper, −1 where it is flatter."""
        return 1 if find_measure(self.measure).direction is Direction.LOWER_IS_FLATTER else -1

    def of(self, table: Table) -> Record:
        """The record of this number in a table that is known to have it."""
        return table[self.measure, self.geometry]

    def find(self, table: Table) -> Record | None:
        """The record of this number in a table; None where it was not measured."""
        key = (self.measure, self.geometry, self.logits or "raw")
        return next((row for row in table if (row.measure, row.geometry, row.settings["logits"]) == key), None)


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
"""Geometries to ask `measure_all` for; the plain Hessian norm is always measured in its own, the Euclidean one."""


COLUMNS = (
    "measure", "geometry", "logits", "value", "lower", "upper", "confidence", "converged", "products", "gradient_passes",
    "loss", "accuracy", "gradient_norm", "stationarity_ratio", "group_hash", "model_hash", "data_hash",
)  # fmt: skip
"""Columns in which a row of a table tells of a number, in this order."""


def flat_row(record: Record) -> dict[str, Any]:
    """A record as the columns of a row; an end of its confidence interval that is infinite becomes None."""
    estimate, point = record.estimate, record.point
    ends = (end if math.isfinite(end) else None for end in (estimate.lower, estimate.upper))
    what = (record.measure, record.geometry, record.settings.get("logits"))
    found = (estimate.value, *ends, estimate.confidence, estimate.converged)
    cost = (estimate.cost.products, estimate.cost.gradient_passes)
    there = (point.loss, point.accuracy, point.gradient_norm, record.stationarity_ratio)
    hashes = (record.group_hash, record.model_hash, record.data_hash)
    return dict(zip(COLUMNS, (*what, *found, *cost, *there, *hashes), strict=True))
