"""Normalisations: they divide a scale out, and bring one of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from isoflat.symmetry.finding.constraints import Ledger
from isoflat.symmetry.finding.values import Activation, Stored, Value, shifted_only
from isoflat.symmetry.motions import Absorbed, Additive, Field, Norm, Running
from isoflat.symmetry.relations import ANY, ZERO, distinct


def layer(
    ledger: Ledger, node: Node, x: Value, shape: Sequence[int], gain: Value = None, offset: Value = None,
    epsilon: float = 1e-5, *args: Any,
) -> Value:  # fmt: skip
    """LayerNorm over the last axes: one scale is divided out and one mean taken away."""
    reason = ledger.where(node)
    x = ledger.activation(x, reason)
    kept = tuple(range(x.scale.ndim - len(shape)))
    factors = ledger.scales.along(x.scale, *kept)
    ledger.shifts.along(x.shift, *kept)
    made = _out(ledger, node, factors, gain, offset, epsilon, x.shape)
    return (made, *[shifted_only(part.shape) for part in node.meta["val"][1:]]) if _several(node) else made


def root_mean_square(
    ledger: Ledger, node: Node, x: Value, shape: Sequence[int], gain: Value = None, epsilon: float | None = None
) -> Value:
    """RMSNorm over the last axes."""
    reason = ledger.where(node)
    x = ledger.activation(x, reason)
    ledger.no_shift(reason, x)
    factors = ledger.scales.along(x.scale, *range(x.scale.ndim - len(shape)))
    # Without a number the type's own machine epsilon is added, which no attribute holds.
    value = float(torch.finfo(node.meta["val"].dtype).eps) if epsilon is None else epsilon
    return _out(ledger, node, factors, gain, None, value, x.shape)


def group(
    ledger: Ledger, node: Node, x: Value, groups: int, gain: Value = None, offset: Value = None,
    epsilon: float = 1e-5, *args: Any,
) -> Value:  # fmt: skip
    """GroupNorm: one scale and one mean for each group of channels."""
    x = ledger.activation(x, ledger.where(node))
    channels = x.shape[1]
    split = (x.shape[0], groups, channels // groups, *x.shape[2:])
    scale, shift = (ids.reshape(split) for ids in (x.scale, x.shift))
    factors = ledger.scales.along(scale, 0, 1)
    ledger.shifts.along(shift, 0, 1)
    shape = (channels, *[1] * (len(x.shape) - 2))
    return _out(ledger, node, factors, gain, offset, epsilon, x.shape, shape)


def instance(
    ledger: Ledger, node: Node, x: Value, gain: Value, offset: Value, mean: Value, variance: Value,
    use_input: bool, momentum: float, epsilon: float, *args: Any,
) -> Value:  # fmt: skip
    """InstanceNorm by the input's own statistics: a group for each channel."""
    if not use_input:
        ledger.pin([x, gain, offset, mean, variance], ledger.where(node))
        return shifted_only(node.meta["val"].shape)
    return group(ledger, node, x, node.meta["val"].shape[1], gain, offset, epsilon)


