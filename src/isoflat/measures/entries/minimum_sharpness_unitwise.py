"""The smallest trace of the curvature that rescaling single units can give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from isoflat.core.estimate import Estimate
from isoflat.geometry.base import Invariance
from isoflat.geometry.traced import Traced
from isoflat.measures.base import DataStatistic, Findings, Measure, Question
from isoflat.measures.entries.statistics import GaussNewtonDiagonal
from isoflat.measures.point import EvaluationPoint
from isoflat.symmetry.canonical.potential import Mass, least


@final
@dataclass(frozen=True)
class _LeastOverUnits(DataStatistic):
    """`min Σ_j G_jj / s_j²` over all scalings s of units that keep the function: convex in their logarithms."""

    def requires(self, point: EvaluationPoint) -> tuple[Question, ...]:
        """The diagonal of the Gauss-Newton matrix."""
        return (GaussNewtonDiagonal(),)

    def finish(self, point: EvaluationPoint, total: Tensor | None, *found: Any) -> tuple[float, tuple[str, ...]]:
        """Newton's method, without data."""
        assert isinstance(point.geometry, Traced)
        assert point.geometry.found is not None
        group = point.geometry.found.scaling
        diagonal = point.state.space.unflatten(found[0])
        masses, seen = [], set()
        for e in group.tensors:
            if e.name in diagonal:
                seen.add(e.name)
                masses.append(Mass(e.name, diagonal[e.name].cpu().reshape(e.view).sum(3), e.first, e.second, e.sign))
        fixed = sum(float(part.sum()) for name, part in diagonal.items() if name not in seen)
        value, gone = least(masses, group.size)
        return fixed + value, gone


def _evaluate(findings: Findings) -> Estimate:
    value, gone = findings.answers[0].result
    notes = [f"scaled to nothing, since what reads them does not see their scale: {', '.join(gone)}"] if gone else []
    return Estimate.exact(value, *notes)


MEASURE = Measure(
    name="minimum_sharpness_unitwise",
    formula=r"\min_{s} \sum_j G_{jj} / s_j^2",
    definition="Smallest trace of the curvature among all networks that rescaling single units makes of this one.",
    reference="ibayashi2021, arXiv:2106.12612 (for whole layers); for units it is ours",
    needs=(_LeastOverUnits(),),
    evaluate=_evaluate,
    geometry="auto",
    claims=frozenset({Invariance.LAYERS, Invariance.UNITS, Invariance.NORMS, Invariance.ORDER}),
    pitfalls=(
        "G is the Gauss-Newton matrix: the Hessian's trace where the network is piecewise linear. Weights before a "
        "normalisation can be scaled up until they count for nothing: they are listed."
    ),
)
