"""A change of basis counts only if the network's derivative along it vanishes at random weights."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from isoflat.core.rng import stream
from isoflat.core.state import State
from isoflat.symmetry.groups.basis import BasisChange, Family

if TYPE_CHECKING:
    from isoflat.symmetry.found import Found

TOLERANCE = 1e-9
"""Derivative along an accepted change, relative to that along what it writes alone."""


def accepted(found: Found) -> Found:
    """The same symmetries less the changes of basis that are none.

    One derivative along a random element proves all of them together; if it does not vanish, each family is asked.
    """
    if not found.basis.families:
        return found
    state = _random(found)
    if _vanishes(found, state, found.basis):
        return found
    good = tuple(f for f in found.basis.families if _vanishes(found, state, BasisChange((f,))))
    return replace(found, basis=BasisChange(good))


def _vanishes(found: Found, state: State, basis: BasisChange) -> bool:
    rates = basis.sample(stream(0, "accept"), 1.0)
    along = _derivative(found, state, basis.velocity(state, rates))
    alone = _derivative(found, state, BasisChange(tuple(map(_writing, basis.families))).velocity(state, rates))
    return float(along.abs().max()) <= TOLERANCE * float(alone.abs().max())


def _writing(family: Family) -> Family:
    """What writes the basis alone, which is no symmetry."""
    return replace(family, sides=tuple(side for side in family.sides if not side.dual))


def _derivative(found: Found, state: State, moving: dict[str, Tensor]) -> Tensor:
    """Of the outputs along a velocity, in float64."""
    names = [name for name, speed in moving.items() if bool(speed.any())]

    def output(*tensors: Tensor) -> Tensor:
        return found.output(state.replace(dict(zip(names, tensors, strict=True))))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        point = tuple(state.tensors[name] for name in names)
        return torch.func.jvp(output, point, tuple(moving[name] for name in names))[1]


def _random(found: Found) -> State:
    """Weights without structure, of the size that they have; a tensor of zeros gets that of its fan."""
    state = found.state().to(dtype=torch.float64)
    random = stream(0, "accept", "weights")
    made = {}
    for name, tensor in (*state.parameters.items(), *state.frozen.items()):
        size = float(tensor.square().mean().sqrt()) or max(1, tensor[0].numel() if tensor.ndim else 1) ** -0.5
        made[name] = size * torch.randn(tensor.shape, generator=random, dtype=torch.float64).to(tensor.device)
    return state.replace(made)
