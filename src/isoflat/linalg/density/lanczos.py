"""Stochastic Lanczos quadrature: a spectral density from a few random probes, with a band that holds everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from isoflat.core.density import Atoms, Density, Outlier, Quadrature
from isoflat.core.errors import UsageError
from isoflat.linalg.certificate import outer_bounds
from isoflat.linalg.density.counts import counted
from isoflat.linalg.density.gauss import JacobiMatrix, Reals, pooled
from isoflat.linalg.eigen.complement import RitzBasis
from isoflat.linalg.krylov.recurrence import Recurrence
from isoflat.linalg.solver import Domain, Request, Steps
from isoflat.linalg.trace.base import Deflating, check, clock
from isoflat.linalg.vectors import gaussian, orthogonalise

ENDS = 0.1
"""Share of the failure probability that the ends of the spectrum have; their bounds depend on its logarithm only."""


@final
@dataclass(frozen=True, eq=False)
class StochasticLanczosQuadrature(Deflating[Density]):
    """Spectral density by Lanczos runs from random probes (Bai, Fahey, Golub 1996; Chen, Trogdon, Ubaru 2021).

    *Estimate.* The eigenvalues of a run's tridiagonal matrix, with the squares of its eigenvectors' first entries, are
    Gauss's quadrature of the probe's distribution `μ(−∞, x] = Σ_{λ_i ≤ x} ⟨u_i, v⟩²`; the probes' average estimates the
    share of eigenvalues.

    *Band.* What a run cannot resolve is bounded for each probe, not estimated (`density.gauss`), and what the average of
    a few probes says about all n eigenvalues follows from its exact law (`density.counts`); the outermost eigenvalues
    have the bounds of `linalg.certificate`. All of it holds together with probability `confidence`. For the Wasserstein
    distance Chen, Trogdon and Ubaru prove `t · (λ_max − λ_min)` for `12/t + 1/2` steps and `4 ln(2n/η)/((n + 2) t²)`
    probes beforehand; the bound that is reported is the area of the band, in absolute units, and smaller.

    *Deflation.* One outlier far away makes the range, and with it every bound in absolute units, as large as itself.
    Directions X are taken out: the eigenvalues of `A` are those of `Xᵀ A X` and of the operator on the complement,
    up to `2 r² / (η + √(η² + 4 r²))`, r the norm of the residual `A X − X Xᵀ A X` and η the gap between the two spectra
    (Li and Li 2005); nothing is assumed about where the directions come from. The outliers' values are Rayleigh quotients
    of fresh products in float64, with their true residuals.

    *Rounding.* A run is one of `A + E` with `‖E‖ = O(k eps ‖A‖)`: all bounds are shifted by that much. Where products in
    float32 leave less than is asked about, the band says so.

    Where all n unit vectors would cost no more products than the probes, they are taken, and the spectrum is exact.

    Departures from the textbook's quadrature, numbered where they happen: (1) each run re-orthogonalises fully and keeps its
    basis, (2) probes are Gaussian directions that are averaged by their squared lengths, because only that average
    has a known law (`density.counts`), and (3) nodes are never smoothed: the band is stated instead.

    Attributes:
        probes: number of probes; an even one has the narrower band.
        depth: steps of each run; fewer where its Krylov space is closed before.
        confidence: probability that the band holds everywhere.
        block: probes that advance together, one pass over the data for all; the basis of each takes `depth` vectors.
        max_products: budget; where it is too small for all steps of all probes, there are fewer steps. None for no limit.
        seconds: budget of wall-clock time, looked at between passes; None for no limit.
        directions: orthonormal columns to deflate, shape `(n, d)`; None for none.

    Raises:
        UsageError: a setting has no meaning, or the directions do not fit or are not orthonormal.

    >>> from isoflat.core.rng import stream
    >>> from isoflat.linalg.operator import Dense
    >>> operator = Dense(torch.diag(torch.linspace(0, 1, 500, dtype=torch.float64)))
    >>> density = StochasticLanczosQuadrature(probes=4, depth=40)(operator, stream(0))
    >>> density.below(0.5).lower < 0.5 < density.below(0.5).upper, density.wasserstein < 0.1
    (True, True)
    """

    label: ClassVar[str] = "StochasticLanczosQuadrature"

    probes: int = 4
    depth: int = 64
    confidence: float = 0.95
    block: int = 4
    max_products: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        """Refuse settings without meaning."""
        check(max(self.probes, 2), self.confidence, self.block)
        if self.probes < 1 or self.affordable < 1:
            raise UsageError(
                f"expected at least 1 probe, and 1 step of each within the budget: got {self.probes} probes of depth "
                f"{self.depth} and a budget of {self.max_products} products"
            )

    @property
    def affordable(self) -> int:
        """The depth that the budget has room for, once directions are paid for."""
        if self.max_products is None:
            return self.depth
        known = 0 if self.directions is None else self.directions.shape[-1]
        return min(self.depth, (self.max_products - known) // max(self.probes, 1))

    def takes_all(self, n: int) -> bool:
        """Test of whether n unit vectors cost no more than the probes, so that the spectrum will be exact."""
        return n <= self.probes * self.affordable

    def steps(self, domain: Domain, stream: torch.Generator) -> Steps[Density]:
        """Multiply with the deflated directions, then run the probes, a block of them at a time."""
        if self.takes_all(domain.n):
            return (yield from _whole(domain, self.block, self.confidence))
        expired = clock(self.seconds)
        removed = yield from _removed(self.basis(domain), self.block)
        size = domain.n - len(removed.rows)
        runs: list[_FinishedRun] = []
        while size and len(runs) < self.probes and not (runs and expired()):
            count = min(self.block, self.probes - len(runs))
            fresh = [_ProbeRun(removed.rows, domain, stream) for _ in range(count)]
            active = fresh
            while active:
                status = f"spectrum: step {active[0].recurrence.k + 1} of {self.affordable}, probe {len(runs) + 1}"
                vectors = torch.cat([probe.recurrence.last for probe in active], dim=1)
                products = yield Request(vectors, status=f"{status} to {len(runs) + count} of {self.probes}")
                for probe, product in zip(active, products.unbind(1), strict=True):
                    probe.extend(product)
                over = expired()
                active = [p for p in active if not (p.closed or over or p.recurrence.k >= self.affordable)]
            runs += [probe.finished() for probe in fresh]
        return self._result(removed, runs, size)

    def _result(self, removed: _DeflatedPart, probes: list[_FinishedRun], size: int) -> Density:
        """Density with its band, from all runs together."""
        low, high, rounding = self._bulk(probes, size) if size else (_NONE, _NONE, 0.0)
        inside = (low[0][0], high[0][-1]) if size else None
        slack = rounding + removed.shift(inside)
        values = np.array([outlier.value for outlier in removed.outliers])
        ones = np.ones(len(values), dtype=np.int64)
        full = len(probes) == self.probes and all(probe.run.closed or probe.depth >= self.depth for probe in probes)
        steps = max((probe.depth for probe in probes), default=0)
        return Density(
            n=size + len(values),
            probes=tuple(probe.quadrature for probe in probes),
            outliers=removed.outliers,
            low=Atoms.of(np.append(low[0], values) - slack, np.append(low[1], ones)),
            high=Atoms.of(np.append(high[0], values) + slack, np.append(high[1], ones)),
            confidence=self.confidence,
            slack=slack,
            products=len(values) + sum(probe.depth for probe in probes),
            exact=not size,
            reached=full or not size,
            stopped=self._reason(len(probes), steps, full or not size),
        )

    def _reason(self, probes: int, steps: int, full: bool) -> str:
        done = f"{probes} probes, {steps} steps"
        if full:
            return f"{done} taken"
        if self.affordable < self.depth and probes == self.probes and steps == self.affordable:
            return f"budget of {self.max_products} products spent: {done} instead of {self.depth}"
        return f"budget of {self.seconds:g} seconds spent: {done} taken"

    def _bulk(self, probes: list[_FinishedRun], size: int) -> tuple[_Spectrum, _Spectrum, float]:
        """Spectra below and above that of the complement, and the rounding error of both."""
        failure = 1 - self.confidence
        ends = [probe.ends(size, ENDS * failure / len(probes)) for probe in probes]
        bottom, top = max(end[0] for end in ends), min(end[1] for end in ends)
        nodes = [node for probe in probes for node in (probe.quadrature.nodes[0], probe.quadrature.nodes[-1])]
        bottom, top = min(bottom, *nodes), max(top, *nodes)  # Ritz values lie inside, whatever was drawn
        squares = np.array([probe.quadrature.square for probe in probes])
        grid, lower, upper = pooled([probe.run for probe in probes], squares / squares.sum())  # 3
        least, most = counted(lower, upper, size, len(probes), (1 - ENDS) * failure)
        least = np.maximum.accumulate(least)
        # In the few cases in which bounds fail they may cross; they say nothing there, and must not contradict.
        most = np.maximum.accumulate(np.maximum(most, np.append(0, least[:-1])))
        grid = grid.clip(bottom, top)
        low = (np.append(bottom, grid), np.diff(most, prepend=0, append=size))
        high = (np.append(grid, top), np.diff(least, prepend=0, append=size))
        return low, high, max(probe.rounding for probe in probes)


_Spectrum = tuple[Reals, np.ndarray]
_NONE: _Spectrum = (np.empty(0), np.empty(0, dtype=np.int64))


@final
@dataclass(frozen=True)
class _FinishedRun:
    """A finished run, without its Krylov basis.

    Attributes:
        run: coefficients of the run.
        quadrature: Gauss quadrature of the probe.
        rounding: largest change of an eigenvalue by rounding, in order of magnitude.
        scale: power of two that the run's coefficients were divided by.
        log_couplings: `Σ ln β_j` for `linalg.certificate`, in units of `scale`.
    """

    run: JacobiMatrix
    quadrature: Quadrature
    rounding: float
    scale: float
    log_couplings: float

    @property
    def depth(self) -> int:
        """Number of steps."""
        return len(self.run.alphas)

    def ends(self, size: int, failure: float) -> tuple[float, float]:
        """Bounds on the smallest and on the largest of `size` eigenvalues."""
        ritz = np.array(self.quadrature.nodes) / self.scale
        lower, upper = outer_bounds(ritz, self.log_couplings, size, failure)
        return lower * self.scale, upper * self.scale


class _ProbeRun:
    """A Lanczos run under way.

    Attributes:
        recurrence: Lanczos recurrence of the run.
        square: `‖g‖²` of the Gaussian vector whose direction the run starts from.
        closed: flag that the Krylov space is invariant up to rounding, so that further steps tell nothing.
    """

    def __init__(self, rows: Sequence[Tensor], domain: Domain, stream: torch.Generator) -> None:
        """Start from a Gaussian vector projected off the rows: its direction is uniform on their complement."""
        draw = gaussian(domain.n, 1, stream)[:, 0].to(domain.device)
        length = orthogonalise(rows, draw)[1]
        self.recurrence = Recurrence(draw.div_(length), domain.dtype, rows)  # 1
        self.square = length**2  # 2
        self.closed = False

    def extend(self, product: Tensor) -> None:
        """Take in a product; the recurrence makes it one of the operator on the complement."""
        self.recurrence.extend(product)
        self.closed = self.recurrence.exhausted or self.recurrence.betas[-1] <= self.recurrence.rounding

    def finished(self) -> _FinishedRun:
        """Coefficients and quadrature of the finished run."""
        done, scale = self.recurrence, self.recurrence.scale
        run = JacobiMatrix(np.array(done.alphas) * scale, np.array(done.betas) * scale, self.closed)
        nodes, weights = run.gauss()
        return _FinishedRun(
            run=run,
            quadrature=Quadrature(tuple(nodes.tolist()), tuple(weights.tolist()), self.square),
            rounding=(1 + self.closed) * done.rounding * scale,  # what was left out in the end is rounding, too
            scale=scale,
            log_couplings=done.log_couplings,
        )


@final
@dataclass(frozen=True)
class _DeflatedPart:
    """Directions taken out before probes are drawn, and the outliers along them.

    Attributes:
        rows: orthonormal vectors X, float64.
        outliers: Ritz values in their span, ascending, with residuals.
        coupling: a bound on `‖A X − X Xᵀ A X‖`.
    """

    rows: tuple[Tensor, ...]
    outliers: tuple[Outlier, ...]
    coupling: float

    def shift(self, inside: tuple[float, float] | None) -> float:
        """Bound on the distance of the eigenvalues from those of the two decoupled parts (Li and Li 2005).

        Args:
            inside: both ends of the spectrum on the complement; None where there is no complement.
        """
        if inside is None or not self.coupling:
            return 0.0
        gaps = [max(inside[0] - outlier.value, outlier.value - inside[1], 0.0) for outlier in self.outliers]
        half = min(gaps) / 2 / self.coupling
        return self.coupling / (half + math.hypot(half, 1.0))


def _removed(rows: Sequence[Tensor], block: int) -> Steps[_DeflatedPart]:
    """Deflated part of the operator, from fresh products in float64 with the directions."""
    if not rows:
        return _DeflatedPart((), (), 0.0)
    basis = torch.linalg.qr(torch.stack(list(rows), dim=1).double())[0]
    images: list[Tensor] = []
    for columns in basis.split(block, dim=1):
        status = f"spectrum: outlier {len(images) + 1} of {len(rows)}"
        images += (yield Request(columns, double=True, status=status)).unbind(1)
    trial = RitzBasis.of(basis.unbind(1), images)
    outliers = [Outlier(float(value), trial.residual(j)) for j, value in enumerate(trial.values)]
    return _DeflatedPart(trial.vectors, tuple(outliers), float(np.linalg.norm(trial.coupling)))


def _whole(domain: Domain, block: int, confidence: float) -> Steps[Density]:
    """The exact spectrum, from products with all unit vectors."""
    n = domain.n
    matrix = np.empty((n, n))
    for start in range(0, n, block):
        columns = torch.zeros(n, min(block, n - start), dtype=torch.float64, device=domain.device)
        columns[start:].fill_diagonal_(1)
        status = f"spectrum: unit vector {start + 1} of {n}"
        matrix[:, start : start + columns.shape[1]] = (yield Request(columns, double=True, status=status)).cpu().numpy()
    size = float(np.abs(matrix).max())
    scale = math.ldexp(1.0, math.frexp(size)[1] - 1) if size else 1.0
    matrix /= scale
    values = np.linalg.eigvalsh((matrix + matrix.T) / 2)
    rounding = np.finfo(np.float64).eps * n * float(np.abs(values).max())
    slack = (rounding + float(np.linalg.norm(matrix - matrix.T)) / 2) * scale
    values *= scale
    ones = np.ones(n, dtype=np.int64)
    return Density(
        n=n,
        probes=(Quadrature(tuple(values.tolist()), (1 / n,) * n, float(n)),),
        outliers=(),
        low=Atoms.of(values - slack, ones),
        high=Atoms.of(values + slack, ones),
        confidence=confidence,
        slack=slack,
        products=n,
        exact=True,
        reached=True,
        stopped=f"{n} products give every eigenvalue",
    )
