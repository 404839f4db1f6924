"""The convex potential whose minimum on an orbit is the canonical representative.

`Φ(z) = Σ_e N_e exp(2 s_e·z) − 2 Σ_u u·z`: the squared norm of all tensors, as a function of the group's coordinates z,
less twice the logarithms of the factors that normalisations divide out. No data enters.

Derivation: docs/concepts/canonical.md, "Balance", "Closure" and "Newton's method".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from torch import Tensor

from isoflat.core.errors import NoInvariantGeometry
from isoflat.core.state import State
from isoflat.symmetry.groups.units import UnitScaling
from isoflat.symmetry.motions import Norm
from isoflat.symmetry.relations import some

Vector = NDArray[np.float64]

LARGE = 1 << 14
"""Entries from which a matrix is multiplied by itself, not in a batch."""

STEPS = 400
"""Newton steps after which an orbit counts as not closed. A unit that lies a factor of e^±140 off takes as many."""


@final
@dataclass(frozen=True)
class Mass:
    """Squared entries of one tensor, summed over what scales alike.

    Attributes:
        name: name of the tensor.
        squares: N, shape `(g, i, j)`, float64.
        first: sparse, shape `(g · i or 1, d)`.
        second: sparse, shape `(g · j or 1, d)`.
        sign: sign of the second term of s.
    """

    name: str
    squares: Tensor
    first: scipy.sparse.csr_matrix
    second: scipy.sparse.csr_matrix
    sign: int


def masses(group: UnitScaling, state: State) -> list[Mass]:
    """Squared entries of every tensor that a group moves, at a state."""
    return [
        Mass(e.name, state.tensors[e.name].cpu().reshape(e.view).square().sum(3), e.first, e.second, e.sign)
        for e in group.tensors
    ]


def distinct_factors(
    norms: Sequence[tuple[Norm, scipy.sparse.csr_matrix]], size: int
) -> tuple[scipy.sparse.csr_matrix, list[str]]:
    """Distinct factors that normalisations divide out, as forms in z, and where each comes from."""
    seen: dict[tuple[tuple[int, float], ...], str] = {}
    for norm, rows in norms:
        for row in range(rows.shape[0]):
            part = slice(rows.indptr[row], rows.indptr[row + 1])
            key = tuple(sorted(zip(rows.indices[part].tolist(), rows.data[part].tolist(), strict=True)))
            if key:
                seen.setdefault(key, norm.where)
    entries = [(k, j, value) for k, key in enumerate(seen) for j, value in key]
    i, j, values = zip(*entries, strict=True) if entries else ((), (), ())
    return scipy.sparse.csr_matrix((np.array(values, dtype=float), (i, j)), shape=(len(seen), size)), list(
        seen.values()
    )


@final
@dataclass(frozen=True)
class _Stack:
    """Masses of one shape side by side: squares `(n, i, j)`, and where their logarithms lie in the list of all."""

    squares: Tensor
    rows: slice
    columns: slice


@final
class _Potential:
    """Φ with all its forms in one sparse matrix, so that a product costs two matrix-vector products per tensor."""

    def __init__(self, masses: Sequence[Mass], factors: scipy.sparse.csr_matrix, size: int) -> None:
        shapes: dict[tuple[int, int, int], list[Mass]] = {}
        for number, mass in enumerate(masses):
            _, i, j = mass.squares.shape
            # Large tensors stay where they are: stacking saves calls, not arithmetic.
            shapes.setdefault((i, j, 0 if i * j < LARGE else number), []).append(mass)
        forms: list[scipy.sparse.csr_matrix] = []
        self.stacks: list[_Stack] = []
        start = 0
        for (i, j, _), group in shapes.items():
            squares = torch.cat([mass.squares for mass in group]) if len(group) > 1 else group[0].squares
            n = len(squares)
            forms += [_repeated(mass.first, mass.squares.shape[0] * i) for mass in group]
            forms += [_repeated(mass.second, mass.squares.shape[0] * j) * mass.sign for mass in group]
            middle = start + n * i
            self.stacks.append(_Stack(squares, slice(start, middle), slice(middle, middle + n * j)))
            start = middle + n * j
        self.forms = scipy.sparse.csr_matrix(scipy.sparse.vstack([*forms, scipy.sparse.csr_matrix((0, size))]))
        self.turned = scipy.sparse.csr_matrix(self.forms.T)
        self.absolute, self.squared = abs(self.turned), self.turned.power(2)
        self.linear = -2.0 * np.asarray(factors.sum(axis=0)).reshape(-1)

    def logs(self, z: Vector) -> list[tuple[Tensor, Tensor]]:
        """Terms of `s·z` for each stack, shapes `(n, i)` and `(n, j)`."""
        values = torch.from_numpy(self.forms @ z)
        return [
            (values[s.rows].view(*s.squares.shape[:2]), values[s.columns].view(len(s.squares), s.squares.shape[2]))
            for s in self.stacks
        ]

    def at(self, z: Vector) -> _PotentialPoint:
        """Everything about Φ at a point."""
        weights = [((2 * a).exp(), (2 * b).exp()) for a, b in self.logs(z)]
        sums = [
            (ea * _times(s.squares, eb), eb * _times(s.squares.mT, ea))
            for s, (ea, eb) in zip(self.stacks, weights, strict=True)
        ]
        flat = _flat(sums)
        gradient = self.linear + 2 * (self.turned @ flat)
        size = np.abs(self.linear) + 2 * (self.absolute @ flat)
        return _PotentialPoint(self, weights, sums, gradient, size, 4 * (self.squared @ flat))


@final
@dataclass(frozen=True)
class _PotentialPoint:
    """Φ at a point.

    Attributes:
        potential: Φ.
        weights: `exp(2a)` and `exp(2b)` for each stack.
        sums: weighted sums of squares over rows and columns.
        gradient: gradient of Φ.
        size: sum of the absolute terms of the gradient, entry by entry.
        curvature: diagonal of the Hessian, terms that mix rows and columns left out.
    """

    potential: _Potential
    weights: list[tuple[Tensor, Tensor]]
    sums: list[tuple[Tensor, Tensor]]
    gradient: Vector
    size: Vector
    curvature: Vector

    def error(self) -> float:
        """Largest entry of the gradient, relative to the terms that cancel in it."""
        moving = self.size > 0
        return float(np.max(np.abs(self.gradient[moving]) / self.size[moving], initial=0.0))

    def product(self, direction: Vector) -> Vector:
        """Hessian times a direction."""
        parts = []
        moves = self.potential.logs(direction)
        for s, (ea, eb), (r, c), (da, db) in zip(self.potential.stacks, self.weights, self.sums, moves, strict=True):
            up = r * da + ea * _times(s.squares, eb * db)
            across = c * db + eb * _times(s.squares.mT, ea * da)
            parts.append((up, across))
        result: Vector = self.potential.turned @ _flat(parts)
        return 4 * result

    def reach(self, direction: Vector) -> float:
        """Largest change of a logarithm `2 s·z` along a direction."""
        return 2 * max((float(a.abs().max() + b.abs().max()) for a, b in self.potential.logs(direction)), default=0.0)


def minimise(masses: Sequence[Mass], factors: scipy.sparse.csr_matrix, size: int) -> Vector:
    """The minimiser of Φ by Newton's method with conjugate gradients, from zero, to rounding.

    Steps are damped by `ln(1 + m)/m`, m the largest change of a logarithm: sums of exponentials are self-concordant in
    that sense, so that the damped step always descends, and Newton's quadratic convergence is kept.

    Args:
        masses: with squares that are not all zero.
        factors: one row for each factor that is divided out, shape `(factors, d)`.
        size: d.

    Raises:
        NoInvariantGeometry: there is no minimum: the orbit is not closed.
    """
    potential = _Potential(masses, factors, size)
    z = np.zeros(size)
    best = error = math.inf
    for _ in range(STEPS):
        point = potential.at(z)
        error = point.error()
        if error <= 1e-15 or (error <= 1e-11 and error > 0.5 * best):
            return z
        best = min(best, error)
        direction = _solve(point, min(0.1, math.sqrt(error)))
        reach = point.reach(direction)
        z = z + direction * (math.log1p(reach) / reach if reach else 1.0)
    raise NoInvariantGeometry(
        f"the canonical representative was not reached in {STEPS} Newton steps (error {error:.1e}): the orbit of these "
        "weights seems not to be closed in a way that is not covered. geometry='layerwise' works; please report the network"
    )


def least(masses: Sequence[Mass], size: int) -> tuple[float, tuple[str, ...]]:
    """The smallest value of `Σ_e N_e exp(2 s_e·z)` over z, to rounding; what only shrinks goes to zero.

    Args:
        masses: N, not negative, and their forms s.
        size: dimension of z.

    Returns:
        The value, and the names of those of which nothing is left.

    >>> one = scipy.sparse.csr_matrix([[1.0]])
    >>> up, down = (Mass(n, torch.full((1, 1, 1), m, dtype=torch.float64), f, 0 * one, 1) for n, m, f in
    ...             (("a", 4.0, one), ("b", 9.0, -one)))
    >>> value, gone = least([up, down], 1)
    >>> round(value, 12), gone
    (12.0, ())
    """
    none = scipy.sparse.csr_matrix((0, size))
    closed, _ = close(masses, none, size)
    potential = _Potential(closed, none, size)
    logs = potential.logs(minimise(closed, none, size))
    value = sum(
        float(((2 * a).exp() * _times(s.squares, (2 * b).exp())).sum())
        for s, (a, b) in zip(potential.stacks, logs, strict=True)
    )
    gone = [
        old.name for old, new in zip(masses, closed, strict=True) if bool(old.squares.any()) and not new.squares.any()
    ]
    return value, tuple(gone)


def _repeated(matrix: scipy.sparse.csr_matrix, rows: int) -> scipy.sparse.csr_matrix:
    """A matrix with as many rows; one row stands for all."""
    return matrix if matrix.shape[0] == rows else scipy.sparse.csr_matrix(scipy.sparse.vstack([matrix] * rows))


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Products of matrices `(n, i, j)` with vectors `(n, j)`, one each."""
    if matrices.shape[1] * matrices.shape[2] < LARGE:
        return (matrices @ vectors[..., None])[..., 0]
    return torch.stack([matrix @ vector for matrix, vector in zip(matrices, vectors, strict=True)])


