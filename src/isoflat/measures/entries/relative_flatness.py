"""Relative flatness of the last layer."""

from isoflat.core.estimate import Estimate
from isoflat.geometry.base import Invariance
from isoflat.measures.base import Direction, Findings, Measure
from isoflat.measures.entries.last_layer import LastTrace


def _evaluate(findings: Findings) -> Estimate:
    value, head = findings.answers[0].result
    return Estimate.exact(value, f"of {head.name}", *head.notes)


MEASURE = Measure(
    name="relative_flatness",
    formula=r"\sum_{s,s'} \langle w_s, w_{s'} \rangle\, \mathrm{tr}\, H_{s,s'}",
    definition="Curvature of the last layer with respect to the features it reads, in units of its rows.",
    reference="petzka2021, arXiv:2001.00939",
    units="loss",
    direction=Direction.LOWER_IS_FLATTER,
    loss_degree=1,
    needs=lambda effort, options: (LastTrace(bool(options["normalised"])),),
    evaluate=_evaluate,
    geometry="euclidean",
    claims=frozenset({Invariance.LAYERS, Invariance.UNITS, Invariance.NORMS, Invariance.ORDER}),
    options={"normalised": 1},
    pitfalls=(
        "By default each feature is divided by its deviation over the data (normalised=1); without (normalised=0), as the "
        "formula stands, single units move it. Of two public scripts one divides by the variance. The model is not changed."
    ),
)
