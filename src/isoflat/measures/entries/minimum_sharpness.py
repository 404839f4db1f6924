"""The smallest trace of the Hessian that rescaling whole layers can give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from isoflat.core.errors import SymmetryViolated, UsageError
from isoflat.core.estimate import Estimate
from isoflat.core.rng import stream
from isoflat.core.state import State
from isoflat.geometry.base import Invariance
from isoflat.measures.base import DataStatistic, Measure, Question
from isoflat.measures.entries.statistics import BlockTraces
from isoflat.measures.point import EvaluationPoint
from isoflat.symmetry.canonical.potential import Mass, least
from isoflat.symmetry.groups.base import verify
from isoflat.symmetry.groups.scaling import LayerScale


@final
@dataclass(frozen=True)
class _LeastOverLayers(DataStatistic):
    """`min Σ_l t_l/a_l² + b_l/(a_1 ⋯ a_l)²` over factors with product 1: convex in their logarithms."""

    framed = False

    def requires(self, point: EvaluationPoint) -> tuple[Question, ...]:
        """Block traces, once the network is seen to be a chain of layers."""
        state = point.state
        chain = LayerScale.sequential(state)
        if held := sorted(chain.touches - set(state.parameters)):
            raise UsageError(f"minimum_sharpness rescales all layers, but {', '.join(held)} is held fixed")
        try:
            verify(chain, point.risk.outputs(), state, stream(point.settings.seed, "chain"))
        except SymmetryViolated as error:
            raise UsageError(
                "minimum_sharpness is for chains of layers with positively homogeneous activations between them, which "
                "this network is not: minimum_sharpness_unitwise takes any"
            ) from error
        return (BlockTraces(),)

    def finish(self, point: EvaluationPoint, total: Tensor | None, *found: Any) -> float:
        """A few Newton steps, without data."""
        chain = LayerScale.sequential(point.state)
        return least(list(_masses(chain, found[0], point.state)), chain.dimension)[0]


def _masses(chain: LayerScale, traces: dict[str, float], state: State) -> list[Mass]:
    """Block traces in coordinates z with `log a_l = z_l − z_{l−1}`, so that biases scale by z_l alone."""
    found = []
    for place, (weight, bias) in enumerate(zip(chain.weights, chain.biases, strict=True)):
        row = np.zeros((2, chain.dimension + 2))
        row[:, place + 1] = 1
        row[0, place] -= 1
        for name, form in ((weight, row[:1]), (bias, row[1:])):
            if name is not None:
                inner = sparse.csr_matrix(form[:, 1:-1])
                found.append(Mass(name, torch.full((1, 1, 1), traces[name], dtype=torch.float64), inner, 0 * inner, 1))
    return found


MEASURE = Measure(
    name="minimum_sharpness",
    formula=r"\min_{a} \sum_l t_l / a_l^2 + b_l / (a_1 \cdots a_l)^2, \quad \prod_l a_l = 1",
    definition="Smallest trace of the Hessian among all networks that rescaling whole layers makes of this one.",
    reference="ibayashi2021, arXiv:2106.12612",
    needs=(_LeastOverLayers(),),
    evaluate=lambda findings: Estimate.exact(findings.answers[0].result),
    geometry="euclidean",
    claims=frozenset({Invariance.LAYERS, Invariance.ORDER}),
    pitfalls=(
        "Exact: L·(∏ t_l)^(1/L) without biases, with biases by Newton's method. The authors' solver (10 000 gradient steps) "
        "is still falling where it stops, so that archived values are upper bounds. Single units move it: "
        "minimum_sharpness_unitwise."
    ),
)
