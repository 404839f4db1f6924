"""Linear maps between a frame's coordinates and the parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from torch import Tensor


class LinearMap(ABC):
    """A linear map from ℝᵐ to ℝⁿ and its transpose."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """Dimension n of the range."""

    @property
    @abstractmethod
    def columns(self) -> int:
        """Dimension m of the domain."""

    @abstractmethod
    def push(self, vectors: Tensor) -> Tensor:
        """`E U` for U of shape `(m, k)`: shape `(n, k)`."""

    @abstractmethod
    def pull(self, vectors: Tensor) -> Tensor:
        """`Eᵀ V` for V of shape `(n, k)`: shape `(m, k)`."""


@final
@dataclass(frozen=True)
class Identity(LinearMap):
    """The identity of ℝⁿ."""

    size: int

    @property
    def rows(self) -> int:
        """Dimension."""
        return self.size

    @property
    def columns(self) -> int:
        """Dimension."""
        return self.size

    def push(self, vectors: Tensor) -> Tensor:
        """The vectors themselves."""
        return vectors

    def pull(self, vectors: Tensor) -> Tensor:
        """The vectors themselves."""
        return vectors


@final
@dataclass(frozen=True)
class Diagonal(LinearMap):
    """Multiplication of each coordinate by a number of its own.

    >>> import torch
    >>> Diagonal(torch.tensor([2.0, 3.0], dtype=torch.float64)).push(torch.ones(2, 1)).ravel().tolist()
    [2.0, 3.0]
    """

    entries: Tensor
    """Shape `(n,)`, float64."""

    @property
    def rows(self) -> int:
        """Dimension."""
        return self.entries.shape[0]

    @property
    def columns(self) -> int:
        """Dimension."""
        return self.entries.shape[0]

    def push(self, vectors: Tensor) -> Tensor:
        """Each row times its entry, rounded once to the vectors' precision."""
        return (self.entries.to(vectors.device)[:, None] * vectors).to(vectors.dtype)

    def pull(self, vectors: Tensor) -> Tensor:
        """The map is its own transpose."""
        return self.push(vectors)


@final
@dataclass(frozen=True)
class Complement(LinearMap):
    """Orthogonal projection onto the complement of a few orthonormal directions.

    >>> import torch
    >>> away = Complement(torch.eye(3, dtype=torch.float64)[:, :1])
    >>> away.push(torch.ones(3, 1, dtype=torch.float64)).ravel().tolist()
    [0.0, 1.0, 1.0]
    """

    directions: Tensor
    """Orthonormal columns, shape `(n, d)`, float64."""

    @property
    def rows(self) -> int:
        """Dimension."""
        return self.directions.shape[0]

    @property
    def columns(self) -> int:
        """Dimension."""
        return self.directions.shape[0]

    def push(self, vectors: Tensor) -> Tensor:
        """Remove the components along the directions."""
        basis = self.directions.to(vectors.device)
        return (vectors - basis @ (basis.T @ vectors.to(basis.dtype))).to(vectors.dtype)

    def pull(self, vectors: Tensor) -> Tensor:
        """The projection is its own transpose."""
        return self.push(vectors)
