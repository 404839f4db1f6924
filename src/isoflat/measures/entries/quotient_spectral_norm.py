"""The Hessian's spectral norm in the metric: the number of Rangamani and others."""

from isoflat.linalg.eigen.extremes import Which
from isoflat.measures.base import Measure
from isoflat.measures.entries.eigenvalues import curvature, eigenvalue, extremes

MEASURE = Measure(
    name="quotient_spectral_norm",
    formula=r"\lVert E^\top \nabla^2 L\, E \rVert_2, \quad E = \mathrm{blockdiag}(\lVert W_i\rVert_F I)",
    definition="Largest curvature of the loss in absolute value, along moves measured in units of each tensor's norm.",
    reference="rangamani2019, arXiv:1902.02434",
    needs=extremes(Which.MAGNITUDE),
    evaluate=eigenvalue,
    curvature=curvature,
    pitfalls=(
        "Away from a minimum it is not the Riemannian Hessian's norm; the two differ by at most b, which is printed "
        "beside it. Growing all weights of a separating network lowers it and the loss together: compare at equal loss."
    ),
)
