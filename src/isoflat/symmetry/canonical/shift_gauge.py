"""Constants in their places: the shifts of a canonical representative, by least norm and in levels.

Derivation: docs/concepts/canonical.md, "Shifts".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, final

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from torch import Tensor

from isoflat.core.errors import NoInvariantGeometry
from isoflat.core.state import State
from isoflat.symmetry.canonical.potential import Vector
from isoflat.symmetry.finding.solve import translation
from isoflat.symmetry.found import Found
from isoflat.symmetry.groups.translation import Translation, deviation, entering, gathered, passed
from isoflat.symmetry.motions import Absorbed, Additive
from isoflat.symmetry.relations import Form

Reader = Callable[[State], tuple[Vector, Vector]]
"""Values and weights of the entries whose norm a level makes least."""

Level = tuple[Translation, "scipy.sparse.csr_matrix", Reader]
"""A group of shifts, the tensors whose norm it makes least as functions of its element, and what these hold."""

SWEEPS = 40
"""Sweeps after which constants are solved for."""

ATTEMPTS = 5
"""Attempts to solve for constants that feed back."""


@final
@dataclass(frozen=True)
class AbsorbedShift:
    """Constants that an additive tensor took up from a factor: `Σ_{j,k} factor[g, i, j, k] · shift[g, j]`."""

    offset: str
    absorbed: Absorbed
    shift: Tensor


def fix_shift_gauge(found: Found, state: State) -> tuple[State, tuple[AbsorbedShift, ...]]:
    """Empty running means, then offsets of normalisations, then share out what is left by least norm.

    Constants flow downstream through the weights, so that one sweep can fill what it emptied before; on a network
    without cycles sweeps come to rest after as many of them as there are layers. Where constants feed back (through the
    residual of a post-norm layer, say), what the sweeps would converge to is solved for.
    """
    levels = _levels(found)
    flow = _Flow(found)
    start, before, moved = state, math.inf, 0.0
    sizes = _Sizes(state, found.translation)
    for attempt in range(ATTEMPTS):
        for _ in range(min(len(found.constraints.additives) + 2, SWEEPS) if attempt == 0 else 3):
            moved = 0.0
            for group, rows, read in levels:
                values, weights = read(state)
                element = torch.from_numpy(_least(rows, values, weights))
                state, change = sizes.settled(group.act(state, element), state)
                moved = max(moved, change)
                flow.add(group, element)
            if moved <= 1e-15:
                return state, flow.shears(state)
        if attempt and moved <= 1e-9 and moved > 0.1 * before:  # what is left is rounding of constants that cancel
            return state, flow.shears(state)
        before = moved
        if attempt == 0:  # the sweeps may have led far away
            state, flow = start, _Flow(found)
        for (group, _, _), element in zip(levels, _at_rest(levels, state), strict=True):
            state = group.act(state, element)
            flow.add(group, element)
    raise NoInvariantGeometry(
        "the constants of this network feed back into each other in a way that no least norm of them was found; "
        "geometry='layerwise' works; please report the network"
    )


def _at_rest(levels: Sequence[Level], state: State) -> list[Tensor]:
    """The element of each level's group that a sweep would leave alone.

    What a sweep adds is affine in what has been added before: `r(x) = r(0) + R x`. Each coordinate counts in its own unit.
    """
    from scipy.sparse.linalg import LinearOperator, gmres

    units = [group.units(state).numpy() for group, _, _ in levels]
    cuts = np.cumsum([len(unit) for unit in units])[:-1]

    def added(x: Vector) -> Vector:
        here = state
        for (group, _, _), unit, part in zip(levels, units, np.split(x, cuts), strict=True):
            here = group.act(here, torch.from_numpy(part * unit))
        further = []
        for (group, rows, read), unit in zip(levels, units, strict=True):
            element = _least(rows, *read(here))
            here = group.act(here, torch.from_numpy(element))
            further.append(element / unit)
        return np.concatenate(further)

    size = sum(map(len, units))
    first = added(np.zeros(size))
    if not first.any():
        return [torch.zeros(len(unit), dtype=torch.float64) for unit in units]
    operator: Any = LinearOperator((size, size), lambda x: first - added(x.reshape(-1)))  # pyrefly: ignore
    x, _ = gmres(operator, first, rtol=1e-14, atol=0.0, restart=min(size, 150), maxiter=4)
    return [torch.from_numpy(part * unit) for unit, part in zip(units, np.split(x, cuts), strict=True)]


class _Flow:
    """Constants that have gone into weights and out of running means, over all sweeps."""

    def __init__(self, found: Found) -> None:
        self.group = found.translation
        takers = [(o.entry.name, o.entry.absorbed) for o in self.group.offsets]
        takers += [(c.running.mean, c.running.absorbed) for c in self.group.centres]
        self.entered = {
            name: torch.zeros(absorbed.shift.shape, dtype=torch.float64)
            for name, absorbed in takers
            if absorbed is not None
        }
        self.taken = {
            c.running.mean: torch.zeros(len(c.running.moved), dtype=torch.float64) for c in self.group.centres
        }

    def add(self, group: Translation, element: Tensor) -> None:
        """Count an element of a group."""
        for offset in group.offsets:
            if offset.entering is not None:
                self.entered[offset.entry.name] += entering(offset, element)
        for centre in group.centres:
            self.taken[centre.running.mean] += torch.from_numpy(centre.moved @ element.numpy())
            if centre.absorbed is not None:
                self.entered[centre.running.mean] += passed(centre, element)

    def shears(self, state: State) -> tuple[AbsorbedShift, ...]:
        """Constants that biases, offsets and means have taken up, as linear maps of weights and gains."""
        shears = [
            AbsorbedShift(offset.entry.name, offset.entry.absorbed, self.entered[offset.entry.name])
            for offset in self.group.offsets
            if offset.entry.absorbed is not None and bool(self.entered[offset.entry.name].any())
        ]
        for running in (centre.running for centre in self.group.centres):
            amount = self.taken[running.mean]
            if running.absorbed is not None and bool(self.entered[running.mean].any()):
                # μ* = μ + W t: a mean takes up with the other sign than a bias.
                shears.append(AbsorbedShift(running.mean, running.absorbed, -self.entered[running.mean]))
            if running.gain is not None and running.offset is not None and bool(amount.any()):
                ratio = amount / deviation(running, state).cpu()
                # β* = β − γ m/σ: a shear of γ into β, one unit at a time.
                unit = Absorbed(running.gain, (len(ratio), 1, 1, 1), running.moved[:, None])
                shears.append(AbsorbedShift(running.offset, unit, ratio[:, None]))
        return tuple(shears)


class _Sizes:
    """The largest size that each entry has had: what it is rounded to, and what counts as nothing."""

    def __init__(self, state: State, group: Translation) -> None:
        self.names = sorted(group.touches)
        self.largest = {name: state.tensors[name].abs() for name in self.names}

    def settled(self, after: State, before: State) -> tuple[State, float]:
        """The state with zeros where entries have cancelled, and by how much any moved, relative to its tensor's size.

        What rounding leaves of a constant is no constant: a last digit must not keep an orbit open.
        """
        changed, moved = {}, 0.0
        for name in self.names:
            new, old = after.tensors[name], before.tensors[name]
            if new is old:
                continue
            self.largest[name] = torch.maximum(self.largest[name], new.abs())
            size = self.largest[name]
            changed[name] = new.masked_fill(new.abs() <= 8 * torch.finfo(torch.float64).eps * size, 0.0)
            most = float(size.max())
            moved = max(moved, float((changed[name] - old).abs().max()) / most if most else 0.0)
        return after.replace(changed), moved


def _levels(found: Found) -> list[Level]:
    """Groups of shifts in their order, each with the tensors whose norm it makes least, as functions of its element."""
    constraints = found.constraints
    means = [c.running for c in found.translation.centres]
    entries = [o.entry for o in found.translation.offsets]
    norms, others = ([e for e in entries if e.norm is kind] for kind in (True, False))
    forms: list[Form] = []
    levels: list[Level] = []

    def level(
        names: Sequence[str], ids: Sequence[Tensor], minus: Sequence[Tensor], read: Reader, still: Sequence[Form] = ()
    ) -> None:
        group = translation(constraints, (*forms, *still))
        rows = [_rows(group, name) for name in names]
        if rows:
            levels.append((group, scipy.sparse.csr_matrix(scipy.sparse.vstack(rows)), read))
        for own, taken in zip(ids, minus, strict=True):
            for a, b in zip(own.reshape(-1).tolist(), taken.reshape(-1).tolist(), strict=True):
                form: dict[int, Fraction] = {}
                for unknown, sign in ((a, 1), (b, -1)):
                    form[unknown] = form.get(unknown, Fraction(0)) + sign
                forms.append(form)

    def of_means(state: State) -> tuple[Vector, Vector]:
        value = torch.cat([state.tensors[r.mean].reshape(-1) for r in means]).cpu().numpy()
        return value, np.ones(len(value))

    def of(chosen: Sequence[Additive]) -> Reader:
        def read(state: State) -> tuple[Vector, Vector]:
            parts = [gathered(state.tensors[e.name], e) for e in chosen]
            value = torch.cat([v for v, _ in parts]).cpu().numpy()
            return value, np.concatenate([np.full(len(v), float(count)) for v, count in parts])

        return read

    # Means are emptied into offsets alone: what enters a normalisation stays for the biases before it to give up.
    still = [{int(u): Fraction(1)} for e in entries for u in e.shift]
    # A mean that nothing can be moved out of (its offset serves another as well) follows the biases before it.
    free = [torch.from_numpy(np.diff(c.moved.indptr) > 0) for c in found.translation.centres]
    entering_ = [r.entering[mask] for r, mask in zip(means, free, strict=True)]
    level(
        [r.mean for r in means],
        entering_,
        [r.moved[mask] for r, mask in zip(means, free, strict=True)],
        of_means,
        still,
    )
    for chosen in (norms, others):
        zero = [torch.zeros_like(e.shift) for e in chosen]
        level([e.name for e in chosen], [e.shift for e in chosen], zero, of(chosen))
    return levels


def _rows(group: Translation, name: str) -> scipy.sparse.csr_matrix:
    """Matrix by which a tensor's own units move with the element of a group."""
    for centre in group.centres:
        if centre.running.mean == name:
            return centre.entering - centre.moved
    return next(offset.own for offset in group.offsets if offset.entry.name == name)


