"""The canonical representative of an orbit: the point that every function-preserving edit leads back to.

In this order: common vectors and shifts by least norm; batch normalisations folded; gains read only by linear maps folded
into them; then the one point of least norm among all scalings (`potential`), after closing orbits that are not closed.
`docs/concepts/canonical.md` has definition and proofs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import lsmr
from torch import Tensor, nn

from isoflat.core.errors import NoInvariantGeometry, UsageError
from isoflat.core.state import State
from isoflat.core.streams import stream
from isoflat.symmetry.found import Found, effective, scaling, translation
from isoflat.symmetry.ledger import Additive, Norm
from isoflat.symmetry.potential import Mass, Vector, close, dead, minimise, touched
from isoflat.symmetry.relations import ZERO, Form, Solution, some
from isoflat.symmetry.translation import Absorbed, Translation, deviation, entering, gathered, passed
from isoflat.symmetry.units import Exponents


@final
@dataclass(frozen=True)
class Shear:
    """What an additive tensor took up from a factor: `Σ_{j,k} factor[g, i, j, k] · shift[g, j]`."""

    offset: str
    absorbed: Absorbed
    shift: Tensor


@final
@dataclass(frozen=True)
class Representative:
    """The canonical point and the way there: `θ* = g·θ₀` with g affine in θ₀.

    Attributes:
        start: θ₀: the weights as given, with zeros where the closed orbit has them; the same function.
        state: θ*, float64; buffers and the epsilons that modules hold moved along.
        logs: log-factor of each tensor that is scaled, by name: broadcastable to its view, and the view.
        shears: constants that biases and offsets took up from weights and gains.
        folded: entries of gains that went into their readers, by name.
        removed: coordinates that only reach through a kink, by name.
        zeroed: how many entries of each tensor the closure sent to zero.
        starved: normalisations that nothing feeds.
    """

    start: State
    state: State
    logs: Mapping[str, tuple[Tensor, tuple[int, ...]]]
    shears: tuple[Shear, ...]
    folded: Mapping[str, Tensor]
    removed: Mapping[str, Tensor]
    zeroed: Mapping[str, int]
    starved: tuple[str, ...]

    def log(self, name: str, shape: torch.Size) -> Tensor:
        """Log-factor of every entry of a tensor."""
        if name not in self.logs:
            return torch.zeros(shape, dtype=torch.float64)
        value, view = self.logs[name]
        return value.expand(view).reshape(shape)


class Epsilon(StrEnum):
    """What becomes of the epsilons of normalisations whose input is scaled."""

    FREE = "free"
    """They count as moved with every factor, also where one of them serves several: what the number is invariant to."""
    MOVED = "moved"
    """Each moves with the one factor that is its own; where several share one, they move together: exact."""
    FIXED = "fixed"
    """They stay, and so does every factor: exact, and the weights alone tell it."""


def canonical(found: Found, state: State, epsilon: Epsilon = Epsilon.FREE) -> Representative:
    """The canonical representative of a state's orbit.

    Args:
        found: the network's symmetries.
        state: the point, with the epsilons that modules hold (`Found.state`).
        epsilon: what becomes of the epsilons of normalisations.

    Raises:
        NoInvariantGeometry: there is none that could be computed.
    """
    origin = state.to(dtype=torch.float64)
    centred = found.common.act(origin, found.common.slice(origin))
    shifted, shears = _shift(found, centred)
    forms: dict[Epsilon, tuple[Form, ...]] = {Epsilon.FREE: (), Epsilon.MOVED: found.exact, Epsilon.FIXED: found.fixed}
    return _scale(found, state, shifted, shears, forms[epsilon])


def canonicalize(model: nn.Module, found: Found, *, epsilon: Epsilon | str = Epsilon.MOVED) -> nn.Module:
    """A copy of the network at the canonical representative of its weights: the same function.

    Args:
        model: the network that `found` was found on, or one of the same architecture; it is not changed.
        found: from `isoflat.symmetries`.
        epsilon: "moved" changes the epsilons that modules hold along with the weights; where one serves several groups
            of channels (GroupNorm), they are scaled together. "fixed" leaves them, so that the weights can be saved
            and loaded into the same network. "free" is the point that is measured, no exact copy of the function
            where an epsilon is shared.

    >>> from isoflat.symmetry.discover import symmetries
    >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> _ = net[0].weight.data.fill_(8.0), net[2].weight.data.fill_(2.0)
    >>> balanced = canonicalize(net, symmetries(net, torch.ones(2, 1)))
    >>> [round(p.item(), 5) for p in balanced.parameters()]
    [4.0, 4.0]
    """
    return install(model, canonical(found, found.state(model), Epsilon(epsilon)).state)


def reparametrize(model: nn.Module, found: Found, *, seed: int = 0, spread: float = 3.0) -> nn.Module:
    """A copy with other weights and the same function: a random element of every exact group is applied.

    Args:
        model: the network that `found` was found on, or one of the same architecture; it is not changed.
        found: from `isoflat.symmetries`.
        seed: of the element.
        spread: standard deviation of the logarithms of the factors.
    """
    state = found.state(model).to(dtype=torch.float64)
    element = found.element(stream(seed, "reparametrize"), spread, state)
    return install(model, found.act(state, element))


def install(model: nn.Module, state: State) -> nn.Module:
    """A copy of the network that holds a state's tensors and constants.

    Raises:
        UsageError: the state is not this network's.
    """
    twin = copy.deepcopy(model)
    own = dict((*twin.named_parameters(), *twin.named_buffers()))
    if unknown := set(state.tensors) - set(own):
        raise UsageError(f"these symmetries are another network's: it has no tensor {', '.join(sorted(unknown)[:4])}")
    with torch.no_grad():
        for name, tensor in state.tensors.items():
            own[name].copy_(tensor)
    for path, value in state.constants.items():
        place, _, name = path.rpartition(".")
        setattr(twin.get_submodule(place), name, value)
    return twin


def _shift(found: Found, state: State) -> tuple[State, tuple[Shear, ...]]:
    """Empty running means, then offsets of normalisations, then share out what is left by least norm.

    Constants flow downstream through the weights, so that one sweep can fill what it emptied before; on a network
    without cycles this comes to rest after as many sweeps as layers.
    """
    levels = _levels(found)
    flow = _Flow(found)
    for _ in range(2 * len(found.ledger.additives) + 10):
        moved = 0.0
        for group, rows, read in levels:
            values, weights = read(state)
            element = torch.from_numpy(_least(rows, values, weights))
            after = _emptied(group.act(state, element), state, group)
            moved = max(moved, _change(after, state, group))
            state = after
            flow.add(group, element)
        if moved <= 1e-14:
            return state, flow.shears(state)
    raise NoInvariantGeometry(
        "the constants of this network feed back into each other (a linear residual chain?), so that their least norm "
        "was not found; geometry='layerwise' works"
    )


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

    def shears(self, state: State) -> tuple[Shear, ...]:
        """What biases, offsets and means have taken up, as linear maps of weights and gains."""
        shears = [
            Shear(offset.entry.name, offset.entry.absorbed, self.entered[offset.entry.name])
            for offset in self.group.offsets
            if offset.entry.absorbed is not None and bool(self.entered[offset.entry.name].any())
        ]
        for running in (centre.running for centre in self.group.centres):
            amount = self.taken[running.mean]
            if running.absorbed is not None and bool(self.entered[running.mean].any()):
                # μ* = μ + W t: a mean takes up with the other sign than a bias.
                shears.append(Shear(running.mean, running.absorbed, -self.entered[running.mean]))
            if running.gain is not None and running.offset is not None and bool(amount.any()):
                ratio = amount / deviation(running, state).cpu()
                # β* = β − γ m/σ: a shear of γ into β, one unit at a time.
                unit = Absorbed(running.gain, (len(ratio), 1, 1, 1), running.moved[:, None])
                shears.append(Shear(running.offset, unit, ratio[:, None]))
        return tuple(shears)


def _change(after: State, before: State, group: Translation) -> float:
    """Largest change of an entry, relative to the largest entry of its tensor."""
    worst = 0.0
    for name in group.touches:
        old, new = before.tensors[name], after.tensors[name]
        size = max(float(old.abs().max()), float(new.abs().max()))
        worst = max(worst, float((new - old).abs().max()) / size if size else 0.0)
    return worst


def _emptied(after: State, before: State, group: Translation) -> State:
    """Entries that cancelled are zero, not what rounding left of them: a last digit must not keep an orbit open."""
    eps = 8 * torch.finfo(torch.float64).eps
    return after.replace(
        {
            name: after.tensors[name].masked_fill(after.tensors[name].abs() <= eps * before.tensors[name].abs(), 0.0)
            for name in group.touches
        }
    )


Reader = Callable[[State], tuple[Vector, Vector]]
"""Values and weights of the entries whose norm a level makes least."""


def _levels(found: Found) -> list[tuple[Translation, sparse.csr_matrix, Reader]]:
    """Groups of shifts in their order, each with the tensors whose norm it makes least, as functions of its element."""
    ledger = found.ledger
    means = [c.running for c in found.translation.centres]
    entries = [o.entry for o in found.translation.offsets]
    norms, others = ([e for e in entries if e.norm is kind] for kind in (True, False))
    forms: list[Form] = []
    levels: list[tuple[Translation, sparse.csr_matrix, Reader]] = []

    def level(
        names: Sequence[str], ids: Sequence[Tensor], minus: Sequence[Tensor], read: Reader, still: Sequence[Form] = ()
    ) -> None:
        group = translation(ledger, (*forms, *still))
        rows = [_rows(group, name) for name in names]
        if rows:
            levels.append((group, sparse.csr_matrix(sparse.vstack(rows)), read))
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


def _rows(group: Translation, name: str) -> sparse.csr_matrix:
    """How a tensor's own units move with the element of a group."""
    for centre in group.centres:
        if centre.running.mean == name:
            return centre.entering - centre.moved
    return next(offset.own for offset in group.offsets if offset.entry.name == name)


