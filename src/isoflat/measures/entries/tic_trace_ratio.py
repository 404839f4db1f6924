"""The ratio of traces that stands for Takeuchi's information criterion."""

from isoflat.core.estimate import Estimate
from isoflat.geometry.base import Invariance
from isoflat.measures.base import Findings, Measure
from isoflat.measures.entries.statistics import GaussNewtonDiagonal, RowMoments


def _evaluate(findings: Findings) -> Estimate:
    moments, diagonal = (answer.result for answer in findings.answers)
    curvature = float(diagonal.sum())
    if not curvature:
        return Estimate.exact(0.0, "no curvature: the ratio is not defined, and is given as zero")
    return Estimate.exact(float(moments.sum()) / (curvature * findings.point.examples))


MEASURE = Measure(
    name="tic_trace_ratio",
    formula=r"\frac{\mathrm{tr}\, C}{N\, \mathrm{tr}\, G}",
    definition="Second moment of the gradients over curvature, traces only: what the training loss hides of the test loss.",
    reference="thomas2020, arXiv:1906.07774; naganuma2026, arXiv:2602.23219",
    needs=(RowMoments(), GaussNewtonDiagonal()),
    evaluate=_evaluate,
    geometry="euclidean",
    claims=frozenset({Invariance.ORDER}),
    pitfalls=(
        "Not invariant to any rescaling, unlike tic_diagonal at the same cost. C is the uncentred second moment with the "
        "labels of the data, G the Gauss-Newton matrix. Cockpit leaves 1/N out."
    ),
)
