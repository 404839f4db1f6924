"""The Fisher-Rao norm: the weights measured in the metric of the gradients' second moment."""

from isoflat.core.estimate import Estimate
from isoflat.geometry.base import Invariance
from isoflat.measures.base import Measure
from isoflat.measures.entries.statistics import Radial

MEASURE = Measure(
    name="fisher_rao_norm",
    formula=r"\theta^\top C\, \theta = \mathbb{E}\, \langle \nabla \ell_i, \theta \rangle^2",
    definition="How fast the examples' losses change when all weights grow together, as a mean square.",
    reference="liang2019, arXiv:1711.01530",
    units="squared loss",
    loss_degree=2,
    needs=(Radial(),),
    evaluate=lambda findings: Estimate.exact(findings.answers[0].result),
    geometry="euclidean",
    claims=frozenset(Invariance),
    pitfalls=(
        "The square, of the empirical Fisher matrix. Taken from the definition by one forward derivative, so that biases "
        "count: the closed form L² E⟨∂ℓ/∂f, f⟩² holds without biases only, with L the number of layers (public code uses "
        "6 for LeNet-5, which has 5, and takes the root). Constants moved between biases change it."
    ),
)
