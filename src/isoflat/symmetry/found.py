"""Symmetries that tracing has found: groups that can be applied, proved and read."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, final

import scipy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from isoflat.core.errors import UnsupportedModel
from isoflat.core.kernels import InDouble
from isoflat.core.precision import unrounded
from isoflat.core.rng import stream
from isoflat.core.state import State, everywhere, fingerprint
from isoflat.modules.private import Copies, held_fixed, own_precision, private, registered, wider
from isoflat.symmetry.finding.constraints import Constraints
from isoflat.symmetry.finding.gains import kept
from isoflat.symmetry.finding.graph import plain_attention
from isoflat.symmetry.finding.rows import all_inputs
from isoflat.symmetry.finding.solve import effective, movable_offsets, scaling, translation
from isoflat.symmetry.finding.untraceable import unsupported
from isoflat.symmetry.groups.base import Symmetry
from isoflat.symmetry.groups.basis import BasisChange
from isoflat.symmetry.groups.translation import CommonVector, Translation
from isoflat.symmetry.groups.units import UnitScaling
from isoflat.symmetry.proof import SHARES, Part, Proof
from isoflat.symmetry.relations import Form, Solution
from isoflat.symmetry.report import UNCLAIMED, SymmetryLine, lines

VERSION = 2
"""Version of the rules; raised whenever another group may be found for some network."""

Counted = tuple[int, Tensor]
"""Entries of an output that a loss looks at: the place of a tensor among those that a network gives, and a mask that fits it."""


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
        counted: entries of the output on those inputs that the loss looks at; None for all.
        left_out: what was found and could not be proved, and why.
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
    counted: Counted | None = None
    left_out: tuple[SymmetryLine, ...] = ()

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
        except (UnsupportedModel, NotImplementedError):
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
        self,
        state: State,
        args: tuple[Any, ...] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        counted: Counted | None = None,
    ) -> Tensor:
        """The network's output at a state, epsilons included, as one flat float64 vector.

        If the loss ignores a constant added to all scores of an example, so does this; what it does not look at is left out.
        Buffers are copies, and random numbers are the same at every call.

        Args:
            state: the tensors.
            args: positional inputs; default those that the network was traced on.
            kwargs: keyword inputs.
            counted: entries that the loss looks at; None for all, or for those of the default inputs.

        Raises:
            UnsupportedModel: the network does not run there.
        """
        counted = self.counted if args is None else counted
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
            torch.random.fork_rng(devices=[state.device] if state.device.type == "cuda" else []),
            private(network, lambda tensor: tensor if id(tensor) in own else copies(tensor)),
            unrounded(dtype, own_precision(network)),
            plain_attention(),
            InDouble(),
        ):
            torch.manual_seed(0)
            swapped = everywhere(network, given)
            try:
                result = torch.func.functional_call(network, swapped, tuple(inputs), named, tie_weights=False)
            except (
                NotImplementedError
            ):  # no forward-mode derivative of some operation: who asks for one knows what to do
                raise
            except Exception as error:  # whatever the user's forward raises
                raise unsupported(
                    f"the network does not run in {dtype}, in which its symmetries are proved", error, network
                ) from error
        tensors = [(t.detach() if t.requires_grad else t).double() for t in output_tensors(result)]
        if not tensors:
            raise UnsupportedModel(
                f"the network gives {type(result).__name__} without a floating-point tensor, so that nothing can be proved on "
                "it: wrap it in a module that returns its scores as a tensor; geometry='layerwise' needs no tracing"
            )
        if self.blind and len(tensors) == 1 and tensors[0].ndim > 1:
            tensors = [tensors[0] - _common(tensors[0])]
        if counted is not None:
            place, mask = counted
            tensors[place] = tensors[place][mask.to(tensors[place].device).expand(tensors[place].shape)]
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
            NondeterministicRisk: outputs differ where nothing was moved.
            NonFinite: no output is a number.
            UnsupportedModel: the network does not run.
        """
        inputs = (None, None) if example is None else all_inputs(example)
        how = spread, samples, seed
        precise = self.precise()
        exact = Proof("exact", self._parts, precise, lambda state: self.output(state, *inputs))
        worst = exact.worst(lambda random, size: self.element(random, size), how)
        movable = all(norm.constant is not None or not norm.epsilon for norm in self.constraints.norms)
        if movable and (self.exact or self.constraints.norms):
            bare = replace(precise, constants=dict.fromkeys(precise.constants, 0.0))
            if not bool(torch.isfinite(self.output(bare, *inputs)).all()):
                return worst  # without epsilon a constant input divides zero by zero
            free = Proof("without epsilon", (Part("scale", self.free),), bare, exact.output)
            worst = max(worst, free.worst(lambda random, size: (self.free.sample(random, size),), how))
        return worst

    def precise(self) -> State:
        """All tensors in the precision of proofs, in memory of their own: a forward pass may write into them."""
        made = self.state().to(dtype=self.precision)
        own = self.state().tensors
        return made.replace(
            {name: t.clone() for name, t in made.tensors.items() if t.data_ptr() == own[name].data_ptr()}
        )

    def averages_hold(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], counted: Counted | None = None) -> bool:
        """Test whether constants pass attention on these inputs, as they do where every row that counts keeps a key.

        Args:
            args: positional inputs.
            kwargs: keyword inputs.
            counted: entries of the output that the loss looks at; None for all.
        """
        precise = self.precise()
        part = Part("shift", self.translation)
        proof = Proof("averages", (part,), precise, lambda state: self.output(state, args, kwargs, counted))
        before, size = proof.before(), 0.1 * self.translation.units(precise)
        element = self.translation.sample(stream(0, "averages")) * size
        return any(proof.change(before, (share * element,)) <= proof.allowed for share in SHARES)

    def without_averages(self) -> Found:
        """The symmetries less the constants that pass attention only where every row keeps a key."""
        averages = self.constraints.averages
        shifts = copy.deepcopy(self.constraints.shifts)
        for average in averages:
            shifts.pin(average.shift, f"{average.where}: some row keeps no key")
        constraints = replace(self.constraints, shifts=shifts, averages=[])
        fewer = translation(constraints)
        movable = movable_offsets(fewer)
        kept = tuple(mean for mean in self.common.means if mean.offset is None or mean.offset in movable)
        common_ = CommonVector(
            kept, tuple(n for m, n in zip(self.common.means, self.common.lengths, strict=True) if m in kept)
        )
        lost = self.translation.dimension + self.common.dimension - fewer.dimension - common_.dimension
        where = ", ".join(dict.fromkeys(average.where for average in averages))
        now = {offset.entry.name: offset.own for offset in fewer.offsets}
        freed = [o.entry.name for o in self.translation.offsets if _moving(o.own) > _moving(now[o.entry.name])]
        names = tuple(sorted({*freed, *(self.common.touches - common_.touches)}))
        line = SymmetryLine(
            UNCLAIMED, lost, names, (f"{where}: rows are masked whole, which gives zeros and no average",)
        )
        return replace(
            self,
            constraints=constraints,
            translation=fewer,
            common=common_,
            left_out=(*self.left_out, line) if lost else self.left_out,
        )

    @property
    def _parts(self) -> tuple[Part, ...]:
        kinds = ("common vector", "shift", "change of basis", "scale")
        return tuple(Part(kind, symmetry) for kind, symmetry in zip(kinds, self.symmetries, strict=True))

    @cached_property
    def report(self) -> tuple[SymmetryLine, ...]:
        """Groups of one kind with their dimensions and tensors, then what is not claimed and why."""
        found = lines(self.constraints, self.free, self.solution, (self.translation, self.common, self.basis))
        return (*found, *self.left_out)

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


def output_tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors that a network gives, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in output_tensors(part)]


def _common(scores: Tensor) -> Tensor:
    """Mean of each example's scores along dimension 1, those left out that are infinite."""
    finite = torch.isfinite(scores)
    if bool(finite.all()):
        return scores.mean(1, keepdim=True)
    count = finite.sum(1, keepdim=True).clamp(min=1)
    return torch.where(finite, scores, 0.0).sum(1, keepdim=True) / count


def _moving(rows: scipy.sparse.csr_matrix) -> int:
    """Number of rows that something moves."""
    return int((rows.getnnz(axis=1) > 0).sum())


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Inputs whose floating-point tensors have another type, also inside of lists and records."""
    return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, value)
