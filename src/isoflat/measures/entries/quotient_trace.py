"""Trace of the Hessian in the metric."""

from isoflat.curvature.matrix import Matrix
from isoflat.measures.base import Measure
from isoflat.measures.entries.stochastic import trace, trace_of

MEASURE = Measure(
    name="quotient_trace",
    formula=r"\mathrm{tr}(E^\top \nabla^2 L\, E)",
    definition="Sum of all curvatures in units of the metric, estimated with random signs.",
    reference="rangamani2019, arXiv:1902.02434; hutchinson1990",
    needs=trace_of(Matrix.HESSIAN),
    evaluate=trace,
    pitfalls="Off a minimum the covariant trace differs by Σ(2 − n_i)⟨g_i, W_i⟩, n_i the size of tensor i (layer-wise).",
)
