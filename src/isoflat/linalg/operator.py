"""Symmetric linear maps on ℝⁿ, known only through their products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from isoflat.core.errors import UsageError
from isoflat.linalg.maps import LinearMap

Parts = tuple[int, ...] | None
"""Places of some parts of a sum; None for all."""


class Operator(ABC):
    """A symmetric linear map on ℝⁿ with the Euclidean inner product.

    Pure and repeatable: the same vectors give the same products. `matmat` is the primitive, because one pass over the
    data can serve several vectors.
    """

    @property
    @abstractmethod
    def n(self) -> int:
        """Dimension."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Precision the products are computed in."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of its vectors."""

    @abstractmethod
    def matmat(self, vectors: Tensor) -> Tensor:
        """Products with the columns of an `(n, k)` matrix: shape `(n, k)`, accumulated in float64."""

    @abstractmethod
    def double(self) -> Operator:
        """The same map computed in float64; itself if it is already, so that passes can be shared."""

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of each part of a sum in the cost of a product, heaviest parts first; `(1.0,)` unless it is a sum."""
        return (1.0,)

    def some(self, parts: Parts) -> Operator:
        """The sum of some of the parts; the whole for None."""
        return self

    @final
    def matvec(self, vector: Tensor) -> Tensor:
        """Product with one vector of shape `(n,)`."""
        return self.matmat(vector[:, None])[:, 0]


@final
@dataclass(frozen=True)
class Dense(Operator):
    """An explicit symmetric matrix.

    >>> Dense(torch.diag(torch.tensor([3.0, 1.0]))).matvec(torch.ones(2)).tolist()
    [3.0, 1.0]
    """

    matrix: Tensor

    @property
    def n(self) -> int:
        """Dimension."""
        return self.matrix.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the matrix."""
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        """Device of the matrix."""
        return self.matrix.device

    def matmat(self, vectors: Tensor) -> Tensor:
        """Matrix product."""
        return (self.matrix @ vectors.to(self.matrix.dtype)).double()

    def double(self) -> Dense:
        """The matrix in float64."""
        return self if self.dtype == torch.float64 else Dense(self.matrix.double())


@final
@dataclass(frozen=True)
class Sum(Operator):
    """Sum `A = Σ_p A_p` whose parts can be multiplied alone, at a part of the cost.

    Attributes:
        terms: operators A_p, the heaviest first.
        costs: cost of a product with each, in any unit.

    >>> heavy, light = Dense(torch.diag(torch.tensor([3.0, 0.0]))), Dense(torch.diag(torch.tensor([0.0, 1.0])))
    >>> both = Sum((heavy, light), costs=(1.0, 3.0))
    >>> both.matvec(torch.ones(2)).tolist(), both.some((0,)).matvec(torch.ones(2)).tolist(), both.shares
    ([3.0, 1.0], [3.0, 0.0], (0.25, 0.75))
    """

    terms: tuple[Operator, ...]
    costs: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse parts that do not fit together."""
        if not self.terms or len(self.terms) != len(self.costs) or len({term.n for term in self.terms}) != 1:
            raise UsageError(f"{len(self.terms)} terms with {len(self.costs)} costs do not make a sum")

    @property
    def n(self) -> int:
        """Dimension of every part."""
        return self.terms[0].n

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the parts."""
        return self.terms[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the parts."""
        return self.terms[0].device

    @property
    def shares(self) -> tuple[float, ...]:
        """Costs as parts of a whole."""
        return tuple(cost / sum(self.costs) for cost in self.costs)

    def some(self, parts: Parts) -> Operator:
        """Sum of the parts at these places; the whole for None."""
        if parts is None:
            return self
        return Sum(tuple(self.terms[p] for p in parts), tuple(self.costs[p] for p in parts))

    def matmat(self, vectors: Tensor) -> Tensor:
        """The sum of all parts' products."""
        total = self.terms[0].matmat(vectors)
        for term in self.terms[1:]:
            total = total + term.matmat(vectors)
        return total

    def double(self) -> Sum:
        """Sum of the parts in float64; itself if they are already."""
        return self if self.dtype == torch.float64 else Sum(tuple(term.double() for term in self.terms), self.costs)


@final
@dataclass(frozen=True)
class Pullback(Operator):
    """Pullback `Eᵀ A E + K`: an operator A seen through a frame E, plus a part K that costs no pass over the data.

    Several pullbacks of one A can share its products (`linalg.solver.serve`).

    Attributes:
        base: operator A on ℝⁿ.
        frame: linear map E from ℝᵐ to ℝⁿ.
        plus: operator K on ℝᵐ, for instance the connection term of a metric; None for zero.
    """

    base: Operator
    frame: LinearMap
    plus: Operator | None = None

    def __post_init__(self) -> None:
        """Refuse parts that do not fit together."""
        if self.frame.rows != self.base.n or (self.plus is not None and self.plus.n != self.frame.columns):
            shape = f"{self.frame.rows}×{self.frame.columns}"
            raise UsageError(f"a frame {shape} does not fit an operator of dimension {self.base.n}")

    @property
    def n(self) -> int:
        """Dimension of the frame's domain."""
        return self.frame.columns

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the base."""
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        """Device of the base."""
        return self.base.device

    @property
    def shares(self) -> tuple[float, ...]:
        """Shares of the base."""
        return self.base.shares

    def some(self, parts: Parts) -> Pullback:
        """Pullback of some of the base's parts; K goes with the first."""
        return self if parts is None else Pullback(self.base.some(parts), self.frame, self.plus if 0 in parts else None)

    def matmat(self, vectors: Tensor) -> Tensor:
        """Push, multiply, pull, add K."""
        return self.pull(self.base.matmat(self.frame.push(vectors)), vectors)

    def pull(self, products: Tensor, vectors: Tensor) -> Tensor:
        """Finish `matmat` from the base's products with the pushed vectors."""
        result = self.frame.pull(products)
        return result if self.plus is None else result + self.plus.matmat(vectors)

    def double(self) -> Pullback:
        """The same map in float64."""
        return Pullback(self.base.double(), self.frame, None if self.plus is None else self.plus.double())
