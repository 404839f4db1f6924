"""Parts of PAC-Bayes bounds: distance from the weights before training, curvature, rows, and closed forms.

With probability 1 − δ over N independent examples, for a prior P fixed before they are seen, every posterior Q and a loss in
[0, 1]: `E_Q L ≤ E_Q L̂ + √((KL(Q‖P) + ln(2√N/δ)) / 2N)` (McAllester; Maurer's constant), and for a β > 0 fixed beforehand
`E_Q L ≤ E_Q L̂ + (KL(Q‖P) + ln(1/δ)) / (βN) + β/8` (Catoni; Alquier and others). A bound is small where a wide Q costs little:
where the loss is flat.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from isoflat.core.errors import UsageError
from isoflat.curvature.sweeps import check_softmax
from isoflat.measures.base import DataStatistic, Needs, Question
from isoflat.measures.entries.statistics import GaussNewtonDiagonal
from isoflat.measures.point import EvaluationPoint
from isoflat.measures.settings import Settings

BOUNDED = (
    "It bounds losses that lie in [0, 1], such as cross-entropy cut off and divided by its largest value: with others it is a "
    "measure of complexity, no guarantee. sigma, and all else that the prior depends on, must be chosen without these data."
)
"""Warning that every bound carries."""


@final
@dataclass(frozen=True)
class BoundTerms:
    """Terms that a bound is evaluated from.

    Attributes:
        curvature: h, the diagonal of the loss's Gauss-Newton matrix, shape `(n,)`, float64.
        distance: `‖θ − θ₀‖²`.
        rows: N.
    """

    curvature: Tensor
    distance: float
    rows: int


@final
@dataclass(frozen=True)
class FromInitial(DataStatistic):
    """Terms for a prior around the weights before training."""

    framed = False

    def requires(self, point: EvaluationPoint) -> tuple[Question, ...]:
        """The diagonal of the Gauss-Newton matrix, where there are weights before training."""
        if point.initial is None:
            raise UsageError(
                "the prior is centred at the weights before training, which were not given: pass initial= (--initial), a copy of the "
                "network from before training or its state_dict"
            )
        check_mean(point)
        return (GaussNewtonDiagonal(),)

    def finish(self, point: EvaluationPoint, total: Tensor | None, *found: Any) -> BoundTerms:
        """The terms."""
        assert point.initial is not None
        distance = float((point.state.vector.double() - point.initial).square().sum())
        return BoundTerms(found[0], distance, point.survey.rows)


def bound_terms(name: str) -> Needs:
    """The question for the terms of a bound around the weights before training, as a measure's `needs`.

    Args:
        name: the measure, named where its parameters have no meaning.
    """

    def needs(settings: Settings, options: Mapping[str, float]) -> tuple[Question, ...]:
        check_options(name, options)
        return (FromInitial(),)

    return needs


def check_mean(point: EvaluationPoint) -> None:
    """Refuse a loss that is no mean of softmax cross-entropies of examples: for others no bound is known here.

    Raises:
        UsageError: it is not.
    """
    if not point.risk.loss.averages:
        raise UsageError("a bound is on the mean loss of an example, and this loss is a sum: use reduction='mean'")
    check_softmax(point.risk, point.state)


def check_options(name: str, options: Mapping[str, float]) -> None:
    """Deviation, probability and, where there is one, inverse temperature.

    Raises:
        UsageError: one of them has no meaning.
    """
    if options["sigma"] > 0 and 0 < options["delta"] < 1 and options.get("beta", 1.0) > 0:
        return
    given = ", ".join(f"{key}={value:g}" for key, value in options.items())
    raise UsageError(f"{name} needs sigma > 0, delta between 0 and 1, and beta > 0 if it has one; got {given}")


def mcallester(complexity: float, rows: int, delta: float) -> float:
    """`√((KL + ln(2√N/δ)) / 2N)`.

    >>> round(mcallester(0.0, 1, 2 / 2.718281828459045), 12)  # √(1/2)
    0.707106781187
    """
    return math.sqrt((complexity + math.log(2 * math.sqrt(rows) / delta)) / (2 * rows))


def catoni(complexity: float, rows: int, delta: float, beta: float) -> float:
    """`(K + ln(1/δ)) / (βN) + β/8`, K the complexity with what the posterior's width costs in training loss.

    >>> catoni(3.0, 2, 1.0, 0.5)
    3.0625
    """
    return (complexity - math.log(delta)) / (beta * rows) + beta / 8


def effective_curvature(terms: BoundTerms, sigma: float) -> float:
    """`½ Σ ln max(h σ², 1) + ‖θ − θ₀‖² / 2σ²`.

    Bounds `KL(N(θ, diag s) ‖ N(θ₀, σ² I))` with `s = min(1/h, σ²)` from above, by `½ Σ (1 − s/σ²)`.
    """
    sharp = (terms.curvature * sigma**2).clamp(min=1.0)
    return 0.5 * float(sharp.log().sum()) + terms.distance / (2 * sigma**2)


def curvature_posterior(terms: BoundTerms, sigma: float, beta: float) -> float:
    """`min_s βN/2 Σ h s + KL(N(θ, diag s) ‖ N(θ₀, σ² I)) = ½ Σ ln(1 + βN h σ²) + ‖θ − θ₀‖² / 2σ²`.

    Reached at `1/s = βN h + 1/σ²`.

    >>> round(curvature_posterior(BoundTerms(torch.tensor([2.718281828459045 - 1]), 4.0, 1), 1.0, 1.0), 6)
    2.5
    """
    spread = torch.log1p(beta * terms.rows * sigma**2 * terms.curvature).sum()
    return 0.5 * float(spread) + terms.distance / (2 * sigma**2)
