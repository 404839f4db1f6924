"""The one Lanczos recurrence: full re-orthogonalisation, float64 coefficients, no absolute threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isoflat.core import space
from isoflat.linalg.vectors import orthogonalise, remove, restart


class Recurrence:
    """An orthonormal Krylov basis that grows by one product at a time.

    After k products `A Q_k = Q_k T_k + β_k q_{k+1} e_kᵀ` with T_k tridiagonal (diagonal α, off-diagonal β).

    Departures from the textbook's algorithm (Golub and Van Loan, "Matrix Computations", section 10.1), numbered where they
    happen:

    1. Full re-orthogonalisation against the whole basis, repeated until the norm stands still (`linalg.vectors`), so that T is
       the exact matrix of `A + E` (`docs/concepts/certificate.md`, "Rounding").
    2. Inner products, norms and coefficients are in float64, whatever the precision of the products and of the basis.
    3. Coefficients are in units of a power of two near `‖A q₁‖`: no threshold is absolute, and nothing overflows.
    4. A coupling at the level of rounding does not end the run: what is left over goes on as the next basis vector, and a
       random one where nothing is left. A small overlap of the start with an extreme eigenvector looks exactly like an
       invariant space, and must not be mistaken for one.
    5. In `log_couplings`, which the certificate rests on, a coupling counts as no less than the rounding level.
    6. An operator on the complement of given rows is multiplied as a whole; the recurrence projects.

    Attributes:
        alphas: diagonal of T, in units of `scale`.
        betas: couplings, the last one towards the next basis vector, in units of `scale`.
        scale: power of two near `‖A q₁‖`, so that nothing depends on the unit of the loss.
        log_couplings: `Σ ln β` over all couplings, in units of `scale`, each taken as no less than `rounding`, because
            below that it is not known; −inf once the space is exhausted.
        exhausted: flag that there is no next basis vector: the Krylov space is ℝⁿ, or the complement of the rows beside
            it, or the operator is zero.
    """

    def __init__(self, start: Tensor, dtype: torch.dtype, beside: Sequence[Tensor] = ()) -> None:
        """Begin with a unit vector of shape `(n,)`; the basis is stored in `dtype`.

        Where the operator is one on the complement of orthonormal rows, these stand `beside` the basis, which is kept
        orthogonal to them: what rounding leaves along them would come back, magnified, as an eigenvector for zero.
        """
        self.n = start.shape[0]
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self.scale = 1.0
        self.log_couplings = 0.0
        self.exhausted = False
        self._largest = 0.0
        self._dtype = dtype
        self._beside = tuple(beside)
        self._basis = [start.to(dtype)]

    @property
    def k(self) -> int:
        """Number of products taken in."""
        return len(self.alphas)

    @property
    def last(self) -> Tensor:
        """The basis vector whose product comes next, shape `(n, 1)`."""
        return self._basis[-1][:, None]

    @property
    def rounding(self) -> float:
        """Rounding error of T: it is that of `A + E` with `‖E‖ = O(k eps ‖A‖)`; in units of `scale`."""
        return self.rounding_at(torch.finfo(self._dtype).eps)

    def rounding_at(self, eps: float) -> float:
        """Rounding error of T for products of another precision; sums over n entries are in float64 in any case."""
        return (eps * self.k + torch.finfo(torch.float64).eps * math.sqrt(self.n)) * self._largest

    def extend(self, product: Tensor) -> None:
        """Take in the product of `last`, shape `(n,)`, float64, which is overwritten: a copy would take as long as a sweep.

        What it has along the rows beside is left out.
        """
        product = product.contiguous()  # a column of a block is not: its sums would be slow, and round otherwise
        if self._beside:
            remove(self._beside, product)  # 6
        size = space.norm(product)
        if not self.alphas:
            self.scale = math.ldexp(1.0, math.frexp(size)[1] - 1) if size else 1.0  # 3
        residual, rows = product.div_(self.scale), [*self._beside, *self._basis]
        removed, beta = orthogonalise(rows, residual)  # 1, 2
        alpha = float(removed[-1])
        self.alphas.append(alpha)
        self.betas.append(beta)
        self._largest = max(self._largest, size / self.scale, abs(alpha), beta)
        if len(rows) >= self.n or self._largest == 0:
            self.exhausted, self.log_couplings = True, -math.inf
            return
        self.log_couplings += math.log(max(beta, self.rounding))  # 5
        self._basis.append((residual.div_(beta) if beta else restart(rows, residual)).to(self._dtype))  # 4

    def ritz(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Ritz values, ascending, in units of `scale`, and the eigenvectors of T as columns."""
        from scipy.linalg import eigh_tridiagonal

        if self.k == 1:
            return np.array(self.alphas), np.ones((1, 1))
        values, vectors = eigh_tridiagonal(np.array(self.alphas), np.array(self.betas[:-1]))[:2]
        return np.asarray(values), np.asarray(vectors)

    def combine(self, coefficients: NDArray[np.float64]) -> Tensor:
        """A vector of the Krylov space from its coefficients, shape `(n,)`, float64, normalised."""
        vector = space.combine(torch.from_numpy(np.ascontiguousarray(coefficients)), self._basis[: self.k])
        return vector.div_(space.norm(vector))

    def predicted(self, value: float, coefficients: NDArray[np.float64], vector: Tensor) -> Tensor:
        """Product `A x` of a Ritz vector as the recurrence predicts it: `θ x + β s_k q_{k+1}`."""
        product = value * vector
        if len(self._basis) > self.k:
            product.add_(self._basis[self.k], alpha=self.betas[-1] * float(coefficients[-1]))
        return product
