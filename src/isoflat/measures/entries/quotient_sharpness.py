"""The Hessian's spectral norm in the metric, as a sharpness in Keskar's form."""

from isoflat.core.estimate import Estimate
from isoflat.linalg.eigen.extremes import Which
from isoflat.measures.base import Findings, Measure
from isoflat.measures.entries.eigenvalues import curvature, eigenvalue, extremes


def _evaluate(findings: Findings) -> Estimate:
    """`λ ε² / (2 + 2 L)`."""
    loss, epsilon = findings.point.loss, findings.options["epsilon"]
    return eigenvalue(findings).scaled(epsilon**2 / (2 + 2 * loss))


MEASURE = Measure(
    name="quotient_sharpness",
    formula=r"\frac{\epsilon^2 \lVert E^\top \nabla^2 L\, E \rVert_2}{2 + 2L}",
    definition="Second-order rise of the loss within a ball of relative radius ε, over 1 + loss.",
    reference="rangamani2019, arXiv:1902.02434; keskar2017, arXiv:1609.04836",
    units="none (1 + loss fixes a unit of loss)",
    loss_degree=None,
    needs=extremes(Which.MAGNITUDE),
    evaluate=_evaluate,
    curvature=curvature,
    options={"epsilon": 1e-3},
    pitfalls=(
        "The published scripts disagree by 10^6: one uses ε = 1e-3, the others leave ε² out (ε = 1 here). "
        "Keskar's factor 100 is not included."
    ),
)
