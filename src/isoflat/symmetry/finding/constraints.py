"""Constraints that tracing writes down: how each stored tensor scales and shifts, and which normalisations divide a scale out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor
from torch.fx import Node

from isoflat.symmetry.finding.values import Activation, Known, StoredTensor, Value, shifted_only
from isoflat.symmetry.motions import Absorbed, Additive, Average, Field, Norm, Running
from isoflat.symmetry.relations import ANY, ZERO, Relations, distinct, is_all

ENTRYWISE = 1 << 18
"""Entries up to which a tensor may get an unknown for each of them."""


@final
@dataclass
class Constraints:
    """Unknowns, relations and findings while the operations of a network are gone through.

    Attributes:
        scales: relations among log-scales.
        shifts: relations among constants.
        fields: log-scales of stored tensors, by name.
        additives: shifts of stored tensors, by name.
        runnings: batch normalisations, by the name of their mean.
        norms: normalisations in the order of the graph.
        rigid: tensors that multiply something, so that nothing may be added to them.
        again: tensors that are added more than once.
        bent: log-scales that pass through a kink or a nonlinearity.
        where: operation and module that a node stands for, in words.
        epsilon_of: path of the module attribute that holds a node's epsilon.
        centred: whether a node is a batch normalisation whose module holds the running mean.
        pending: constants that a contraction without bias passes on to the batch normalisations that alone read it.
        forgets: whether everything that reads a node is blind to a constant along an axis.
        gains: vectors that multiply what a normalisation gives.
        normalised: nodes that hold what a normalisation written by hand gives.
        averages: constants that pass attention where every row keeps a key.
        varies: whether a node's value hangs on the network's input, and not on its shape alone.
    """

    scales: Relations = field(default_factory=Relations)
    shifts: Relations = field(default_factory=Relations)
    fields: dict[str, Field] = field(default_factory=dict)
    additives: dict[str, Additive] = field(default_factory=dict)
    runnings: dict[str, Running] = field(default_factory=dict)
    norms: list[Norm] = field(default_factory=list)
    rigid: dict[str, str] = field(default_factory=dict)
    again: set[str] = field(default_factory=set)
    bent: set[int] = field(default_factory=set)
    where: Callable[[Node], str] = str
    epsilon_of: Callable[[Node, float], str | None] = lambda node, value: None
    centred: Callable[[Node], bool] = lambda node: False
    pending: dict[Node, Absorbed] = field(default_factory=dict)
    forgets: Callable[[Node, int], bool] = lambda node, axis: False
    gains: set[str] = field(default_factory=set)
    normalised: set[Node] = field(default_factory=set)
    averages: list[Average] = field(default_factory=list)
    varies: Callable[[Node], bool] = lambda node: True

    def scale_by(self, name: str, found: Field) -> None:
        """Write down how a tensor scales; where it has been seen before, both must hold."""
        # What meets a literal zero only is free there, but not where it is read again: it is held.
        first, second = (torch.where(ids == ANY, ZERO, ids) for ids in (found.first, found.second))
        found = replace(found, first=first, second=second)
        old = self.fields.setdefault(name, found)
        if old is found:
            return
        if old.view != found.view:
            self._freeze(old, f"'{name}' is read in two ways")
            self._freeze(found, f"'{name}' is read in two ways")
            return
        # first + sign·second = first' + sign'·second' at every entry: both differences are one and the same constant.
        left = self.scales.combine((1, old.first), (-1, found.first))
        right = self.scales.combine((found.sign, found.second), (-old.sign, old.second))
        for g in range(max(left.shape[0], right.shape[0])):
            a, b = (side[min(g, side.shape[0] - 1)] for side in (left, right))
            self.scales.tie(a, b[:1])
            self.scales.tie(b, b[:1])

    def add_to(self, name: str, found: Additive) -> None:
        """Write down how a tensor may be shifted; where it has been seen before, in the same way only."""
        old = self.additives.setdefault(name, found)
        if old is found:
            return
        self.again.add(name)
        same = old.axis == found.axis and old.shift.shape == found.shift.shape
        for a, b in ((old.absorbed, found.absorbed),):
            same = same and (a is None) == (b is None)
            if a is not None and b is not None:
                same = same and (a.factor, a.view, a.shift.shape) == (b.factor, b.view, b.shift.shape)
        if same:
            self.shifts.tie(old.shift, found.shift)
            if old.absorbed is not None and found.absorbed is not None:
                self.shifts.tie(old.absorbed.shift, found.absorbed.shift)
            return
        for entry in (old, found):
            self.shifts.pin(entry.shift, f"'{name}' is added in two ways")
            if entry.absorbed is not None:
                self.shifts.pin(entry.absorbed.shift, f"'{name}' is added in two ways")

    def added(self, found: Additive) -> Tensor:
        """Write down how a tensor may be shifted; the unknowns that stand for it here, in the shape they were given."""
        self.add_to(found.name, found)
        known = self.additives[found.name].shift
        return known if known.shape == found.shift.shape else found.shift

    def entries(self, stored: StoredTensor) -> Tensor:
        """Log-scales of a tensor entry by entry, shape of the tensor; of its last axis only where it has too many."""
        count = math.prod(stored.shape)
        if count > ENTRYWISE and len(stored.shape) > 1 and stored.shape[-1] <= ENTRYWISE:
            view = (1, count // stored.shape[-1], stored.shape[-1], 1)
            old = self.fields.get(stored.name)
            if old is None or old.view != view or old.sign != 1 or not is_all(old.first, ZERO):
                ids = self.scales.fresh(stored.shape[-1])
                self.scale_by(stored.name, Field(stored.name, view, torch.zeros(1, 1, dtype=torch.int64), ids[None], 1))
                return ids.expand(stored.shape)
            return old.second[0].expand(stored.shape)
        if count > ENTRYWISE:
            reason = f"'{stored.name}' is used entry by entry and has {count} entries"
            self.pin([stored], reason)
            return torch.zeros((), dtype=torch.int64).expand(stored.shape)
        old = self.fields.get(stored.name)
        if old is not None and old.view == (1, count, 1, 1):
            ids = self.scales.combine((1, old.first.expand(1, count)), (old.sign, old.second))
            return ids.reshape(stored.shape)
        ids = self.scales.fresh(count)
        self.scale_by(stored.name, Field(stored.name, (1, count, 1, 1), ids[None]))
        return ids.view(stored.shape)

    def activation(self, value: Value, where: str) -> Activation:
        """Any value as an activation: a stored tensor by its entries, a known one with neither scale nor shift."""
        if isinstance(value, Activation):
            return value
        if isinstance(value, StoredTensor):
            scale = self.entries(value)
            count = math.prod(value.shape)
            if count > ENTRYWISE and (len(value.shape) < 2 or value.shape[-1] > ENTRYWISE):
                return shifted_only(value.shape)
            if count > ENTRYWISE:
                last = len(value.shape) - 1
                own = self.added(Additive(value.name, last, self.shifts.fresh(value.shape[-1])))
                return Activation(scale, own.expand(value.shape))
            own = self.added(Additive(value.name, None, self.shifts.fresh(count)))
            return Activation(scale, own.view(value.shape))
        content = value.value if isinstance(value, Known) else value
        tensor = torch.as_tensor(content)
        scale = torch.where(tensor == 0, 1, 0)  # a literal zero has every scale
        return Activation(scale if bool(scale.any()) else scale.new_zeros(()).expand(tensor.shape),
                          scale.new_zeros(()).expand(tensor.shape))  # fmt: skip

    def multiplies(self, value: Value, where: str) -> None:
        """Nothing may be added to a stored tensor that multiplies."""
        if isinstance(value, StoredTensor):
            self.rigid.setdefault(value.name, where)

    def pin(self, values: Iterable[Value], reason: str) -> None:
        """An operation that is not understood: whatever goes in keeps its scale and its constants."""
        for value in values:
            if isinstance(value, Activation):
                self.scales.pin(value.scale, reason)
                self.shifts.pin(value.shift, reason)
            elif isinstance(value, StoredTensor):
                count = math.prod(value.shape)
                self.scale_by(value.name, Field(value.name, (1, count, 1, 1), torch.zeros(1, 1, dtype=torch.int64)))
                self._freeze(self.fields[value.name], reason)
                self.rigid.setdefault(value.name, reason)
            elif isinstance(value, list | tuple):
                self.pin(value, reason)

    def no_shift(self, reason: str, *values: Value) -> None:
        """These activations may not carry constants into an operation."""
        for value in values:
            if isinstance(value, Activation):
                self.shifts.pin(value.shift, reason)

    def bend(self, ids: Tensor) -> None:
        """These scales pass a kink or a nonlinearity."""
        self.bent.update(distinct(ids))

    def settle(self) -> None:
        """Close the constraints once the network has been gone through: nothing may be added to what multiplies."""
        for name, reason in self.rigid.items():
            if name in self.additives:
                entry = self.additives[name]
                self.shifts.pin(entry.shift, reason)
                if entry.absorbed is not None:
                    self.shifts.pin(entry.absorbed.shift, reason)
        for running in self.runnings.values():
            self._settle(running)

    def _settle(self, running: Running) -> None:
        """Statistics and offsets of a batch normalisation that something else reads too."""
        sharing = [other for other in self.runnings.values() if other.variance == running.variance]
        if len(sharing) > 1 or running.variance in (*self.fields, *self.additives, *self.rigid):
            reason = f"'{running.variance}' is read in two ways"
            self.scales.pin(running.deviation, reason)
            if running.variance in self.fields:
                self._freeze(self.fields[running.variance], reason)
            if running.variance in self.additives:
                self.shifts.pin(self.additives[running.variance].shift, reason)
        if running.mean in self.additives or running.mean in self.rigid:
            reason = f"'{running.mean}' is read in two ways"
            self.shifts.pin(torch.stack([running.entering, running.moved]), reason)
            if running.absorbed is not None:
                self.shifts.pin(running.absorbed.shift, reason)
            if running.mean in self.additives:
                self.shifts.pin(self.additives[running.mean].shift, reason)
        if running.offset in self.again or running.offset in self.rigid:
            self.shifts.pin(running.moved, f"'{running.offset}' is read in two ways")

    def _freeze(self, entry: Field, reason: str) -> None:
        """Pin every log-scale of a tensor."""
        self.fields.setdefault(entry.name, entry)
        self.scales.pin(entry.first, reason)
        self.scales.pin(entry.second, reason)