def _least(rows: sparse.csr_matrix, values: Vector, weights: Vector) -> Vector:
    """The element that makes `Σ weights (values + rows·τ)²` least, and of those the smallest.

    Units that share no coordinate are solved for apart, each in its own scale: a tiny stream counts like any other.
    """
    count, size = rows.shape
    element = np.zeros(size)
    if rows.nnz == 0:
        return element
    _, labels = connected_components(sparse.bmat([[None, rows], [rows.T, None]]), directed=False)
    single = (np.diff(rows.indptr) == 1) & (np.diff(sparse.csc_matrix(rows).indptr)[_first(rows)] == 1)
    element[rows.indices[rows.indptr[:-1][single]]] = -values[single] / rows.data[rows.indptr[:-1][single]]
    order = np.argsort(labels[:count], kind="stable")
    starts = np.flatnonzero(np.diff(labels[:count][order], prepend=-1))
    for part in np.split(order, starts[1:]):
        if len(part) == 0 or single[part].all():
            continue
        block = sparse.csr_matrix(rows[part])
        columns = np.unique(block.indices)
        scale = np.abs(values[part]).max()
        if len(columns) and scale:
            root = np.sqrt(weights[part])
            dense = root[:, None] * block[:, columns].toarray()  # pyrefly: ignore
            element[columns] = np.linalg.lstsq(dense, -root * (values[part] / scale), rcond=None)[0] * scale
    return element


