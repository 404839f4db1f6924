"""Metrics on the weights, as orthonormal frames."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import StrEnum
from typing import final

from torch import Tensor

from isoflat.core.state import State, fingerprint
from isoflat.linalg.maps import LinearMap
from isoflat.linalg.operator import Operator


class Invariance(StrEnum):
    """Reparametrisations that a number may be invariant to.

    Each is attacked by the law suite, whether the invariance is claimed or not.
    """

    LAYERS = "layers"
    """Whole tensors times positive factors, function unchanged."""
    UNITS = "units"
    """Single units, channels or filters likewise."""
    NORMS = "normalisation"
    """The scale of each channel that a normalisation divides out."""
    BASES = "bases"
    """Invertible matrices between two linear maps: heads of attention, adapters."""
    ORDER = "order"
    """Permutations of units."""


@final
@dataclass(frozen=True)
class GeneratorIdentity:
    """A generator X of the group, to check products with: `⟨∇L, Xθ⟩ = 0` and `H Xθ = −Xᵀ∇L` at any point.

    Attributes:
        velocity: Xθ, shape `(n,)`.
        length: length of u with `E u = Xθ`: its size in the metric.
        rates: X as a diagonal, shape `(n,)`: the generator is a scaling.
    """

    velocity: Tensor
    length: float
    rates: Tensor


@final
@dataclass(frozen=True)
class Chart:
    """A geometry at a point: where curvature is taken, and in which units.

    Attributes:
        state: the point, and the tensors that the frame reaches; the same function as the point asked for.
        frame: E, from the geometry's coordinates ℝᵐ to the trainable entries ℝⁿ of `state`.
        unseen: trainable tensors whose curvature does not enter, and why.
        group: reparametrisations the spectrum is invariant to, in words.
        group_hash: hash of that group on these tensors; equal hashes make numbers comparable.
        notes: facts that a reader must know.
        identity: a check of the products against the group; None where there is no generator to check with.
    """

    state: State
    frame: LinearMap
    unseen: tuple[tuple[str, str], ...]
    group: str
    group_hash: str
    notes: tuple[str, ...] = ()
    identity: GeneratorIdentity | None = None


@dataclass(frozen=True)
class Geometry(ABC):
    """A metric, given at each point by a frame E with `E Eᵀ` = inverse metric.

    Every curvature A is measured as the plain symmetric operator `Eᵀ A E`. A group that acts by θ ↦ S θ leaves that
    operator's spectrum alone if `E Eᵀ` at S θ is `S (E Eᵀ) Sᵀ`: that law is tested for every claim.

    Attributes:
        name: catalogue name.
        title: the geometry in a line.
        group: reparametrisations its spectra are invariant to, in words.
        version: raised whenever its numbers change.
        claims: the same, for the law suite; none unless it says so.
        constant: whether the metric is the same at every point, so that the plain Hessian is the covariant one.
    """

    name: str
    title: str
    group: str
    version: int
    claims: frozenset[Invariance] = field(default=frozenset(), kw_only=True)
    constant: bool = field(default=False, kw_only=True)

    @abstractmethod
    def chart(self, state: State) -> Chart:
        """The geometry at a point."""

    @abstractmethod
    def connection(self, state: State, gradient: Tensor) -> Operator | None:
        """Term that the covariant Hessian adds to `Eᵀ H E`, in the frame's coordinates; None where the metric is flat.

        Args:
            state: the point.
            gradient: of the loss, shape `(n,)`, float64.
        """

    @final
    def frame(self, state: State) -> LinearMap:
        """E at a point, from ℝᵐ to the trainable entries ℝⁿ."""
        return self.chart(state).frame


def tensors_hash(name: str, version: int, state: State) -> str:
    """Hash of a group that is the same for all networks, as it acts on a state's tensors."""
    space = state.space
    return fingerprint(name, str(version), repr(space.names), repr(space.shapes))
