"""Lower end of the quotient spectrum, with its sign."""

from isoflat.linalg.eigen.extremes import Which
from isoflat.measures.base import Direction, Measure
from isoflat.measures.entries.eigenvalues import curvature, eigenvalue, extremes

MEASURE = Measure(
    name="quotient_smallest_eigenvalue",
    formula=r"\lambda_{\min}(E^\top \nabla^2 L\, E)",
    definition="Smallest eigenvalue, sign kept: negative where the point is not a minimum along some direction.",
    reference="rangamani2019, arXiv:1902.02434",
    direction=Direction.HIGHER_IS_FLATTER,
    needs=extremes(Which.SMALLEST),
    evaluate=eigenvalue,
    curvature=curvature,
    pitfalls="Its size is often far below the largest eigenvalue's, so a relative tolerance costs many more products.",
)