def _flat(parts: Sequence[tuple[Tensor, Tensor]]) -> Vector:
    """Row and column sums of all stacks, one after the other."""
    flat = [part.reshape(-1) for pair in parts for part in pair]
    return torch.cat(flat).numpy() if flat else np.zeros(0)


def _solve(point: _PotentialPoint, tolerance: float) -> Vector:
    """Newton's direction by preconditioned conjugate gradients, to a relative residual."""
    scale = np.where(point.curvature > 0, point.curvature, 1.0)
    residual = -point.gradient
    direction = np.zeros_like(residual)
    conditioned = residual / scale
    search, power = conditioned.copy(), float(residual @ conditioned)
    goal = tolerance**2 * power
    for _ in range(2000):
        if power <= goal or power == 0:
            break
        image = point.product(search)
        curvature = float(search @ image)
        if curvature <= 0:
            break
        step = power / curvature
        direction += step * search
        residual -= step * image
        conditioned = residual / scale
        power, old = float(residual @ conditioned), power
        search = conditioned + (power / old) * search
    return direction


def close(masses: Sequence[Mass], factors: scipy.sparse.csr_matrix, size: int) -> tuple[list[Mass], NDArray[np.bool_]]:
    """Zero what an orbit's closure sends to zero, and drop factors that nothing feeds.

    A coordinate of z in which no entry grows while some vanish, and which moves no factor, leads to the closed orbit:
    the entries that vanish are zero there. What is left over may free further coordinates.

    Args:
        masses: squares of all tensors.
        factors: one row for each factor, shape `(factors, d)`.
        size: d.

    Returns:
        The masses with zeros, and which factors stay.
    """
    masses = list(masses)
    kept = np.ones(factors.shape[0], dtype=bool)
    while True:
        up, down = _directions(masses, size)
        fed = ((factors > 0) @ up.astype(float) + (factors < 0) @ down.astype(float)) > 0
        starving = kept & ~fed
        kept &= fed
        held = np.zeros(size, dtype=bool)
        held[np.unique(some(factors, np.flatnonzero(kept)).indices)] = True
        one_way = (up ^ down) & ~held
        if not one_way.any() and not starving.any():
            return masses, kept
        masses = [_without(mass, one_way) for mass in masses]


