"""Gauss quadratures of a Lanczos run, and the bounds they put on the distribution of the start vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

Reals = NDArray[np.float64]


@final
@dataclass(frozen=True)
class JacobiMatrix:
    """Coefficients of a Lanczos run from a unit vector q: the Jacobi matrix of `A + E`, E the rounding.

    The *distribution* of q is `μ(−∞, x] = Σ_{λ_i ≤ x} ⟨u_i, q⟩²` over the eigenpairs of A.

    Attributes:
        alphas: diagonal of T, shape `(k,)`.
        betas: couplings, shape `(k,)`, the last one towards the vector that would come next.
        closed: flag that the last coupling is rounding, so that the distribution has no atoms but the nodes.
    """

    alphas: Reals
    betas: Reals
    closed: bool

    def gauss(self) -> tuple[Reals, Reals]:
        """Gauss quadrature (Golub and Welsch 1969): nodes, ascending, and weights with sum 1, exact up to degree `2k − 1`.

        >>> nodes, weights = JacobiMatrix(np.array([1.0, 1.0]), np.array([1.0, 0.5]), closed=False).gauss()
        >>> nodes.round(12).tolist(), weights.round(12).tolist()
        ([0.0, 2.0], [0.5, 0.5])
        """
        return _quadrature(self.alphas, self.betas[:-1])

    def bounds(self) -> tuple[Reals, Reals, Reals]:
        """Bounds on the distribution, after Chebyshev, Markov and Stieltjes.

        At each node of a quadrature with r nodes and positive weights that is exact up to degree `2r − 2`,

            Σ_{θ_j < θ_i} w_j ≤ μ(−∞, θ_i)  and  μ(−∞, θ_i] ≤ Σ_{θ_j ≤ θ_i} w_j,

        and no better bound follows from these moments. Gauss's rule gives k such points. Every choice of a next diagonal
        entry gives a rule with `k + 1` nodes that is exact up to degree 2k (Gauss and Radau: one of its nodes could be
        prescribed), and so as many points; three choices on the scale of the last coupling put them between Gauss's nodes.

        Returns:
            Points, ascending; bounds from below on `μ(−∞, x]` for x from there on; bounds from above for x before it.
        """
        nodes, weights = self.gauss()
        ends = np.cumsum(weights)
        if self.closed:
            return nodes, ends, ends - weights
        found = [(nodes, ends - weights, ends)]
        for shift in (-1.0, 0.0, 1.0):
            last = self.alphas[-1] + shift * self.betas[-1]
            nodes, weights = _quadrature(np.append(self.alphas, last), self.betas)
            ends = np.cumsum(weights)
            found.append((nodes, ends - weights, ends))
        points, least, most = (np.concatenate(part) for part in zip(*found, strict=True))
        order = np.argsort(points, kind="stable")
        return points[order], least[order], most[order]


def _quadrature(alphas: Reals, betas: Reals) -> tuple[Reals, Reals]:
    """Eigenvalues of a Jacobi matrix, and squares of the first entries of its eigenvectors, normalised (Golub, Welsch)."""
    from scipy.linalg import eigh_tridiagonal

    if len(alphas) == 1:
        return alphas.copy(), np.ones(1)
    values, vectors = eigh_tridiagonal(alphas, betas)[:2]
    weights = np.asarray(vectors)[0] ** 2
    return np.asarray(values), weights / weights.sum()


def pooled(runs: list[JacobiMatrix], shares: Reals) -> tuple[Reals, Reals, Reals]:
    """Bounds on the average of the runs' distributions, each with its share; shapes and meaning as of `JacobiMatrix.bounds`.

    What is rounding in the sums of weights is conceded.
    """
    bounds = [run.bounds() for run in runs]
    grid = np.unique(np.concatenate([points for points, _, _ in bounds]))
    least, most = np.zeros(len(grid)), np.zeros(len(grid))
    for share, (points, lower, upper) in zip(shares, bounds, strict=True):
        lower = np.concatenate([[0.0], np.maximum.accumulate(lower)])
        upper = np.concatenate([np.minimum.accumulate(upper[::-1])[::-1], [1.0]])
        least += share * lower[np.searchsorted(points, grid, side="right")]
        most += share * upper[np.searchsorted(points, grid, side="left")]
    concession = np.finfo(np.float64).eps * (len(grid) + len(runs))
    return grid, np.maximum(least - concession, 0.0), np.minimum(most + concession, 1.0)
