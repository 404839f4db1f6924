"""The flat metric of the weights as numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from isoflat.core.state import State
from isoflat.geometry.base import Chart, Geometry, Invariance, tensors_hash
from isoflat.linalg.maps import Identity
from isoflat.linalg.operator import Operator


@final
@dataclass(frozen=True)
class Euclidean(Geometry):
    """`E = I`. Invariant to no rescaling: a function-preserving change of scale moves its numbers without bound."""

    name: str = "euclidean"
    title: str = "plain weights"
    group: str = "none (rescaling the layers moves it without bound)"
    version: int = 1
    constant: bool = field(default=True, kw_only=True)
    claims: frozenset[Invariance] = frozenset({Invariance.ORDER})

    def chart(self, state: State) -> Chart:
        """The identity; nothing is invisible."""
        group_hash = tensors_hash(self.name, self.version, state)
        return Chart(state, Identity(state.space.size), (), self.group, group_hash)

    def connection(self, state: State, gradient: Tensor) -> Operator | None:
        """A flat metric has none."""
        return None


GEOMETRY = Euclidean()
