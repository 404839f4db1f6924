"""Geometries at the canonical representative of an orbit: what they share is how they get there and back.

Derivation: docs/concepts/bases.md, "The frame".
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Self, final

import numpy as np
import torch
from torch import Tensor

from isoflat.core.errors import NoInvariantGeometry
from isoflat.core.render import some
from isoflat.core.rng import stream
from isoflat.core.space import norm
from isoflat.core.state import State
from isoflat.geometry.base import Chart, GeneratorIdentity, Geometry, Invariance
from isoflat.linalg.maps import (
    Composition,
    Contraction,
    Diagonal,
    Embedding,
    LinearMap,
    Mixing,
    Shear,
    TensorSlices,
    slices,
)
from isoflat.linalg.operator import Operator
from isoflat.symmetry.canonical.representative import Epsilon, Gauge, Representative, canonical
from isoflat.symmetry.found import VERSION, Found


@dataclass(frozen=True)
class Traced(Geometry):
    """A metric at the canonical representative of the orbit under every symmetry that was found.

    The weights stay where they are: for fixed g the action is affine, `θ* = S θ + t`, so that the Hessian there is
    `S⁻ᵀ H S⁻¹` and the frame at the user's own weights is `E = S⁻¹ J D`, with D the metric's units at θ* and J the
    inclusion of the trainable coordinates.

    Attributes:
        found: the network's symmetries; None in the catalogue, before a network is known.
        epsilon: treatment of the epsilons of normalisations (`symmetry.canonical.Epsilon`).
    """

    version: int = 2
    claims: frozenset[Invariance] = frozenset(Invariance)
    found: Found | None = None
    epsilon: Epsilon = Epsilon.FREE

    @property
    @abstractmethod
    def gauge(self) -> Gauge:
        """Choice among the points of least norm."""

    @abstractmethod
    def units(
        self, found: Found, point: Representative, state: State
    ) -> tuple[dict[str, Tensor], tuple[tuple[str, str], ...]]:
        """D: the unit of each trainable entry, zero where it has none; and the tensors without one, and why.

        Args:
            found: the network's symmetries.
            point: the representative.
            state: as given, with its trainable tensors.
        """

    @abstractmethod
    def open(self, found: Found, point: Representative, state: State) -> tuple[str, ...]:
        """Symmetries that were found and that the number is not invariant to, in words."""

    @final
    def on(self, found: Found) -> Self:
        """The geometry of a network with these symmetries."""
        return replace(self, found=found)

    @final
    def chart(self, state: State) -> Chart:
        """Canonical representative, frame, and what to know about them.

        Raises:
            NoInvariantGeometry: no network's symmetries are known.
        """
        if self.found is None:
            raise NoInvariantGeometry(
                f"geometry='{self.name}' needs the symmetries of a network: isoflat.measure finds them; here, bind them "
                "with GEOMETRY.on(isoflat.symmetries(model, example))"
            )
        found = self.found
        own = replace(state, constants=found.constants(found.model))
        point = canonical(found, own, self.epsilon, self.gauge)
        reached = replace(_reaching(point.start, point), constants={})
        unchanged = reached.parameters.keys() == state.parameters.keys() and not point.zeroed
        place = state if unchanged else reached
        units, unseen = self.units(found, point, state)
        frame, length = _frame(point, state, place, units)
        left_open = (*self.open(found, point, state), *_left_out(found))
        return Chart(
            state=place,
            frame=frame,
            unseen=unseen,
            group=_described(found) + (", but for what the notes except" if left_open else ""),
            group_hash=found.hash,
            notes=(*_notes(point, place, state), *left_open),
            identity=_identity(found, own, place, length),
        )

    @final
    def connection(self, state: State, gradient: Tensor) -> Operator | None:
        """No term: the frame is that of a fixed representative (design: the headline has no connection term)."""
        return None


def behind_gains(found: Found, state: State) -> tuple[str, ...]:
    """Symmetries that were found and still move the number, because a gain on the way has a block of its own."""
    stay = found.kept(state)
    turned = sorted({gain for family in found.basis.families for gain in family.gains if stay & set(family.gains)})
    blind = sorted({mean.gain for mean in found.common.means if mean.gain is not None and mean.gain in stay})
    notes = [("rotations of a stream", turned), ("common vectors of what reads a normalisation", blind)]
    return tuple(
        f"{what} are not covered, because a gain stays that they pass: {', '.join(gains)}"
        for what, gains in notes
        if gains
    )


def _left_out(found: Found) -> tuple[str, ...]:
    """Symmetries that were found and could not be proved on this network or these data."""
    return tuple(
        f"not covered: {line.dimension} dimensions of {some(line.tensors)} ({'; '.join(line.reasons)})"
        for line in found.left_out
    )


def without_unit(point: Representative, name: str, unit: Tensor) -> Tensor:
    """A tensor's units with zeros where it has no block: folded into its readers, or left out behind a kink."""
    for mask in (point.folded.get(name), point.removed.get(name)):
        if mask is not None:
            unit = unit.masked_fill(mask.to(unit.device), 0.0)
    return unit