def _first(rows: sparse.csr_matrix) -> NDArray[np.int64]:
    """Column of the first entry of each row; any column where it has none."""
    return rows.indices[np.minimum(rows.indptr[:-1], rows.nnz - 1)]


def _scale(
    found: Found, given: State, moved: State, shears: tuple[Shear, ...], exact: tuple[Form, ...]
) -> Representative:
    """Fold, close and minimise; `moved` is the point with its constants in place."""
    ledger = found.ledger
    relations = ledger.scales
    before = effective(ledger, relations.solve(exact)) if exact else found.solution
    fixed, targets, folded = _folds(found, before, moved)
    rows = before.rows(torch.tensor(fixed, dtype=torch.int64))
    particular = (
        lsmr(rows, np.array(targets), atol=1e-16, btol=1e-16, conlim=0)[0] if fixed else np.zeros(before.dimension)
    )
    first = scaling(ledger, before)
    state = first.act(moved, torch.from_numpy(particular))
    logs = _add({}, first.tensors, particular)

    left = effective(ledger, relations.solve((*exact, *({x: Fraction(1)} for x in fixed)))) if fixed else before
    group = scaling(ledger, left)
    masses = [
        Mass(e.name, state.tensors[e.name].cpu().reshape(e.view).square().sum(3), e.first, e.second, e.sign)
        for e in group.tensors
    ]
    factors, owners = _factors(group.norms, left.dimension)
    closed, kept = close(masses, factors, left.dimension)
    z = minimise([m for m in closed if bool(m.squares.any())], some(factors, np.flatnonzero(kept)), left.dimension)
    logs = _add(logs, group.tensors, z)
    zeros = {m.name: new.squares == 0 for m, new in zip(masses, closed, strict=True) if new is not m}
    unscaled, state = moved, group.act(state, torch.from_numpy(z))
    removed, zeroed, vanished = {}, {}, {}
    unfed = dead(closed, left.dimension) & _bent(ledger.bent, left)
    for entry, mass in zip(group.tensors, closed, strict=True):
        shape = state.tensors[entry.name].shape
        if entry.name in zeros:
            mask = zeros[entry.name][..., None].expand(entry.view).reshape(shape).to(state.device)
            count = int((mask & (state.tensors[entry.name] != 0)).sum())
            if count:
                zeroed[entry.name] = count
                state = state.replace({entry.name: state.tensors[entry.name].masked_fill(mask, 0.0)})
                vanished[entry.name] = torch.where(mask, -unscaled.tensors[entry.name], 0.0)
        feeding = touched(mass, unfed, growing=True)
        if bool(feeding.any()):
            removed[entry.name] = feeding[..., None].expand(entry.view).reshape(shape)
    starved = tuple(where for where, stays in zip(owners, kept, strict=True) if not stays)
    return Representative(_changed(given, vanished, shears), state, logs, shears, folded, removed, zeroed, starved)


