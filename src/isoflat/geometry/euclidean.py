"""The flat metric of the weights as numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from isoflat.core.state import State
from isoflat.geometry.base import Geometry
from isoflat.linalg.maps import Identity, LinearMap
from isoflat.linalg.operator import Operator


@final
@dataclass(frozen=True)
class Euclidean(Geometry):
    """`E = I`. Invariant to no rescaling: a function-preserving change of scale moves its numbers without bound."""

    name: str = "euclidean"
    title: str = "plain weights"
    group: str = "none (rescaling the layers moves it without bound)"
    version: int = 1

    def frame(self, state: State) -> LinearMap:
        """The identity."""
        return Identity(state.space.size)

    def connection(self, state: State, gradient: Tensor) -> Operator | None:
        """A flat metric has none."""
        return None

    def degenerate(self, state: State) -> tuple[str, ...]:
        """Nothing is invisible."""
        return ()


GEOMETRY = Euclidean()
