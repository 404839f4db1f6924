"""Linear maps between a frame's coordinates and the parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
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


class Square(LinearMap):
    """A linear map from ℝⁿ to itself."""

    @final
    @property
    def columns(self) -> int:
        """Dimension, which is that of the range."""
        return self.rows


@final
@dataclass(frozen=True)
class Identity(Square):
    """The identity of ℝⁿ."""

    size: int

    @property
    def rows(self) -> int:
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
class Diagonal(Square):
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

    def push(self, vectors: Tensor) -> Tensor:
        """Multiply each row by its entry, rounded once to the vectors' precision."""
        return torch.mul(self.entries.to(vectors.device)[:, None], vectors, out=torch.empty_like(vectors))

    def pull(self, vectors: Tensor) -> Tensor:
        """The map is its own transpose."""
        return self.push(vectors)


@final
@dataclass(frozen=True)
class Complement(Square):
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

    def push(self, vectors: Tensor) -> Tensor:
        """Remove the components along the directions."""
        basis = self.directions.to(vectors.device)
        return (vectors - basis @ (basis.T @ vectors.to(basis.dtype))).to(vectors.dtype)

    def pull(self, vectors: Tensor) -> Tensor:
        """The projection is its own transpose."""
        return self.push(vectors)


@final
@dataclass(frozen=True)
class Contraction:
    """Contraction of a shear: `out[g, i] += Σ_{j, k} source[g, i, j, k] · weights[g, j]`.

    Attributes:
        source: range of the factor's entries in the flat vector.
        target: range of the entries that the contraction is added to.
        view: shape `(g, i, j, k)` of the factor.
        weights: shape `(g, j)`, float64.
        turned: flag that the source is stored as `(g, j, i, k)`.
    """

    source: slice
    target: slice
    view: tuple[int, int, int, int]
    weights: Tensor
    turned: bool = False


@final
@dataclass(frozen=True)
class Shear(Square):
    """`v ↦ v + Σ_terms`: some coordinates take up contractions of others, which stay as they are.

    >>> import torch
    >>> term = Contraction(slice(0, 2), slice(2, 3), (1, 1, 2, 1), torch.tensor([[1.0, 10.0]], dtype=torch.float64))
    >>> Shear(3, (term,)).push(torch.tensor([[1.0], [2.0], [5.0]], dtype=torch.float64)).ravel().tolist()
    [1.0, 2.0, 26.0]
    """

    size: int
    terms: tuple[Contraction, ...]

    @property
    def rows(self) -> int:
        """Dimension."""
        return self.size

    def push(self, vectors: Tensor) -> Tensor:
        """Add the contractions, each in float64."""
        result = vectors.clone()
        for term in self.terms:
            g, i, j, k = term.view
            factor = vectors[term.source].double().view(*((g, j, i, k) if term.turned else term.view), -1)
            letters = "gjikc" if term.turned else "gijkc"
            taken = torch.einsum(f"{letters},gj->gic", factor, term.weights.to(vectors.device))
            result[term.target] += taken.reshape(-1, vectors.shape[1])
        return result

    def pull(self, vectors: Tensor) -> Tensor:
        """The transpose: the targets are spread back over the factors."""
        result = vectors.clone()
        for term in self.terms:
            g, i, _, k = term.view
            target = vectors[term.target].double().view(g, i, 1, 1, -1)
            spread = target * term.weights.to(vectors.device)[:, None, :, None, None]
            wide = spread.expand(-1, -1, -1, k, -1)
            result[term.source] += (wide.transpose(1, 2) if term.turned else wide).reshape(-1, vectors.shape[1])
        return result


@final
@dataclass(frozen=True)
class TensorSlices:
    """Slices of one tensor in a flat vector.

    Attributes:
        where: range of the tensor's entries in the flat vector.
        shape: shape of the tensor.
        axis: axis along which the slices are counted.
        places: places along the axis, for each of n blocks: shape `(n, p)`.
        slots: coordinates of a block that they hold, shape `(p,)`.
        window: selected part of the tensor, as axis, start and size; None for all of it.
    """

    where: slice
    shape: tuple[int, ...]
    axis: int
    places: Tensor
    slots: Tensor
    window: tuple[int, int, int] | None = None

    def view(self, vectors: Tensor) -> Tensor:
        """Selected part of the tensor in each of k vectors, slices first; it shares memory."""
        tensor = vectors[self.where].view(*self.shape, -1)
        return (tensor if self.window is None else tensor.narrow(*self.window)).movedim(self.axis, 0)


