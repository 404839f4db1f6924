"""What many eigenpairs are, and what a search for them is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from isoflat.linalg.solver import Steps

Reals = NDArray[np.float64]


@final
@dataclass(frozen=True)
class Eigenpair:
    """An eigenvalue with its enclosure, and an approximate eigenvector.

    Attributes:
        value: a Ritz value of fresh products; the eigenvalue lies beyond it, up to rounding.
        lower: the eigenvalue is at least this.
        upper: the eigenvalue is at most this.
        residual: `‖A x − value·x‖`, from a product of its own.
        vector: x, shape `(n,)`, float64, of length 1.
        clustered: whether another eigenvalue may lie in the enclosure: then the value is certified, the vector is not.
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
        largest: descending; the j-th encloses the j-th largest eigenvalue, counted with multiplicity.
        smallest: ascending, alike. All of the spectrum where more was asked for than there is.
        reached: whether the tolerance was reached for every pair.
        confidence: probability that all enclosures hold; 0 if uncertified, where outer ends are infinite.
        noise: estimated rounding error of a product.
        products: products used, fresh ones and those of the certificate included.
        stopped: why the run ended, in words.
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
        """What rounding amounts to in the precision of the products."""

    @property
    @abstractmethod
    def size(self) -> float:
        """The largest magnitude seen so far: of a Ritz value, or of a product."""

    @property
    @abstractmethod
    def stuck(self) -> bool:
        """Whether no product could make it better: the whole space is spanned, or rounding is all that is left."""

    @abstractmethod
    def ritz(self) -> tuple[Reals, Reals]:
        """All Ritz values, ascending, and their residuals alike."""

    @abstractmethod
    def pairs(self, chosen: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Ritz vectors, float64, and what their products should be."""

    @abstractmethod
    def advance(self, goals: dict[int, float], room: int) -> Steps[int]:
        """Make some of the pairs better.

        Args:
            goals: residuals to reach, by the place of the Ritz value; empty where there are too few of them yet.
            room: at most so many products.

        Returns:
            Number of products taken.
        """

    @abstractmethod
    def admit(self, vectors: Sequence[Tensor]) -> Steps[int]:
        """Take in further vectors; returns the number of products taken, 0 where they add nothing."""
