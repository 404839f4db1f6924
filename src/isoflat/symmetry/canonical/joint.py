"""Bases and scales balanced together: the least norm of all tensors over both.

Along `exp(t π)`, π symmetric, the squared norm of a tensor T has the derivatives `2⟨T, πT⟩` and `4‖πT‖²`: gradient and
Hessian of the potential need nothing but how fast tensors move. Newton's method is started anew at every point.

Derivation: docs/concepts/bases.md, "The point of least norm".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import final

import numpy as np
import scipy
import torch
from torch import Tensor

from isoflat.core.errors import NoInvariantGeometry
from isoflat.core.state import State
from isoflat.symmetry.canonical.balance import Change, balanced, cut
from isoflat.symmetry.canonical.potential import Vector, close, distinct_factors, masses, minimise
from isoflat.symmetry.finding.bases.families import scales
from isoflat.symmetry.finding.constraints import Constraints
from isoflat.symmetry.finding.solve import effective, scaling
from isoflat.symmetry.groups.basis import Family, mixed, stacked
from isoflat.symmetry.groups.units import Exponents, UnitScaling
from isoflat.symmetry.relations import Form, some

STEPS = 200
"""Newton steps after which bases and scales count as not coming to rest."""


@final
@dataclass(frozen=True)
class BalancedPoint:
    """The point of least norm, and the way there: one change of basis after scalings that commute with it.

    Attributes:
        state: the point.
        scales: elements of the scalings, with the tensors they act on.
        changes: changes of basis.
    """

    state: State
    scales: tuple[tuple[Vector, tuple[Exponents, ...]], ...]
    changes: tuple[Change, ...]


def balance(constraints: Constraints, families: Sequence[Family], state: State, still: Sequence[Form]) -> BalancedPoint:
    """Balance bases by their singular values, then scales, then both together until nothing moves any more.

    The scales that are balanced again are those that every coordinate of a block shares, so that they commute with its
    changes. In a transformer one round is enough; linear maps in a row take Newton's method.

    Args:
        constraints: relations among scales.
        families: pairs.
        state: point of least norm among all scalings, its orbit closed.
        still: forms in scales that must vanish.

    Raises:
        NoInvariantGeometry: it does not come to rest.
    """
    if not families:
        return BalancedPoint(state, (), ())
    group = scaling(
        constraints, effective(constraints, constraints.scales.solve((*still, *_ties(constraints, families, state))))
    )
    factors, _ = distinct_factors(group.norms, group.size)
    _, kept = close(masses(group, state), factors, group.size)
    fed = some(factors, np.flatnonzero(kept))
    linear = -2.0 * np.asarray(fed.sum(axis=0)).reshape(-1)
    changes = [balanced(family, state) for family in families]
    for change in changes:
        state = change.act(state)
    # What rounding has left in coordinates beyond a pair's rank is seen for what it is now that sizes are even.
    state = cut(families, state)
    z = minimise([mass for mass in masses(group, state) if bool(mass.squares.any())], fed, group.size)
    state = group.act(state, torch.from_numpy(z))
    best = math.inf
    for _ in range(STEPS):
        point = _JointPotential(group, families, linear, state)
        error = point.error()
        if error <= 1e-13 or (error <= 1e-11 and error > 0.5 * best):
            return BalancedPoint(state, ((z, group.tensors),), tuple(changes))
        best = min(best, error)
        # No closer than rounding: beyond it, conjugate gradients would follow directions that nothing feels.
        step = point.step(min(0.1, max(math.sqrt(error), 16 * torch.finfo(torch.float64).eps / error)))
        z = z + step.scales
        state = group.act(state, torch.from_numpy(step.scales))
        for place, (family, velocity) in enumerate(zip(families, step.bases, strict=True)):
            change = Change(family, torch.matrix_exp(velocity), torch.matrix_exp(-velocity))
            state = change.act(state)
            changes[place] = change.after(changes[place])
    raise NoInvariantGeometry(
        f"bases and scales were not balanced in {STEPS} Newton steps (error {best:.1e}). geometry='layerwise' works; "
        "please report the network"
    )


@final
@dataclass(frozen=True)
class _Vector:
    """A direction: rates of the scales, and a symmetric velocity for each block."""

    scales: Vector
    bases: tuple[Tensor, ...]

    def dot(self, other: _Vector) -> float:
        """Inner product."""
        return float(self.scales @ other.scales) + sum(
            float((a * b).sum()) for a, b in zip(self.bases, other.bases, strict=True)
        )

    def plus(self, factor: float, other: _Vector) -> _Vector:
        """`self + factor · other`."""
        parts = tuple(a + factor * b for a, b in zip(self.bases, other.bases, strict=True))
        return _Vector(self.scales + factor * other.scales, parts)

    def traceless(self) -> _Vector:
        """Without what the coordinates of a block have in common, which is among the scales already."""
        parts = []
        for part in self.bases:
            common = part.diagonal(dim1=1, dim2=2).mean(1)
            parts.append(part - common[:, None, None] * torch.eye(part.shape[1], dtype=part.dtype))
        return _Vector(self.scales, tuple(parts))

    def over(self, other: _Vector) -> _Vector:
        """Entry by entry; what is divided by zero stays."""
        scales = self.scales / np.where(other.scales > 0, other.scales, 1.0)
        parts = tuple(a / torch.where(b > 0, b, 1.0) for a, b in zip(self.bases, other.bases, strict=True))
        return _Vector(scales, parts)


@final
class _JointPotential:
    """The potential's derivatives at a point."""

    def __init__(self, group: UnitScaling, families: Sequence[Family], linear: Vector, state: State) -> None:
        self.group, self.families, self.linear = group, families, linear
        names = {entry.name for entry in group.tensors} | {name for family in families for name in family.names}
        self.state = state
        self.tensors: Mapping[str, Tensor] = {name: state.tensors[name] for name in sorted(names)}
        own = self._against(self.tensors)
        self.gradient = _Vector(2 * own.scales + linear, tuple(2 * part for part in own.bases)).traceless()
        squares = self._squares()
        # A coordinate that nothing reaches is balanced as well as the block's largest: by rounding of that.
        largest = tuple(2 * part.amax((1, 2), keepdim=True).expand(part.shape) for part in squares[1])
        self.size = _Vector(2 * squares[0] + np.abs(linear), largest)
        self.curvature = _Vector(4 * squares[2], tuple(4 * part for part in squares[1]))

    def error(self) -> float:
        """Largest entry of the gradient, relative to the terms that cancel in it."""
        ratio = _Vector(np.abs(self.gradient.scales), tuple(part.abs() for part in self.gradient.bases)).over(self.size)
        worst = float(np.max(ratio.scales, initial=0.0))
        return max([worst, *(float(part.max()) for part in ratio.bases)])

    def step(self, tolerance: float) -> _Vector:
        """Newton's step by preconditioned conjugate gradients, damped as in `potential.minimise`."""
        zero = _Vector(np.zeros_like(self.linear), tuple(torch.zeros_like(part) for part in self.gradient.bases))
        residual, direction = zero.plus(-1.0, self.gradient), zero
        search = residual.over(self.curvature).traceless()
        power = residual.dot(search)
        goal = tolerance**2 * power
        for _ in range(2000):
            if power <= goal or power == 0:
                break
            image = self._product(search)
            curvature = search.dot(image)
            if curvature <= 0:
                break
            direction = direction.plus(power / curvature, search)
            residual = residual.plus(-power / curvature, image)
            conditioned = residual.over(self.curvature).traceless()
            power, old = residual.dot(conditioned), power
            search = conditioned.plus(power / old, search)
        reach = 2 * self._reach(direction)
        return zero.plus(math.log1p(reach) / reach if reach else 1.0, direction)

    def _product(self, direction: _Vector) -> _Vector:
        """Hessian times a direction."""
        image = self._against(self._moving(direction))
        return _Vector(4 * image.scales, tuple(4 * part for part in image.bases)).traceless()

    def _moving(self, direction: _Vector) -> dict[str, Tensor]:
        """Velocities of the tensors along a direction."""
        moving = self.group.velocity(self.state, torch.from_numpy(direction.scales))
        for family, velocity in zip(self.families, direction.bases, strict=True):
            for side in family.sides:
                for name, change in mixed(side, -velocity if side.dual else velocity, self.tensors).items():
                    moving[name] = moving[name] + change if name in moving else change
        return moving

    def _against(self, moving: Mapping[str, Tensor]) -> _Vector:
        """`⟨moving, πT⟩` for every direction π."""
        scales = np.zeros(self.group.size)
        for entry in self.group.tensors:
            if entry.name in moving:
                product = (self.tensors[entry.name] * moving[entry.name]).reshape(entry.view).sum(3).cpu()
                for matrix, part in _sums(entry, product):
                    scales += matrix.T @ part
        return _Vector(scales, tuple(self._mixing(family, moving) for family in self.families))

    def _mixing(self, family: Family, moving: Mapping[str, Tensor]) -> Tensor:
        total = torch.zeros(family.count, family.size, family.size, dtype=torch.float64)
        for side in family.sides:
            speed = {
                piece.name: moving.get(piece.name, torch.zeros_like(self.tensors[piece.name])) for piece in side.pieces
            }
            product = stacked(side, speed).cpu() @ stacked(side, self.tensors).cpu().mT
            total += (-product if side.dual else product) + (-product if side.dual else product).mT
        return total / 2

    def _squares(self) -> tuple[Vector, list[Tensor], Vector]:
        """Sums of squares that each scale, pair of coordinates, and squared rate of a scale moves."""
        scales, squared = np.zeros(self.group.size), np.zeros(self.group.size)
        for entry in self.group.tensors:
            product = self.tensors[entry.name].square().reshape(entry.view).sum(3).cpu()
            for matrix, part in _sums(entry, product):
                scales += abs(matrix).T @ part
                squared += matrix.power(2).T @ part
        pairs = []
        for family in self.families:
            norms = sum(stacked(side, self.tensors).cpu().square().sum(2) for side in family.sides)
            whole = torch.as_tensor(norms).expand(family.count, family.size)
            # Where a pair is short of rank, what rounding has left of a coordinate must not be balanced.
            whole = whole.clamp(min=torch.finfo(torch.float64).eps * whole.amax(1, keepdim=True))
            pairs.append((whole[:, :, None] + whole[:, None, :]) / 2)
        return scales, pairs, squared

    def _reach(self, direction: _Vector) -> float:
        """Largest rate of a logarithm along a direction, at most."""
        z = torch.from_numpy(direction.scales)
        rates = [sum(float(part.abs().max()) for part in entry.terms(z)) for entry in self.group.tensors]
        turns = [float(torch.linalg.matrix_norm(part, 2).max()) for part in direction.bases]
        return max(rates, default=0.0) + 2 * max(turns, default=0.0)


def _sums(entry: Exponents, product: Tensor) -> Iterator[tuple[scipy.sparse.csr_matrix, Vector]]:
    """Rows and columns of a tensor, with the sums over what belongs to each."""
    for matrix, axis in ((entry.first, 2), (entry.second * entry.sign, 1)):
        part = product.sum(axis).reshape(-1) if matrix.shape[0] > 1 else product.sum().view(1)
        yield matrix, part.numpy()


def _ties(constraints: Constraints, families: Sequence[Family], state: State) -> Iterator[Form]:
    """The scales of all coordinates of a block are one."""
    shapes = {name: tensor.shape for name, tensor in state.tensors.items()}
    for family in families:
        for ids in scales(constraints.fields, family, shapes):
            yield from ({a: Fraction(1), ids[0]: Fraction(-1)} for a in ids[1:] if a != ids[0])