def running(
    ledger: Ledger, node: Node, x: Value, gain: Value, offset: Value, mean: Value, variance: Value,
    momentum: float, epsilon: float,
) -> Value:  # fmt: skip
    """BatchNorm by running statistics: `γ (x − μ)/√(v + ε) + β`, an affine map of each channel."""
    reason = ledger.where(node)
    parts = node.meta["val"]
    shape = parts[0].shape
    waiting = ledger.pending.get(node.args[0])  # pyrefly: ignore
    plain = isinstance(mean, Stored) and isinstance(variance, Stored)
    old = ledger.runnings.get(mean.name) if isinstance(mean, Stored) else None
    names = tuple(part.name if isinstance(part, Stored) else None for part in (mean, variance, gain, offset))
    known = old is None or (old.mean, old.variance, old.gain, old.offset) == names
    affine = (gain is None and offset is None) or (isinstance(gain, Stored) and isinstance(offset, Stored))
    if not plain or not affine or not known:
        ledger.pin([x, gain, offset, mean, variance], reason)
        _hold(ledger, waiting, reason)
        if old is not None:
            _hold(ledger, old.absorbed, reason)
            ledger.scales.pin(old.deviation, reason)
            ledger.shifts.pin(torch.stack([old.entering, old.moved]), reason)
        return tuple(shifted_only(part.shape) for part in parts)
    x = ledger.activation(x, reason)
    entering, channels = ledger.scales.along(x.scale, 1), shape[1]
    entering = torch.where(entering == ANY, ZERO, entering)  # where x is zero, its mean need not be
    wide = (slice(None), *[None] * (len(shape) - 2))
    rest = [shifted_only(part.shape) for part in parts[1:]]
    if old is not None:
        _hold(ledger, waiting, f"{reason}: used twice")
        return (_again(ledger, x, old, entering, wide, shape, reason), *rest)
    deviation = ledger.scales.fresh(channels)
    ledger.scale_by(mean.name, _vector(mean.name, entering))
    shifts, out, moved = ledger.shifts.along(x.shift, 1), None, torch.zeros(channels, dtype=torch.int64)
    if isinstance(gain, Stored) and isinstance(offset, Stored):
        out = ledger.scales.fresh(channels)
        own = ledger.scales.combine((1, out), (-1, entering), (1, deviation))
        ledger.scale_by(gain.name, _vector(gain.name, own))
        ledger.scale_by(offset.name, _vector(offset.name, out))
        ledger.multiplies(gain, reason)
        moved = ledger.shifts.fresh(channels)
        ledger.add_to(offset.name, Additive(offset.name, None, ledger.shifts.fresh(channels), norm=True))
        leaving = ledger.additives[offset.name].shift
    else:
        out = ledger.scales.combine((1, entering), (-1, deviation))
        leaving = torch.zeros(channels, dtype=torch.int64)
    ledger.runnings[mean.name] = Running(*names, epsilon, deviation, shifts, moved, waiting)  # pyrefly: ignore
    return (Activation(out[wide].expand(shape), leaving[wide].expand(shape)), *rest)


def _again(
    ledger: Ledger, x: Activation, old: Running, entering: Tensor, wide: Any, shape: torch.Size, reason: str
) -> Activation:
    """A normalisation that has been seen before: what enters and leaves it is as it was then."""
    _hold(ledger, old.absorbed, f"{reason}: used twice")
    ledger.scales.tie(entering, ledger.fields[old.mean].first[0])
    ledger.shifts.tie(ledger.shifts.along(x.shift, 1), old.entering)
    if old.offset is None:
        scale, shift = ledger.scales.combine((1, entering), (-1, old.deviation)), torch.zeros_like(entering)
    else:
        scale, shift = ledger.fields[old.offset].first[0], ledger.additives[old.offset].shift
    return Activation(scale[wide].expand(shape), shift[wide].expand(shape))


def _hold(ledger: Ledger, absorbed: Absorbed | None, reason: str) -> None:
    """Constants that cannot be taken up do not move."""
    if absorbed is not None:
        ledger.shifts.pin(absorbed.shift, reason)


def _out(
    ledger: Ledger,
    node: Node,
    factors: Tensor,
    gain: Value,
    offset: Value,
    epsilon: float,
    shape: torch.Size,
    view: Sequence[int] | None = None,
) -> Activation:
    """What leaves a normalisation: the gain's scales and the offset's shifts, or none."""
    reason = ledger.where(node)
    ledger.norms.append(
        Norm(
            reason,
            ledger.epsilon_of(node, epsilon),
            epsilon,
            tuple(u for u in distinct(factors) if u != ANY),
        )
    )
    scale = shift = torch.zeros((), dtype=torch.int64)
    for value in (gain, offset):
        if isinstance(value, Activation):
            ledger.pin([value], reason)
    if isinstance(gain, Stored):
        ledger.multiplies(gain, reason)
        ledger.gains.add(gain.name)
        scale = ledger.entries(gain)
    if isinstance(offset, Stored):
        flat = scale.expand(offset.shape).reshape(-1)
        ledger.scale_by(offset.name, _vector(offset.name, flat))
        ledger.add_to(offset.name, Additive(offset.name, None, ledger.shifts.fresh(len(flat)), norm=True))
        shift = ledger.additives[offset.name].shift.view(offset.shape)
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