def unseen(point: Representative, state: State) -> tuple[tuple[str, str], ...]:
    """Trainable tensors whose curvature does not enter, and why."""
    absorbed = {shear.offset for shear in point.shears}
    missing = []
    for name, tensor in state.parameters.items():
        if name in point.folded and bool(point.folded[name].all()):
            missing.append((name, "folded into its readers"))
        if not bool(point.state.tensors[name].any()):
            shifted = name in absorbed or bool((tensor != 0).any())
            why = (
                "zero on the closed orbit" if name in point.zeroed else "emptied by a shift" if shifted else "all zero"
            )
            missing.append((name, why))
    return tuple(missing)


def _described(found: Found) -> str:
    shifts = found.translation.dimension + found.common.dimension
    return (
        f"{found.free.dimension} scalings, {found.basis.dimension} changes of basis and {shifts} shifts found by "
        f"tracing (rules {VERSION}); isoflat symmetries lists them"
    )


def _reaching(start: State, point: Representative) -> State:
    """The state with fixed tensors made reachable that take up something of a trainable one, or are mixed with it."""
    wanted = {
        shear.offset
        for shear in point.shears
        if shear.absorbed.factor in start.parameters and shear.offset not in start.parameters
    }
    for change in point.changes:
        for side in change.family.sides:
            names = {piece.name for piece in side.pieces}
            if names & start.parameters.keys():
                wanted |= names - start.parameters.keys()
    if not wanted:
        return start

    def rest(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if name not in wanted}

    parameters = {**start.parameters, **{name: start.tensors[name] for name in sorted(wanted)}}
    return replace(start, parameters=parameters, frozen=rest(start.frozen), buffers=rest(start.buffers))


def _frame(
    point: Representative, state: State, place: State, units: Mapping[str, Tensor]
) -> tuple[LinearMap, Callable[[Tensor], float]]:
    """`E = S⁻¹ J D`: D, then J into what the frame reaches, then bases, scales and constants undone.

    Returns:
        E, and how long a vector of its range is in its coordinates.
    """
    places, size = place.space.slices, place.space.size
    diagonal = torch.cat([units[name].to(place.device).reshape(-1) for name in state.parameters])
    log = torch.cat([point.log(name, tensor.shape).reshape(-1) for name, tensor in place.parameters.items()])
    log = log.to(place.device)
    shears = tuple(
        Contraction(
            places[shear.absorbed.factor],
            places[shear.offset],
            shear.absorbed.view,
            shear.shift,
            shear.absorbed.turned,
        )
        for shear in point.shears
        if shear.absorbed.factor in places and shear.offset in places
    )
    embedding = None
    if place.parameters.keys() != state.parameters.keys():
        own = [torch.arange(places[name].start, places[name].stop) for name in state.parameters]
        embedding = Embedding(size, torch.cat(own))
    undone, done = (Mixing(size, _mixing(point, place, inverse)) for inverse in (True, False))
    maps: list[LinearMap] = [embedding] if embedding else []
    if undone.terms and not (embedding is None and _commute(undone, diagonal)):
        maps = [Diagonal((-log).exp()), undone, *maps, Diagonal(diagonal)]
    else:  # one multiplication does for both
        within = log if embedding is None else embedding.pull(log[:, None])[:, 0]
        maps = [*maps, Diagonal((-within).exp() * diagonal), *([undone] if undone.terms else [])]
    if shears:
        maps.insert(0, Shear(size, shears))

    def length(velocity: Tensor) -> float:
        vector = velocity[:, None]
        if shears:
            vector = Shear(size, tuple(replace(term, weights=-term.weights) for term in shears)).push(vector)
        vector = done.push(Diagonal(log.exp()).push(vector))
        if embedding is not None:
            vector = embedding.pull(vector)
        unit = diagonal.to(vector.device)
        return norm(torch.where(unit > 0, vector[:, 0] / unit, 0.0))

    return maps[0] if len(maps) == 1 else Composition(tuple(maps)), length


def _commute(mixing: Mixing, units: Tensor) -> bool:
    """Test whether what is mixed has one unit, so that the order of mixing and measuring does not matter."""
    return all(
        bool((seen == seen[:, :1]).all()) for _, parts in mixing.terms for seen in (slices(units[:, None], parts),)
    )


def _mixing(point: Representative, place: State, inverse: bool) -> tuple[tuple[Tensor, tuple[TensorSlices, ...]], ...]:
    """The changes of basis on the tensors that the frame reaches, or their inverses."""
    places = place.space.slices
    terms = []
    for change in point.changes:
        forward, back = (change.inverse, change.matrix) if inverse else (change.matrix, change.inverse)
        for side in change.family.sides:
            if all(piece.name in places for piece in side.pieces):
                parts = tuple(
                    TensorSlices(
                        places[p.name], tuple(place.tensors[p.name].shape), p.axis, p.places, p.slots, p.window
                    )
                    for p in side.pieces
                )
                terms.append((back.mT if side.dual else forward, parts))
    return tuple(terms)


def _identity(found: Found, state: State, place: State, length: Callable[[Tensor], float]) -> GeneratorIdentity | None:
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
    moving = {entry.name: entry for entry in group.tensors}
    velocity, rates = (torch.zeros(place.space.size, dtype=torch.float64, device=place.device) for _ in range(2))
    for name, where in place.space.slices.items():
        if name in moving:
            rates[where] = moving[name].log(z).expand(moving[name].view).reshape(-1).to(place.device)
            velocity[where] = rates[where] * place.parameters[name].detach().reshape(-1)
    return GeneratorIdentity(velocity.to(place.dtype), length(velocity), rates.to(place.dtype))


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
