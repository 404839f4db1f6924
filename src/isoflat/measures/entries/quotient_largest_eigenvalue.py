"""Upper end of the quotient spectrum, with its sign."""

from isoflat.linalg.eigen.extremes import Which
from isoflat.measures.base import Measure
from isoflat.measures.entries.eigenvalues import curvature, eigenvalue, extremes

MEASURE = Measure(
    name="quotient_largest_eigenvalue",
    formula=r"\lambda_{\max}(E^\top \nabla^2 L\, E)",
    definition="Largest eigenvalue, sign kept, of the Hessian in units of each tensor's norm.",
    reference="rangamani2019, arXiv:1902.02434",
    needs=extremes(Which.LARGEST),
    evaluate=eigenvalue,
    curvature=curvature,
)
