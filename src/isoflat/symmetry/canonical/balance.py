"""Bases balanced: what is written and what reads it have one Gram matrix.

A block of what is written, `A` (d × n), and what reads it, `B` (m × d), matter through `B A` only. Of all `g A`, `B g⁻¹`
those with least norm have `A Aᵀ = Bᵀ B`; from the singular values of the product, `B A = U S Vᵀ`, one of them is
`S^½ Vᵀ` and `U S^½`. The orbit is closed if A and B have the rank of the product; else both are cut to it.

Derivation: docs/concepts/bases.md, "The point of least norm".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from isoflat.core.state import State
from isoflat.symmetry.groups.basis import Family, apply, stacked

CLOSE = 1e6
"""Singular values that differ by less than this many roundings of the largest count as equal."""


@final
@dataclass(frozen=True)
class Change:
    """A matrix for each block of a family, and its inverse, shape `(n, d, d)`."""

    family: Family
    matrix: Tensor
    inverse: Tensor

    def act(self, state: State) -> State:
        """The state in the new coordinates."""
        return apply(self.family, self.matrix, state, self.inverse)

    def after(self, first: Change) -> Change:
        """This change after another of the same family."""
        return Change(self.family, self.matrix @ first.matrix, first.inverse @ self.inverse)


@final
@dataclass(frozen=True)
class _Product:
    """`B A` by its factors: `A = R_Aᵀ Q`, `B = Q R_B`, and the singular value decomposition of `R_B R_Aᵀ`.

    Attributes:
        written: R_A, shape `(n, k, d)`.
        read: R_B, shape `(n, l, d)`.
        left: U, shape `(n, l, r)`.
        values: S, descending, shape `(n, r)`.
        right: Vᵀ, shape `(n, r, k)`.
        ranks: number of values that are above rounding, for each block.
    """

    written: Tensor
    read: Tensor
    left: Tensor
    values: Tensor
    right: Tensor
    ranks: tuple[int, ...]


def cut(families: Sequence[Family], state: State) -> State:
    """The state with every pair cut to the rank of its product: the closed orbit in the closure; the same function."""
    for family in families:
        product = _product(family, state)
        if all(rank == family.size for rank in product.ranks) or not _above(family, product, state):
            continue
        projections = torch.stack([b @ a for a, b in (_pair(product, block) for block in range(family.count))])
        state = apply(family, projections, state, projections)
    return state


def balanced(family: Family, state: State) -> Change:
    """The symmetric positive change that brings every block of a family to least norm; the identity where it is."""
    product = _product(family, state)
    matrices, inverses = [], []
    for block in range(family.count):
        forward, back = _extended(*_pair(product, block))
        # The rotation that makes the change symmetric: what is balanced already stays where it is.
        u, _, v = torch.linalg.svd(forward)
        matrices.append(v.mT @ u.mT @ forward)
        inverses.append(back @ u @ v)
    return Change(family, torch.stack(matrices), torch.stack(inverses))


def principal(family: Family, state: State) -> tuple[Change, tuple[bool, ...]]:
    """Rotations of a balanced family that make its Gram matrices diagonal, descending.

    Signs are chosen so that the largest entry of each coordinate's slice of what is written is positive.

    Returns:
        The change, and for each block whether its singular values are all different, so that coordinates mean something.
    """
    written = torch.cat([stacked(s, state.tensors).cpu() for s in family.sides if not s.dual], 2)
    root = torch.linalg.qr(written.mT, mode="r").R.mT
    u, values, _ = torch.linalg.svd(root, full_matrices=True)
    rotation = u.mT
    turned = rotation @ written
    largest = turned.gather(2, turned.abs().argmax(2, keepdim=True))
    rotation = rotation * torch.where(largest < 0, -1.0, 1.0)
    noise = CLOSE * torch.finfo(torch.float64).eps * values[:, :1]
    close = ((values[:, :-1] - values[:, 1:]) <= noise) & (values[:, :-1] > noise)  # zeros have no coordinates to mix
    return Change(family, rotation, rotation.mT.contiguous()), tuple((~close.any(1)).tolist())


def _product(family: Family, state: State) -> _Product:
    sides = {
        dual: torch.cat([stacked(s, state.tensors).cpu() for s in family.sides if s.dual is dual], 2)
        for dual in (False, True)
    }
    written, read = (torch.linalg.qr(sides[dual].mT, mode="r").R for dual in (False, True))
    left, values, right = torch.linalg.svd(read @ written.mT, full_matrices=False)
    noise = 8 * family.size * torch.finfo(torch.float64).eps
    floor = noise * torch.linalg.matrix_norm(written) * torch.linalg.matrix_norm(read)
    ranks = tuple((values > floor[:, None]).sum(1).tolist())
    return _Product(written, read, left, values, right, ranks)


def _above(family: Family, product: _Product, state: State) -> bool:
    """Test whether a pair has slices beyond the rank of its product."""
    for block, rank in enumerate(product.ranks):
        for factor in (product.written[block], product.read[block]):
            values = torch.linalg.svdvals(factor)
            if int((values > 8 * family.size * torch.finfo(torch.float64).eps * values[0]).sum()) > rank:
                return True
    return False


def _pair(product: _Product, block: int) -> tuple[Tensor, Tensor]:
    """G (r × d) and its right inverse (d × r), without inverting anything: `S^-½ Uᵀ R_B` and `R_Aᵀ V S^-½`."""
    rank = product.ranks[block]
    root = product.values[block, :rank].rsqrt()
    forward = root[:, None] * (product.left[block, :, :rank].mT @ product.read[block])
    back = product.written[block].mT @ product.right[block, :rank].mT * root
    return forward, back


def _extended(forward: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
    """G and its inverse with the coordinates added that neither side reaches, d × d."""
    rank, d = forward.shape
    if rank == d:
        return forward, back
    inside = torch.linalg.svd(forward, full_matrices=True).Vh[rank:].mT  # g sends these to zero
    outside = torch.linalg.svd(back.mT, full_matrices=True).Vh[rank:]  # these vanish on what g reaches back
    further = torch.linalg.solve(outside @ inside, outside)
    return torch.cat([forward, further]), torch.cat([back, inside], 1)
