"""Largest eigenvalue of the gradients' second moment in the metric."""

from isoflat.curvature.matrix import Matrix
from isoflat.linalg.eigen.extremes import Which
from isoflat.measures.base import Measure
from isoflat.measures.entries.eigenvalues import eigenvalue, extremes

MEASURE = Measure(
    name="fisher_spectral_norm",
    formula=r"\lVert E^\top C E \rVert_2, \quad C = \mathbb{E}\, \nabla\ell_i \nabla\ell_i^\top",
    definition="Largest second moment of the examples' gradients along a direction, labels of the data.",
    reference="kunstner2019, arXiv:1905.12558; thomas2020, arXiv:1906.07774",
    units="squared loss",
    loss_degree=2,
    needs=extremes(Which.MAGNITUDE, matrix=Matrix.EMPIRICAL_FISHER),
    evaluate=eigenvalue,
    pitfalls="The *empirical* Fisher matrix: with the labels of the data, not of the model; it vanishes where all are fitted.",
)
