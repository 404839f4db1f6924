"""Enclosures of eigenvalues from any trial vectors, certified by a fresh random start on their complement.

Let X be orthonormal trial vectors, however they were found, and B the operator on their complement. In the basis of X
and its complement

    A = [ Xᵀ A X   Rᵀ ]  with R = (I − X Xᵀ) A X, and A ≤ [ Xᵀ A X   Rᵀ  ]  where B ≤ U I,
        [   R      B  ]                                  [   R      U I ]

so that the j-th largest eigenvalue of A is at most that of the right matrix, which only has dimension 2d to look at. Where
U lies below the Ritz values the price of a residual is quadratic, `‖R‖² / (θ − U)`, and U need not be sharp at all: a
Lanczos run from a fresh random start in the complement, which by itself would need many steps for a tight bound, stops
as soon as U is clear of θ. Where A is a sum of parts, `U = Σ_p U_p` with a run in each part by itself: parts that weigh
little need a few steps only, however dear their products are. `docs/concepts/certificate.md`, "Several eigenvalues, from any
start", has the proof.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isoflat.core import space
from isoflat.linalg.certificate import outer_bounds
from isoflat.linalg.krylov.recurrence import Recurrence
from isoflat.linalg.operator import Parts
from isoflat.linalg.solver import Domain, Request, Solver, Steps
from isoflat.linalg.vectors import gram, orthogonalise, remove, sphere

PATIENCE = 3
"""Steps in a row without gain after which a run promises nothing more: one may be bad luck of the couplings."""

CLEAR = 0.25
"""Share of the gap to the vector's own value that a bound may take: a residual then costs 4/3 of the least."""


@final
@dataclass(frozen=True)
class ComplementBounds:
    """Bounds on the spectrum of `B = (I − X Xᵀ) A (I − X Xᵀ)`.

    Attributes:
        lower: bound on its smallest eigenvalue.
        upper: bound on its largest eigenvalue.
        bottom: smallest Ritz value, summed over the groups of parts.
        top: largest Ritz value, summed over the groups of parts.
        weight: largest magnitude of a Ritz value, summed over the groups after the first: about the norm of these.
        products: cost in products with all of A.
        runs: Lanczos run of each group.
        reached: flag that the bounds met the stopping rule.
    """

    lower: float
    upper: float
    bottom: float
    top: float
    weight: float
    products: float
    runs: tuple[Recurrence, ...]
    reached: bool = False

    @property
    def magnitude(self) -> float:
        """Largest magnitude of a Ritz value on the complement."""
        return max(-self.bottom, self.top)

    @property
    def steps(self) -> int:
        """Number of steps of all runs together."""
        return sum(run.k for run in self.runs)

    def beyond(self, below: float, above: float) -> list[Tensor]:
        """Ritz vectors of a run in all of A with values beyond either of two: shape `(n,)` each, float64."""
        (run,) = self.runs
        values, coefficients = run.ritz()
        chosen = [j for j, value in enumerate(values * run.scale) if not below <= value <= above]
        return [run.combine(coefficients[:, j]) for j in chosen]


