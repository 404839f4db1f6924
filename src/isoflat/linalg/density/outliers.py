"""Eigenvectors to deflate before probes are drawn: those that a Lanczos run has separated from the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isoflat.core.errors import UsageError
from isoflat.linalg.krylov.recurrence import Recurrence
from isoflat.linalg.solver import Domain, Request, Solver, Steps
from isoflat.linalg.trace.base import clock
from isoflat.linalg.vectors import sphere

Reals = NDArray[np.float64]

CLEAR = 0.1
"""Largest residual of a separated group, in units of the gap behind it: a bound on the sine of its angle to the truth."""

FINE = 1e-3
"""Largest shift of an eigenvalue by taking a group out, in units of the range of the rest."""


@final
@dataclass(frozen=True, eq=False)
class Separated:
    """Eigenvectors that a run has separated.

    Attributes:
        directions: orthonormal columns, shape `(n, d)`, in the precision of the products; None where there are none.
        products: products used.
    """

    directions: Tensor | None
    products: int


@final
@dataclass(frozen=True)
class Outliers(Solver[Separated]):
    """Ritz vectors of one Lanczos run, as many at each end as are separated from the rest; see `separated`.

    How many are taken is decided by the run's own residuals, before any probe is drawn: never by what makes a result
    look good. A wrong decision costs sharpness only, because `StochasticLanczosQuadrature` multiplies with the directions
    again and adds what they miss to its band.

    Attributes:
        limit: largest number of vectors.
        depth: largest number of steps of the run.
        seconds: budget of wall-clock time; None for no limit.

    Raises:
        UsageError: a setting has no meaning.

    >>> from isoflat.core.rng import stream
    >>> from isoflat.linalg.operator import Dense
    >>> bulk = torch.linspace(0, 1, 98, dtype=torch.float64)
    >>> spikes = torch.tensor([9.0, -7.0], dtype=torch.float64)
    >>> found = Outliers(limit=5, depth=30)(Dense(torch.diag(torch.cat([spikes, bulk]))), stream(0))
    >>> found.directions[:2].abs().T.round(decimals=6).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """

    label: ClassVar[str] = "Outliers"

    limit: int = 24
    depth: int = 64
    seconds: float | None = None

    def __post_init__(self) -> None:
        """Refuse settings without meaning."""
        if self.limit < 1 or self.depth < 2:
            raise UsageError(f"expected a limit from 1 on and a depth from 2 on, got {self.limit} and {self.depth}")

    def steps(self, domain: Domain, stream: torch.Generator) -> Steps[Separated]:
        """Run Lanczos once, and return its separated Ritz vectors."""
        expired = clock(self.seconds)
        run = Recurrence(sphere(domain.n, stream).to(domain.device), domain.dtype)
        while not run.exhausted and run.k < self.depth and not (run.k and expired()):
            product = yield Request(run.last, status=f"outliers: step {run.k + 1} of {self.depth}")
            run.extend(product[:, 0])
        values, vectors = run.ritz()
        coupling = 0.0 if run.exhausted else run.betas[-1]
        masses = vectors[0] ** 2
        bottom, top = separated(values, coupling * np.abs(vectors[-1]), masses, self.limit, run.rounding)
        chosen = [*range(bottom), *range(len(values) - top, len(values))]
        if not chosen:
            return Separated(None, run.k)
        columns = torch.stack([run.combine(vectors[:, j]).to(domain.dtype) for j in chosen], dim=1)
        return Separated(torch.linalg.qr(columns)[0], run.k)


def separated(values: Reals, residuals: Reals, masses: Reals, limit: int, rounding: float) -> tuple[int, int]:
    """Numbers of Ritz values to take from each end.

    A group at an end is separated where the norm r of its residuals, and rounding, are at most `CLEAR` times the gap g
    behind it, and taking it out moves no eigenvalue by more than `FINE` times the range of the rest, `r²/g` being about what it moves
    (or by more than rounding does anyhow). Of all pairs of separated groups with at most `limit` members that leave more
    than half of the start's mass, which is where most eigenvalues are, the one is taken that leaves the narrowest rest; of
    equal ones the one with fewest members.

    Args:
        values: Ritz values, ascending, shape `(k,)`.
        residuals: `‖A x_j − θ_j x_j‖` by the recurrence, shape `(k,)`.
        masses: squares of the start's components along the Ritz vectors, shape `(k,)`.
        limit: largest number of members of both groups together.
        rounding: rounding error of the run's coefficients.

    Returns:
        Numbers at the bottom and at the top.

    >>> residuals, masses = np.array([1e-9, 0.3, 0.3, 0.3, 1e-9]), np.array([0.01, 0.3, 0.38, 0.3, 0.01])
    >>> separated(np.array([-5.0, 0.0, 0.5, 1.0, 9.0]), residuals, masses, 4, 1e-15)
    (1, 1)
    """
    k = len(values)
    squares = residuals**2
    below, above = np.append(0.0, np.cumsum(squares)), np.append(0.0, np.cumsum(squares[::-1]))
    best, least = (0, 0), float(values[-1] - values[0])
    for count in range(1, min(limit, k - 1) + 1):
        for bottom in range(count + 1):
            top = count - bottom
            if 2 * float(masses[bottom : k - top].sum()) <= 1:
                continue
            first, last = values[bottom], values[k - 1 - top]
            width = float(last - first)
            room = max(FINE * width, rounding)
            gaps = [(below[bottom], first - values[bottom - 1])] if bottom else []
            gaps += [(above[top], values[k - top] - last)] if top else []
            clear = all(max(square, rounding**2) <= (CLEAR * gap) ** 2 and square <= room * gap for square, gap in gaps)
            if clear and width < least:
                best, least = (bottom, top), width
    return best
