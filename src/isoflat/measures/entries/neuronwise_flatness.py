"""Curvature of every neuron in units of its own weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

from isoflat.core.errors import UsageError
from isoflat.core.estimate import Estimate
from isoflat.curvature.block_trace import check_blocks
from isoflat.geometry.base import Invariance
from isoflat.measures.base import DataStatistic, Findings, Measure, Question
from isoflat.measures.entries.statistics import GaussNewtonDiagonal
from isoflat.measures.point import EvaluationPoint

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weight has a row for each neuron."""


@final
@dataclass(frozen=True)
class _Neurons(DataStatistic):
    """`Σ_l Σ_j ‖w_j‖² tr H_jj`, and the names of weight matrices that have no neurons."""

    framed = False

    def requires(self, point: EvaluationPoint) -> tuple[Question, ...]:
        """The Gauss-Newton matrix's diagonal, once the network is seen to be linear in each weight."""
        names = _with_neurons(point)
        if not names:
            raise UsageError("neuronwise_flatness needs a trainable torch.nn.Linear or convolution: here there is none")
        check_blocks(point.risk, point.state, names)
        return (GaussNewtonDiagonal(),)

    def finish(self, point: EvaluationPoint, total: Tensor | None, *found: Any) -> tuple[float, tuple[str, ...]]:
        """Sums over the diagonal, and matrices that have no neurons."""
        state, names, value = point.state, _with_neurons(point), 0.0
        diagonal = state.space.unflatten(found[0])
        for name in names:
            sizes = state.parameters[name].detach().double().square().flatten(1).sum(1)
            value += float(sizes @ diagonal[name].flatten(1).sum(1))
        rest = [name for name, tensor in state.parameters.items() if tensor.ndim > 1 and name not in names]
        return value, tuple(rest)


def _with_neurons(point: EvaluationPoint) -> list[str]:
    """Trainable weights that have a row for each neuron."""
    owners = {
        f"{path}.weight" if path else "weight"
        for path, module in point.risk.network.module.named_modules()
        if isinstance(module, LAYERS)
    }
    return [name for name in point.state.parameters if name in owners]


def _evaluate(findings: Findings) -> Estimate:
    value, rest = findings.answers[0].result
    notes = [f"belongs to no linear layer or convolution, and is left out: {', '.join(rest)}"] if rest else []
    return Estimate.exact(value, *notes)


MEASURE = Measure(
    name="neuronwise_flatness",
    formula=r"\sum_l \sum_j \lVert w_j^l \rVert^2\, \mathrm{tr}\, H_{jj}^l",
    definition="Trace of each neuron's own block of the Hessian in units of its incoming weights, over all neurons.",
    reference="petzka2019, arXiv:1912.00058",
    needs=(_Neurons(),),
    evaluate=_evaluate,
    geometry="euclidean",
    claims=frozenset({Invariance.LAYERS, Invariance.NORMS, Invariance.ORDER}),
    provisional=(
        "written from memory of the paper: that neurons count by traces rather than largest eigenvalues, and layers all "
        "alike, is unverified"
    ),
    pitfalls=(
        "A neuron's own scale cancels, but not that of the single neurons it reads: rescaling units moves it, layers do not. "
        "Exact for piecewise linear networks under softmax cross-entropy, and refused elsewhere. Biases do not enter."
    ),
)
