"""Normalisations: they divide a scale out, and bring one of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from isoflat.symmetry.finding.constraints import Constraints
from isoflat.symmetry.finding.values import Activation, StoredTensor, Value, shifted_only
from isoflat.symmetry.motions import Absorbed, Additive, Field, Norm, Running
from isoflat.symmetry.relations import ANY, ZERO, distinct


def layer(
    constraints: Constraints, node: Node, x: Value, shape: Sequence[int], gain: Value = None, offset: Value = None,
    epsilon: float = 1e-5, *args: Any,
) -> Value:  # fmt: skip
    """LayerNorm over the last axes: one scale is divided out and one mean taken away."""
    reason = constraints.where(node)
    x = constraints.activation(x, reason)
    kept = tuple(range(x.scale.ndim - len(shape)))
    factors = constraints.scales.along(x.scale, *kept)
    constraints.shifts.along(x.shift, *kept)
    made = _out(constraints, node, factors, gain, offset, epsilon, x.shape)
    return (made, *[shifted_only(part.shape) for part in node.meta["val"][1:]]) if _several(node) else made


def root_mean_square(
    constraints: Constraints,
    node: Node,
    x: Value,
    shape: Sequence[int],
    gain: Value = None,
    epsilon: float | None = None,
) -> Value:
    """RMSNorm over the last axes."""
    reason = constraints.where(node)
    x = constraints.activation(x, reason)
    constraints.no_shift(reason, x)
    factors = constraints.scales.along(x.scale, *range(x.scale.ndim - len(shape)))
    # Without a number the type's own machine epsilon is added, which no attribute holds.
    value = float(torch.finfo(node.meta["val"].dtype).eps) if epsilon is None else epsilon
    return _out(constraints, node, factors, gain, None, value, x.shape)


def group(
    constraints: Constraints, node: Node, x: Value, groups: int, gain: Value = None, offset: Value = None,
    epsilon: float = 1e-5, *args: Any,
) -> Value:  # fmt: skip
    """GroupNorm: one scale and one mean for each group of channels."""
    x = constraints.activation(x, constraints.where(node))
    channels = x.shape[1]
    split = (x.shape[0], groups, channels // groups, *x.shape[2:])
    scale, shift = (ids.reshape(split) for ids in (x.scale, x.shift))
    factors = constraints.scales.along(scale, 0, 1)
    constraints.shifts.along(shift, 0, 1)
    shape = (channels, *[1] * (len(x.shape) - 2))
    return _out(constraints, node, factors, gain, offset, epsilon, x.shape, shape)


def instance(
    constraints: Constraints, node: Node, x: Value, gain: Value, offset: Value, mean: Value, variance: Value,
    use_input: bool, momentum: float, epsilon: float, *args: Any,
) -> Value:  # fmt: skip
    """InstanceNorm by the input's own statistics: a group for each channel."""
    if not use_input:
        constraints.pin([x, gain, offset, mean, variance], constraints.where(node))
        return shifted_only(node.meta["val"].shape)
    return group(constraints, node, x, node.meta["val"].shape[1], gain, offset, epsilon)


