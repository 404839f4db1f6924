"""Metrics on the weights, as orthonormal frames."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from isoflat.core.fingerprint import fingerprint
from isoflat.core.state import State
from isoflat.linalg.maps import LinearMap
from isoflat.linalg.operator import Operator


@dataclass(frozen=True)
class Geometry(ABC):
    """A metric, given at each point by a frame E with `E Eᵀ` = inverse metric.

    Every curvature A is measured as the plain symmetric operator `Eᵀ A E`. A group that acts by θ ↦ S θ leaves that
    operator's spectrum alone if `E Eᵀ` at S θ is `S (E Eᵀ) Sᵀ`: that law is tested for every claim.

    Attributes:
        name: catalogue name.
        title: what it is, in a line.
        group: reparametrisations its spectra are invariant to, in words.
        version: raised whenever its numbers change.
    """

    name: str
    title: str
    group: str
    version: int

    @abstractmethod
    def frame(self, state: State) -> LinearMap:
        """E at a point, from ℝᵐ to the trainable entries ℝⁿ."""

    @abstractmethod
    def connection(self, state: State, gradient: Tensor) -> Operator | None:
        """What the covariant Hessian adds to `Eᵀ H E`, in the frame's coordinates; None where the metric is flat.

        Args:
            state: the point.
            gradient: of the loss, shape `(n,)`, float64.
        """

    @abstractmethod
    def degenerate(self, state: State) -> tuple[str, ...]:
        """Tensors that the metric cannot see: their curvature does not enter."""

    def group_hash(self, state: State) -> str:
        """Hash of the group as it acts on this state's tensors; equal hashes make numbers comparable."""
        space = state.space
        return fingerprint(self.name, str(self.version), repr(space.names), repr(space.shapes))
