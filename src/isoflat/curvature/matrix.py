"""A curvature matrix of the weights as an operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from isoflat.linalg.operator import Operator
from isoflat.risk.routes.base import Linearisation


@final
@dataclass(frozen=True)
class Curvature(Operator):
    """A matrix on the trainable tensors, flat and symmetric: the Hessian `∇²L`, unless its products are of another.

    Attributes:
        linearisation: how products are computed (`risk.linearise`).
    """

    linearisation: Linearisation

    @property
    def n(self) -> int:
        """Number of trainable entries."""
        return self.linearisation.state.space.size

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the products."""
        return self.linearisation.state.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.linearisation.state.device

    def matmat(self, vectors: Tensor) -> Tensor:
        """One pass over the data for all columns."""
        return self.linearisation.products(vectors.to(self.dtype))

    def double(self) -> Curvature:
        """The same matrix in float64, its graphs rebuilt for each product; itself if it is in float64 already."""
        return self if self.dtype == torch.float64 else Curvature(self.linearisation.double())
