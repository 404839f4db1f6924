"""Shifts of constants: what a bias gives, its readers take back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import numpy as np
import scipy
import torch
from torch import Tensor

from isoflat.core.state import State
from isoflat.symmetry.groups.base import Symmetry
from isoflat.symmetry.motions import Absorbed, Additive, Mean, Running


@final
@dataclass(frozen=True)
class Offset:
    """An additive tensor with its shifts solved for.

    Attributes:
        entry: the tensor.
        own: sparse `(units, m)`: what is added, as a function of the group's coordinates τ.
        entering: sparse `(g · j, m)`: constants that its factor would multiply; None where it absorbs nothing.
    """

    entry: Additive
    own: scipy.sparse.csr_matrix
    entering: scipy.sparse.csr_matrix | None

    def moves(self) -> bool:
        """Test whether some element moves the tensor."""
        return self.own.nnz > 0 or (self.entering is not None and self.entering.nnz > 0)


@final
@dataclass(frozen=True)
class Centre:
    """A batch normalisation with its shifts solved for.

    Attributes:
        running: the normalisation.
        entering: sparse `(C, m)`: shift of its input.
        moved: sparse `(C, m)`: shift out of its mean into its offset.
        absorbed: sparse `(g · j, m)`: constants before the contraction without bias that it reads; None for none.
    """

    running: Running
    entering: scipy.sparse.csr_matrix
    moved: scipy.sparse.csr_matrix
    absorbed: scipy.sparse.csr_matrix | None


class Addition(Symmetry):
    """A group whose elements are added to tensors: what they add is their velocity."""

    @final
    def act(self, state: State, element: Tensor) -> State:
        """Add; new tensors."""
        return state.replace(
            {
                name: (state.tensors[name].double() + delta).to(state.tensors[name].dtype)
                for name, delta in self.velocity(state, element).items()
            }
        )


@final
@dataclass(frozen=True)
class Translation(Addition):
    """Constants moved between biases, offsets, tables and running means. An element is the vector τ; they add up.

    Attributes:
        offsets: additive tensors.
        centres: batch normalisations.
        size: dimension m.
    """

    offsets: tuple[Offset, ...]
    centres: tuple[Centre, ...]
    size: int

    @property
    def touches(self) -> frozenset[str]:
        """Tensors that some element moves."""
        names = {offset.entry.name for offset in self.offsets if offset.moves()}
        for centre in self.centres:
            if any(part is not None and part.nnz for part in (centre.entering, centre.moved, centre.absorbed)):
                names.add(centre.running.mean)
            if centre.moved.nnz and centre.running.offset is not None:
                names.add(centre.running.offset)
        return frozenset(names)

    @property
    def dimension(self) -> int:
        """Number of coordinates."""
        return self.size

    def units(self, state: State) -> Tensor:
        """A natural size for each coordinate at a state: that of the activations it is added to, shape `(m,)`."""
        sizes = np.zeros(self.size)

        def weigh(rows: scipy.sparse.csr_matrix, values: Tensor) -> None:
            entries = rows.tocoo()
            np.maximum.at(sizes, entries.col, values.cpu().numpy()[entries.row])

        for offset in self.offsets:
            value, _ = gathered(state.tensors[offset.entry.name], offset.entry)
            size = value.abs() + value.square().mean().sqrt()
            if offset.entry.absorbed is not None:
                factor = offset.entry.absorbed.seen(state.tensors[offset.entry.absorbed.factor].double())
                size = size + factor.square().sum((2, 3)).sqrt().reshape(-1)
            weigh(offset.own, size)
        for centre in self.centres:
            size = state.tensors[centre.running.mean].double().abs() + deviation(centre.running, state)
            weigh(centre.entering, size)
            weigh(centre.moved, size)
        return torch.from_numpy(np.where(sizes > 0, sizes, 1.0))

    def velocity(self, state: State, rates: Tensor) -> dict[str, Tensor]:
        """Constants added to each tensor."""
        moving: dict[str, Tensor] = {}
        for offset in filter(Offset.moves, self.offsets):
            tensor = state.tensors[offset.entry.name]
            delta = given(offset, rates).to(tensor.device)
            if offset.entering is not None and offset.entering.nnz and offset.entry.absorbed is not None:
                delta = delta - absorbed(offset.entry.absorbed, state, entering(offset, rates))
            moving[offset.entry.name] = spread_out(delta, offset.entry, tensor.shape)
        for centre in self.centres:
            running = centre.running
            moved = _values(centre.moved, rates)
            mean = state.tensors[running.mean]
            moving[running.mean] = (_values(centre.entering, rates) - moved).to(mean.device)
            if centre.absorbed is not None and running.absorbed is not None and centre.absorbed.nnz:
                moving[running.mean] += absorbed(running.absorbed, state, passed(centre, rates))
            if running.gain is not None and running.offset is not None:
                gain = state.tensors[running.gain].double()
                taken = gain * moved.to(gain.device) / deviation(running, state)
                before = moving.get(running.offset, torch.zeros_like(taken))
                moving[running.offset] = before - taken
        return moving


@final
@dataclass(frozen=True)
class CommonVector(Addition):
    """A common vector added along an axis of a weight, over which a mean is lost or zero. An element holds one each.

    Attributes:
        means: weights and the axis that is averaged over.
        lengths: entries of each one's vector.
    """

    means: tuple[Mean, ...]
    lengths: tuple[int, ...]

    @property
    def touches(self) -> frozenset[str]:
        """The weights, and biases that take something back."""
        biases = {mean.bias for mean in self.means if mean.bias is not None and mean.offset is not None}
        return frozenset(mean.name for mean in self.means) | biases

    @property
    def dimension(self) -> int:
        """Length of all vectors together."""
        return sum(self.lengths)

    def velocity(self, state: State, rates: Tensor) -> dict[str, Tensor]:
        """The vectors, along their axis; and what biases take back."""
        moving: dict[str, Tensor] = {}
        for mean, part in zip(self.means, rates.split(self.lengths), strict=True):
            tensor = state.tensors[mean.name]
            rest = [n for axis, n in enumerate(tensor.shape) if axis != mean.axis]
            vector = part.to(state.device).view(rest).unsqueeze(mean.axis)
            along = _along(mean, state)
            wide = along.view(-1, *[1] * (tensor.ndim - 1 - mean.axis))
            before = moving.get(mean.name, torch.zeros_like(tensor, dtype=torch.float64))
            moving[mean.name] = before + vector * wide
            if mean.offset is not None and mean.bias is not None:
                taken = part.to(state.device) * (along @ state.tensors[mean.offset].double())
                moving[mean.bias] = moving.get(mean.bias, torch.zeros_like(taken)) - taken
        return moving

    def units(self, state: State) -> Tensor:
        """A natural size for each coordinate at a state: that of the weight's own entries."""
        parts = [
            (state.tensors[mean.name].double() * _against(mean, state))
            .square()
            .mean(mean.axis)
            .sqrt()
            .reshape(-1)
            .cpu()
            for mean in self.means
        ]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def mask(self, stay: frozenset[str]) -> Tensor:
        """One for the coordinates of weights before which no gain stays, zero for the others."""
        parts = [torch.full((n,), float(m.gain not in stay)) for m, n in zip(self.means, self.lengths, strict=True)]
        return torch.cat(parts).double() if parts else torch.zeros(0, dtype=torch.float64)

    def slice(self, state: State) -> Tensor:
        """The element that makes every mean zero; with a gain, that of the weight with the gain folded in."""
        parts = [torch.zeros(0, dtype=torch.float64)]
        for mean, length in zip(self.means, self.lengths, strict=True):
            part = -(state.tensors[mean.name].double() * _against(mean, state)).mean(mean.axis).reshape(-1).cpu()
            parts.append(part)
            state = CommonVector((mean,), (length,)).act(state, part)  # a weight may lose a mean over each axis
        return torch.cat(parts)


