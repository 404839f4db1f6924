"""The metric at the canonical representative of the orbit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from torch import Tensor

from isoflat.core.errors import NoInvariantGeometry
from isoflat.core.space import norm
from isoflat.core.state import State
from isoflat.core.streams import stream
from isoflat.geometry.base import Chart, Geometry, Identity
from isoflat.linalg.maps import Composition, Diagonal, Embedding, LinearMap, Shear, Term
from isoflat.linalg.operator import Operator
from isoflat.symmetry.canonical import Epsilon, Representative, canonical
from isoflat.symmetry.found import VERSION, Found


@final
@dataclass(frozen=True)
class Canonical(Geometry):
    """`geometry="auto"`: `D H D` at the canonical representative of the orbit under every symmetry that was found.

    The weights stay where they are: for fixed g the action is affine, `θ* = S θ + t`, so that the Hessian there is
    `S⁻ᵀ H S⁻¹` and the frame at the user's own weights is `E = S⁻¹ J D`, with D the norms of the tensors at θ* and J
    the inclusion of the trainable coordinates.

    *Degenerate cases*: tensors that a shift empties (an offset its readers take up) and gains folded into their readers
    have no block. Units that are dead in the closed orbit lose the coordinates that only reach through their kink; the
    number is lower semicontinuous there. Both are listed.

    Attributes:
        found: the network's symmetries; None in the catalogue, before a network is known.
        epsilon: what becomes of the epsilons of normalisations (`symmetry.canonical.Epsilon`).
    """

    name: str = "auto"
    title: str = "each tensor in units of its norm at the canonical representative of the orbit"
    group: str = "every scaling, normalisation and shift found by tracing the network"
    version: int = 1
    found: Found | None = None
    epsilon: Epsilon = Epsilon.FREE

    def on(self, found: Found) -> Canonical:
        """The geometry of a network with these symmetries."""
        return replace(self, found=found)

    def chart(self, state: State) -> Chart:
        """Canonical representative, frame, and what to know about them.

        Raises:
            NoInvariantGeometry: no network's symmetries are known.
        """
        if self.found is None:
            raise NoInvariantGeometry(
                "geometry='auto' needs the symmetries of a network: isoflat.measure finds them; here, bind them with "
                "GEOMETRY.on(isoflat.symmetries(model, example))"
            )
        found = self.found
        own = replace(state, constants=found.constants(found.model))
        point = canonical(found, own, self.epsilon)
        reached = replace(_reaching(point.start, point), constants={})
        unchanged = reached.parameters.keys() == state.parameters.keys() and not point.zeroed
        place = state if unchanged else reached
        scale, unseen = _units(point, state)
        frame = _frame(point, state, place, scale)
        return Chart(
            state=place,
            frame=frame,
            unseen=unseen,
            group=self._described(found),
            group_hash=found.hash,
            notes=_notes(point, place, state),
            identity=_identity(found, own, place, frame, scale),
        )

    def connection(self, state: State, gradient: Tensor) -> Operator | None:
        """None: the frame is that of a fixed representative (design: the headline has no connection term)."""
        return None

    def _described(self, found: Found) -> str:
        scalings, shifts = found.free.dimension, found.translation.dimension + found.common.dimension
        return (
            f"{scalings} scalings and {shifts} shifts found by tracing (rules {VERSION}); isoflat symmetries lists them"
        )


def _reaching(start: State, point: Representative) -> State:
    """The state with fixed offsets and running means made reachable that take up something of a trainable factor."""
    wanted = {
        shear.offset
        for shear in point.shears
        if shear.absorbed.factor in start.parameters and shear.offset not in start.parameters
    }
    if not wanted:
        return start

    def rest(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if name not in wanted}

    parameters = {**start.parameters, **{name: start.tensors[name] for name in sorted(wanted)}}
    return replace(start, parameters=parameters, frozen=rest(start.frozen), buffers=rest(start.buffers))


def _units(point: Representative, state: State) -> tuple[Tensor, tuple[str, ...]]:
    """`exp(−log-factor) · ‖T*‖` for each trainable entry, zero where it has no block; and the tensors without one."""
    parts, unseen = [], []
    absorbed = {shear.offset for shear in point.shears}
    for name, tensor in state.parameters.items():
        size = norm(point.state.tensors[name])
        scale = (-point.log(name, tensor.shape)).exp() * size
        if name in point.folded:
            scale = scale.masked_fill(point.folded[name], 0.0)
            if bool(point.folded[name].all()):
                unseen.append(f"{name} (folded into its readers)")
        if name in point.removed:
            scale = scale.masked_fill(point.removed[name], 0.0)
        if size == 0:
            moved = name in absorbed or bool((tensor != 0).any())
            unseen.append(f"{name} ({'emptied by a shift' if moved else 'all zero'})")
        parts.append(scale.reshape(-1))
    return torch.cat(parts), tuple(unseen)


def _frame(point: Representative, state: State, place: State, scale: Tensor) -> LinearMap:
    """`E = S⁻¹ J D`."""
    slices, size = place.space.slices, place.space.size
    maps: list[LinearMap] = []
    terms = tuple(
        Term(slices[shear.absorbed.factor], slices[shear.offset], shear.absorbed.view, shear.shift)
        for shear in point.shears
        if shear.absorbed.factor in slices and shear.offset in slices
    )
    if terms:
        maps.append(Shear(size, terms))
    if place.parameters.keys() != state.parameters.keys():
        places = [torch.arange(slices[name].start, slices[name].stop) for name in state.parameters]
        maps.append(Embedding(size, torch.cat(places)))
    maps.append(Diagonal(scale))
    return maps[0] if len(maps) == 1 else Composition(tuple(maps))


def _identity(found: Found, state: State, place: State, frame: LinearMap, scale: Tensor) -> Identity | None:
    """A random generator that moves trainable tensors only, as a check of the products."""
    group = found.scaling
    allowed = np.ones(group.size, dtype=bool)
    for entry in group.tensors:
        if entry.name not in state.parameters and bool((state.tensors[entry.name] != 0).any()):
            allowed[[*entry.first.indices, *entry.second.indices]] = False
    for _, rows in (*group.runnings, *((n, r) for n, r in group.norms if n.epsilon)):
        allowed[rows.indices] = False
    if not allowed.any():
        return None
    random = torch.randn(group.size, generator=stream(0, "identity"), dtype=torch.float64)
    z = torch.where(torch.from_numpy(allowed), random, 0.0)
    rates = {e.name: e.log(z).expand(e.view).reshape(-1) for e in group.tensors}
    along = torch.cat(
        [rates.get(name, torch.zeros(t.numel(), dtype=torch.float64)) for name, t in place.parameters.items()]
    ).to(state.device)
    velocity = along * place.vector.double()
    straight = velocity[:, None]
    for part in frame.maps if isinstance(frame, Composition) else ():
        if isinstance(part, Shear):
            straight = Shear(part.size, tuple(replace(t, weights=-t.weights) for t in part.terms)).push(straight)
        elif isinstance(part, Embedding):
            straight = part.pull(straight)
    units = scale.to(state.device)
    return Identity(velocity, torch.where(units > 0, straight[:, 0] / units, 0.0), along)


def _notes(point: Representative, place: State, state: State) -> tuple[str, ...]:
    notes = []
    if point.zeroed:
        listed = ", ".join(f"{count} of {name}" for name, count in sorted(point.zeroed.items()))
        notes.append(f"dead units: entries that the closed orbit sends to zero: {listed}")
    if point.removed:
        notes.append(f"reach only through a dead unit's kink, left out: {', '.join(sorted(point.removed))}")
    if point.starved:
        notes.append(f"normalisations that nothing feeds, left out of the balance: {', '.join(point.starved)}")
    if further := place.parameters.keys() - state.parameters.keys():
        notes.append(f"the frame reaches fixed tensors that take up constants: {', '.join(sorted(further))}")
    return tuple(notes)


GEOMETRY = Canonical()
