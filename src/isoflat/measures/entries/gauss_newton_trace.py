"""The Gauss-Newton matrix's trace in the metric."""

from isoflat.curvature.matrix import Matrix
from isoflat.measures.base import Measure
from isoflat.measures.entries.stochastic import trace, trace_of

MEASURE = Measure(
    name="gauss_newton_trace",
    formula=r"\mathrm{tr}(E^\top G E), \quad G = \mathbb{E}\, J^\top (\partial^2 \ell/\partial z^2)\, J",
    definition="Sum of the curvatures that the loss has in the output, seen from the weights.",
    reference="schraudolph2002; martens2020, arXiv:1412.1193",
    needs=trace_of(Matrix.GAUSS_NEWTON),
    evaluate=trace,
    pitfalls=(
        "Equal to the Hessian's trace for piecewise linear networks only; elsewhere it leaves out what the network itself "
        "curves. In geometry='euclidean' it is in units of loss per squared weight, and rescaling moves it."
    ),
)
