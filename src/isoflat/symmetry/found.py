"""Symmetries that tracing has found: groups that can be applied, proved and read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, final

import scipy
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from isoflat.core.errors import SymmetryViolated
from isoflat.core.precision import unrounded
from isoflat.core.rng import stream
from isoflat.core.state import State, everywhere, fingerprint
from isoflat.modules.private import Copies, held_fixed, own_precision, private, registered, wider
from isoflat.symmetry.finding.constraints import Constraints
from isoflat.symmetry.finding.gains import kept
from isoflat.symmetry.finding.solve import effective, scaling
from isoflat.symmetry.groups.base import Symmetry
from isoflat.symmetry.groups.basis import BasisChange
from isoflat.symmetry.groups.translation import CommonVector, Translation
from isoflat.symmetry.groups.units import UnitScaling
from isoflat.symmetry.relations import Form, Solution
from isoflat.symmetry.report import SymmetryLine, lines

VERSION = 2
"""Version of the rules; raised whenever another group may be found for some network."""

TOLERANCE = 1e-9
"""Relative change of outputs in float64 up to which a symmetry counts as proved."""

SINGLE_TOLERANCE = 1e-4
"""The same in float32, for networks that run in nothing wider: still far below what a wrong rule changes."""


def allowed_change(dtype: torch.dtype) -> float:
    """Relative change of outputs in a precision up to which a symmetry counts as proved."""
    return TOLERANCE if dtype == torch.float64 else SINGLE_TOLERANCE


@final
@dataclass(frozen=True, eq=False)
class Found:
    """The continuous symmetries of one network.

    Attributes:
        model: the network.
        skeleton: a copy of its structure, in evaluation mode, on which outputs are computed at other tensors.
        args: positional inputs that it was traced on, two rows.
        kwargs: keyword inputs.
        constraints: unknowns and relations.
        solution: solution of the scales, normalisations' epsilons disregarded.
        exact: forms that must vanish where epsilons stay or move with the only module that holds them.
        translation: shifts of constants.
        common: common vectors that every reader subtracts.
        basis: changes of basis between linear maps.
        blocks: blocks of tensors that pack several: an axis, and the number of the block along it.
        blind: whether the loss ignores a constant added to all scores of an example.
    """

    model: nn.Module
    skeleton: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    constraints: Constraints
    solution: Solution
    exact: tuple[Form, ...]
    translation: Translation
    common: CommonVector
    basis: BasisChange
    blocks: Mapping[str, tuple[int, Tensor]]
    blind: bool

    @cached_property
    def free(self) -> UnitScaling:
        """Scalings that keep the function where epsilons are zero."""
        return scaling(self.constraints, self.solution)

    @cached_property
    def scaling(self) -> UnitScaling:
        """Scalings that keep the function exactly, epsilons moved where modules hold them."""
        if not self.exact:
            return self.free
        return scaling(self.constraints, effective(self.constraints, self.constraints.scales.solve(self.exact)))

    @cached_property
    def precision(self) -> torch.dtype:
        """Precision of proofs: float64, unless the network runs in float32 only."""
        own = self.state()
        try:
            self.output(own.to(dtype=torch.float64))
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            single = own.to(dtype=torch.float32)
            self.output(single)
            return torch.float32
        return torch.float64

    @property
    def fixed(self) -> tuple[Form, ...]:
        """Forms that must vanish for a rescaling to be exact with every epsilon as it is."""
        return tuple({u: Fraction(1)} for norm in self.constraints.norms if norm.epsilon for u in norm.factors)

    @property
    def symmetries(self) -> tuple[Symmetry, ...]:
        """The exact groups in the order in which they are applied."""
        return (self.common, self.translation, self.basis, self.scaling)

    @property
    def dimension(self) -> int:
        """Dimension of all exact groups together."""
        return sum(symmetry.dimension for symmetry in self.symmetries)

    @cached_property
    def hash(self) -> str:
        """Hash of the group as it acts on this network's tensors, and of the rules that found it."""
        parts: list[str | bytes] = [str(VERSION), str(self.blind)]
        for entry in self.free.tensors:
            parts.append(repr((entry.name, entry.view, entry.sign)))
            parts += [*_bytes(entry.first), *_bytes(entry.second)]
        for offset in self.translation.offsets:
            parts += [offset.entry.name, *_bytes(offset.own)]
        parts += [repr(self.common.means)]
        for family in self.basis.families:
            parts.append(repr((family.count, family.size, family.orthogonal, family.centred)))
            for side in family.sides:
                parts.append(repr((side.dual, side.gain)))
                for piece in side.pieces:
                    parts += [repr((piece.name, piece.axis, piece.window)), piece.places.numpy().tobytes()]
        return fingerprint(*parts)

    def state(self, model: nn.Module | None = None) -> State:
        """All tensors of a network, and the epsilons that its modules hold."""
        module = self.model if model is None else model
        parameters = {name: p.detach() for name, p in module.named_parameters()}
        trainable = {name: t for name, t in parameters.items() if module.get_parameter(name).requires_grad}
        frozen = {name: t for name, t in parameters.items() if name not in trainable}
        buffers = {name: b.detach() for name, b in module.named_buffers()}
        return State(trainable, frozen, buffers, self.constants(module))

    def constants(self, model: nn.Module) -> dict[str, float]:
        """Epsilons that modules hold, by dotted path."""
        paths = dict.fromkeys(norm.constant for norm in self.constraints.norms if norm.constant is not None)
        return {path: float(getattr(*_holder(model, path))) for path in paths}

    def element(self, random: torch.Generator, spread: float, state: State | None = None) -> tuple[Tensor, ...]:
        """A random element of each exact group.

        Args:
            random: randomness.
            spread: standard deviation of the logarithms of factors, and a tenth of it that of shifts in their unit.
            state: whose sizes are the units of shifts; default the network's own.
        """
        at = self.state() if state is None else state
        common_, shift, mix, scale = (s.sample(random, spread) for s in self.symmetries)
        stay = self.kept(at)
        free = [not stay & set(family.gains) for family in self.basis.families]
        return (
            0.1 * common_ * self.common.units(at) * self.common.mask(stay),
            0.1 * shift * self.translation.units(at),
            mix * self.basis.units(at) * self.basis.mask(free),
            scale,
        )

    def kept(self, state: State) -> frozenset[str]:
        """Gains that stay where they are at a state, because they or their readers are held: what is behind is not covered."""
        return kept(self.constraints, self.solution, self.free, state)

    def act(self, state: State, element: Iterable[Tensor]) -> State:
        """Apply an element of each exact group."""
        for symmetry, part in zip(self.symmetries, element, strict=True):
            state = symmetry.act(state, part)
        return state

    def output(
        self, state: State, args: tuple[Any, ...] | None = None, kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        """The network's output at a state, epsilons included, as one flat float64 vector.

        If the loss ignores a constant added to all scores of an example, so does this.
        """
        for path, value in state.constants.items():
            holder, name = _holder(self.skeleton, path)
            setattr(holder, name, value)
        dtype = state.dtype
        inputs = [_cast(value, dtype) for value in (self.args if args is None else args)]
        named = {key: _cast(value, dtype) for key, value in (self.kwargs if kwargs is None else kwargs).items()}
        network = self.skeleton
        copies = Copies(lambda tensor: True, wider(own_precision(network), dtype))
        own = {id(tensor) for _, tensor in registered(network)}
        # A forward pass may write into buffers, and may differentiate by its inputs; weights cost no graph.
        given = {name: t.detach() if t.requires_grad else t for name, t in state.tensors.items()}
        given |= {name: given[name].clone() for name in state.buffers} | {n: held_fixed(given[n]) for n in state.frozen}
        with (
            torch.enable_grad(),
            private(network, lambda tensor: tensor if id(tensor) in own else copies(tensor)),
            unrounded(dtype, own_precision(network)),
            sdpa_kernel(SDPBackend.MATH),
        ):
            swapped = everywhere(network, given)
            result = torch.func.functional_call(network, swapped, tuple(inputs), named, tie_weights=False)
        found = (t.detach() if t.requires_grad else t for t in _tensors(result))
        tensors = [t.double() for t in found if t.is_floating_point()]
        if self.blind and len(tensors) == 1 and tensors[0].ndim > 1:
            tensors = [tensors[0] - tensors[0].mean(1, keepdim=True)]
        return torch.cat([t.reshape(-1) for t in tensors])

    def verify(self, example: Any = None, *, spread: float = 1.0, samples: int = 3, seed: int = 0) -> float:
        """Apply random group elements to the real network in float64, or what it runs in, and compare outputs.

        Args:
            example: inputs; default those it was traced on.
            spread: standard deviation of the logarithms of the factors. A wrong symmetry shows at any; at a large one
                rounding does too, where weights lie far out on their orbit already.
            samples: number of elements to try.
            seed: seed of the elements.

        Returns:
            The largest relative change seen, at rounding level.

        Raises:
            SymmetryViolated: an output changed by more than 1e-9 of the largest (1e-4 in float32).
        """
        inputs = (self.args, self.kwargs) if example is None else _split(example)
        precise = self.state().to(dtype=self.precision)

        def exact(random: torch.Generator, size: float) -> State:
            return self.act(precise, self.element(random, size))

        worst = self._change("exact", precise, exact, inputs, (spread, samples, seed))
        movable = all(norm.constant is not None or not norm.epsilon for norm in self.constraints.norms)
        if movable and (self.exact or self.constraints.norms):
            bare = replace(precise, constants=dict.fromkeys(precise.constants, 0.0))

            def free(random: torch.Generator, size: float) -> State:
                return self.free.act(bare, self.free.sample(random, size))

            worst = max(worst, self._change("without epsilon", bare, free, inputs, (spread, samples, seed)))
        return worst

    def _change(
        self,
        group: str,
        start: State,
        moved: Callable[[torch.Generator, float], State],
        inputs: tuple[tuple[Any, ...], Mapping[str, Any]],
        how: tuple[float, int, int],
    ) -> float:
        """Largest relative change of the outputs under random elements of a group; see `verify`."""
        spread, samples, seed = how
        before = self.output(start, *inputs)
        if not bool(torch.isfinite(before).all()):
            return 0.0  # without epsilon a constant input divides zero by zero
        size, allowed = float(before.abs().max()) or 1.0, allowed_change(self.precision)
        worst = 0.0
        for attempt in range(samples):
            change = math.inf
            # What a wrong rule changes shrinks with the element; what rounding does, far out on an orbit, faster.
            for share in (1.0, 0.1, 0.01):
                state = moved(stream(seed, "verify", group, attempt), share * spread)
                change = float((self.output(state, *inputs) - before).abs().max()) / size
                if change <= allowed:
                    break
            worst = max(worst, change)
            if not change <= allowed:
                raise SymmetryViolated(
                    f"the symmetries found ({group}) change the network's output by {worst:.2e} of its size "
                    f"(allowed: {allowed:g}). A rule for one of its operations is wrong, its forward pass depends "
                    "on the values of its weights, or they lie so far out on their orbit that rounding decides; measure "
                    "isoflat.canonicalize's copy of a network that was reparametrised, and report the others"
                )
        return worst

    @cached_property
    def report(self) -> tuple[SymmetryLine, ...]:
        """Groups of one kind with their dimensions and tensors, then what is not claimed and why."""
        return lines(self.constraints, self.free, self.solution, (self.translation, self.common, self.basis))

    def __str__(self) -> str:
        """The report as text."""
        lines = []
        for line in self.report:
            why = f" — {'; '.join(line.reasons)}" if line.reasons else ""
            lines.append(f"{line.dimension:>7} {line.kind}: {', '.join(line.tensors)}{why}")
        return "\n".join(lines)


def _bytes(matrix: scipy.sparse.csr_matrix) -> tuple[bytes, ...]:
    matrix.sort_indices()
    return matrix.indptr.tobytes(), matrix.indices.tobytes(), matrix.data.tobytes()


def _holder(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    place, _, name = path.rpartition(".")
    return module.get_submodule(place), name


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _split(example: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(example, Mapping):
        return (), example
    return (example if isinstance(example, tuple) else (example,)), {}
