"""Relative flatness of the last layer."""

from isoflat.measures.base import Measure
from isoflat.measures.entries.last_layer import PITFALLS, LastTrace, claims, evaluate

MEASURE = Measure(
    name="relative_flatness",
    formula=r"\sum_{s,s'} \langle w_s, w_{s'} \rangle\, \mathrm{tr}\, H_{s,s'}",
    definition="Curvature of the last layer with respect to the features it reads, in units of its rows.",
    reference="petzka2021, arXiv:2001.00939",
    needs=lambda settings, options: (LastTrace(bool(options["normalised"])),),
    evaluate=evaluate,
    geometry="euclidean",
    claims=claims,
    options={"normalised": 1},
    pitfalls=PITFALLS,
)
