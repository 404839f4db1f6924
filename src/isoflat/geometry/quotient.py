"""The quotient manifold of the paper: weights modulo layer-wise rescaling.

Derivation: docs/concepts/quotient.md, "Vertical, horizontal, gradient, Hessian".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from isoflat.core import space as flat
from isoflat.core.state import State
from isoflat.geometry.layerwise import GEOMETRY as LAYERWISE
from isoflat.linalg.maps import Complement, LinearMap
from isoflat.linalg.operator import Operator, Pullback
from isoflat.symmetry.groups.base import Symmetry


@final
@dataclass(frozen=True)
class Quotient:
    """Tangent space at a point, split into what the group moves and the rest (Rangamani et al. 2019, section 3).

    Tangent vectors are flat, in the parameters' own coordinates, shape `(n,)`, float64.

    Attributes:
        symmetry: the equivalence relation, verified on the network beforehand (`symmetry.base.verify`).
        state: the point.

    >>> from isoflat.symmetry.groups.scaling import LayerScale
    >>> state = State({"u": torch.tensor([2.0]), "v": torch.tensor([0.5])})
    >>> quotient = Quotient(LayerScale(("u", "v"), (None, None)), state)
    >>> [round(x, 12) for x in quotient.vertical(torch.tensor([3.0, 0.0], dtype=torch.float64)).tolist()]
    [1.5, -0.375]
    >>> [round(x, 12) for x in quotient.horizontal(torch.tensor([3.0, 0.0], dtype=torch.float64)).tolist()]
    [1.5, 0.375]
    """

    symmetry: Symmetry
    state: State

    @cached_property
    def frame(self) -> LinearMap:
        """D: orthonormal coordinates u of a tangent vector `D u`."""
        return LAYERWISE.frame(self.state)

    @cached_property
    def vertical_frame(self) -> Tensor:
        """Orthonormal basis of the vertical space in the frame's coordinates, shape `(n, d)`."""
        coordinates = self._coordinates(self.symmetry.generators(self.state))
        basis, triangle = torch.linalg.qr(coordinates)
        # Generators of vanishing blocks are zero; columns that carry nothing are dropped.
        sizes = triangle.diagonal().abs()
        return basis[:, sizes > sizes.max() * coordinates.shape[0] * torch.finfo(torch.float64).eps]

    def inner(self, a: Tensor, b: Tensor) -> float:
        """`⟨a, b⟩_W = Σ_i ⟨a_i, b_i⟩ / ‖W_i‖²`."""
        return float(flat.inner([self._coordinates(a[:, None])[:, 0]], self._coordinates(b[:, None])[:, 0])[0])

    def vertical(self, vector: Tensor) -> Tensor:
        """The part along the orbit."""
        return vector - self.horizontal(vector)

    def horizontal(self, vector: Tensor) -> Tensor:
        """The part orthogonal to the orbit: the tangent vector of the quotient."""
        return self.frame.push(self.projector.push(self._coordinates(vector[:, None])))[:, 0]

    @property
    def projector(self) -> LinearMap:
        """The horizontal projection in the frame's coordinates."""
        return Complement(self.vertical_frame)

    def gradient(self, euclidean: Tensor) -> Tensor:
        """Riemannian gradient `D² ∇L`: horizontal, because the loss is constant on orbits."""
        return self.frame.push(self.frame.pull(euclidean[:, None]))[:, 0]

    def hessian(self, euclidean: Operator, gradient: Tensor) -> Operator:
        """Covariant Hessian `P D(H + C)D P` of the quotient in the frame's coordinates.

        Args:
            euclidean: H on ℝⁿ.
            gradient: of the loss, shape `(n,)`, float64.
        """
        covariant = Pullback(euclidean, self.frame, LAYERWISE.connection(self.state, gradient))
        return Pullback(covariant, self.projector)

    def _coordinates(self, vectors: Tensor) -> Tensor:
        """`D⁻¹ a`; entries of vanishing blocks have no coordinate and are zero."""
        norms = self.state.space.spread(self.state.space.block_norms(self.state.vector))
        return torch.where(norms[:, None] > 0, vectors.double() / norms[:, None], 0.0)
