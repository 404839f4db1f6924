"""Recovery from a lack of memory: the work is cut finer, and goes on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import final

from torch import Tensor

from isoflat.core.raised import is_out_of_memory
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.routes.base import Linearisation


@final
@dataclass
class Grain:
    """Current size of the pieces that the data is cut into; a block that runs out of memory halves it, and is left.

    Attributes:
        rows: number of rows of a piece.
        halvings: number of times that it has been halved.
    """

    rows: int
    halvings: int = 0

    def __enter__(self) -> int:
        """Number of rows of a piece."""
        return self.rows

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        """Halve the rows where memory ran out; other errors pass."""
        if error is None or not is_out_of_memory(error):
            return False
        self.halve(error)
        return True

    def halve(self, error: BaseException) -> None:
        """Halve the rows.

        Raises:
            BaseException: the error that was given, if a piece is one row already.
        """
        if self.rows <= 1:
            raise error
        self.rows = (self.rows + 1) // 2
        self.halvings += 1


@final
@dataclass(frozen=True)
class Guarded(Linearisation):
    """A route that halves its pieces where memory runs out; the weights of examples do not change.

    Graphs that were kept are let go, and rebuilt for each product from then on.

    Attributes:
        inner: route inside; a list, so that graphs can be let go.
        grain: size of its pieces.
    """

    inner: list[Linearisation] = field(repr=False)
    grain: Grain

    @property
    def route(self) -> str:
        """Name of the inner route's method."""
        return self.inner[0].route

    @property
    def exact(self) -> bool:
        """Flag that the inner route is exact up to rounding."""
        return self.inner[0].exact

    def products(self, vectors: Tensor) -> Tensor:
        """Products, cut finer until they fit."""
        while True:
            with self.grain:
                return self.inner[0].products(vectors)
            old = self.inner.pop()
            self.inner.append(old.on(replace(self.risk, batches=self.risk.batches.cut(self.grain.rows))))
            del old

    def on(self, risk: EmpiricalRisk) -> Guarded:
        """Guarded route over other pieces of the data."""
        return Guarded(risk, self.state, [self.inner[0].on(risk)], self.grain)

    def double(self) -> Guarded:
        """Route in float64, if the network runs in that, cut as finely as this one is by then."""
        return Guarded(self.risk, self.risk.network.widest(self.state), [self.inner[0].double()], self.grain)
