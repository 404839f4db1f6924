"""Check of products against differences of gradients, on a few rows, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from isoflat.core.errors import DataError, NonFinite
from isoflat.core.rng import stream
from isoflat.core.space import inner, largest, norm
from isoflat.core.state import State
from isoflat.risk.batches import Batches, pieces
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.losses import TargetLoss, class_axis
from isoflat.risk.network import exactly
from isoflat.risk.ranks import Ranks
from isoflat.risk.routes.base import Linearisation, gradient

Route = Callable[[EmpiricalRisk, State], Linearisation]
"""Constructor of a product route."""

ROWS = 4
"""Rows that are enough to tell a formula from a wrong one."""

AWAY = 1e-3
"""Relative distance from the point at which they are compared."""

SYMMETRY = 1e-8
"""Largest `|⟨u, Hv⟩ − ⟨v, Hu⟩|` in units of `‖u‖ ‖Hv‖ + ‖v‖ ‖Hu‖`, in float64."""

AGREEMENT = 1e-4
"""Largest relative difference between a product and a central difference of gradients, in float64."""

STEPS = (1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
"""Relative steps of the differences: the first that agrees is enough, since a network of ReLUs has kinks on the way."""

SURE = 4.0
"""Class scores are brought this close to their mean: where a network is surer of its classes, slopes are differences of
numbers next to 1, and differences of slopes are rounding. What lies before the scores is the same."""

DRAWN = 1_000_003
"""Random numbers of a direction; a prime, so that no two rows of a matrix get the same."""


@final
@dataclass(frozen=True)
class CheckedRows:
    """The risk of a few rows close to a point, in float64.

    Close to it, not at it: units that are dead, or zero biases behind them, sit on kinks there, where products and
    differences are of two minds though both are right.

    Attributes:
        risk: empirical risk of the rows.
        state: point of the comparison.
        scales: typical size of the tensor that each entry is in, shape `(n,)`; zero where nothing has a gradient, such as
            an embedding's row of padding: the network depends on it, but it is held.
    """

    risk: EmpiricalRisk
    state: State
    scales: Tensor

    @staticmethod
    def of(risk: EmpiricalRisk, state: State, rows: int = ROWS) -> CheckedRows:
        """The first rows of the first batch; all of them where they may be needed together."""
        batch = next(iter(risk.batches), None)
        if batch is None:
            raise DataError("the data is empty: the loader gave no batch")
        if isinstance(risk.loss, TargetLoss) and risk.batches.whole is None:
            batch = next(pieces(batch, rows))
        alone = replace(risk, batches=Batches(partial(iter, [batch]), volatile=False), ranks=Ranks())
        wide = state.to(dtype=torch.float64)
        space, center = wide.space, wide.vector
        sizes = torch.tensor(space.sizes, dtype=torch.float64).sqrt()
        typical = space.block_norms(center) / sizes.clamp(min=1)
        typical = torch.where(typical > 0, typical, (norm(center) or 1.0) / space.size**0.5)
        scales = space.spread(typical.to(center.device))
        beside = center + AWAY * scales * _drawn(space.size, "beside", center.device)
        moved = wide.replace(space.unflatten(beside))
        sample = CheckedRows(_unsure(alone, moved, batch), moved, scales)
        # What fails here is no question of routes.
        gradient = sample.gradient(beside)
        return replace(sample, scales=torch.where(gradient != 0, scales, 0.0)) if bool(gradient.any()) else sample

    def direction(self, k: int) -> Tensor:
        """A random direction, shape `(n,)`: every tensor moves in proportion to its size."""
        return self.scales * _drawn(self.state.space.size, k, self.state.device)

    def product(self, route: Route, direction: Tensor) -> Tensor:
        """A product with a direction.

        Raises:
            NonFinite: it is NaN or infinite.
        """
        product = route(self.risk, self.state).products(direction[:, None])[:, 0]
        if not math.isfinite(largest(product)):
            raise NonFinite(
                "a Hessian-vector product is NaN or infinite although loss and gradient are finite: look for sqrt, log or "
                "division at 0"
            )
        return product

    def slope(self, direction: Tensor) -> float:
        """Relative distance of the gradient from central differences of the loss, along a direction."""
        slope = inner([direction], self.gradient(self.state.vector))
        return self.distance(direction, slope, self.loss)

    def distance(self, direction: Tensor, derivative: Tensor, function: Callable[[Tensor], Tensor]) -> float:
        """Relative distance of a derivative from central differences of a function: the least over all steps.

        What rounding of the function explains does not count.

        Args:
            direction: direction of the derivative, shape `(n,)`.
            derivative: value of the derivative.
            function: `loss` or `gradient`.
        """
        center = self.state.vector
        scale = (norm(center) or 1.0) / norm(direction)
        best = float("inf")
        for step in STEPS:
            reach = step * scale
            ahead, behind = function(center + reach * direction), function(center - reach * direction)
            rounding = 10 * torch.finfo(torch.float64).eps * max(norm(ahead), norm(behind)) / reach
            quotient = ahead.sub_(behind).div_(2 * reach)
            size = max(norm(derivative), norm(quotient))
            excess = max(norm(derivative - quotient) - rounding, 0.0)
            best = min(best, excess / size if size else 0.0)
            if best <= AGREEMENT:
                break
        return best

    def loss(self, vector: Tensor) -> Tensor:
        """The rows' risk where the trainable tensors have these values, shape `(1,)`."""
        moved = self.state.replace(self.state.space.unflatten(vector))
        with exactly(moved.device):
            return torch.tensor([self.risk.value(moved)], dtype=torch.float64, device=moved.device)

    def gradient(self, vector: Tensor) -> Tensor:
        """Gradient of the rows' risk, where the trainable tensors have these values."""
        moved = self.state.replace(self.state.space.unflatten(vector))
        with exactly(moved.device):
            return self.risk.accumulate(lambda _, batch: gradient(self.risk, moved, batch), vector)


