"""Eigenpairs with their enclosures, and the interface of a search for them."""

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
