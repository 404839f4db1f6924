"""The Gauss-Newton matrix's largest eigenvalue in the metric."""

from isoflat.curvature.matrix import Matrix
from isoflat.linalg.eigen.extremes import Which
from isoflat.measures.base import Measure
from isoflat.measures.entries.eigenvalues import curvature, eigenvalue, extremes

MEASURE = Measure(
    name="gauss_newton_spectral_norm",
    formula=r"\lVert E^\top G E \rVert_2, \quad G = \mathbb{E}\, J^\top (\partial^2 \ell/\partial z^2)\, J",
    definition="Largest curvature that the loss has in the output, seen from the weights: never negative where the loss is convex.",
    reference="schraudolph2002; martens2020, arXiv:1412.1193",
    needs=extremes(Which.MAGNITUDE, matrix=Matrix.GAUSS_NEWTON),
    evaluate=eigenvalue,
    curvature=curvature,
    pitfalls="Off a minimum it is not the Hessian's: the difference is the second derivatives of the network times residuals.",
)
