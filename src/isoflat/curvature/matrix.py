"""The curvature matrices of the weights, and one of them as an operator."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import final

import torch
from torch import Tensor

from isoflat.core.state import State
from isoflat.curvature.fisher import EmpiricalFisher, counted
from isoflat.curvature.gauss_newton import GaussNewton
from isoflat.linalg.operator import Operator
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.routes.base import Graph, Linearisation
from isoflat.risk.routes.output import check_output
from isoflat.risk.routes.reverse import GradientGraph


class Matrix(StrEnum):
    """Choice of the curvature matrix."""

    HESSIAN = "Hessian"
    """Matrix of all second derivatives of the loss."""
    GAUSS_NEWTON = "Gauss-Newton"
    """Matrix `Jᵀ (∂²ℓ/∂z²) J`, without the network's own second derivatives (`curvature.gauss_newton`)."""
    EMPIRICAL_FISHER = "empirical Fisher"
    """The second moment of the rows' gradients (`curvature.fisher`)."""

    def over(self, risk: EmpiricalRisk, state: State) -> tuple[EmpiricalRisk, type[Graph]]:
        """The risk with what its products need beside the data, and what they go through.

        Raises:
            UsageError: weights enter the loss other than through the model's output, or the output is not known.
        """
        if self is Matrix.HESSIAN:
            return risk, GradientGraph
        check_output(risk, state)
        return (risk, GaussNewton) if self is Matrix.GAUSS_NEWTON else (counted(risk, state), EmpiricalFisher)


@final
@dataclass(frozen=True)
class Curvature(Operator):
    """A matrix on the trainable tensors, flat and symmetric: the Hessian `∇²L`, unless its products are of another.

    Attributes:
        linearisation: source of the products (`risk.linearise`).
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