def _unsure(risk: EmpiricalRisk, state: State, batch: Any) -> EmpiricalRisk:
    """The risk with class scores scaled down where they are far apart."""
    loss = risk.loss
    if not isinstance(loss, TargetLoss) or loss.classes is None or loss.gain is None:
        return risk
    with torch.no_grad(), exactly(state.device):
        z = risk.term(state, batch).z
    if z is None:
        return risk
    apart = largest(z - z.mean(class_axis(z), keepdim=True))
    return replace(risk, loss=loss.scaled(loss.gain * SURE / apart)) if SURE < apart < math.inf else risk


def _drawn(size: int, label: str | int, device: torch.device) -> Tensor:
    """Normal numbers, over again after a million of them: drawing more takes longer than the product they check."""
    drawn = torch.randn(min(size, DRAWN), generator=stream(0, "check", label), dtype=torch.float64).to(device)
    return drawn.repeat(-(-size // DRAWN))[:size]


def disagreement(sample: CheckedRows, route: Route) -> float:
    """Worst relative difference between products and differences of gradients, along two random directions."""
    worst = 0.0
    for k in range(2):
        direction = sample.direction(k)
        worst = max(worst, sample.distance(direction, sample.product(route, direction), sample.gradient))
    return worst


def asymmetry(sample: CheckedRows, route: Route) -> float:
    """`|⟨u, Hv⟩ − ⟨v, Hu⟩|` in units of `‖u‖ ‖Hv‖ + ‖v‖ ‖Hu‖`, for two random directions."""
    u, v = (sample.direction(k) for k in range(2))
    hu, hv = (sample.product(route, direction) for direction in (u, v))
    scale = norm(u) * norm(hv) + norm(v) * norm(hu)
    return abs(float(inner([u], hv)[0]) - float(inner([v], hu)[0])) / scale if scale else 0.0
