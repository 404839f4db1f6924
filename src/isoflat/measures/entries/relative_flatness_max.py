"""Relative flatness of the last layer by largest eigenvalues."""

from isoflat.core.estimate import Estimate
from isoflat.geometry.base import Invariance
from isoflat.measures.base import Direction, Findings, Measure
from isoflat.measures.entries.last_layer import LastBlocks


def _evaluate(findings: Findings) -> Estimate:
    value, head = findings.answers[0].result
    return Estimate.exact(value, f"of {head.name}", *head.notes)


MEASURE = Measure(
    name="relative_flatness_max",
    formula=r"\sum_s \lVert w_s \rVert^2 \lambda_{\max}(H_{s,s})",
    definition="Largest curvature of each row of the last layer in units of that row, added up.",
    reference="petzka2021, arXiv:2001.00939",
    units="loss",
    direction=Direction.LOWER_IS_FLATTER,
    loss_degree=1,
    needs=lambda effort, options: (LastBlocks(bool(options["normalised"])),),
    evaluate=_evaluate,
    geometry="euclidean",
    claims=frozenset({Invariance.LAYERS, Invariance.UNITS, Invariance.NORMS, Invariance.ORDER}),
    options={"normalised": 1},
    pitfalls=(
        "By default each feature is divided by its deviation over the data (normalised=1); without (normalised=0), as the "
        "formula stands, single units move it. Of two public scripts one divides by the variance. The model is not changed."
    ),
)
