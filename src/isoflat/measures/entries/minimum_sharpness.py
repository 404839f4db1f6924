"""The smallest trace of the Hessian that rescaling whole layers can give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from scipy import sparse

from isoflat.core.errors import SymmetryViolated, UsageError
from isoflat.core.estimate import Estimate
from isoflat.core.rng import stream
from isoflat.core.state import State
from isoflat.geometry.base import Invariance
from isoflat.measurement.prepare import outputs
from isoflat.measures.base import Asking, DataStatistic, Direction, Findings, Measure, Scene
from isoflat.measures.entries.readings import BlockTraces
from isoflat.symmetry.canonical.potential import Mass, least
from isoflat.symmetry.groups.base import verify
from isoflat.symmetry.groups.scaling import LayerScale


@final
@dataclass(frozen=True)
class _Least(DataStatistic):
    """`min Σ_l t_l/a_l² + b_l/(a_1 ⋯ a_l)²` over factors with product 1: convex in their logarithms."""

    framed = False

    def answer(self, scene: Scene) -> Asking[float]:
        """Block traces by backward passes; then a few Newton steps, without data."""
        state = scene.state
        chain = LayerScale.sequential(state)
        if held := sorted(chain.touches - set(state.parameters)):
            raise UsageError(f"minimum_sharpness rescales all layers, but {', '.join(held)} is held fixed")
        try:
            verify(chain, outputs(scene.risk), state, stream(scene.settings.seed, "chain"))
        except SymmetryViolated as error:
            raise UsageError(
                "minimum_sharpness is for chains of layers with positively homogeneous activations between them, which "
                "this network is not: minimum_sharpness_unitwise takes any"
            ) from error
        traces = yield BlockTraces()
        return least(list(_masses(chain, traces, state)), chain.dimension)[0]


def _masses(chain: LayerScale, traces: dict[str, float], state: State) -> list[Mass]:
    """In coordinates z with `log a_l = z_l − z_{l−1}`, so that biases scale by z_l alone."""
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


def _evaluate(findings: Findings) -> Estimate:
    return Estimate.exact(findings.answers[0].result)


MEASURE = Measure(
    name="minimum_sharpness",
    formula=r"\min_{a} \sum_l t_l / a_l^2 + b_l / (a_1 \cdots a_l)^2, \quad \prod_l a_l = 1",
    definition="Smallest trace of the Hessian among all networks that rescaling whole layers makes of this one.",
    reference="ibayashi2021, arXiv:2106.12612",
    units="loss",
    direction=Direction.LOWER_IS_FLATTER,
    loss_degree=1,
    needs=lambda settings, options: (_Least(),),
    evaluate=_evaluate,
    geometry="euclidean",
    claims=frozenset({Invariance.LAYERS, Invariance.ORDER}),
    pitfalls=(
        "Exact: L·(∏ t_l)^(1/L) without biases, with biases by Newton's method. The authors' solver (10 000 gradient steps) "
        "is still falling where it stops, so that archived values are upper bounds. Single units move it: "
        "minimum_sharpness_unitwise."
    ),
)