@final
@dataclass(frozen=True)
class RitzBasis:
    """Trial vectors and their products, rotated so that `Xᵀ A X` is diagonal.

    Attributes:
        vectors: X, rows of shape `(n,)`, float64, orthonormal.
        images: `A X`, rows of shape `(n,)`, float64.
        values: Ritz values, ascending, shape `(d,)`.
        coupling: C with `Rᵀ R = Cᵀ C` for the residuals `R = (I − X Xᵀ) A X`, shape `(d, d)`.
    """

    vectors: tuple[Tensor, ...]
    images: tuple[Tensor, ...]
    values: NDArray[np.float64]
    coupling: NDArray[np.float64]

    @staticmethod
    def of(vectors: Sequence[Tensor], images: Sequence[Tensor]) -> RitzBasis:
        """Rayleigh-Ritz procedure on orthonormal vectors.

        Args:
            vectors: rows of shape `(n,)`, float64, orthonormal.
            images: products of A with them.
        """
        values, turn = np.linalg.eigh(gram(vectors, images))
        columns = [torch.from_numpy(np.ascontiguousarray(turn[:, j])) for j in range(len(values))]
        turned, moved = ([space.combine(column, rows) for column in columns] for rows in (vectors, images))
        residuals, sizes = [], np.zeros(len(values))
        for j, (vector, image, value) in enumerate(zip(turned, moved, values, strict=True)):
            residual = torch.sub(image, vector, alpha=float(value))
            remove(turned, residual)
            sizes[j] = space.norm(residual)
            residuals.append(residual.div_(sizes[j]) if sizes[j] else residual)
        # R = Q C with orthonormal Q; the root of a Gram matrix is such a C, and unit columns do not overflow in it.
        squares, axes = np.linalg.eigh(gram(residuals, residuals))
        root = np.sqrt(squares.clip(min=0))[:, None] * axes.T
        return RitzBasis(tuple(turned), tuple(moved), values, root * sizes)

    def residual(self, j: int) -> float:
        """`‖A x_j − θ_j x_j‖`."""
        return space.norm(torch.sub(self.images[j], self.vectors[j], alpha=float(self.values[j])))

    def bounds(self, lower: float, upper: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Bounds on the d largest eigenvalues from above, and on the d smallest from below; both ascending.

        Args:
            lower: lower bound on the spectrum of the complement.
            upper: upper bound on it.

        >>> start = torch.tensor([1.0, 0.0], dtype=torch.float64)
        >>> trial = RitzBasis.of([start], [torch.tensor([2.0, 0.5], dtype=torch.float64)])
        >>> [round(float(bound[0]), 3) for bound in trial.bounds(0.0, 1.0)]
        [2.207, -0.118]
        """
        d = len(self.values)
        return self._compared(upper)[d:], self._compared(lower)[:d]

    def _compared(self, bound: float) -> NDArray[np.float64]:
        """Eigenvalues of the matrix with which A is compared, ascending, shape `(2d,)`."""
        d = len(self.values)
        if not math.isfinite(bound):
            return np.full(2 * d, bound)
        both = np.block([[np.diag(self.values), self.coupling.T], [self.coupling, np.eye(d) * bound]])
        return np.linalg.eigvalsh(both).astype(np.float64)


@final
@dataclass(frozen=True)
class StoppingRule:
    """Stopping rule of bounds on a complement: failure probability, tightness and budget.

    Attributes:
        failure: probability that a bound is wrong, both ends and all groups together.
        enough: test of whether bounds are tight enough.
        affordable: test of whether so many products can be spent in all.
        status: text for a progress bar.
    """

    failure: float
    enough: Callable[[ComplementBounds], bool]
    affordable: Callable[[float], bool]
    status: str = ""


def complement_bounds(
    trial: RitzBasis, domain: Domain, stream: torch.Generator, groups: Sequence[Parts], rule: StoppingRule
) -> Steps[ComplementBounds]:
    """Bound the spectrum on the complement of a Ritz basis, one Lanczos run in each group of parts.

    The step that promises the most for its cost comes first. It ends where the bounds are tight enough, where they
    cannot become so (the Ritz values themselves add up to too much), or with the budget.

    Args:
        trial: trial vectors X with their products.
        domain: domain of A.
        stream: random stream of the fresh starts.
        groups: groups of parts that share a run; together they are all of A.
        rule: stopping rule.
    """
    levels = [_PartRun.fresh(trial, domain, stream, parts) for parts in groups]
    spent = 0.0
    while True:
        known = _combined(levels, spent)
        done = all(level.recurrence.k for level in levels)
        reached = done and rule.enough(known)
        hopeless = done and not rule.enough(replace(known, lower=known.bottom, upper=known.top))
        level = max(levels, key=lambda level: level.promise)
        if reached or hopeless or level.promise <= 0 or (done and not rule.affordable(spent + level.share)):
            return replace(known, reached=reached)
        where = f" in part {levels.index(level) + 1} of {len(levels)}" if len(levels) > 1 else ""
        status = f"{rule.status}{where}: bound {known.upper:.3g}"
        product = (yield Request(level.recurrence.last, status=status, parts=level.parts))[:, 0]
        spent += level.share
        level.extend(product, rule.failure / len(levels))


@dataclass
class _PartRun:
    """A Lanczos run on the complement in some of the parts.

    Attributes:
        parts: places of the parts.
        share: cost of a product with them, in products with all of A.
        recurrence: Lanczos recurrence of the run.
        lower: bound on the smallest eigenvalue.
        upper: bound on the largest eigenvalue.
        bottom: smallest Ritz value.
        top: largest Ritz value.
        gains: factors by which the distance of the bounds shrank, step by step.
    """

    parts: Parts
    share: float
    recurrence: Recurrence
    lower: float = -math.inf
    upper: float = math.inf
    bottom: float = -math.inf
    top: float = math.inf
    gains: list[float] = field(default_factory=list)

    @staticmethod
    def fresh(trial: RitzBasis, domain: Domain, stream: torch.Generator, parts: Parts) -> _PartRun:
        """Start at a uniform point of the complement's unit sphere."""
        start = sphere(domain.n, stream).to(domain.device)
        size = orthogonalise(trial.vectors, start)[1]
        # Where the trial vectors are a basis nothing is left, and any start does for the zero operator.
        start = start / size if size else sphere(domain.n, stream).to(domain.device)
        return _PartRun(parts, domain.share(parts), Recurrence(start, domain.dtype, trial.vectors))

    @property
    def promise(self) -> float:
        """Expected gain of the next step in the distance of the bounds, per unit of cost, from the last few steps."""
        if self.recurrence.exhausted:
            return 0.0
        if not self.gains:
            return math.inf
        return (self.upper - self.lower) * (1 - min(self.gains[-PATIENCE:])) / self.share

    def extend(self, product: Tensor, failure: float) -> None:
        """Take in a product with the parts; the recurrence makes it one of the complement's operator."""
        run = self.recurrence
        run.extend(product)
        ritz = run.ritz()[0]
        lower, upper = outer_bounds(ritz, run.log_couplings, run.n, failure)
        # Earlier bounds hold as well, on the same event.
        lower, upper = max(self.lower, lower * run.scale), min(self.upper, upper * run.scale)
        width = self.upper - self.lower
        self.gains.append((upper - lower) / width if math.isfinite(width) and width > 0 else 0.0)
        self.lower, self.upper = lower, upper
        self.bottom, self.top = float(ritz[0]) * run.scale, float(ritz[-1]) * run.scale


def _combined(levels: Sequence[_PartRun], spent: float) -> ComplementBounds:
    """Bounds on the sum of the parts, from the bounds of each run."""
    lower, upper, bottom, top = (
        math.fsum(getattr(level, name) for level in levels) for name in ("lower", "upper", "bottom", "top")
    )
    weight = math.fsum(max(-level.bottom, level.top, 0.0) for level in levels[1:])
    return ComplementBounds(lower, upper, bottom, top, weight, spent, tuple(level.recurrence for level in levels))


@final
@dataclass(frozen=True, eq=False)
class Remainder(Solver[ComplementBounds]):
    """Bounds on the spectrum on a vector's complement, tight enough to tell it from the vector's Rayleigh quotient.

    Attributes:
        vector: unit vector, shape `(n,)`.
        confidence: probability that both bounds hold.
        max_products: largest number of products, the one with the vector included.

    >>> from isoflat.core.rng import stream
    >>> from isoflat.linalg.operator import Dense
    >>> operator = Dense(torch.diag(torch.cat([torch.tensor([9.0]), torch.linspace(0, 1, 99)]).double()))
    >>> left = Remainder(torch.eye(100, dtype=torch.float64)[0])(operator, stream(0))
    >>> left.lower <= 0.0, 1.0 <= left.upper < 3.0
    (True, True)
    """

    label: ClassVar[str] = "Remainder"

    vector: Tensor
    confidence: float = 1 - 1e-6
    max_products: int = 300

    def steps(self, domain: Domain, stream: torch.Generator) -> Steps[ComplementBounds]:
        """Multiply the vector, then run Lanczos on its complement."""
        status = "what a vector leaves"
        product = (yield Request(self.vector[:, None].to(domain.dtype), status=status))[:, 0]
        trial = RitzBasis.of([self.vector], [product])
        size = abs(float(trial.values[0]))

        def enough(left: ComplementBounds) -> bool:
            above = left.upper - left.top <= CLEAR * (size - left.top)
            return above and left.bottom - left.lower <= CLEAR * (size + left.bottom)

        rule = StoppingRule(1 - self.confidence, enough, lambda spent: spent + 1 <= self.max_products, status)
        return (yield from complement_bounds(trial, domain, stream, (None,), rule))
