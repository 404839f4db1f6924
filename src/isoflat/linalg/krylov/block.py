"""The block Lanczos recurrence, free to multiply only those of its directions that are of use."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isoflat.core import space
from isoflat.linalg.vectors import orthogonalise, restart

Matrix = NDArray[np.float64]


class BlockRecurrence:
    """An orthonormal basis that grows by the products of several vectors at a time.

    After k products `A V = V T + P C`: V the k vectors multiplied so far, T symmetric, P the w orthonormal directions that
    `A V` reaches beyond V and C their couplings. With P multiplied as a whole again and again it is block Lanczos. But a
    Ritz vector `V s` only has the residual `P (C s)`: `steer` turns P so that the directions that matter come first,
    and `extend` takes the products of these alone; the others wait. Converged pairs are thereby locked: they stay in V,
    and nothing is spent on them.

    Departures from the textbook's algorithm (Golub and Van Loan, "Matrix Computations", section 10.3.6), numbered where
    they happen; those of the plain `Recurrence` hold as well:

    1. Only some of the waiting directions are multiplied in a step (`steer`): T is symmetric, but no band matrix.
    2. A direction lost to rounding is replaced by a random one, so that P keeps its width until ℝⁿ has no room.
    3. The diagonal block of T is made symmetric, because each column is orthogonalised in turn.

    Attributes:
        n: dimension.
        scale: power of two near the largest of the first products that are not zero.
        size: largest magnitude met so far, in units of `scale`.
        active: number of waiting directions that are multiplied next.
    """

    def __init__(self, start: Tensor, dtype: torch.dtype) -> None:
        """Begin with columns of shape `(n, w)` that span the first block; vectors are stored in `dtype`."""
        self.n = start.shape[0]
        self.scale = 1.0
        self.size = 0.0
        self._dtype = dtype
        self._basis: list[Tensor] = []
        self._waiting: list[Tensor] = []
        self._matrix = np.zeros((0, 0))
        self._couplings = np.zeros((0, 0))
        for column in start.double().unbind(1):
            if not self.admit(column) and len(self._waiting) < self.n:
                self._wait(restart(self._waiting, column))
        self.active = len(self._waiting)

    @property
    def k(self) -> int:
        """Number of products taken in."""
        return len(self._basis)

    @property
    def waiting(self) -> int:
        """Number w of the directions that wait."""
        return len(self._waiting)

    @property
    def exhausted(self) -> bool:
        """Flag that no direction waits: the basis spans ℝⁿ."""
        return not self._waiting

    @property
    def block(self) -> Tensor:
        """The directions whose products come next, as columns of shape `(n, active)`."""
        return torch.stack(self._waiting[: self.active], dim=1)

    @property
    def rounding(self) -> float:
        """Rounding error of T: it is that of `A + E` with `‖E‖ = O(k eps ‖A‖)`; in units of `scale`."""
        return self.rounding_at(torch.finfo(self._dtype).eps)

    def rounding_at(self, eps: float) -> float:
        """Rounding error of T for products of another precision; sums over n entries are in float64 in any case."""
        return (eps * self.k + torch.finfo(torch.float64).eps * math.sqrt(self.n)) * self.size

    def admit(self, vector: Tensor) -> bool:
        """Let a further direction wait, from outside the recurrence; False where the vector adds nothing."""
        rows = [*self._basis, *self._waiting]
        residual = vector.double().clone()
        size = 0.0 if len(rows) == self.n else orthogonalise(rows, residual)[1]
        if size:
            self._wait(residual.div_(size))
        return size > 0

    def lead(self, count: int) -> None:
        """Multiply the first so many of the waiting directions next: those that have waited longest."""
        self.active = min(count, len(self._waiting))

    def steer(self, directions: Matrix) -> None:
        """Choose what is multiplied next, and turn the waiting directions accordingly.

        Args:
            directions: orthonormal columns in coordinates of the waiting directions, shape `(w, a)`, a ≥ 1.
        """
        self.active = directions.shape[1]
        if self.active == len(self._waiting):
            return
        turn = np.linalg.qr(directions, mode="complete")[0]
        columns = torch.from_numpy(np.ascontiguousarray(turn.T))
        turned = [space.combine(column, self._waiting) for column in columns]
        self._waiting = [vector.div_(space.norm(vector)).to(self._dtype) for vector in turned]  # 1
        self._couplings = turn.T @ self._couplings

    def extend(self, products: Tensor) -> None:
        """Take in the products of `block`, shape `(n, active)`, float64."""
        k, a, rows = self.k, self.active, [*self._basis, *self._waiting]
        sizes = [space.norm(product) for product in products.unbind(1)]
        if not self.size and any(sizes):
            self.scale = math.ldexp(1.0, math.frexp(max(sizes))[1] - 1)
        images, fresh = np.zeros((len(rows) + a, a)), 0
        for j, product in enumerate(products.unbind(1)):
            residual = product / self.scale
            removed, left = orthogonalise(rows, residual)
            images[: len(rows), j] = removed.cpu().numpy()
            if len(rows) == self.n:
                continue
            images[len(rows), j] = left
            rows.append((residual.div_(left) if left else restart(rows, residual)).to(self._dtype))  # 2
            fresh += 1
        images = images[: len(rows)]
        inside = images[k : k + a]
        # 3
        self._matrix = np.block([[self._matrix, self._couplings[:a].T], [self._couplings[:a], (inside + inside.T) / 2]])
        waiting = np.vstack([self._couplings[a:], np.zeros((fresh, k))])
        self._couplings = np.hstack([waiting, images[k + a :]])
        self._basis, self._waiting = rows[: k + a], rows[k + a :]
        self.size = max(self.size, max(sizes) / self.scale, float(np.abs(images).max()))
        self.active = len(self._waiting)

    def ritz(self) -> tuple[Matrix, Matrix]:
        """Ritz values, ascending, in units of `scale`, and the eigenvectors of T as columns."""
        values, vectors = np.linalg.eigh(self._matrix)
        return values, vectors

    def residuals(self, coefficients: Matrix) -> Matrix:
        """Residuals of Ritz vectors in coordinates of the waiting directions, in units of `scale`: shape `(w, j)`.

        Args:
            coefficients: eigenvectors of T as columns, shape `(k, j)`.
        """
        return self._couplings @ coefficients

    def combine(self, coefficients: Matrix) -> Tensor:
        """A vector of the basis' span from its coefficients, shape `(n,)`, float64, normalised."""
        vector = _combined(coefficients, self._basis)
        return vector.div_(space.norm(vector))

    def predicted(self, value: float, coefficients: Matrix, vector: Tensor) -> Tensor:
        """Product `A x` of a Ritz vector as the recurrence predicts it: `θ x + P C s`."""
        product = value * vector
        if self._waiting:
            product += _combined(self.residuals(coefficients), self._waiting)
        return product

    def _wait(self, vector: Tensor) -> None:
        self._waiting.append(vector.to(self._dtype))
        self._couplings = np.vstack([self._couplings, np.zeros((1, self.k))])


def _combined(coefficients: Matrix, rows: Sequence[Tensor]) -> Tensor:
    return space.combine(torch.from_numpy(np.ascontiguousarray(coefficients)), rows)
