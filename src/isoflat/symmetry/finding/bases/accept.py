"""A change of basis counts only if the network's derivative along it vanishes at random weights.

Where some operation has no forward-mode derivative, outputs before and after a finite change are compared instead.

Derivation: docs/concepts/bases.md, "Why a derivative at random weights".
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from isoflat.core.errors import UnsupportedModel
from isoflat.core.rng import stream
from isoflat.core.state import State
from isoflat.symmetry.groups.basis import BasisChange, Family

TOLERANCE = 1e-9
"""Derivative along an accepted change, relative to that along what it writes alone."""

SINGLE_TOLERANCE = 1e-4
"""The same in float32, for networks that run in nothing wider."""

DISTANCE = 0.25
"""Size of the eigenvalues of a finite change's logarithm: so far that what it changes stands clear of rounding."""


Output = Callable[[State], Tensor]
"""A network's output, in float64, as a function of its tensors."""


def accepted(basis: BasisChange, given: State, output: Output) -> BasisChange:
    """The changes of basis less those that change the output.

    One derivative along a random element proves all of them together; if it does not vanish, each family is asked.

    Args:
        basis: candidates.
        given: the network's tensors, whose sizes random weights have, in the precision of the proof.
        output: the network's output.
    """
    if not basis.families:
        return basis
    state = _random(given)
    if _vanishes(basis, state, output):
        return basis
    return BasisChange(tuple(f for f in basis.families if _vanishes(BasisChange((f,)), state, output)))


def unproved(basis: BasisChange, left: BasisChange, given: State, output: Output) -> tuple[Family, ...]:
    """The candidates that were given up because outputs at random weights are no numbers, which neither proves nor refutes.

    Args:
        basis: candidates.
        left: those of them that were accepted.
        given: the network's tensors, whose sizes random weights have, in the precision of the proof.
        output: the network's output.
    """
    lost = tuple(family for family in basis.families if all(family is not other for other in left.families))
    if not lost or bool(torch.isfinite(output(_random(given))).all()):
        return ()
    return lost


def _vanishes(basis: BasisChange, state: State, output: Output) -> bool:
    writing = BasisChange(tuple(map(_writing, basis.families)))
    try:
        rates = basis.sample(stream(0, "accept"), 1.0)
        along = _derivative(output, state, basis.velocity(state, rates))
        alone = _derivative(output, state, writing.velocity(state, rates))
    except (RuntimeError, UnsupportedModel):  # no forward-mode derivative; a network that does not run is seen below
        rates = basis.sample(stream(0, "accept"), DISTANCE)
        before = output(state)
        along, alone = (output(change.act(state, rates)) - before for change in (basis, writing))
    allowed = TOLERANCE if state.dtype == torch.float64 else SINGLE_TOLERANCE
    return float(along.abs().max()) <= allowed * float(alone.abs().max())


def _writing(family: Family) -> Family:
    """Family with the sides that write the basis alone, which is no symmetry."""
    return replace(family, sides=tuple(side for side in family.sides if not side.dual))


def _derivative(output: Output, state: State, moving: dict[str, Tensor]) -> Tensor:
    """Derivative of the outputs along a velocity, in float64."""
    names = [name for name, speed in moving.items() if bool(speed.any())]

    def moved(*tensors: Tensor) -> Tensor:
        return output(state.replace(dict(zip(names, tensors, strict=True))))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        point = tuple(state.tensors[name] for name in names)
        return torch.func.jvp(moved, point, tuple(moving[name].to(state.dtype) for name in names))[1]


def _random(state: State) -> State:
    """Weights without structure, of the size that they have; a tensor of zeros gets that of its fan."""
    random = stream(0, "accept", "weights")
    made = {}
    for name, tensor in (*state.parameters.items(), *state.frozen.items()):
        size = float(tensor.square().mean().sqrt()) or max(1, tensor[0].numel() if tensor.ndim else 1) ** -0.5
        made[name] = size * torch.randn(tensor.shape, generator=random, dtype=torch.float64).to(tensor)
    return state.replace(made)