def dead(masses: Sequence[Mass], size: int) -> NDArray[np.bool_]:
    """Coordinates whose units nothing feeds: no entry that is not zero grows with them."""
    up, _ = _directions(masses, size)
    return ~up


def touched(mass: Mass, columns: NDArray[np.bool_], growing: bool = False) -> Tensor:
    """Entries of a tensor that some of these coordinates move, or make grow: a mask that broadcasts to `(g, i, j)`."""
    g = mass.squares.shape[0]
    shared = np.intersect1d(mass.first.indices, mass.second.indices)
    mask = torch.zeros(1, 1, 1, dtype=torch.bool)
    for matrix, sign, shape in ((mass.first, 1, (g, -1, 1)), (mass.second, mass.sign, (g, 1, -1))):
        entries = matrix.tocoo()
        moves = (sign * entries.data > 0) if growing else (entries.data != 0)
        chosen = np.zeros(matrix.shape[0], dtype=bool)
        chosen[entries.row[moves & columns[entries.col] & ~np.isin(entries.col, shared)]] = True
        mask = mask | torch.from_numpy(chosen).view(shape if len(chosen) > 1 else (1, 1, 1))
    for _, rates in _rates(mass, shared[columns[shared]]):
        mask = mask | ((rates > 0) if growing else (rates != 0))
    return mask


