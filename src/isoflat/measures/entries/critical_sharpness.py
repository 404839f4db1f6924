"""How long a step against the gradient may be before the loss is back where it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from isoflat.core.errors import UsageError
from isoflat.core.estimate import Estimate, Kind
from isoflat.core.space import inner
from isoflat.core.state import State
from isoflat.measures.base import Direction, Findings, Measure, Reading, Scene
from isoflat.measures.entries.readings import Gradient
from isoflat.risk.network import exactly

DOUBLINGS = 60
"""Steps from the first guess at most."""


@final
@dataclass(frozen=True)
class _Crossing(Reading):
    """Smallest step η along `−E Eᵀ g` at which the loss exceeds its start, between two ends that are rtol apart."""

    def answer(self, scene: Scene) -> tuple[float, float]:
        """A dozen forward passes, doubling and then halving."""
        slope = scene.ask(Gradient())
        direction = scene.chart.frame.push(slope[:, None])[:, 0]
        fall = float(inner([slope], slope)[0])
        if not fall:
            raise UsageError("critical sharpness is a step along the gradient, which is zero here")
        start = self._loss(scene, direction, 0.0)

        def rises(step: float) -> bool:
            scene.report(f"step {step:.3g}")
            return not self._loss(scene, direction, step) <= start

        # On a parabola that touches zero the crossing is at 4 L / ‖g‖²: a guess that has the right scale.
        low, high = 0.0, 4 * abs(start) / fall or 1.0
        for _ in range(DOUBLINGS):
            if rises(high):
                break
            low, high = high, 2 * high
        else:
            raise UsageError("the loss does not rise again however long the step: critical sharpness is not defined")
        while not low and high > 0:
            if rises(high / 2):
                high /= 2
            else:
                low = high / 2
        while high - low > scene.effort.rtol * low:
            middle = (low + high) / 2
            low, high = (low, middle) if rises(middle) else (middle, high)
        return low, high

    @staticmethod
    def _loss(scene: Scene, direction: Tensor, step: float) -> float:
        state = scene.state
        moved = state.space.unflatten(state.vector.double() - step * direction)
        tensors = {name: tensor.to(state.dtype) for name, tensor in moved.items()}
        with exactly(state.device):
            return scene.risk.value(State(tensors, state.frozen, state.buffers, state.constants))


def _evaluate(findings: Findings) -> Estimate:
    low, high = findings.answers[0].result
    return Estimate(4 / (low + high), 2 / high, 2 / low, 1.0, Kind.ENCLOSURE, True)


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
