"""The metric at the canonical representative of the orbit."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from isoflat.core.space import norm
from isoflat.core.state import State
from isoflat.geometry.traced import Traced, behind_gains, unseen, without_unit
from isoflat.symmetry.canonical.representative import Gauge, Representative
from isoflat.symmetry.found import Found


@final
@dataclass(frozen=True)
class Canonical(Traced):
    """`geometry="auto"`: `D H D` at the canonical representative of the orbit under every symmetry that was found.

    Blocks of D are logical tensors: query, key and value count as three though one weight may pack them, and what a
    change of basis mixes is one block.

    *Degenerate cases*: tensors that a shift empties (an offset its readers take up) and gains folded into their readers
    have no block. Units that are dead in the closed orbit lose the coordinates that only reach through their kink; the
    number is lower semicontinuous there. Both are listed.
    """

    name: str = "auto"
    title: str = "each tensor in units of its norm at the canonical representative of the orbit"
    group: str = "every scaling, normalisation, shift and change of basis found by tracing the network"

    @property
    def gauge(self) -> Gauge:
        """Any: norms of blocks do not see rotations inside of them."""
        return Gauge.NEAREST

    def units(
        self, found: Found, point: Representative, state: State
    ) -> tuple[dict[str, Tensor], tuple[tuple[str, str], ...]]:
        """Norm of the block of each entry."""
        sizes = _sizes(found, point)
        units = {n: without_unit(point, n, sizes[n].expand(tensor.shape)) for n, tensor in state.parameters.items()}
        return units, unseen(point, state)

    def open(self, found: Found, point: Representative, state: State) -> tuple[str, ...]:
        """Symmetries that lie behind gains that stay."""
        return behind_gains(found, state)


def _sizes(found: Found, point: Representative) -> dict[str, Tensor]:
    """Norm of the block that each entry belongs to: the stored tensor's, or that of what it is packed or mixed with."""
    squares: dict[int, float] = defaultdict(float)
    for name, (axis, numbers) in found.blocks.items():
        rows = point.state.tensors[name].movedim(axis, 0).flatten(1) if point.state.tensors[name].ndim > 1 else (
            point.state.tensors[name][:, None]
        )  # fmt: skip
        for number, square in zip(numbers.tolist(), rows.square().sum(1).tolist(), strict=True):
            squares[number] += square
    sizes = {}
    for name, tensor in point.state.tensors.items():
        if name in found.blocks:
            axis, numbers = found.blocks[name]
            roots = torch.tensor([squares[number] ** 0.5 for number in numbers.tolist()], dtype=torch.float64)
            sizes[name] = roots.view(-1, *[1] * (tensor.ndim - 1 - axis))
        elif tensor.is_floating_point():
            sizes[name] = torch.tensor(norm(tensor), dtype=torch.float64)
    return sizes


GEOMETRY = Canonical()
