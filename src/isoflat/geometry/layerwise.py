"""The paper's metric: each stored tensor measured in units of its own norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from isoflat.core import space as flat
from isoflat.core.space import ParameterSpace
from isoflat.core.state import State
from isoflat.geometry.base import Chart, Geometry, Invariance, tensors_hash
from isoflat.linalg.maps import Diagonal
from isoflat.linalg.operator import Operator


@final
@dataclass(frozen=True)
class Layerwise(Geometry):
    """`⟨a, b⟩_W = Σ_i ⟨a_i, b_i⟩ / ‖W_i‖_F²` (Rangamani et al. 2019, section 3), so `E = D = blockdiag(‖W_i‖_F I)`.

    One block per stored tensor; each bias is a block of its own. `D H D` is the same at every point of an orbit of
    layer-wise rescalings, minimum or not. Rescaling single neurons moves it; `auto` does not let it.

    *Degenerate case*: a tensor of norm zero has `D_i = 0`. Its curvature does not enter; it is listed, not divided by.
    """

    name: str = "layerwise"
    title: str = "each tensor in units of its Frobenius norm (Rangamani et al. 2019)"
    group: str = "positive rescalings of whole tensors (layer-wise rescaling); not of single neurons"
    version: int = 1
    claims: frozenset[Invariance] = frozenset({Invariance.LAYERS, Invariance.ORDER})

    def chart(self, state: State) -> Chart:
        """`D`; tensors whose entries are all zero are invisible."""
        norms = state.space.block_norms(state.vector)
        unseen = tuple(
            (name, "all zero") for name, size in zip(state.space.names, norms.tolist(), strict=True) if size == 0
        )
        frame = Diagonal(state.space.spread(norms.to(state.device)))
        return Chart(state, frame, unseen, self.group, tensors_hash(self.name, self.version, state))

    def connection(self, state: State, gradient: Tensor) -> Operator | None:
        """`D C D = blockdiag(w gᵀ + g wᵀ − ⟨w, g⟩ I)`: the block metric is that of a cylinder ℝ × sphere."""
        return Connection(state.space, state.vector.double(), gradient)


@final
@dataclass(frozen=True)
class Connection(Operator):
    """`blockdiag(w gᵀ + g wᵀ − ⟨w, g⟩ I)`; its spectral norm is `max_i ‖w_i‖ ‖g_i‖` (`stationarity`).

    Attributes:
        space: the blocks.
        point: w, shape `(n,)`, float64.
        gradient: g, shape `(n,)`, float64.
    """

    space: ParameterSpace
    point: Tensor
    gradient: Tensor

    @property
    def n(self) -> int:
        """Dimension."""
        return self.space.size

    @property
    def dtype(self) -> torch.dtype:
        """Always float64."""
        return torch.float64

    @property
    def device(self) -> torch.device:
        """Device of the point."""
        return self.point.device

    def matmat(self, vectors: Tensor) -> Tensor:
        """Block by block, without forming a matrix."""
        sizes = self.space.sizes
        blocks = zip(self.point.split(sizes), self.gradient.split(sizes), vectors.double().split(sizes), strict=True)
        return torch.cat([torch.outer(w, g @ v) + torch.outer(g, w @ v) - (w @ g) * v for w, g, v in blocks])

    def double(self) -> Connection:
        """The operator itself, which is in float64 already."""
        return self


def stationarity(state: State, gradient: Tensor) -> float:
    """`b = max_i ‖W_i‖ ‖∇_i L‖`: how much `D H D` and the covariant Hessian can differ, in spectral norm.

    Invariant to layer-wise rescaling, and zero at a critical point.

    >>> stationarity(State({"w": torch.tensor([3.0, 4.0])}), torch.tensor([0.0, 2.0], dtype=torch.float64))
    10.0
    """
    weights = state.vector.split(state.space.sizes)
    slopes = gradient.split(state.space.sizes)
    return max(flat.norm(w) * flat.norm(g) for w, g in zip(weights, slopes, strict=True))


GEOMETRY = Layerwise()
