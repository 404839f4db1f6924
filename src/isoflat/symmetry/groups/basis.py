"""Changes of basis: vectors that linear maps alone write and read, in other coordinates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
import torch
from torch import Tensor

from isoflat.core.state import State
from isoflat.symmetry.groups.base import Symmetry


@final
@dataclass(frozen=True)
class Piece:
    """Slices of one tensor among those that make up a vector of d of them.

    Attributes:
        name: name of the tensor.
        axis: axis that holds the slices.
        places: indices along the axis, shape `(n, p)`: for each of n blocks.
        slots: numbers of the coordinates that they are, shape `(p,)`.
        window: part of the tensor that is meant, as axis, start and size; None for all of it.
    """

    name: str
    axis: int
    places: Tensor
    slots: Tensor
    window: tuple[int, int, int] | None = None

    def seen(self, tensor: Tensor) -> Tensor:
        """The part of the tensor that is meant, slices first; a view."""
        return (tensor if self.window is None else tensor.narrow(*self.window)).movedim(self.axis, 0)


@final
@dataclass(frozen=True)
class Side:
    """Everything of one kind that is mixed by a block's matrix: the rows of a weight, the columns of its reader.

    Attributes:
        dual: whether it is mixed by `g⁻ᵀ`, or by g.
        gain: name of the gain between the basis and this side; None without.
        places: indices of the coordinates in the gain, shape `(n, d)`.
        pieces: slices of tensors that make it up.
    """

    dual: bool
    gain: str | None
    places: Tensor
    pieces: tuple[Piece, ...]


@final
@dataclass(frozen=True)
class Family:
    """Blocks of one size and kind on the same tensors, such as the heads of an attention.

    Attributes:
        count: number n of blocks.
        size: dimension d of each.
        orthogonal: whether only rotations are allowed.
        centred: whether they must leave the vector of ones alone.
        sides: rows and columns that are mixed.
    """

    count: int
    size: int
    orthogonal: bool
    centred: bool
    sides: tuple[Side, ...]

    @property
    def freedom(self) -> int:
        """Coordinates of one block: entries off the diagonal, which belongs to the scalings, or angles."""
        d = self.size - self.centred
        return d * (d - 1) // 2 if self.orthogonal else d * (d - 1)

    @property
    def names(self) -> tuple[str, ...]:
        """Tensors that are mixed, each once."""
        return tuple(dict.fromkeys(piece.name for side in self.sides for piece in side.pieces))

    @property
    def gains(self) -> tuple[str, ...]:
        """Gains that are passed on the way, each once."""
        return tuple(dict.fromkeys(side.gain for side in self.sides if side.gain is not None))

    def matrices(self, coordinates: Tensor) -> Tensor:
        """Velocities X of the blocks, shape `(n, d, d)`, from coordinates of shape `(n, freedom)`."""
        from scipy.linalg import helmert

        d = self.size - self.centred
        made = torch.zeros(self.count, d, d, dtype=torch.float64)
        if self.orthogonal:
            i, j = torch.tril_indices(d, d, -1)
            made[:, i, j] = coordinates.double()
            made = made - made.mT
        else:
            i, j = (~torch.eye(d, dtype=torch.bool)).nonzero(as_tuple=True)
            made[:, i, j] = coordinates.double()
        if self.centred:
            around = torch.from_numpy(helmert(self.size))
            made = around.T @ made @ around
        return made


@final
@dataclass(frozen=True)
class BasisChange(Symmetry):
    """An invertible matrix for every block: what is written is multiplied by it, what reads is by its inverse.

    An element holds coordinates of X for each block, and acts by `g = exp(X)`. Scalings of single coordinates belong to
    `UnitScaling`. Between basis and side a gain may lie, which is as if folded into the side: `Γ g Γ⁻¹`.

    Attributes:
        families: blocks of one kind each.
    """

    families: tuple[Family, ...]

    @property
    def touches(self) -> frozenset[str]:
        """Tensors that some element moves."""
        return frozenset(name for family in self.families for name in family.names)

    @property
    def dimension(self) -> int:
        """Number of coordinates."""
        return sum(family.count * family.freedom for family in self.families)

    def sample(self, stream: torch.Generator, spread: float = 1.0) -> Tensor:
        """Normal coordinates; eigenvalues of X are as large as `spread`."""
        parts = [
            torch.randn(f.count * f.freedom, generator=stream, dtype=torch.float64) * (spread / f.size**0.5)
            for f in self.families
        ]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def act(self, state: State, element: Tensor) -> State:
        """Multiply; new tensors."""
        for family, part in self._parts(element):
            state = apply(family, torch.matrix_exp(family.matrices(part)), state)
        return state

    def velocity(self, state: State, rates: Tensor) -> dict[str, Tensor]:
        """`δT = X T` along what is written, `−Xᵀ T` along what is read."""
        moving: dict[str, Tensor] = {}
        for family, part in self._parts(rates):
            x = family.matrices(part)
            for side in family.sides:
                matrix = through_gain(side, -x.mT if side.dual else x, state)
                for name, change in mixed(side, matrix, state.tensors).items():
                    moving[name] = moving[name] + change if name in moving else change
        return moving

    def units(self, state: State) -> Tensor:
        """A natural size for each coordinate at a state: that of what it adds to, over that of what it adds."""
        parts = []
        for family in self.families:
            if family.orthogonal:
                parts.append(torch.ones(family.count * family.freedom, dtype=torch.float64))
                continue
            sizes = _balance(family, state)
            i, j = (~torch.eye(family.size, dtype=torch.bool)).nonzero(as_tuple=True)
            parts.append((sizes[:, i] / sizes[:, j]).reshape(-1))
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def mask(self, chosen: Sequence[bool]) -> Tensor:
        """One for the coordinates of chosen families, zero for the others."""
        parts = [torch.full((f.count * f.freedom,), float(c)) for f, c in zip(self.families, chosen, strict=True)]
        return torch.cat(parts).double() if parts else torch.zeros(0, dtype=torch.float64)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Offsets at which each family's coordinates begin, and where the last one's end."""
        return tuple(np.cumsum([0, *(f.count * f.freedom for f in self.families)]).tolist())

    def _parts(self, element: Tensor) -> Iterator[tuple[Family, Tensor]]:
        for family, start, stop in zip(self.families, self.starts, self.starts[1:], strict=False):
            part = element[start:stop].detach()
            if bool(part.any()):
                yield family, part.view(family.count, family.freedom)