def running(
    constraints: Constraints, node: Node, x: Value, gain: Value, offset: Value, mean: Value, variance: Value,
    momentum: float, epsilon: float,
) -> Value:  # fmt: skip
    """BatchNorm by running statistics: `γ (x − μ)/√(v + ε) + β`, an affine map of each channel."""
    reason = constraints.where(node)
    parts = node.meta["val"]
    shape = parts[0].shape
    waiting = constraints.pending.get(node.args[0])  # pyrefly: ignore
    plain = isinstance(mean, StoredTensor) and isinstance(variance, StoredTensor)
    old = constraints.runnings.get(mean.name) if isinstance(mean, StoredTensor) else None
    names = tuple(part.name if isinstance(part, StoredTensor) else None for part in (mean, variance, gain, offset))
    known = old is None or (old.mean, old.variance, old.gain, old.offset) == names
    affine = (gain is None and offset is None) or (isinstance(gain, StoredTensor) and isinstance(offset, StoredTensor))
    if not plain or not affine or not known:
        constraints.pin([x, gain, offset, mean, variance], reason)
        _hold(constraints, waiting, reason)
        if old is not None:
            _hold(constraints, old.absorbed, reason)
            constraints.scales.pin(old.deviation, reason)
            constraints.shifts.pin(torch.stack([old.entering, old.moved]), reason)
        return tuple(shifted_only(part.shape) for part in parts)
    x = constraints.activation(x, reason)
    entering, channels = constraints.scales.along(x.scale, 1), shape[1]
    entering = torch.where(entering == ANY, ZERO, entering)  # where x is zero, its mean need not be
    wide = (slice(None), *[None] * (len(shape) - 2))
    rest = [shifted_only(part.shape) for part in parts[1:]]
    if old is not None:
        _hold(constraints, waiting, f"{reason}: used twice")
        return (_again(constraints, x, old, entering, wide, shape, reason), *rest)
    deviation = constraints.scales.fresh(channels)
    constraints.scale_by(mean.name, _vector(mean.name, entering))
    shifts, out, moved = constraints.shifts.along(x.shift, 1), None, torch.zeros(channels, dtype=torch.int64)
    if isinstance(gain, StoredTensor) and isinstance(offset, StoredTensor):
        out = constraints.scales.fresh(channels)
        own = constraints.scales.combine((1, out), (-1, entering), (1, deviation))
        constraints.scale_by(gain.name, _vector(gain.name, own))
        constraints.scale_by(offset.name, _vector(offset.name, out))
        constraints.multiplies(gain, reason)
        moved = constraints.shifts.fresh(channels)
        leaving = constraints.added(Additive(offset.name, None, constraints.shifts.fresh(channels), norm=True))
    else:
        out = constraints.scales.combine((1, entering), (-1, deviation))
        leaving = torch.zeros(channels, dtype=torch.int64)
    constraints.runnings[mean.name] = Running(*names, epsilon, deviation, shifts, moved, waiting)  # pyrefly: ignore
    return (Activation(out[wide].expand(shape), leaving[wide].expand(shape)), *rest)


def _again(
    constraints: Constraints, x: Activation, old: Running, entering: Tensor, wide: Any, shape: torch.Size, reason: str
) -> Activation:
    """A normalisation that has been seen before: what enters and leaves it is as it was then."""
    _hold(constraints, old.absorbed, f"{reason}: used twice")
    constraints.scales.tie(entering, constraints.fields[old.mean].first[0])
    constraints.shifts.tie(constraints.shifts.along(x.shift, 1), old.entering)
    if old.offset is None:
        scale, shift = constraints.scales.combine((1, entering), (-1, old.deviation)), torch.zeros_like(entering)
    else:
        scale, shift = constraints.fields[old.offset].first[0], constraints.additives[old.offset].shift
    return Activation(scale[wide].expand(shape), shift[wide].expand(shape))


def _hold(constraints: Constraints, absorbed: Absorbed | None, reason: str) -> None:
    """Constants that cannot be taken up do not move."""
    if absorbed is not None:
        constraints.shifts.pin(absorbed.shift, reason)


def _out(
    constraints: Constraints,
    node: Node,
    factors: Tensor,
    gain: Value,
    offset: Value,
    epsilon: float,
    shape: torch.Size,
    view: Sequence[int] | None = None,
) -> Activation:
    """Activation that leaves a normalisation: the gain's scales and the offset's shifts, or none."""
    reason = constraints.where(node)
    constraints.norms.append(
        Norm(
            reason,
            constraints.epsilon_of(node, epsilon),
            epsilon,
            tuple(u for u in distinct(factors) if u != ANY),
        )
    )
    scale = shift = torch.zeros((), dtype=torch.int64)
    for value in (gain, offset):
        if isinstance(value, Activation):
            constraints.pin([value], reason)
    if isinstance(gain, StoredTensor):
        constraints.multiplies(gain, reason)
        constraints.gains.add(gain.name)
        scale = constraints.entries(gain)
    if isinstance(offset, StoredTensor):
        flat = scale.expand(offset.shape).reshape(-1)
        constraints.scale_by(offset.name, _vector(offset.name, flat))
        own = constraints.added(Additive(offset.name, None, constraints.shifts.fresh(len(flat)), norm=True))
        shift = own.view(offset.shape)
    if view is not None:
        scale, shift = (ids.view(tuple(view)) if ids.ndim else ids for ids in (scale, shift))
    return Activation(scale.expand(shape), shift.expand(shape))


def _vector(name: str, ids: Tensor) -> Field:
    return Field(name, (1, ids.numel(), 1, 1), ids.reshape(1, -1))


def _several(node: Node) -> bool:
    return isinstance(node.meta["val"], tuple | list)


RULES = {
    "aten.layer_norm.default": layer,
    "aten.native_layer_norm.default": layer,
    "aten.rms_norm.default": root_mean_square,
    "aten.group_norm.default": group,
    "aten.instance_norm.default": instance,
    "aten._native_batch_norm_legit_no_training.default": running,
}
