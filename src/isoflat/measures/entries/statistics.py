"""Statistics of the data that several measures share: answers that need no solver."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from isoflat.curvature.block_trace import check_blocks
from isoflat.curvature.diagonal import diagonal_pass, moment_pass
from isoflat.curvature.fisher import counts_of
from isoflat.curvature.sweeps import Pass
from isoflat.linalg.maps import Diagonal as Scaled
from isoflat.linalg.maps import Identity
from isoflat.measures.base import DataStatistic, Question
from isoflat.measures.point import EvaluationPoint
from isoflat.risk.network import exactly
from isoflat.risk.ranks import BatchSum
from isoflat.risk.rows import derivative, row_gradients


@final
@dataclass(frozen=True)
class Gradient(DataStatistic):
    """`Eᵀ ∇L`, shape `(m,)`, float64: known since the survey."""

    def finish(self, point: EvaluationPoint, total: Tensor | None, *found: Any) -> Tensor:
        """The survey's gradient through the frame."""
        return point.chart.frame.pull(point.survey.gradient[:, None])[:, 0]


@final
@dataclass(frozen=True)
class RowMoments(DataStatistic):
    """The diagonal of the gradients' second moment in the weights as they are (`curvature.fisher`): shape `(n,)`, float64."""

    framed = False

    def sweep(self, point: EvaluationPoint, *found: Any) -> Pass:
        """A backward pass, and gradients of single rows for what is no linear layer."""
        return replace(moment_pass(point.risk, point.state), status="gradients of single rows")

    def finish(self, point: EvaluationPoint, total: Tensor | None, *found: Any) -> Tensor:
        """The sum itself."""
        assert total is not None
        return total


@final
@dataclass(frozen=True)
class FramedMoments(DataStatistic):
    """The diagonal of `Eᵀ C E`, C the second moment of the rows' gradients: shape `(m,)`, float64."""

    def requires(self, point: EvaluationPoint) -> tuple[Question, ...]:
        """The diagonal of C where E is diagonal."""
        return (RowMoments(),) if isinstance(point.chart.frame, Identity | Scaled) else ()

    def finish(self, point: EvaluationPoint, total: Tensor | None, *found: Any) -> Tensor:
        """The diagonal of C in the frame's units; else the gradient of each row through E."""
        risk, state, frame = point.risk, point.state, point.chart.frame
        if found:
            units = frame.pull(torch.ones(frame.rows, 1, dtype=torch.float64, device=state.device))[:, 0]
            return units.square() * found[0]

        def per_batch(index: int, batch: Any) -> BatchSum:
            total, count = torch.zeros(frame.columns, dtype=torch.float64, device=state.device), 0.0
            for piece, gradients in row_gradients(risk, state, batch):
                counts = counts_of(risk, state, piece).to(state.device)
                total += frame.pull(gradients.T.double()).square() @ torch.where(counts > 0, 1 / counts, 0)
                count += float(counts.sum())
            return BatchSum(total, count)

        point.report("gradients of single rows")
        with exactly(state.device):
            return risk.accumulate(per_batch, torch.zeros(frame.columns, dtype=torch.int8, device=state.device))


@final
@dataclass(frozen=True)
class GaussNewtonDiagonal(DataStatistic):
    """The Gauss-Newton matrix's diagonal in the weights as they are, shape `(n,)`, float64."""

    framed = False

    def sweep(self, point: EvaluationPoint, *found: Any) -> Pass:
        """A backward pass for each class."""
        return replace(diagonal_pass(point.risk, point.state), status="diagonal of the Gauss-Newton matrix")

    def finish(self, point: EvaluationPoint, total: Tensor | None, *found: Any) -> Tensor:
        """The sum itself."""
        assert total is not None
        return total


@final
@dataclass(frozen=True)
class BlockTraces(DataStatistic):
    """Exact traces of the Hessian's diagonal blocks, by tensor: those of the Gauss-Newton matrix, where these are the same."""

    framed = False

    def requires(self, point: EvaluationPoint) -> tuple[Question, ...]:
        """The diagonal, once the network is seen to be linear in each tensor."""
        check_blocks(point.risk, point.state, list(point.state.parameters))
        return (GaussNewtonDiagonal(),)

    def finish(self, point: EvaluationPoint, total: Tensor | None, *found: Any) -> dict[str, float]:
        """Sums over the diagonal."""
        parts = point.state.space.unflatten(found[0])
        return {name: float(part.sum()) for name, part in parts.items()}


@final
@dataclass(frozen=True)
class Radial(DataStatistic):
    """`Σ_i ⟨∇ total_i, θ⟩² / c_i`, over what a mean divides by: `θᵀ C θ`."""

    framed = False

    def finish(self, point: EvaluationPoint, total: Tensor | None, *found: Any) -> float:
        """One forward derivative."""
        risk, state = point.risk, point.state

        def per_batch(index: int, batch: Any) -> BatchSum:
            counts = counts_of(risk, state, batch).to(state.device)
            total = (
                derivative(risk, state, batch, state.vector).double().square() * torch.where(counts > 0, 1 / counts, 0)
            ).sum()
            return BatchSum(total.reshape(1), float(counts.sum()))

        point.report("slopes of single rows")
        with exactly(state.device), torch.no_grad():
            return float(risk.accumulate(per_batch, torch.zeros(1, dtype=torch.int8, device=state.device)))
