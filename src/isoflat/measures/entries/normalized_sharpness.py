"""Normalized sharpness: curvature and size of each layer, balanced over rows and columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from scipy import sparse
from torch import Tensor

from isoflat.core.errors import UsageError
from isoflat.core.estimate import Estimate
from isoflat.geometry.base import Invariance
from isoflat.measures.base import DataStatistic, Measure, Question
from isoflat.measures.entries.statistics import GaussNewtonDiagonal
from isoflat.measures.point import EvaluationPoint
from isoflat.symmetry.canonical.potential import Mass, least


@final
@dataclass(frozen=True)
class _BestNoise(DataStatistic):
    """Sum over the weight tensors of `min Σ_ij h_ij r_i c_j + w_ij² / (r_i c_j)` over positive r and c."""

    framed = False

    def requires(self, point: EvaluationPoint) -> tuple[Question, ...]:
        """The diagonal of the Gauss-Newton matrix."""
        return (GaussNewtonDiagonal(),)

    def finish(self, point: EvaluationPoint, total: Tensor | None, *found: Any) -> float:
        """Newton's method, without data."""
        diagonal = point.state.space.unflatten(found[0])
        weights = {name: tensor for name, tensor in point.state.parameters.items() if tensor.ndim >= 2}
        if not weights:
            raise UsageError("normalized_sharpness is a sum over weight matrices, and no trainable tensor is one")
        return sum(_least_of_layer(name, diagonal[name], tensor) for name, tensor in weights.items())


def _least_of_layer(name: str, curvature: Tensor, weight: Tensor) -> float:
    """The minimum for one weight tensor; kernels of convolutions are summed over their window first."""
    h, w = (part.double().cpu().flatten(2).sum(2) if part.ndim > 2 else part.double().cpu() for part in (
        curvature, weight.detach().double().square()
    ))  # fmt: skip
    rows, columns = h.shape
    # One of the scales is redundant (r → t r, c → c / t): the last column's is 1.
    size = rows + columns - 1
    first = sparse.csr_matrix(sparse.eye(rows, size))
    second = sparse.csr_matrix(sparse.eye(columns, size, k=rows))
    up = Mass(name, h[None], first, second, 1)
    down = Mass(name, w[None], -first, second, -1)
    return least([up, down], size)[0]


MEASURE = Measure(
    name="normalized_sharpness",
    formula=r"\sum_l \min_{r, c > 0} \sum_{ij} h^l_{ij} r_i c_j + (w^l_{ij})^2 / (r_i c_j)",
    definition="Expected rise of the loss plus the size of weights, at the best scale of noise for each row and column.",
    reference="tsuzuku2020, arXiv:1901.04653",
    units="√loss · weight; see pitfalls",
    loss_degree=0.5,
    needs=(_BestNoise(),),
    evaluate=lambda findings: Estimate.exact(findings.answers[0].result),
    geometry="euclidean",
    claims=frozenset({Invariance.LAYERS, Invariance.UNITS, Invariance.NORMS, Invariance.ORDER}),
    provisional=(
        "The preprint's form. The conference paper minimises another function, over column scales only, and the two do not "
        "agree; code of the first authors was not found."
    ),
    pitfalls=(
        "h is the Gauss-Newton matrix's diagonal (the Hessian's may be negative). Biases and gains are left out. Values of "
        "networks of different widths have no common scale."
    ),
)
