"""Block Lanczos as a search for many eigenpairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from isoflat.core.errors import UsageError
from isoflat.linalg.eigen.attempt import Attempt
from isoflat.linalg.eigen.pairs import EigenpairSolver, Pairs, Reals, Search
from isoflat.linalg.krylov.block import BlockRecurrence
from isoflat.linalg.solver import Domain, Request, Steps

USUAL = 4
"""Width of a block where none is asked for: multiplicities up to it need no help from the certificate."""


@final
@dataclass(frozen=True, eq=False)
class Eigenpairs(EigenpairSolver):
    """Block Lanczos with full re-orthogonalisation for several eigenpairs at both ends, each with its enclosure.

    Only residuals of pairs that are not good enough yet are multiplied (`krylov.block`). A start of some vectors finds an
    eigenvalue as often as there are vectors; what they leave out of a larger multiplicity is found by the certificate, at
    more cost. The basis takes one vector per product.

    Attributes:
        block: vectors that share a pass over the data, at most; a start of fewer is padded to as many with random ones.
            None for as many as are wanted, at most 4, or as the warm start has.

    >>> from isoflat.core.rng import stream
    >>> from isoflat.linalg.operator import Dense
    >>> operator = Dense(torch.diag(torch.tensor([5.0, 5.0, 4.0, 1.0, 0.5, 0.0, -3.0], dtype=torch.float64)))
    >>> run = Eigenpairs(largest=3, smallest=1, rtol=1e-9)(operator, stream(0))
    >>> [round(pair.value, 9) for pair in run.largest + run.smallest], run.reached
    ([5.0, 5.0, 4.0, -3.0], True)
    """

    label: ClassVar[str] = "Eigenpairs"

    block: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse settings without meaning."""
        super().__post_init__()
        if self.block is not None and self.block < 1:
            raise UsageError(f"expected a block of at least one vector, got {self.block}")

    def steps(self, domain: Domain, stream: torch.Generator) -> Steps[Pairs]:
        """Search, verify, certify; again from the start where the certificate shows that something was missed."""
        return (yield from Attempt(self, domain, stream).steps())

    def search(self, domain: Domain, stream: torch.Generator) -> Search:
        """Block Lanczos from the warm start, padded."""
        width = self.block or min(self.largest + self.smallest, USUAL)
        return _BlockLanczos(BlockRecurrence(self.columns(domain, width, stream), domain.dtype), self.block)


@final
class _BlockLanczos(Search):
    """Block Lanczos, one step at a time.

    Attributes:
        unseen: number of start vectors that have not been multiplied yet.
    """

    def __init__(self, recurrence: BlockRecurrence, block: int | None) -> None:
        self.recurrence = recurrence
        self.block = block
        self.unseen = recurrence.waiting
        self._ritz: tuple[Reals, Reals] = np.zeros(0), np.zeros((0, 0))

    @property
    def scale(self) -> float:
        return self.recurrence.scale

    @property
    def rounding(self) -> float:
        return self.recurrence.rounding * self.scale

    @property
    def size(self) -> float:
        return self.recurrence.size * self.scale

    @property
    def stuck(self) -> bool:
        return self.recurrence.exhausted

    def ritz(self) -> tuple[Reals, Reals]:
        if self.unseen:
            return np.zeros(0), np.zeros(0)
        values, vectors = self._ritz
        return values * self.scale, np.linalg.norm(self.recurrence.residuals(vectors), axis=0) * self.scale

    def pairs(self, chosen: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        values, vectors = self._ritz
        found = [self.recurrence.combine(vectors[:, j]) for j in chosen]
        images = [
            self.recurrence.predicted(float(values[j]), vectors[:, j], vector).mul_(self.scale)
            for j, vector in zip(chosen, found, strict=True)
        ]
        return found, images

    def advance(self, goals: dict[int, float], room: int) -> Steps[int]:
        run = self.recurrence
        width = min(room, self.block or run.waiting)
        if goals:
            wanted = run.residuals(self._ritz[1][:, list(goals)]) / (np.array(list(goals.values())) / self.scale)
            directions, sizes, _ = np.linalg.svd(wanted, full_matrices=False)
            # A pair that is not good enough has a column longer than 1 here.
            run.steer(directions[:, : min(width, max(1, int((sizes > 0.5).sum())))])
        else:
            run.lead(min(width, self.unseen or run.waiting))
            # With a start that is more than the budget, what there is room for must do.
            self.unseen = max(self.unseen - width, 0) if width < room else 0
        return (yield from self._multiply())

    def admit(self, vectors: Sequence[Tensor]) -> Steps[int]:
        run = self.recurrence
        before = run.waiting
        for vector in vectors:
            run.admit(vector)
        if run.waiting == before:
            return 0
        run.steer(np.eye(run.waiting)[:, before:])
        return (yield from self._multiply())

    def _multiply(self) -> Steps[int]:
        run = self.recurrence
        width = run.active
        values = self._ritz[0]
        range_ = f": {values[0] * self.scale:.4g} … {values[-1] * self.scale:.4g}" if len(values) else ""
        run.extend((yield Request(run.block, status=f"block Lanczos {run.k}{range_}")))
        self._ritz = run.ritz()
        return width
