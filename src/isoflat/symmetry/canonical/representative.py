"""The canonical representative of an orbit: the point that every function-preserving edit leads back to.

In this order: common vectors and shifts by least norm; batch normalisations folded; gains read only by linear maps folded
into them; then the one point of least norm among all scalings (`potential`), after closing orbits that are not closed.
`docs/concepts/canonical.md` has definition and proofs.

Derivation: docs/concepts/canonical.md, "Definition, in the order of the code".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction
from typing import final

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from isoflat.core.errors import UsageError
from isoflat.core.rng import stream
from isoflat.core.state import State
from isoflat.modules.caches import Cache, emptied
from isoflat.modules.private import twin
from isoflat.symmetry.canonical.balance import Change, cut, principal
from isoflat.symmetry.canonical.gain_folding import fold_gains
from isoflat.symmetry.canonical.joint import balance
from isoflat.symmetry.canonical.potential import Mass, Vector, close, dead, distinct_factors, masses, minimise, touched
from isoflat.symmetry.canonical.shift_gauge import AbsorbedShift, fix_shift_gauge
from isoflat.symmetry.finding.caches import caches_of
from isoflat.symmetry.finding.gains import bent
from isoflat.symmetry.finding.solve import effective, scaling
from isoflat.symmetry.found import Found
from isoflat.symmetry.groups.basis import Family
from isoflat.symmetry.groups.units import Exponents, UnitScaling
from isoflat.symmetry.relations import Form, some

Logs = tuple[Tensor, Tensor, tuple[int, ...]]
"""Log-factors of a tensor's two kinds of units, and the view they broadcast to."""


@final
@dataclass(frozen=True)
class Representative:
    """The canonical point and the way there: `θ* = g·θ₀` with g affine in θ₀.

    Attributes:
        start: θ₀: the weights as given, with zeros where the closed orbit has them; the same function.
        state: θ*, float64; buffers and the epsilons that modules hold moved along.
        logs: log-factors of each tensor that is scaled, by name: two that add up, and the view they broadcast to.
        shears: constants that biases and offsets took up from weights and gains.
        changes: changes of basis, after the scaling.
        folded: entries of gains that went into their readers, by name.
        removed: coordinates that only reach through a kink, by name.
        zeroed: number of entries of each tensor the closure changed; to zero, but for pairs that are cut to their rank.
        starved: normalisations that nothing feeds.
        loose: tensors whose coordinates mean nothing by themselves: rotations of a stream or of rotary pairs mix them,
            or singular values that tie; in the nearest gauge, those of all pairs.
    """

    start: State
    state: State
    logs: Mapping[str, Logs]
    shears: tuple[AbsorbedShift, ...]
    changes: tuple[Change, ...]
    folded: Mapping[str, Tensor]
    removed: Mapping[str, Tensor]
    zeroed: Mapping[str, int]
    starved: tuple[str, ...]
    loose: tuple[str, ...]

    def log(self, name: str, shape: torch.Size) -> Tensor:
        """Log-factor of every entry of a tensor."""
        if name not in self.logs:
            return torch.zeros(shape, dtype=torch.float64)
        first, second, view = self.logs[name]
        return (first + second).expand(view).reshape(shape)


class Epsilon(StrEnum):
    """Treatment of the epsilons of normalisations whose input is scaled."""

    FREE = "free"
    """Epsilons count as moved with every factor, also where one of them serves several: what the number is invariant to."""
    MOVED = "moved"
    """Epsilons move, each with the one factor that is its own; where several share one, they move together: exact."""
    FIXED = "fixed"
    """Epsilons stay, and so does every factor: exact, and the weights alone tell it."""


class Gauge(StrEnum):
    """Choice among the points of least norm: they differ by rotations of each pair of linear maps."""

    NEAREST = "nearest"
    """Point reached by symmetric changes of basis: a balanced network stays as it is."""
    PRINCIPAL = "principal"
    """Gram matrices diagonal, descending: single entries mean something, unless singular values tie."""


def canonical(
    found: Found, state: State, epsilon: Epsilon = Epsilon.FREE, gauge: Gauge = Gauge.NEAREST
) -> Representative:
    """The canonical representative of a state's orbit.

    Args:
        found: the network's symmetries.
        state: the point, with the epsilons that modules hold (`Found.state`).
        epsilon: treatment of the epsilons of normalisations.
        gauge: which of the points of least norm.

    Raises:
        NoInvariantGeometry: there is none that could be computed.
    """
    forms: dict[Epsilon, tuple[Form, ...]] = {Epsilon.FREE: (), Epsilon.MOVED: found.exact, Epsilon.FIXED: found.fixed}
    point = _scale(found, state, forms[epsilon])
    return _principal(found, point) if gauge is Gauge.PRINCIPAL else point