def _directions(masses: Sequence[Mass], size: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Two masks over coordinates: whether some entry that is not zero grows with it, and whether some shrinks."""
    up, down = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    for mass in masses:
        alive = mass.squares > 0
        shared = np.intersect1d(mass.first.indices, mass.second.indices)
        for matrix, axis, sign in ((mass.first, 2, 1), (mass.second, 1, mass.sign)):
            lives = alive.any(axis).reshape(-1) if matrix.shape[0] > 1 else alive.any().view(1)
            entries = matrix.tocoo()
            seen = lives.numpy()[entries.row] & ~np.isin(entries.col, shared)
            up[entries.col[seen & (sign * entries.data > 0)]] = True
            down[entries.col[seen & (sign * entries.data < 0)]] = True
        for column, rates in _rates(mass, shared):
            up[column] |= bool((alive & (rates > 0)).any())
            down[column] |= bool((alive & (rates < 0)).any())
    return up, down


def _rates(mass: Mass, columns: NDArray[np.int64]) -> Iterator[tuple[int, Tensor]]:
    """Rates at which each entry grows with each of some coordinates, shapes that broadcast to `(g, i, j)`."""
    g = mass.squares.shape[0]
    for column in columns:
        unit = np.zeros(mass.first.shape[1])
        unit[column] = 1.0
        a, b = (torch.from_numpy(part @ unit) for part in (mass.first, mass.second))
        a = a.view(g, -1, 1) if len(a) > 1 else a.view(1, 1, 1)
        b = b.view(g, 1, -1) if len(b) > 1 else b.view(1, 1, 1)
        yield int(column), a + mass.sign * b


def _without(mass: Mass, columns: NDArray[np.bool_]) -> Mass:
    mask = touched(mass, columns)
    return Mass(mass.name, torch.where(mask, 0.0, mass.squares), mass.first, mass.second, mass.sign)
