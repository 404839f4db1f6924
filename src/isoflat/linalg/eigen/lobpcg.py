"""LOBPCG as another way to search for many eigenpairs: three blocks of vectors instead of a basis that grows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from isoflat.core import space
from isoflat.core.errors import UsageError
from isoflat.linalg.eigen.many import Many
from isoflat.linalg.eigen.pairs import Reals, Search
from isoflat.linalg.orthogonal import gram, orthogonalise, orthonormalise, restart
from isoflat.linalg.solver import Domain, Request, Steps


@final
@dataclass(frozen=True, eq=False)
class Lobpcg(Many):
    """Several eigenpairs at both ends by LOBPCG (Knyazev, SIAM J. Sci. Comput. 23, 2001), each with its enclosure.

    Rayleigh and Ritz on the vectors themselves, on the residuals of those that are not good enough yet, and on the
    directions of the last step; all of them in one orthonormal basis, and the directions orthogonal to the new vectors
    in its coordinates (Hetmaniuk and Lehoucq, J. Comput. Phys. 218, 2006), without which it breaks down near
    convergence. It takes more products than block Lanczos, and memory for three blocks of vectors and their images however
    long it runs. What is verified and certified afterwards, and how, is the same.

    Attributes:
        guard: vectors beyond the wanted ones at each end that is asked for; convergence depends on the gap behind them.

    >>> from isoflat.core.streams import stream
    >>> from isoflat.linalg.operator import Dense
    >>> operator = Dense(torch.diag(torch.tensor([5.0, 5.0, 4.0, 1.0, 0.5, 0.0, -3.0], dtype=torch.float64)))
    >>> run = Lobpcg(largest=3, smallest=1, rtol=1e-9)(operator, stream(0))
    >>> [round(pair.value, 9) for pair in run.largest + run.smallest], run.reached
    ([5.0, 5.0, 4.0, -3.0], True)
    """

    label: ClassVar[str] = "Lobpcg"

    guard: int = field(default=2, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse settings without meaning."""
        super().__post_init__()
        if self.guard < 0:
            raise UsageError(f"expected a number of guard vectors, got {self.guard}")

    def search(self, domain: Domain, stream: torch.Generator) -> Search:
        """From the warm start, padded."""
        ends = [count and min(count + self.guard, domain.n) for count in (self.smallest, self.largest)]
        return _Descent(self.columns(domain, sum(ends), stream), domain, ends[0], ends[1])