def canonicalize(
    model: nn.Module, found: Found, *, epsilon: Epsilon | str = Epsilon.MOVED, gauge: Gauge | str = Gauge.NEAREST
) -> nn.Module:
    """A copy of the network at the canonical representative of its weights: the same function.

    Args:
        model: the network that `found` was found on, or one of the same architecture; it is not changed.
        found: symmetries from `isoflat.symmetries`.
        epsilon: "moved" changes the epsilons that modules hold along with the weights; where one serves several groups
            of channels (GroupNorm), they are scaled together. "fixed" leaves them, so that the weights can be saved
            and loaded into the same network. "free" is the point that is measured, no exact copy of the function
            where an epsilon is shared.
        gauge: "nearest" leaves balanced bases as they are; "principal" turns each pair of linear maps to its singular
            vectors, so that single entries can be compared.

    >>> from isoflat.symmetry.finding.discover import symmetries
    >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> _ = net[0].weight.data.fill_(8.0), net[2].weight.data.fill_(2.0)
    >>> balanced = canonicalize(net, symmetries(net, torch.ones(2, 1)))
    >>> [round(p.item(), 5) for p in balanced.parameters()]
    [4.0, 4.0]
    """
    caches = caches_of(model, found.args, found.kwargs)
    return install(model, canonical(found, found.state(model), Epsilon(epsilon), Gauge(gauge)).state, caches)


def reparametrize(model: nn.Module, found: Found, *, seed: int = 0, spread: float = 3.0) -> nn.Module:
    """A copy with other weights and the same function: a random element of every exact group is applied.

    Args:
        model: the network that `found` was found on, or one of the same architecture; it is not changed.
        found: symmetries from `isoflat.symmetries`.
        seed: seed of the element.
        spread: standard deviation of the logarithms of the factors.
    """
    state = found.state(model).to(dtype=torch.float64)
    element = found.element(stream(seed, "reparametrize"), spread, state)
    return install(model, found.act(state, element), caches_of(model, found.args, found.kwargs))


def install(model: nn.Module, state: State, caches: Sequence[Cache] = ()) -> nn.Module:
    """A copy of the network that holds a state's tensors and constants.

    Args:
        model: the network.
        state: tensors and constants.
        caches: what it has made of its own tensors before, which the copy makes anew.

    Raises:
        UsageError: the state is not this network's.
    """
    made = twin(model)
    own = dict((*made.named_parameters(), *made.named_buffers()))
    if unknown := set(state.tensors) - set(own):
        raise UsageError(f"these symmetries are another network's: it has no tensor {', '.join(sorted(unknown)[:4])}")
    with torch.no_grad():
        for name, tensor in state.tensors.items():
            own[name].copy_(tensor)
    for path, value in state.constants.items():
        place, _, name = path.rpartition(".")
        setattr(made.get_submodule(place), name, value)
    emptied(made, caches)
    return made


def _scale(found: Found, given: State, exact: tuple[Form, ...]) -> Representative:
    """Representative before a gauge is chosen."""
    orbit = _least(found, given.to(dtype=torch.float64), exact)
    least = balance(found.constraints, _pairs(found), orbit.state, orbit.still)
    logs = orbit.logs
    for element, tensors in least.scales:
        logs = _add(logs, tensors, element)
    return Representative(
        start=_changed(given, orbit.lost, orbit.shears),
        state=least.state,
        logs=logs,
        shears=orbit.shears,
        changes=least.changes,
        folded=orbit.folded,
        removed=orbit.removed,
        zeroed={name: int((delta != 0).sum()) for name, delta in orbit.lost.items()},
        starved=orbit.starved,
        loose=tuple(sorted({name for family in found.basis.families for name in family.names})),
    )


@final
@dataclass(frozen=True)
class _ClosedOrbit:
    """A closed orbit, and the point on it that has least norm among all scalings; as in `Representative`.

    Attributes:
        lost: change that the closure made: what it took from each tensor, in the scale of the weights as given.
        still: forms in scales that vanish from here on.
    """

    state: State
    logs: Mapping[str, Logs]
    shears: tuple[AbsorbedShift, ...]
    folded: Mapping[str, Tensor]
    removed: Mapping[str, Tensor]
    starved: tuple[str, ...]
    lost: Mapping[str, Tensor]
    still: tuple[Form, ...]


def _least(found: Found, state: State, exact: tuple[Form, ...]) -> _ClosedOrbit:
    """Put constants in their places, fold, close, and balance scales. States on the way are given back as it goes."""
    from scipy.sparse.linalg import lsmr

    constraints = found.constraints
    common = found.common
    moved, shears = fix_shift_gauge(found, common.act(state, common.slice(state) * common.mask(found.kept(state))))
    del state  # of a large network, every state that is no longer needed counts
    before = effective(constraints, constraints.scales.solve(exact)) if exact else found.solution
    first = scaling(constraints, before) if exact else found.free
    fixed, targets, folded = fold_gains(constraints, before, first, moved)
    rows = before.rows(torch.tensor(fixed, dtype=torch.int64))
    particular = (
        lsmr(rows, np.array(targets), atol=1e-16, btol=1e-16, conlim=0)[0] if fixed else np.zeros(before.dimension)
    )
    folded_state = first.act(moved, torch.from_numpy(particular))
    logs = _add({}, first.tensors, particular)
    still = (*exact, *({x: Fraction(1)} for x in fixed))
    left = effective(constraints, constraints.scales.solve(still)) if fixed else before
    group = scaling(constraints, left)
    factors, owners = distinct_factors(group.norms, group.size)
    state, closed, kept = _closed(group, factors, _pairs(found), folded_state)
    lost = _difference(folded_state, state, moved, logs)
    del moved, folded_state
    z = minimise([m for m in closed if bool(m.squares.any())], some(factors, np.flatnonzero(kept)), group.size)
    unfed = dead(closed, group.size) & bent(constraints.bent, left)
    removed = {}
    for entry, mass in zip(group.tensors, closed, strict=True):
        feeding = touched(mass, unfed, growing=True)
        if bool(feeding.any()):
            removed[entry.name] = feeding[..., None].expand(entry.view).reshape(state.tensors[entry.name].shape)
    return _ClosedOrbit(
        state=group.act(state, torch.from_numpy(z)),
        logs=_add(logs, group.tensors, z),
        shears=shears,
        folded=folded,
        removed=removed,
        starved=tuple(where for where, stays in zip(owners, kept, strict=True) if not stays),
        lost=lost,
        still=still,
    )


