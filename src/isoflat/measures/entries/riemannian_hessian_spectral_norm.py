"""The covariant Hessian of the metric."""

from isoflat.linalg.eigen.extremes import Which
from isoflat.measures.base import Measure
from isoflat.measures.entries.eigenvalues import curvature, eigenvalue, extremes

MEASURE = Measure(
    name="riemannian_hessian_spectral_norm",
    formula=(
        r"\lVert D(\nabla^2 L + C)D \rVert_2, \quad "
        r"C_i = (g_i W_i^\top + W_i g_i^\top - \langle g_i, W_i\rangle I)/\lVert W_i\rVert^2"
    ),
    definition=(
        "Spectral norm of the covariant Hessian of the layer-wise metric: with the connection term, rescaling "
        "directions lie exactly in its kernel (networks without biases), at a minimum or not."
    ),
    reference="rangamani2019, arXiv:1902.02434; the connection term is ours",
    needs=extremes(Which.MAGNITUDE, covariant=True),
    evaluate=eigenvalue,
    curvature=curvature,
    geometry="layerwise",
    pitfalls="Equal to quotient_spectral_norm at a minimum; elsewhere they differ by at most b.",
)
