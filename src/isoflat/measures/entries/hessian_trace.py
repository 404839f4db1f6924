"""Trace of the plain Hessian."""

from isoflat.curvature.matrix import Matrix
from isoflat.measures.base import Measure
from isoflat.measures.entries.stochastic import trace, trace_of

MEASURE = Measure(
    name="hessian_trace",
    formula=r"\mathrm{tr}\,\nabla^2 L",
    definition="Sum of all curvatures in the weights as numbers, estimated with random signs.",
    reference="hutchinson1990; yao2020, arXiv:1912.07145",
    units="loss per squared weight",
    needs=trace_of(Matrix.HESSIAN),
    evaluate=trace,
    geometry="euclidean",
    pitfalls=(
        "Rescaling layers moves it without bound above its smallest value on the orbit (minimum_sharpness). PyHessian stops "
        "when two running means agree to 1e-3, which two lucky probes can do: it has no error bar."
    ),
)