def _pairs(found: Found) -> tuple[Family, ...]:
    """Pairs of linear maps: changes of basis that are no rotations, and have something to balance."""
    return tuple(family for family in found.basis.families if not family.orthogonal)


def _closed(
    group: UnitScaling, factors: scipy.sparse.csr_matrix, pairs: Sequence[Family], state: State
) -> tuple[State, list[Mass], NDArray[np.bool_]]:
    """The closed orbit in the closure of a point's orbit: what a scaling or a change of basis sends to zero is zero.

    Returns:
        A point on it, its masses, and which factors are fed.
    """
    while True:
        seen = masses(group, state)
        closed, kept = close(seen, factors, group.size)
        emptied = _emptied(group, seen, closed, state)
        state = cut(pairs, emptied)
        if state is emptied:
            return state, closed, kept


def _principal(found: Found, point: Representative) -> Representative:
    """The same point with every pair of linear maps turned to its singular vectors."""
    state, changes = point.state, list(point.changes)
    loose: set[str] = set()
    # The signs of one pair may hang on those of another before it: they are set when none of them changes any more.
    for _ in range(len(changes) + 1):
        loose = {name for family in found.basis.families if family.orthogonal for name in family.names}
        still = True
        for place, change in enumerate(changes):
            turn, apart = principal(change.family, state)
            state, changes[place] = turn.act(state), turn.after(change)
            still &= bool((turn.matrix.diagonal(dim1=1, dim2=2) > 0.5).all())
            loose |= set() if all(apart) else set(change.family.names)
        if still:
            break
    return replace(point, state=state, changes=tuple(changes), loose=tuple(sorted(loose)))


def _emptied(group: UnitScaling, seen: Sequence[Mass], closed: Sequence[Mass], state: State) -> State:
    """The state with zeros where the closed orbit has them."""
    tensors = {}
    for entry, old, new in zip(group.tensors, seen, closed, strict=True):
        if new is not old:
            tensor = state.tensors[entry.name]
            mask = (new.squares == 0)[..., None].expand(entry.view).reshape(tensor.shape).to(tensor.device)
            tensors[entry.name] = tensor.masked_fill(mask, 0.0)
    return state.replace(tensors)


def _difference(before: State, after: State, unscaled: State, logs: Mapping[str, Logs]) -> dict[str, Tensor]:
    """Changes that the closure made: what it took from each tensor, in the scale of the weights as given."""
    changes = {}
    for name, tensor in after.tensors.items():
        old = before.tensors[name]
        if tensor is not old and bool((tensor != old).any()):
            first, second, view = logs.get(name, (torch.zeros(()), torch.zeros(()), tensor.shape))
            lost = (tensor - old) * (-first - second).exp().expand(view).reshape(old.shape).to(old.device)
            changes[name] = torch.where(tensor == 0, -unscaled.tensors[name], lost)
    return changes


def _changed(given: State, vanished: Mapping[str, Tensor], shears: Sequence[AbsorbedShift]) -> State:
    """The weights as given, less what vanishes; offsets keep what they took up from factors that change."""
    changes = {name: change.double() for name, change in vanished.items()}
    for shear in shears:
        change = vanished.get(shear.absorbed.factor)
        if change is not None:
            shift = shear.shift.to(change.device)
            taken = torch.einsum("gijk,gj->gi", shear.absorbed.seen(change.double()), shift)
            old = changes.get(shear.offset, torch.zeros((), dtype=torch.float64, device=change.device))
            changes[shear.offset] = old + taken.reshape(given.tensors[shear.offset].shape)
    tensors = given.tensors
    return given.replace({name: (tensors[name].double() + c).to(tensors[name].dtype) for name, c in changes.items()})


def _add(logs: Mapping[str, Logs], tensors: Sequence[Exponents], z: Vector) -> dict[str, Logs]:
    """Log-factors with those of another element added."""
    total = dict(logs)
    for entry in tensors:
        a, b = entry.terms(torch.from_numpy(z))
        if entry.name in total:
            first, second, _ = total[entry.name]
            a, b = a + first, b + second
        total[entry.name] = a, b, entry.view
    return total
