"""Length of the gradient in the metric."""

from isoflat.core.estimate import Estimate
from isoflat.core.space import norm
from isoflat.measures.base import Measure
from isoflat.measures.entries.statistics import Gradient

MEASURE = Measure(
    name="gradient_norm",
    formula=r"\lVert E^\top \nabla L \rVert_2",
    definition="Steepest rise of the loss in units of the metric.",
    reference="zhao2022, arXiv:2202.03599; kwon2021, arXiv:2102.11600",
    needs=(Gradient(),),
    evaluate=lambda findings: Estimate.exact(norm(findings.answers[0].result)),
    pitfalls=(
        "Zero at every critical point, sharp or flat: it tells how far training has come. euclidean: ‖g‖; layerwise: "
        "√Σ‖W_i‖²‖g_i‖²; elementwise: ‖|w|·g‖, which is adaptive sharpness to first order, over ρ."
    ),
)
