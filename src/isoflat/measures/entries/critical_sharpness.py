"""How long a step against the gradient may be before the loss is back where it was."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from isoflat.core.errors import UsageError
from isoflat.core.estimate import Estimate, Kind
from isoflat.core.space import inner
from isoflat.measures.base import Direction, Findings, Measure, Reading, Scene
from isoflat.risk.network import exactly
from isoflat.risk.routes.base import gradient

TRIES = 60
"""Doublings of the first guess, and halvings, at most."""

ROUNDING = 100
"""Roundings of the loss, as a sum over the data, that a change must exceed to count."""


@final
@dataclass(frozen=True)
class _Crossing(Reading):
    """Smallest step η along `−E Eᵀ g` at which the loss exceeds its start, between two ends on which rounding has no say.

    In float64 whatever the weights are: near a minimum float32 resolves neither the gradient nor how the loss changes along
    the whole step.
    """

    def answer(self, scene: Scene) -> tuple[float, float]:
        """A dozen forward passes or two: doubling, then halving, until the ends are rtol apart or too close to tell."""
        slope = scene.chart.frame.pull(self._gradient(scene)[:, None])[:, 0]
        direction = scene.chart.frame.push(slope[:, None])[:, 0]
        fall = float(inner([slope], slope)[0])
        if not fall:
            raise UsageError("critical sharpness is a step along the gradient, which is zero here")
        start = self._loss(scene, direction, 0.0)
        noise = ROUNDING * torch.finfo(torch.float64).eps * abs(start)

        def change(step: float) -> float:
            """Of the loss; infinite where it overflows."""
            scene.report(f"step {step:.3g}")
            found = self._loss(scene, direction, step) - start
            return found if math.isfinite(found) else math.inf

        # On a parabola that touches zero the crossing is at 4 L / ‖g‖²: a guess that has the right scale.
        low, high = 0.0, 4 * abs(start) / fall or 1.0
        for _ in range(TRIES):
            risen = change(high)
            if risen > noise:
                break
            low, high = (high if risen < -noise else low), 2 * high
        else:
            raise UsageError("the loss does not rise again however long the step: critical sharpness is not defined")
        step = high
        for _ in range(0 if low else TRIES):
            step /= 2
            risen = change(step)
            if risen < -noise:
                low = step
                break
            high = step if risen > noise else high
        if not low:
            raise UsageError(
                f"along the gradient the loss falls by less than rounding resolves ({noise:.1e}): this is a minimum, and "
                "critical sharpness is not defined there"
            )
        while high - low > scene.effort.rtol * low:
            middle = (low + high) / 2
            risen = change(middle)
            if abs(risen) <= noise:
                break
            low, high = (low, middle) if risen > 0 else (middle, high)
        return low, high

    @staticmethod
    def _gradient(scene: Scene) -> Tensor:
        risk, state = scene.risk, scene.state
        if state.dtype == torch.float64:
            return scene.survey.gradient
        precise = state.to(dtype=torch.float64)
        like = torch.zeros(state.space.size, dtype=torch.int8, device=state.device)
        with exactly(state.device):
            return risk.accumulate(lambda _, batch: gradient(risk, precise, batch), like)

    @staticmethod
    def _loss(scene: Scene, direction: Tensor, step: float) -> float:
        state = scene.state.to(dtype=torch.float64)
        moved = state.space.unflatten(state.vector - step * direction)
        with exactly(state.device):
            return scene.risk.value(state.replace(moved))


def _evaluate(findings: Findings) -> Estimate:
    low, high = findings.answers[0].result
    converged = high - low <= findings.effort.rtol * low
    notes = (
        () if converged else ("not converged: what separates the ends of the interval is below rounding of the loss",)
    )
    return Estimate(4 / (low + high), 2 / high, 2 / low, 1.0, Kind.ENCLOSURE, converged, notes=notes)


MEASURE = Measure(
    name="critical_sharpness",
    formula=r"2 / \eta_c, \quad \eta_c = \min\{\eta > 0 : L(\theta - \eta E E^\top \nabla L) > L(\theta)\}",
    definition="Two over the longest step of steepest descent, in the metric, that does not end above where it began.",
    reference="kalra2026, arXiv:2601.16979; in a metric it is ours",
    units="as the metric's curvature",
    direction=Direction.LOWER_IS_FLATTER,
    loss_degree=1,
    needs=lambda effort, options: (_Crossing(),),
    evaluate=_evaluate,
    pitfalls=(
        "geometry='euclidean' is the measure of the paper for plain gradient descent; its step depends on the optimiser. "
        "For a quadratic loss it is the curvature along the gradient. The first crossing that doubling finds: a loss that "
        "rises and falls again in between is not seen. Undefined where the gradient is zero."
    ),
)
