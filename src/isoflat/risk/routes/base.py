"""What a product route is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isoflat.core.space import ParameterSpace
from isoflat.core.state import State
from isoflat.risk.empirical import EmpiricalRisk


@dataclass(frozen=True)
class Linearisation(ABC):
    """The Hessian of the empirical risk at a state, as products.

    Attributes:
        risk: the empirical risk.
        state: the point.
    """

    risk: EmpiricalRisk
    state: State

    @property
    @abstractmethod
    def route(self) -> str:
        """How the products are computed, for the record."""

    @property
    def exact(self) -> bool:
        """Whether products are exact up to rounding."""
        return True

    @abstractmethod
    def products(self, vectors: Tensor) -> Tensor:
        """`H V` for V of shape `(n, k)`: shape `(n, k)`, float64."""

    @abstractmethod
    def double(self) -> Linearisation:
        """The same in float64, with the memory of one batch."""


def columns(space: ParameterSpace, vectors: Tensor) -> list[list[Tensor]]:
    """Each column of `(n, k)` as tensors of the parameters' shapes."""
    return [list(space.unflatten(column).values()) for column in vectors.T.contiguous()]


def joined(leaves: Sequence[Tensor], parts: Sequence[Tensor | None]) -> Tensor:
    """Tensors of the parameters' shapes as one vector; None counts as zero."""
    return torch.cat(
        [
            torch.zeros_like(leaf).reshape(-1) if part is None else part.reshape(-1)
            for leaf, part in zip(leaves, parts, strict=True)
        ]
    )
