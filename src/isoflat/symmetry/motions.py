"""Motions of stored tensors in terms of unknowns: how each scales and shifts, and what a normalisation divides out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

NONE = torch.zeros(1, 1, dtype=torch.int64)


@final
@dataclass(frozen=True)
class Field:
    """The log-scale of a stored tensor: `first[g, i] + sign · second[g, j]` at entry `[g, i, j, …]` of a view.

    For a weight, `first` are its output units, `second` its input units and `sign` is −1.

    Attributes:
        name: name of the tensor.
        view: shape `(g, i, j, k)` under which it is seen; groups, two axes of units, and the rest.
        first: unknowns, shape `(g, i)` or `(1, 1)`.
        second: unknowns, shape `(g, j)` or `(1, 1)`.
        sign: sign of the second term.
    """

    name: str
    view: tuple[int, int, int, int]
    first: Tensor
    second: Tensor = NONE
    sign: int = -1


def along(found: Field, axis: int, shape: torch.Size) -> Tensor:
    """The unknowns that a field has along one axis of its tensor, where all else is the same; shape `(n,)`."""
    groups, rows, columns, rest = found.view
    if len(shape) > 1 and groups * rows == math.prod(shape) and columns * rest == 1:  # entry by entry
        return found.first.expand(groups, rows).reshape(shape).movedim(axis, 0).flatten(1)[:, 0]
    if axis == 0:
        return found.first.expand(groups, rows).reshape(-1)
    return found.second[0].expand(columns)


@final
@dataclass(frozen=True)
class Absorbed:
    """Constants that an additive tensor takes up when constants upstream move: `−Σ_j factor[g, i, j, k] · shift[g, j]`.

    Attributes:
        factor: name of the weight.
        view: shape `(g, i, j, k)` under which it is seen.
        shift: unknown constants that enter, shape `(g, j)`.
        turned: whether the stored tensor holds its inputs first: `(g, j, i, k)`.
    """

    factor: str
    view: tuple[int, int, int, int]
    shift: Tensor
    turned: bool = False

    def seen(self, factor: Tensor) -> Tensor:
        """The weight under its view, shape `(g, i, j, k)`."""
        g, i, j, k = self.view
        return factor.reshape(g, j, i, k).transpose(1, 2) if self.turned else factor.reshape(self.view)


@final
@dataclass(frozen=True)
class Additive:
    """A stored tensor that is added: `shift[g, i]` may be added to all its entries `[g, i, …]` of a view.

    Attributes:
        name: name of the tensor.
        view: shape `(i, k)` after `axis` is moved to the front.
        axis: which axis of the stored tensor holds the units; None for all of them flattened.
        shift: unknowns, shape `(i,)`.
        absorbed: constants that it takes up besides; None for nothing.
        norm: whether it is the offset of a normalisation, which is emptied first.
    """

    name: str
    axis: int | None
    shift: Tensor
    absorbed: Absorbed | None = None
    norm: bool = False


@final
@dataclass(frozen=True)
class Running:
    """Batch normalisation with fixed statistics: an affine map per channel, `γ (x − μ)/√(v + ε) + β`.

    Attributes:
        mean: name of μ.
        variance: name of v.
        gain: name of γ; None without.
        offset: name of β; None without.
        epsilon: ε.
        deviation: unknown log-scale of √(v + ε), shape `(C,)`.
        entering: unknown shift of x, shape `(C,)`.
        moved: unknown shift of x taken out of μ into β, shape `(C,)`.
        absorbed: constants that μ takes up from constants before a contraction without bias: `+Σ factor · shift`; None for none.
    """

    mean: str
    variance: str
    gain: str | None
    offset: str | None
    epsilon: float
    deviation: Tensor
    entering: Tensor
    moved: Tensor
    absorbed: Absorbed | None = None


@final
@dataclass(frozen=True)
class Norm:
    """A normalisation that divides its input's scale out.

    Attributes:
        where: module path, for people.
        constant: path of the module attribute that holds ε; None where there is none, or it is not one module's alone.
        epsilon: ε.
        factors: unknown log-scales it divides out, each once.
    """

    where: str
    constant: str | None
    epsilon: float
    factors: tuple[int, ...]


@final
@dataclass(frozen=True)
class Mean:
    """A weight to which a common vector may be added along an axis: what the mean over it makes is lost, or is zero.

    Either every reader of the weight's output subtracts that mean, or the weight reads what has none: a LayerNorm's
    output before its gain γ. Then `a ⊗ 1/γ` is added, and the bias takes back what the offset β would make of it.

    Attributes:
        name: name of the tensor.
        axis: axis of the stored tensor over which the mean is taken.
        reads: whether it is the weight's inputs that have no mean.
        gain: name of γ; None without.
        offset: name of β; None without.
        bias: name of the weight's bias; None without.
    """

    name: str
    axis: int
    reads: bool = False
    gain: str | None = None
    offset: str | None = None
    bias: str | None = None


@final
@dataclass(frozen=True)
class Average:
    """Constants that pass attention because its weights add up to one: they do where a row keeps a key.

    Attributes:
        shift: unknown constants of the values that pass.
        where: the operation, for people.
        varies: whether its mask hangs on the network's input, and not on its shape alone.
    """

    shift: Tensor
    where: str
    varies: bool
