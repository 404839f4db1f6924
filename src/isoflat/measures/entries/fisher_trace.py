"""The trace of the gradients' second moment in the metric."""

from isoflat.core.estimate import Estimate
from isoflat.measures.base import Measure
from isoflat.measures.entries.statistics import FramedMoments

MEASURE = Measure(
    name="fisher_trace",
    formula=r"\mathbb{E}\, \lVert E^\top \nabla \ell_i \rVert^2",
    definition="Mean square of the examples' gradients in units of the metric, labels of the data.",
    reference="thomas2020, arXiv:1906.07774; kunstner2019, arXiv:1905.12558",
    units="squared loss",
    loss_degree=2,
    needs=(FramedMoments(),),
    evaluate=lambda findings: Estimate.exact(float(findings.answers[0].result.sum())),
    pitfalls="The trace of the *empirical* Fisher matrix: it vanishes where all examples are fitted, sharp or flat.",
)