@final
@dataclass(frozen=True)
class Mixing(Square):
    """Slices of tensors multiplied by a matrix for each block; all other coordinates stay as they are.

    >>> import torch
    >>> part = TensorSlices(slice(0, 4), (2, 2), 0, torch.tensor([[0, 1]]), torch.tensor([0, 1]))
    >>> swap = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], dtype=torch.float64)
    >>> Mixing(5, ((swap, (part,)),)).push(torch.arange(5.0)[:, None]).ravel().tolist()
    [2.0, 3.0, 0.0, 1.0, 4.0]

    Attributes:
        size: dimension.
        terms: matrices, shape `(n, d, d)`, float64, and the slices that make up their d coordinates.
    """

    size: int
    terms: tuple[tuple[Tensor, tuple[TensorSlices, ...]], ...]

    @property
    def rows(self) -> int:
        """Dimension."""
        return self.size

    def push(self, vectors: Tensor) -> Tensor:
        """Apply one term after the other, each in float64."""
        result = vectors.clone()
        for matrix, parts in self.terms:
            _mix(result, matrix, parts)
        return result

    def pull(self, vectors: Tensor) -> Tensor:
        """Apply the transposes in the opposite order."""
        result = vectors.clone()
        for matrix, parts in reversed(self.terms):
            _mix(result, matrix.mT, parts)
        return result


def slices(vectors: Tensor, parts: tuple[TensorSlices, ...]) -> Tensor:
    """The slices that make up the d coordinates of each block, shape `(n, d, r)`; a copy."""
    made = []
    for part in parts:
        taken = part.view(vectors)[part.places.to(vectors.device)]
        made.append(taken.reshape(*part.places.shape, -1))
    order = torch.argsort(torch.cat([part.slots for part in parts]))
    return torch.cat(made, 1)[:, order.to(vectors.device)]


def _mix(vectors: Tensor, matrix: Tensor, parts: tuple[TensorSlices, ...]) -> None:
    """Multiply slices in place."""
    after = matrix.to(vectors.device) @ slices(vectors, parts).double()
    for part in parts:
        view = part.view(vectors)
        mixed = after[:, part.slots.to(after.device)].to(view.dtype)
        view[part.places.to(view.device)] = mixed.reshape(*part.places.shape, *view.shape[1:])


@final
@dataclass(frozen=True)
class Embedding(LinearMap):
    """Coordinates of a few entries as those of a longer vector; the others are zero.

    >>> import torch
    >>> Embedding(3, torch.tensor([2])).push(torch.ones(1, 1)).ravel().tolist()
    [0.0, 0.0, 1.0]
    """

    size: int
    places: Tensor
    """Places of the entries, shape `(m,)`."""

    @property
    def rows(self) -> int:
        """Length of the longer vector."""
        return self.size

    @property
    def columns(self) -> int:
        """Number of entries."""
        return self.places.shape[0]

    def push(self, vectors: Tensor) -> Tensor:
        """Put them in their places."""
        result = vectors.new_zeros(self.size, vectors.shape[1])
        result[self.places.to(vectors.device)] = vectors
        return result

    def pull(self, vectors: Tensor) -> Tensor:
        """Take them out."""
        return vectors[self.places.to(vectors.device)]


@final
@dataclass(frozen=True)
class Composition(LinearMap):
    """Composition of several maps; the last one of the list acts first.

    >>> import torch
    >>> twice = Diagonal(torch.tensor([2.0, 2.0], dtype=torch.float64))
    >>> Composition((twice, Embedding(2, torch.tensor([0])))).push(torch.ones(1, 1)).ravel().tolist()
    [2.0, 0.0]
    """

    maps: tuple[LinearMap, ...]

    @property
    def rows(self) -> int:
        """Dimension of the range of the first map."""
        return self.maps[0].rows

    @property
    def columns(self) -> int:
        """Dimension of the domain of the last map."""
        return self.maps[-1].columns

    def push(self, vectors: Tensor) -> Tensor:
        """Apply the maps, the last one first."""
        for part in reversed(self.maps):
            vectors = part.push(vectors)
        return vectors

    def pull(self, vectors: Tensor) -> Tensor:
        """Apply the transposes, the first one first."""
        for part in self.maps:
            vectors = part.pull(vectors)
        return vectors
