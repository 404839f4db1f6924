"""Many eigenpairs at both ends of a spectrum: found from any start, certified from a fresh random one.

1. *Search.* Block Lanczos (`block_lanczos`) from warm vectors, random ones, or both, until its own residuals are small
   enough. Nothing here needs to be random, or right.
2. *Verify.* Fresh products of the vectors found, in float64, and Rayleigh and Ritz once more: values and residuals come
   from here only.
3. *Certify.* `complement` bounds the spectrum on the complement, from a random start that knows nothing of the search; the
   eigenvalues of a small comparison matrix then bound those of A (`docs/concepts/certificate.md`, "Several
   eigenvalues, from any start"). If the complement
   holds an eigenvalue that belongs among the wanted ones, it goes into the search, and all begins again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isoflat.core import space
from isoflat.core.errors import UsageError
from isoflat.linalg.solver import Domain, SolverWithVectors, Steps
from isoflat.linalg.vectors import sphere

Reals = NDArray[np.float64]


@final
@dataclass(frozen=True)
class Eigenpair:
    """An eigenvalue with its enclosure `[lower, upper]`, and an approximate eigenvector.

    Attributes:
        value: Ritz value of fresh products; the eigenvalue lies beyond it (further out), up to rounding.
        lower: lower bound on the eigenvalue.
        upper: upper bound on the eigenvalue.
        residual: `‖A x − value·x‖`, from a product of its own.
        vector: unit vector x, shape `(n,)`, float64.
        clustered: flag that another eigenvalue may lie in the enclosure: the value is certified, the vector is not.
        angle: bound on the sine of the angle between x and the eigenvector; 1 where nothing is known.
    """

    value: float
    lower: float
    upper: float
    residual: float
    vector: Tensor
    clustered: bool
    angle: float


@final
@dataclass(frozen=True)
class Pairs:
    """Both ends of a spectrum, several eigenvalues each.

    Attributes:
        largest: largest eigenvalues, descending; the j-th encloses the j-th largest, counted with multiplicity.
        smallest: smallest eigenvalues, ascending, alike.
        reached: flag that the tolerance was reached for every pair.
        confidence: probability that all enclosures hold; 0 if uncertified, where outer ends are infinite.
        noise: estimated rounding error of a product.
        products: number of products used, fresh ones and those of the certificate included.
        stopped: reason for the end of the run, in words.
    """

    largest: tuple[Eigenpair, ...]
    smallest: tuple[Eigenpair, ...]
    reached: bool
    confidence: float
    noise: float
    products: int
    stopped: str


class Search(ABC):
    """Approximate eigenpairs that get better by products; steered by its own residuals, which are never reported."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """A power of two near the size of the products."""

    @property
    @abstractmethod
    def rounding(self) -> float:
        """Rounding error of the Ritz values in the precision of the products."""

    @property
    @abstractmethod
    def size(self) -> float:
        """The largest magnitude seen so far: of a Ritz value, or of a product."""

    @property
    @abstractmethod
    def stuck(self) -> bool:
        """Flag that no product can improve the pairs: the whole space is spanned, or rounding is all that is left."""

    @abstractmethod
    def ritz(self) -> tuple[Reals, Reals]:
        """Ritz values, ascending, and their residuals in the same order."""

    @abstractmethod
    def pairs(self, chosen: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Ritz vectors in float64, and their products as the search predicts them."""

    @abstractmethod
    def advance(self, goals: dict[int, float], room: int) -> Steps[int]:
        """Make some of the pairs better.

        Args:
            goals: residuals to reach, by the place of the Ritz value; empty where there are too few of them yet.
            room: largest number of products.

        Returns:
            Number of products taken.
        """

    @abstractmethod
    def admit(self, vectors: Sequence[Tensor]) -> Steps[int]:
        """Take in further vectors; returns the number of products taken, 0 where they add nothing."""


@dataclass(frozen=True, eq=False)
class EigenpairSolver(SolverWithVectors[Pairs], ABC):
    """Solver for many eigenpairs at both ends, whatever its search: the question, the tolerance and the budget.

    Attributes:
        largest: number of largest eigenvalues wanted; at most n are returned.
        smallest: number of smallest eigenvalues wanted.
        start: vectors to begin from as columns, shape `(n, m)`, in any position; None for random ones only. However
            bad they are, they cost products, not truth.
        rtol: width of each enclosure (certified), or true residual (uncertified), relative to the value.
        confidence: probability that all enclosures hold.
        certify: switch of the certificate; False stops on the residuals, skips float64 and leaves the outer ends infinite.
        max_products: largest number of products, fresh ones and the certificate's included.
        seconds: budget of wall-clock time, looked at between passes; None for no limit.
    """

    largest: int = 1
    smallest: int = 0
    start: Tensor | None = field(default=None, kw_only=True, repr=False)
    rtol: float = field(default=1e-3, kw_only=True)
    confidence: float = field(default=1 - 1e-6, kw_only=True)
    certify: bool = field(default=True, kw_only=True)
    max_products: int = field(default=500, kw_only=True)
    seconds: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse settings without meaning."""
        wanted = self.largest + self.smallest
        if min(self.largest, self.smallest) < 0 or not wanted:
            raise UsageError(f"expected at least one eigenpair, got {self.largest} largest, {self.smallest} smallest")
        if not (0 < self.confidence < 1 and self.rtol >= 0):
            raise UsageError(f"expected 0 < confidence < 1 and rtol ≥ 0, got {self.confidence} and {self.rtol}")
        if self.max_products < 2 * wanted + self.certify:
            raise UsageError(
                f"{wanted} eigenpairs need {2 * wanted + self.certify} products, one to look and one to verify for each"
                f"{' and one for the certificate' if self.certify else ''}, got {self.max_products}"
            )

    @abstractmethod
    def search(self, domain: Domain, stream: torch.Generator) -> Search:
        """A search that has not begun."""

    @final
    def columns(self, domain: Domain, width: int, stream: torch.Generator) -> Tensor:
        """The warm start, padded with random columns to a width, or to n: shape `(n, at least width)`, float64.

        Raises:
            UsageError: the warm start does not fit the operator, or is not finite.
        """
        given = [] if self.start is None else [column for column in self._warm(domain).unbind(1) if space.norm(column)]
        while len(given) < min(width, domain.n):
            given.append(sphere(domain.n, stream).to(domain.device))
        return torch.stack(given[: domain.n], dim=1)

    def _warm(self, domain: Domain) -> Tensor:
        start = self.start
        if start is None or start.ndim != 2 or start.shape[0] != domain.n or not start.is_floating_point():
            shape = "none" if start is None else f"{tuple(start.shape)} of {start.dtype}"
            raise UsageError(f"expected a start of real columns of length {domain.n}, got a tensor of shape {shape}")
        if not bool(torch.isfinite(start).all()):
            raise UsageError("the start has entries that are NaN or infinite: leave out the columns they are in")
        return start.detach().to(device=domain.device, dtype=torch.float64)
