"""Frobenius norm of the plain Hessian."""

from isoflat.curvature.matrix import Matrix
from isoflat.measures.base import Measure
from isoflat.measures.entries.stochastic import frobenius, frobenius_of

MEASURE = Measure(
    name="hessian_frobenius",
    formula=r"\lVert \nabla^2 L \rVert_F",
    definition="Root of the sum of squares of all curvatures in the weights as numbers.",
    reference="wu2022, arXiv:2207.02628",
    units="loss per squared weight",
    needs=frobenius_of(Matrix.HESSIAN),
    evaluate=frobenius,
    geometry="euclidean",
    pitfalls="Rescaling layers moves it without bound.",
)
