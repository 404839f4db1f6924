"""Feature robustness: the rise of the loss under small random changes of the last layer's features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from isoflat.core.errors import UsageError
from isoflat.core.estimate import Estimate
from isoflat.core.rng import stream
from isoflat.curvature.sweeps import Pass, Sweeps
from isoflat.geometry.base import Invariance
from isoflat.measures.base import DataStatistic, Findings, Measure, Question
from isoflat.measures.entries.last_layer import MEMORY, Head, LastLayer, gain, last_of
from isoflat.measures.entries.stochastic import mean_of
from isoflat.measures.point import EvaluationPoint
from isoflat.measures.settings import Settings
from isoflat.risk.losses import TargetLoss


@final
@dataclass(frozen=True)
class _Changes(DataStatistic):
    """`(L(φ + δ A φ) + L(φ − δ A φ)) / 2 − L(φ)` for a few random A: what is odd in δ drops out.

    Only `W A` enters. Its columns are independent and normal with covariance `W Wᵀ / m`, so that `(W Wᵀ)^½ G` is drawn,
    G of the shape of W.

    Attributes:
        delta: δ.
        draws: number of matrices A.
        seed: seed of these.
    """

    delta: float
    draws: int
    seed: int
    framed = False

    def requires(self, point: EvaluationPoint) -> tuple[Question, ...]:
        """The layer that gives the scores."""
        return (LastLayer(False),)

    def sweep(self, point: EvaluationPoint, *found: Any) -> Pass:
        """One forward pass."""
        risk, state = point.risk, point.state
        head: Head = found[0]
        classes, width = head.weight.shape
        if 8 * self.draws * classes * width > MEMORY:
            raise UsageError(
                f"feature_robustness holds {self.draws} matrices of {classes}×{width} entries, more than {MEMORY >> 30} GiB: "
                "ask for fewer draws"
            )
        loss = risk.loss
        assert isinstance(loss, TargetLoss)  # it is softmax cross-entropy: the head has looked
        drawn = torch.randn(
            self.draws, classes, width, generator=stream(self.seed, "features"), dtype=torch.float64
        ).to(state.device)
        steps = self.delta / math.sqrt(width) * (_root(head.weight) @ drawn)
        bias = state.tensors.get(f"{head.name.removesuffix('weight')}bias")

        def part(sweeps: Sweeps) -> Tensor:
            features, target = last_of(point, sweeps).inputs.double(), sweeps.target
            target = target.double() if target.is_floating_point() else target
            z = F.linear(features, head.weight, None if bias is None else gain(point) * bias.detach().double())

            def total(scores: Tensor) -> Tensor:
                return loss.by_row(scores, target).sum()

            start, changes = total(z), []
            for step in steps:
                moved = features @ step.T
                changes.append((total(z + moved) + total(z - moved)) / 2 - start)
            return torch.stack(changes)

        return Pass(part, self.draws, "changed features")

    def finish(self, point: EvaluationPoint, total: Tensor | None, *found: Any) -> tuple[tuple[float, ...], str]:
        """Changes draw by draw, and the name of the layer's weight."""
        assert total is not None
        return tuple(total.tolist()), found[0].name


def _root(weight: Tensor) -> Tensor:
    """`(W Wᵀ)^½`, which does not depend on the order of the features."""
    left, sizes, _ = torch.linalg.svd(weight, full_matrices=False)
    return (left * sizes) @ left.T


def _needs(settings: Settings, options: Mapping[str, float]) -> tuple[DataStatistic, ...]:
    delta, draws = options["delta"], options["draws"]
    if not delta > 0 or not draws >= 2 or draws != int(draws):
        raise UsageError(
            "feature_robustness needs a positive delta and a whole number of at least 2 draws: "
            f"feature_robustness(delta=0.01, draws=32), got {delta:g} and {draws:g}"
        )
    return (_Changes(delta, int(draws), settings.seed),)


def _evaluate(findings: Findings) -> Estimate:
    samples, name = findings.answers[0].result
    return mean_of(findings, samples, f"features are those that {name} reads", remedy="raise the option draws")


MEASURE = Measure(
    name="feature_robustness",
    formula=r"\mathbb{E}_A\, L(W(\varphi + \delta A \varphi)) - L(W \varphi), \quad A_{ij} \sim \mathcal{N}(0, 1/m)",
    definition="Rise of the loss when the features of the last layer are changed at random by a fraction delta of their length.",
    reference="petzka2021, arXiv:2001.00939",
    needs=_needs,
    evaluate=_evaluate,
    geometry="euclidean",
    claims=frozenset({Invariance.LAYERS, Invariance.NORMS, Invariance.ORDER}),
    provisional=(
        "the paper's feature matrices are written from memory: Gaussian ones, with E‖Aφ‖² = ‖φ‖² and drawn in pairs ±A, are "
        "our choice"
    ),
    options={"delta": 0.01, "draws": 32},
    pitfalls=(
        "For small δ it is δ²/(2m) times relative_flatness(normalised=0), m the number of features: features of another scale "
        "move it. Orthogonal matrices would give the same there. What is odd in δ cancels between A and −A, so that the slope "
        "off a minimum does not enter."
    ),
)
