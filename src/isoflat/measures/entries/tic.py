"""Takeuchi's information criterion: invariant to every linear change of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from isoflat.core.errors import UsageError
from isoflat.core.estimate import Estimate
from isoflat.curvature.fisher import counts_of
from isoflat.curvature.gauss_newton import gauss_newton
from isoflat.geometry.base import Invariance
from isoflat.measures.base import DataStatistic, Findings, Measure
from isoflat.measures.point import EvaluationPoint
from isoflat.risk.network import exactly
from isoflat.risk.ranks import BatchSum
from isoflat.risk.rows import row_gradients

MOST = 3000
"""Weights up to which both matrices are formed."""


@final
@dataclass(frozen=True)
class _Full(DataStatistic):
    """`tr(G⁺ C)`, both matrices formed."""

    framed = False

    def finish(self, point: EvaluationPoint, total: Tensor | None, *found: Any) -> tuple[float, int]:
        """Value and rank of G, from as many products as there are weights and a gradient of each row."""
        risk, state = point.risk, point.state
        n = state.space.size
        if n > MOST:
            raise UsageError(f"tic forms matrices of {n}×{n} entries, and takes up to {MOST} weights: use tic_diagonal")
        point.report("Gauss-Newton matrix and gradients of single rows")
        with exactly(state.device):
            products = gauss_newton(risk, state)
            eye = torch.eye(n, dtype=state.dtype, device=state.device)
            matrix = torch.cat([products.products(part) for part in eye.split(64, dim=1)], dim=1)
            values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
            # The usual numerical rank: below lies rounding of the products.
            kept = values > n * torch.finfo(state.dtype).eps * values[-1]
            roots = vectors[:, kept] / values[kept].sqrt()

            def per_batch(index: int, batch: Any) -> BatchSum:
                sums, count = torch.zeros(1, dtype=torch.float64, device=state.device), 0.0
                for piece, gradients in row_gradients(risk, state, batch):
                    counts = counts_of(risk, state, piece).to(state.device)
                    shares = torch.where(counts > 0, 1 / counts, 0)
                    sums += (gradients.double() @ roots).square().sum(1) @ shares
                    count += float(counts.sum())
                return BatchSum(sums, count)

            trace = risk.accumulate(per_batch, torch.zeros(1, dtype=torch.int8, device=state.device))
        return float(trace), int(kept.sum())


def _evaluate(findings: Findings) -> Estimate:
    trace, rank = findings.answers[0].result
    return Estimate.exact(trace / findings.point.examples, f"rank of the Gauss-Newton matrix: {rank}")


MEASURE = Measure(
    name="tic",
    formula=r"\mathrm{tr}(G^{+} C) / N",
    definition="Second moment of the gradients over curvature, in every direction: what the training loss hides of the test loss.",
    reference="thomas2020, arXiv:1906.07774; takeuchi1976",
    needs=(_Full(),),
    evaluate=_evaluate,
    geometry="euclidean",
    claims=frozenset(Invariance),
    pitfalls=(
        f"Up to {MOST} weights. G is the Gauss-Newton matrix, by its pseudo-inverse on its numerical rank; where that is not "
        "clear, nor is the number."
    ),
)