def _along(mean: Mean, state: State) -> Tensor:
    """Factors by which a common vector is multiplied along the axis: ones, or `1/γ`; zeros where some γ is zero."""
    if mean.gain is None:
        return torch.ones(state.tensors[mean.name].shape[mean.axis], dtype=torch.float64, device=state.device)
    gain = state.tensors[mean.gain].double()
    return 1 / gain if bool(gain.all()) else torch.zeros_like(gain)


def _against(mean: Mean, state: State) -> Tensor:
    """Weights of the mean that a slice makes zero, shaped to the axis: ones, or γ."""
    tensor = state.tensors[mean.name]
    weights = torch.ones(()) if mean.gain is None else state.tensors[mean.gain]
    return weights.double().to(state.device).view(-1, *[1] * (tensor.ndim - 1 - mean.axis))


def given(offset: Offset, element: Tensor) -> Tensor:
    """Constants that an element adds to each unit of an additive tensor, shape `(units,)`."""
    return _values(offset.own, element)


def entering(offset: Offset, element: Tensor) -> Tensor:
    """Constants that enter an additive tensor's factor, shape `(g, j)`."""
    assert offset.entering is not None
    assert offset.entry.absorbed is not None
    return _values(offset.entering, element).view(offset.entry.absorbed.shift.shape)


def passed(centre: Centre, element: Tensor) -> Tensor:
    """Constants before the contraction that a batch normalisation reads, shape `(g, j)`."""
    assert centre.absorbed is not None
    assert centre.running.absorbed is not None
    return _values(centre.absorbed, element).view(centre.running.absorbed.shift.shape)


def absorbed(entry: Absorbed, state: State, shift: Tensor) -> Tensor:
    """`Σ_{j,k} factor[g, i, j, k] · shift[g, j]`, shape `(g · i,)`."""
    factor = entry.seen(state.tensors[entry.factor].double()).sum(3)
    return torch.einsum("gij,gj->gi", factor, shift.to(factor.device)).reshape(-1)


def spread_out(delta: Tensor, entry: Additive, shape: torch.Size) -> Tensor:
    """A value for each unit, at every entry of the tensor."""
    if entry.axis is None:
        return delta.view(shape)
    wide = [1] * len(shape)
    wide[entry.axis] = -1
    return delta.view(wide).expand(shape)


def gathered(tensor: Tensor, entry: Additive) -> tuple[Tensor, int]:
    """Mean over the entries that share a unit, shape `(units,)`, and how many they are."""
    if entry.axis is None:
        return tensor.double().reshape(-1), 1
    rows = tensor.double().movedim(entry.axis, 0).reshape(tensor.shape[entry.axis], -1)
    return rows.mean(1), rows.shape[1]


def deviation(running: Running, state: State) -> Tensor:
    """`√(v + ε)`, float64."""
    return (state.tensors[running.variance].double() + running.epsilon).sqrt()


def _values(rows: scipy.sparse.csr_matrix, element: Tensor) -> Tensor:
    return torch.from_numpy(rows @ element.detach().double().numpy())


def common(means: tuple[Mean, ...], shapes: dict[str, torch.Size]) -> CommonVector:
    """The symmetry of some weights."""
    lengths = tuple(math.prod(shapes[mean.name]) // shapes[mean.name][mean.axis] for mean in means)
    return CommonVector(means, lengths)
