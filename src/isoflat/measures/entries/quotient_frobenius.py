"""Frobenius norm of the Hessian in the metric."""

from isoflat.curvature.matrix import Matrix
from isoflat.measures.base import Measure
from isoflat.measures.entries.stochastic import frobenius, frobenius_of

MEASURE = Measure(
    name="quotient_frobenius",
    formula=r"\lVert E^\top \nabla^2 L\, E \rVert_F",
    definition="Root of the sum of squares of all curvatures in units of the metric.",
    reference="rangamani2019, arXiv:1902.02434; hutchinson1990",
    needs=frobenius_of(Matrix.HESSIAN),
    evaluate=frobenius,
    pitfalls="Between the spectral norm and √rank times it; signs of curvatures are lost.",
)