@final
class _Descent(Search):
    """LOBPCG, one step at a time; images are stored in units of `scale`.

    Attributes:
        bottom: vectors that are kept for the smallest eigenvalues.
        top: for the largest.
    """

    def __init__(self, start: Tensor, domain: Domain, bottom: int, top: int) -> None:
        self.start: Tensor | None = start
        self.domain = domain
        self.bottom, self.top = bottom, top
        self.steps = 0
        self._scale = 1.0
        self._size = 0.0
        self._lost = False
        self._vectors: list[Tensor] = []
        self._images: list[Tensor] = []
        self._conjugate: list[Tensor] = []
        self._moved: list[Tensor] = []
        self._values, self._residuals = np.zeros(0), np.zeros(0)

    @property
    def scale(self) -> float:
        return self._scale

    @property
    def rounding(self) -> float:
        eps = torch.finfo(self.domain.dtype).eps * self.steps
        return (eps + torch.finfo(torch.float64).eps * math.sqrt(self.domain.n)) * self.size

    @property
    def size(self) -> float:
        return self._size * self._scale

    @property
    def stuck(self) -> bool:
        return self._lost or len(self._vectors) == self.domain.n

    def ritz(self) -> tuple[Reals, Reals]:
        return self._values * self._scale, self._residuals * self._scale

    def pairs(self, chosen: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        found = [self._vectors[j].double().clone() for j in chosen]
        return found, [self._images[j].double() * self._scale for j in chosen]

    def advance(self, goals: dict[int, float], room: int) -> Steps[int]:
        if self.start is not None:
            start, self.start = self.start[:, : max(room, 1)], None
            return (yield from self._expand(start.unbind(1), fill=True))
        residuals = np.array([self._residuals[j] * self._scale / goal for j, goal in goals.items()])
        urgent = np.array(list(goals))[residuals.argsort()[::-1][:room]] if goals else []
        taken = yield from self._expand([self._residual(j) for j in urgent])
        self._lost = not taken
        return taken

    def admit(self, vectors: Sequence[Tensor]) -> Steps[int]:
        taken = yield from self._expand(vectors)
        self._lost = self._lost and not taken
        return taken

    def _residual(self, j: int) -> Tensor:
        return torch.sub(self._images[j].double(), self._vectors[j].double(), alpha=float(self._values[j]))

    def _expand(self, vectors: Sequence[Tensor], fill: bool = False) -> Steps[int]:
        """Rayleigh and Ritz with further vectors; returns how many of them were not in the span already.

        Args:
            vectors: each of shape `(n,)`.
            fill: whether random ones stand in for those that were.
        """
        rows, old = [*self._vectors, *self._conjugate], len(self._vectors)
        known = len(rows)
        for vector in vectors:
            if len(rows) == self.domain.n:
                break
            left = vector.double().clone()
            size = orthogonalise(rows, left)[1]
            if size or fill:
                rows.append((left.div_(size) if size else restart(rows, left)).to(self.domain.dtype))
        added = torch.stack(rows[known:], dim=1) if len(rows) > known else None
        if added is None:
            return 0
        products = yield Request(added, status=self._status())
        self._measure(products)
        images = [*self._images, *self._moved, *(products / self._scale).unbind(1)]
        values, turn = np.linalg.eigh(gram(rows, images))
        count = len(values)
        kept = sorted({*range(min(self.bottom, count)), *range(max(count - self.top, 0), count)})
        self._values = values[kept]
        self._rotate(turn[:, kept], _conjugate(turn[:, kept], old, len(rows) - known), rows, images)
        self.steps += 1
        return added.shape[1]

    def _rotate(self, ahead: Reals, across: Reals, rows: Sequence[Tensor], images: Sequence[Tensor]) -> None:
        """New vectors and directions from coefficients in the basis; orthonormal again, in float64, before they are stored."""
        columns = [torch.from_numpy(np.ascontiguousarray(column)) for column in np.hstack([ahead, across]).T]
        vectors, moved = ([space.combine(column, part) for column in columns] for part in (rows, images))
        orthonormalise(vectors, moved)
        kept, dtype = ahead.shape[1], self.domain.dtype
        self._residuals = np.array(
            [
                space.norm(torch.sub(image, vector, alpha=float(value)))
                for vector, image, value in zip(vectors[:kept], moved[:kept], self._values, strict=True)
            ]
        )
        narrow = [[vector.to(dtype) for vector in part] for part in (vectors, moved)]
        (self._vectors, self._conjugate), (self._images, self._moved) = ((part[:kept], part[kept:]) for part in narrow)

    def _measure(self, products: Tensor) -> None:
        sizes = [space.norm(product) for product in products.unbind(1)]
        if not self._size and any(sizes):
            self._scale = math.ldexp(1.0, math.frexp(max(sizes))[1] - 1)
        self._size = max(self._size, max(sizes) / self._scale)

    def _status(self) -> str:
        if not len(self._values):
            return "LOBPCG: start"
        ends = (self._values[0] * self._scale, self._values[-1] * self._scale)
        return f"LOBPCG {self.steps}: {ends[0]:.4g} … {ends[1]:.4g}"


def _conjugate(ahead: Reals, old: int, new: int) -> Reals:
    """Directions in which new vectors left the old ones, orthonormal and orthogonal to the new vectors.

    Args:
        ahead: new vectors in coordinates of an orthonormal basis whose first members are the old ones, as columns.
        old: how many these are.
        new: at most so many directions.

    >>> abs(_conjugate(np.array([[0.8], [0.6]]), 1, 1)).round(12).tolist()
    [[0.6], [0.8]]
    """
    across = ahead.copy()
    across[:old] = 0
    for _ in range(2):
        across -= ahead @ (ahead.T @ across)
    directions, sizes, _ = np.linalg.svd(across, full_matrices=False)
    rank = int((sizes > len(ahead) * np.finfo(np.float64).eps * max(sizes.max(), 1.0)).sum()) if old else 0
    return directions[:, : min(rank, new)]
