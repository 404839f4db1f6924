"""Spectral norm of the plain Hessian, which a rescaling can move at will."""

from isoflat.linalg.eigen.extremes import Which
from isoflat.measures.base import Measure
from isoflat.measures.entries.eigenvalues import eigenvalue, extremes

MEASURE = Measure(
    name="hessian_spectral_norm",
    formula=r"\lVert \nabla^2 L \rVert_2",
    definition="Largest curvature of the loss in absolute value, in the weights as numbers.",
    reference="dinh2017, arXiv:1703.04933 (why it cannot be trusted)",
    units="loss per squared weight",
    needs=extremes(Which.MAGNITUDE),
    evaluate=eigenvalue,
    geometry="euclidean",
    pitfalls="Multiplying one layer by 10 and dividing the next by 10 keeps the function and can multiply this by 100.",
)
