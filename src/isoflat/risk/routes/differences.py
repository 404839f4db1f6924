"""Central differences of gradients: the last resort."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from isoflat.core.space import norm
from isoflat.risk.network import exactly
from isoflat.risk.ranks import BatchSum
from isoflat.risk.routes.base import Linearisation, gradient


def step_in(dtype: torch.dtype) -> float:
    """Relative step in a precision: rounding (ε / h) and the third derivative (h²) are then of one size."""
    return torch.finfo(dtype).eps ** (1 / 3)


@final
@dataclass(frozen=True)
class Differences(Linearisation):
    """Route by `(∇L(θ + h v) − ∇L(θ − h v)) / 2h` in float64, for networks that can be differentiated once only.

    No certificate is given for such products: the difference is not linear in v, and a kink between the two points is
    taken for curvature.

    Attributes:
        step: step h in units of ‖θ‖ / ‖v‖; None for the one that fits the precision (`step_in`).
    """

    step: float | None = None

    @property
    def route(self) -> str:
        """Name of the method, for the record."""
        return f"central differences of gradients, {str(self.risk.network.widest(self.state).dtype).removeprefix('torch.')}"

    @property
    def exact(self) -> bool:
        """False: differences are approximate."""
        return False

    def products(self, vectors: Tensor) -> Tensor:
        """Products by two gradients for each column."""
        state, center = self.state, self.state.vector.double()
        step = step_in(state.dtype) if self.step is None else self.step
        reaches = [step * (norm(center) or 1.0) / (norm(vector) or 1.0) for vector in vectors.T]

        def per_batch(index: int, batch: Any) -> BatchSum:
            made, count = [], 0.0
            for vector, reach in zip(vectors.T, reaches, strict=True):
                ends = []
                for sign in (1.0, -1.0):
                    moved = state.replace(state.space.unflatten((center + sign * reach * vector).to(state.dtype)))
                    end = gradient(self.risk, moved, batch)
                    ends.append(end.total)
                    count = end.count
                made.append((ends[0] - ends[1]) / (2 * reach))
            return BatchSum(torch.stack(made, dim=1), count)

        with exactly(state.device):
            return self.risk.accumulate(per_batch, vectors)
