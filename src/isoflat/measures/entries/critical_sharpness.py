"""Critical sharpness: two over the length of a step against the gradient after which the loss is back where it was."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, final

import torch

from isoflat.core.errors import UsageError
from isoflat.core.estimate import Estimate, Kind
from isoflat.core.space import inner
from isoflat.measures.base import Findings, Measure, Question, Steps
from isoflat.measures.point import EvaluationPoint
from isoflat.risk.moved import AtWeights

TRIES = 60
"""Doublings of the first guess, and halvings, at most."""

ROUNDING = 100
"""Roundings of the loss, as a sum over the data, that a change must exceed to count."""


@final
@dataclass(frozen=True)
class _Crossing(Question):
    """Smallest step η along `−E Eᵀ g` at which the loss exceeds its start, between two ends on which rounding has no say.

    In float64 whatever the weights are: near a minimum float32 resolves neither the gradient nor how the loss changes along
    the whole step.
    """

    def steps(self, point: EvaluationPoint, *found: Any) -> Steps[tuple[float, float]]:
        """Half a dozen forward passes: doubling until the loss has risen, then interpolation until the ends are rtol apart."""
        state = point.state.to(dtype=torch.float64)
        start, gradient = point.survey.loss, point.survey.gradient
        if point.state.dtype != torch.float64:
            start, gradient = yield AtWeights(point.risk, state, gradient=True)
        frame = point.chart.frame
        slope = frame.pull(gradient[:, None])[:, 0]
        direction = frame.push(slope[:, None])[:, 0]
        fall = float(inner([slope], slope)[0])
        if not fall:
            raise UsageError("critical sharpness is a step along the gradient, which is zero here")
        # On a parabola that touches zero the crossing is at 4 L / ‖g‖²: a guess that has the right scale.
        first = 4 * abs(start) / fall or 1.0
        noise = ROUNDING * torch.finfo(torch.float64).eps * abs(start)
        search = _crossing(fall, first, noise, point.settings.rtol)
        try:
            step = next(search)
            while True:
                moved = state.replace(state.space.unflatten(state.vector - step * direction))
                reached = yield AtWeights(point.risk, moved, status=f"step {step:.3g}")
                change = reached.loss - start
                step = search.send(change if math.isfinite(change) else math.inf)
        except StopIteration as ends:
            return ends.value


def _crossing(fall: float, step: float, noise: float, rtol: float) -> Generator[float, float, tuple[float, float]]:
    """Find two steps on which the loss has fallen and risen beyond noise, rtol apart, or with noise between them.

    Change over step starts at `−fall` and is a line where the loss is a parabola: it is interpolated, aiming a little to the
    side of the crossing that is not known well yet, and halves the interval where that does not.

    Yields steps, and is sent the change of the loss after each; an infinite one where it overflows.

    Args:
        fall: slope at which the loss falls from the start.
        step: first guess.
        noise: size below which a change of the loss does not count.
        rtol: relative distance of the ends.

    Raises:
        UsageError: the loss does not rise again, or never falls by more than noise.
    """
    low, high, below, above = 0.0, math.inf, -fall, math.inf
    for _ in range(TRIES):
        risen = yield step
        if risen > noise:
            high, above = step, risen / step
            break
        low, below = (step, risen / step) if risen < -noise else (low, below)
        step *= 2
    else:
        raise UsageError("the loss does not rise again however long the step: critical sharpness is not defined")
    middle, room = False, high
    for _ in range(3 * TRIES):
        if high - low <= rtol * low or fall * room <= noise:
            break
        before = high - low
        step = (low + room) / 2
        if not middle and room == high and math.isfinite(above):
            crossing = low - below * (high - low) / (above - below)
            aim = crossing * (1 - rtol / 4 if crossing - low > rtol / 2 * crossing else 1 + rtol / 4)
            step = aim if low < aim < high else step
        risen = yield step
        if risen > noise:
            high, above, room = step, risen / step, step
        elif risen < -noise:
            low, below = step, risen / step
        elif low:
            break
        else:
            room = step
        middle = high - low > before / 2 and not middle
    if not low:
        raise UsageError(
            f"along the gradient the loss falls by less than rounding resolves ({noise:.1e}): this is a minimum, and critical "
            "sharpness is not defined there"
        )
    return low, high


def _evaluate(findings: Findings) -> Estimate:
    low, high = findings.answers[0].result
    converged = high - low <= findings.settings.rtol * low
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
    needs=(_Crossing(),),
    evaluate=_evaluate,
    pitfalls=(
        "geometry='euclidean' is the measure of the paper for plain gradient descent; its step depends on the optimiser. "
        "For a quadratic loss it is the curvature along the gradient. The first crossing that doubling finds: a loss that "
        "rises and falls again in between is not seen. Undefined where the gradient is zero."
    ),
)
