"""The metric in which every entry is measured by its own size, at the canonical representative of the orbit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from isoflat.core.state import State
from isoflat.geometry.traced import Traced, behind_gains, unseen, without_unit
from isoflat.symmetry.canonical.representative import Gauge, Representative
from isoflat.symmetry.found import Found


@final
@dataclass(frozen=True)
class Elementwise(Traced):
    """`D H D` with `D = diag(|θ*|)`: relative changes of single weights, as adaptive sharpness has them.

    Single entries mean something only if rotations are fixed: every pair of linear maps is turned to its singular
    vectors. Where singular values tie, and where rotations of a stream or of rotary pairs are symmetries, nothing fixes
    them: the claim is withdrawn for those tensors, and they are listed.
    """

    name: str = "elementwise"
    title: str = "each entry in units of its own size at the canonical representative, in singular vectors"
    group: str = "every scaling, normalisation, shift and change of basis found, but for rotations that nothing fixes"
    version: int = 1

    @property
    def gauge(self) -> Gauge:
        """Singular vectors, descending."""
        return Gauge.PRINCIPAL

    def units(
        self, found: Found, point: Representative, state: State
    ) -> tuple[dict[str, Tensor], tuple[tuple[str, str], ...]]:
        """Size of each entry."""
        return {n: without_unit(point, n, point.state.tensors[n].abs()) for n in state.parameters}, unseen(point, state)

    def open(self, found: Found, point: Representative, state: State) -> tuple[str, ...]:
        """Tensors that something may rotate."""
        further = behind_gains(found, state)
        if not point.loose:
            return further
        return (
            *further,
            f"claim withdrawn, because rotations mix single entries and nothing fixes them: {', '.join(point.loose)}",
        )


GEOMETRY = Elementwise()