def _balance(family: Family, state: State) -> Tensor:
    """Square root of what is written over what reads it, in size, for each coordinate, shape `(n, d)`; 1 where one is zero."""
    written, read = (
        sum(stacked(side, state.tensors).cpu().square().sum(2) for side in family.sides if side.dual is dual)
        for dual in (False, True)
    )
    written, read = (torch.as_tensor(part).expand(family.count, family.size) for part in (written, read))
    ratio = (written / read) ** 0.25
    return torch.where((written > 0) & (read > 0), ratio, 1.0)


def apply(family: Family, g: Tensor, state: State, inverse: Tensor | None = None) -> State:
    """The state in other coordinates.

    Args:
        family: blocks of one kind.
        g: a matrix for each, shape `(n, d, d)`.
        state: whose tensors are mixed.
        inverse: inverse of g; computed if left out.
    """
    back = torch.linalg.inv(g) if inverse is None else inverse
    for side in family.sides:
        matrix = through_gain(side, back.mT if side.dual else g, state)
        state = state.replace(
            {
                name: tensor.to(state.tensors[name].dtype)
                for name, tensor in mixed(side, matrix, state.tensors, keep=True).items()
            }
        )
    return state


def through_gain(side: Side, matrix: Tensor, state: State) -> Tensor:
    """A matrix as a side sees it that lies behind a gain: `Γ g Γ⁻¹` where it writes, `Γ⁻¹ g⁻ᵀ Γ` where it reads."""
    if side.gain is None:
        return matrix
    gain = state.tensors[side.gain].double().cpu()[side.places]
    return matrix * gain[:, None, :] / gain[:, :, None] if side.dual else matrix * gain[:, :, None] / gain[:, None, :]


def stacked(side: Side, tensors: Mapping[str, Tensor]) -> Tensor:
    """The slices of a side as vectors, shape `(n, d, r)`, float64."""
    parts, slots = [], []
    for piece in side.pieces:
        tensor = piece.seen(tensors[piece.name])
        parts.append(tensor[piece.places.to(tensor.device)].double().reshape(*piece.places.shape, -1))
        slots.append(piece.slots)
    together = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    return together[:, torch.argsort(torch.cat(slots)).to(together.device)]


def mixed(side: Side, matrix: Tensor, tensors: Mapping[str, Tensor], keep: bool = False) -> dict[str, Tensor]:
    """The tensors of a side with their slices mixed, float64; what is not mixed is kept, or zero."""
    before = stacked(side, tensors)
    after = matrix.to(before.device) @ before
    made: dict[str, Tensor] = {}
    for piece in side.pieces:
        tensor = tensors[piece.name]
        whole = made.get(piece.name)
        if whole is None:
            whole = tensor.double().clone() if keep else torch.zeros_like(tensor, dtype=torch.float64)
        moved = piece.seen(whole)
        slices = after[:, piece.slots.to(after.device)].reshape(*piece.places.shape, *moved.shape[1:])
        moved[piece.places.to(tensor.device)] = slices
        made[piece.name] = whole
    return made
