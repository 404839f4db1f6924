"""The Hessian of the empirical risk as an operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from isoflat.linalg.operator import Operator
from isoflat.risk.routes.base import Linearisation


@final
@dataclass(frozen=True)
class Hessian(Operator):
    """`H = ∇²L` on the trainable tensors, as a flat symmetric operator.

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

    def double(self) -> Hessian:
        """The same Hessian in float64, its graph rebuilt for each product; itself if it is in float64 already."""
        return self if self.dtype == torch.float64 else Hessian(self.linearisation.double())
