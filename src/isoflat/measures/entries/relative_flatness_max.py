"""Relative flatness of the last layer by largest eigenvalues."""

from isoflat.measures.base import Measure
from isoflat.measures.entries.last_layer import PITFALLS, LastBlocks, claims, evaluate

MEASURE = Measure(
    name="relative_flatness_max",
    formula=r"\sum_s \lVert w_s \rVert^2 \lambda_{\max}(H_{s,s})",
    definition="Largest curvature of each row of the last layer in units of that row, added up.",
    reference="petzka2021, arXiv:2001.00939",
    needs=lambda settings, options: (LastBlocks(bool(options["normalised"])),),
    evaluate=evaluate,
    geometry="euclidean",
    claims=claims,
    options={"normalised": 1},
    pitfalls=PITFALLS,
)