def _least(rows: scipy.sparse.csr_matrix, values: Vector, weights: Vector) -> Vector:
    """The element that makes `Σ weights (values + rows·τ)²` least, and of those the smallest.

    Units that share no coordinate are solved for apart, each in its own scale: a tiny stream counts like any other.
    """
    from scipy.sparse.csgraph import connected_components

    count, size = rows.shape
    element = np.zeros(size)
    if rows.nnz == 0:
        return element
    _, labels = connected_components(scipy.sparse.bmat([[None, rows], [rows.T, None]]), directed=False)
    single = (np.diff(rows.indptr) == 1) & (np.diff(scipy.sparse.csc_matrix(rows).indptr)[_first(rows)] == 1)
    element[rows.indices[rows.indptr[:-1][single]]] = -values[single] / rows.data[rows.indptr[:-1][single]]
    order = np.argsort(labels[:count], kind="stable")
    starts = np.flatnonzero(np.diff(labels[:count][order], prepend=-1))
    for part in np.split(order, starts[1:]):
        if len(part) == 0 or single[part].all():
            continue
        block = scipy.sparse.csr_matrix(rows[part])
        columns = np.unique(block.indices)
        scale = np.abs(values[part]).max()
        if len(columns) and scale:
            root = np.sqrt(weights[part])
            dense = root[:, None] * block[:, columns].toarray()  # pyrefly: ignore
            element[columns] = np.linalg.lstsq(dense, -root * (values[part] / scale), rcond=None)[0] * scale
    return element


def _first(rows: scipy.sparse.csr_matrix) -> NDArray[np.int64]:
    """Column of the first entry of each row; any column where it has none."""
    return rows.indices[np.minimum(rows.indptr[:-1], rows.nnz - 1)]