def _changed(given: State, vanished: Mapping[str, Tensor], shears: Sequence[Shear]) -> State:
    """The weights as given, less what vanishes; offsets keep what they took up from factors that change."""
    changes = {name: change.double() for name, change in vanished.items()}
    for shear in shears:
        change = vanished.get(shear.absorbed.factor)
        if change is not None:
            shift = shear.shift.to(change.device)
            taken = torch.einsum("gijk,gj->gi", change.double().reshape(shear.absorbed.view), shift)
            old = changes.get(shear.offset, torch.zeros((), dtype=torch.float64, device=change.device))
            changes[shear.offset] = old + taken.reshape(given.tensors[shear.offset].shape)
    tensors = given.tensors
    return given.replace({name: (tensors[name].double() + c).to(tensors[name].dtype) for name, c in changes.items()})


def _folds(found: Found, solution: Solution, state: State) -> tuple[list[int], list[float], dict[str, Tensor]]:
    """Unknowns that are fixed before anything is minimised, and their values; gains' entries that go into readers."""
    fixed: list[int] = []
    targets: list[float] = []
    for running in found.ledger.runnings.values():
        moves = np.diff(solution.rows(running.deviation).indptr) > 0
        logs = deviation(running, state).log().cpu()
        fixed += running.deviation[torch.from_numpy(moves)].tolist()
        targets += (-logs[torch.from_numpy(moves)]).tolist()
    folded: dict[str, Tensor] = {}
    for name, mask in _foldable(found, solution, state).items():
        gain = state.tensors[name].cpu().reshape(-1)
        mask = mask & (gain != 0)
        if bool(mask.any()):
            folded[name] = mask.view(state.tensors[name].shape)
            fixed += found.ledger.fields[name].first.reshape(-1)[mask].tolist()
            targets += (-gain[mask].abs().log()).tolist()
    return fixed, targets, folded


