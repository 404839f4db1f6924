"""The metric at the canonical representative of the orbit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn, final

from torch import Tensor

from isoflat.core.errors import NoInvariantGeometry
from isoflat.core.state import State
from isoflat.geometry.base import Geometry


@final
@dataclass(frozen=True)
class Canonical(Geometry):
    """`geometry="auto"`: invariant to every rescaling found by tracing the network. Not available in this version."""

    name: str = "auto"
    title: str = "canonical representative of the orbit (not available in this version)"
    group: str = "all rescalings found by tracing"
    version: int = 0

    def frame(self, state: State) -> NoReturn:
        """Refuse."""
        raise _unavailable()

    def connection(self, state: State, gradient: Tensor) -> NoReturn:
        """Refuse."""
        raise _unavailable()

    def degenerate(self, state: State) -> NoReturn:
        """Refuse."""
        raise _unavailable()


def _unavailable() -> NoInvariantGeometry:
    return NoInvariantGeometry(
        "geometry='auto' needs the network's rescalings found by tracing it and the canonical representative of their "
        "orbit, which this version does not have. Pass geometry='layerwise' for the paper's metric (invariant to "
        "layer-wise rescaling) or geometry='euclidean' for the plain Hessian"
    )


GEOMETRY = Canonical()