def _foldable(found: Found, solution: Solution, state: State) -> dict[str, Tensor]:
    """Entries of normalisations' gains whose scale only they, their offset and columns of weights have.

    A gain is kept where it can be trained and some reader cannot: folding would take the freedom away.
    """
    group = scaling(found.ledger, solution)
    d = solution.dimension
    as_row, barred = np.zeros(d, dtype=int), np.zeros(d, dtype=bool)
    frozen_reader = np.zeros(d, dtype=bool)
    for entry in group.tensors:
        np.add.at(as_row, entry.first.indices, 1)
        if entry.sign == 1:
            barred[entry.second.indices] = True
        elif entry.name not in state.parameters:
            frozen_reader[entry.second.indices] = True
    for _, rows in (*group.norms, *group.runnings):
        barred[rows.indices] = True
    barred |= _bent(found.ledger.bent, solution)
    by_name = {entry.name: entry for entry in group.tensors}
    result: dict[str, Tensor] = {}
    for norm in found.ledger.norms:
        entry = by_name.get(norm.gain) if norm.gain is not None else None
        if entry is None or entry.first.shape[0] == 1:
            continue
        single = np.diff(entry.first.indptr) == 1
        column = np.zeros(len(single), dtype=int)
        column[single] = entry.first.indices[entry.first.indptr[:-1][single]]
        rate = np.zeros(len(single))
        rate[single] = entry.first.data[entry.first.indptr[:-1][single]]
        plain = rate == 1
        offset = _offset_rows(found, entry, column, group.tensors)
        fine = plain & (as_row[column] == 1 + offset) & ~barred[column]
        if entry.name in state.parameters:
            fine &= ~frozen_reader[column]
        result[entry.name] = torch.from_numpy(fine)
    return result


def _offset_rows(
    found: Found, gain: Exponents, column: NDArray[np.int64], tensors: Sequence[Exponents]
) -> NDArray[np.int64]:
    """For each entry of a gain, how many offsets of normalisations have exactly its scale."""
    norms = {name for name, entry in found.ledger.additives.items() if entry.norm}
    count = np.zeros(len(column), dtype=int)
    for entry in tensors:
        if entry.name in norms and entry.first.shape == gain.first.shape and (entry.first != gain.first).nnz == 0:
            count += 1
    return count


def _factors(norms: Sequence[tuple[Norm, sparse.csr_matrix]], size: int) -> tuple[sparse.csr_matrix, list[str]]:
    """Distinct factors that normalisations divide out, as forms in z, and where each comes from."""
    seen: dict[tuple[tuple[int, float], ...], str] = {}
    for norm, rows in norms:
        for row in range(rows.shape[0]):
            part = slice(rows.indptr[row], rows.indptr[row + 1])
            key = tuple(sorted(zip(rows.indices[part].tolist(), rows.data[part].tolist(), strict=True)))
            if key:
                seen.setdefault(key, norm.where)
    entries = [(k, j, value) for k, key in enumerate(seen) for j, value in key]
    i, j, values = zip(*entries, strict=True) if entries else ((), (), ())
    return sparse.csr_matrix((np.array(values, dtype=float), (i, j)), shape=(len(seen), size)), list(seen.values())


def _bent(ids: set[int], solution: Solution) -> NDArray[np.bool_]:
    """Coordinates of units that pass a kink or a nonlinearity."""
    mask = np.zeros(solution.dimension, dtype=bool)
    chosen = torch.tensor(sorted(x for x in ids if x != ZERO), dtype=torch.int64)
    mask[np.unique(solution.rows(chosen).indices)] = True
    return mask


def _add(
    logs: Mapping[str, tuple[Tensor, tuple[int, ...]]], tensors: Sequence[Exponents], z: Vector
) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """Log-factors with those of another element added."""
    total = dict(logs)
    for entry in tensors:
        value = entry.log(torch.from_numpy(z))
        total[entry.name] = (value + total[entry.name][0] if entry.name in total else value, entry.view)
    return total
