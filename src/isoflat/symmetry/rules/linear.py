"""Contractions with weights: a unit's row scales with it, its column against it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from isoflat.symmetry.ledger import ENTRYWISE, Absorbed, Additive, Field, Ledger
from isoflat.symmetry.relations import ANY
from isoflat.symmetry.values import Activation, Stored, Value, shifted_only


def linear(ledger: Ledger, node: Node, x: Value, weight: Value, bias: Value = None) -> Activation:
    """`y = x Wᵀ + b`."""
    x = ledger.activation(x, ledger.where(node))
    if not isinstance(weight, Stored):
        return _with_bias(ledger, node, contraction(ledger, node, x, ledger.activation(weight, "")), bias)
    rows, columns = weight.shape
    out = _weigh(ledger, node, weight, (1, rows, columns, 1), ledger.scales.along(x.scale, -1)[None])
    shift = _shift(ledger, node, weight, (1, rows, columns, 1), ledger.shifts.along(x.shift, -1)[None], out, bias)
    shape = (*x.shape[:-1], rows)
    return Activation(out.reshape(-1).expand(shape), shift.reshape(-1).expand(shape))


def convolution(
    ledger: Ledger,
    node: Node,
    x: Value,
    weight: Value,
    bias: Value = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    """`y = W ∗ x + b`, in groups; padding with zeros cannot take a constant."""
    reason = ledger.where(node)
    out_shape = node.meta["val"].shape
    if not isinstance(weight, Stored) or len(out_shape) != len(weight.shape):
        ledger.pin([x, weight, bias], reason)
        return shifted_only(out_shape)
    x = ledger.activation(x, reason)
    rows, columns = weight.shape[0] // groups, weight.shape[1]
    view = (groups, rows, columns, math.prod(weight.shape[2:]))
    out = _weigh(ledger, node, weight, view, ledger.scales.along(x.scale, 1).view(groups, columns))
    shift = ledger.shifts.along(x.shift, 1)
    if padding not in (0, [0], [0, 0], [0, 0, 0], "valid"):
        ledger.shifts.pin(shift, f"{reason}: zero padding")
    moved = _shift(ledger, node, weight, view, shift.view(groups, columns), out, bias)
    return Activation(*(ids.reshape(-1)[:, *[None] * (len(out_shape) - 2)].expand(out_shape) for ids in (out, moved)))


def transposed(
    ledger: Ledger,
    node: Node,
    x: Value,
    weight: Value,
    bias: Value = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Value:
    """Transposed convolution: the weight's first axis is the input's. How many inputs reach a pixel varies: no shift."""
    reason = ledger.where(node)
    out_shape = node.meta["val"].shape
    if not isinstance(weight, Stored) or len(out_shape) != len(weight.shape):
        ledger.pin([x, weight, bias], reason)
        return shifted_only(out_shape)
    x = ledger.activation(x, reason)
    ledger.no_shift(reason, x)
    columns, rows = weight.shape[0] // groups, weight.shape[1]
    ledger.multiplies(weight, reason)
    out = ledger.scales.fresh(groups * rows).view(groups, rows)
    entering = ledger.scales.combine((-1, ledger.scales.along(x.scale, 1).view(groups, columns)))
    view = (groups, columns, rows, math.prod(weight.shape[2:]))
    ledger.scale_by(weight.name, Field(weight.name, view, entering, out, 1))
    shift = _offset(ledger, node, out, bias)
    return Activation(*(ids.reshape(-1)[:, *[None] * (len(out_shape) - 2)].expand(out_shape) for ids in (out, shift)))


def product(ledger: Ledger, node: Node, x: Value, weight: Value) -> Activation:
    """`y = x W`."""
    reason = ledger.where(node)
    if isinstance(weight, Stored) and len(weight.shape) == 2 and not isinstance(x, Stored):
        x = ledger.activation(x, reason)
        ledger.no_shift(f"{reason}: no bias", x)
        ledger.multiplies(weight, reason)
        out = ledger.scales.fresh(weight.shape[1])
        entering = ledger.scales.combine((-1, ledger.scales.along(x.scale, -1)))
        view = (1, weight.shape[0], weight.shape[1], 1)
        ledger.scale_by(weight.name, Field(weight.name, view, entering[None], out[None], 1))
        shape = (*x.shape[:-1], weight.shape[1])
        return Activation(out.expand(shape), torch.zeros((), dtype=torch.int64).expand(shape))
    a, b = ledger.activation(x, reason), ledger.activation(weight, reason)
    ledger.multiplies(x, reason)
    ledger.multiplies(weight, reason)
    if len(b.shape) != 2:
        ledger.pin([x, a, weight, b], reason)
        return shifted_only(node.meta["val"].shape)
    return contraction(ledger, node, a, Activation(b.scale.T, b.shift.T))


def affine(ledger: Ledger, node: Node, bias: Value, x: Value, weight: Value, beta: Any = 1, alpha: Any = 1) -> Value:
    """`addmm`: `y = b + x W`."""
    made = product(ledger, node, x, weight)
    return _with_bias(ledger, node, made, bias) if (beta, alpha) == (1, 1) else _pinned(ledger, node, made, bias)


def contraction(ledger: Ledger, node: Node, x: Activation, weight: Activation) -> Activation:
    """`y[…, o] = Σ_i x[…, i] w[o, i]`, with a weight that is itself computed: every term of a sum has one scale."""
    reason = ledger.where(node)
    shape = (*x.shape[:-1], weight.shape[0])
    ledger.no_shift(reason, x, weight)
    if math.prod(weight.shape) > ENTRYWISE:
        ledger.pin([x, weight], f"{reason}: more than {ENTRYWISE} products")
        return shifted_only(shape)
    entering = ledger.scales.along(x.scale, -1)
    out = ledger.scales.along(ledger.scales.combine((1, entering[None, :]), (1, weight.scale)), 0)
    return Activation(out.expand(shape), torch.zeros((), dtype=torch.int64).expand(shape))


def embedding(
    ledger: Ledger,
    node: Node,
    weight: Value,
    index: Value,
    padding: int = -1,
    by_frequency: bool = False,
    sparse: bool = False,
) -> Value:
    """Rows of a table: which ones depends on the input, so all rows scale and shift alike."""
    shape = node.meta["val"].shape
    if not isinstance(weight, Stored):
        ledger.pin([weight], ledger.where(node))
        return shifted_only(shape)
    rows, columns = weight.shape
    out = ledger.scales.fresh(columns)
    zero = torch.zeros(1, 1, dtype=torch.int64)
    ledger.scale_by(weight.name, Field(weight.name, (1, rows, columns, 1), zero, out[None], 1))
    shift = ledger.shifts.fresh(columns)
    ledger.add_to(weight.name, Additive(weight.name, 1, shift))
    if padding >= 0:
        ledger.shifts.pin(shift, f"{ledger.where(node)}: a padding row stays zero")
    return Activation(out.expand(shape), shift.expand(shape))


def _weigh(ledger: Ledger, node: Node, weight: Stored, view: tuple[int, int, int, int], entering: Tensor) -> Tensor:
    """A weight that multiplies: `s(W) = s(y) − s(x)`; the new units, shape `(groups, rows)`."""
    ledger.multiplies(weight, ledger.where(node))
    out = ledger.scales.fresh(view[0] * view[1]).view(view[:2])
    ledger.scale_by(weight.name, Field(weight.name, view, out, entering))
    return out


def _shift(
    ledger: Ledger,
    node: Node,
    weight: Stored,
    view: tuple[int, int, int, int],
    entering: Tensor,
    out: Tensor,
    bias: Value,
) -> Tensor:
    """Constants after a contraction: the bias takes `−W t(x)` and gives what it likes; without one, the running means do."""
    if bias is None and node.users and all(ledger.centred(user) and user.args[0] is node for user in node.users):
        ledger.pending[node] = Absorbed(weight.name, view, entering)
        return torch.zeros_like(out)
    if not isinstance(bias, Stored) or math.prod(bias.shape) != out.numel():
        ledger.shifts.pin(entering, f"{ledger.where(node)}: no bias")
        return _offset(ledger, node, out, bias)
    _scaled_like(ledger, bias, out)
    shift = ledger.shifts.fresh(out.numel())
    ledger.add_to(bias.name, Additive(bias.name, None, shift, Absorbed(weight.name, view, entering)))
    return ledger.additives[bias.name].shift.view(out.shape)


def _offset(ledger: Ledger, node: Node, out: Tensor, bias: Value) -> Tensor:
    """The shift of a bias that absorbs nothing, shape of `out`."""
    if bias is None:
        return torch.zeros_like(out)
    if not isinstance(bias, Stored) or math.prod(bias.shape) != out.numel():
        value = ledger.activation(bias, "")
        ledger.scales.tie(out.reshape(-1), value.scale)
        return value.shift.expand(out.numel()).reshape(out.shape)
    _scaled_like(ledger, bias, out)
    ledger.add_to(bias.name, Additive(bias.name, None, ledger.shifts.fresh(out.numel())))
    return ledger.additives[bias.name].shift.view(out.shape)


def _scaled_like(ledger: Ledger, bias: Stored, out: Tensor) -> None:
    ledger.scale_by(bias.name, Field(bias.name, (1, out.numel(), 1, 1), out.reshape(1, -1)))


def _with_bias(ledger: Ledger, node: Node, y: Activation, bias: Value) -> Activation:
    if bias is None:
        return y
    if isinstance(bias, Stored) and tuple(bias.shape) == (y.shape[-1],):
        return Activation(y.scale, _offset(ledger, node, ledger.scales.along(y.scale, -1), bias).expand(y.shape))
    value = ledger.activation(bias, ledger.where(node))
    ledger.scales.tie(y.scale, value.scale)
    scale = torch.where(y.scale == ANY, value.scale, y.scale)
    return Activation(scale, ledger.shifts.combine((1, y.shift), (1, value.shift)))


def _pinned(ledger: Ledger, node: Node, *values: Value) -> Activation:
    ledger.pin(values, ledger.where(node))
    return shifted_only(node.meta["val"].shape)


def general(
    ledger: Ledger, node: Node, x: Value, weight: Value, bias: Value, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], turned: bool, extra: Sequence[int], groups: int,
) -> Value:  # fmt: skip
    """`aten.convolution`."""
    if turned:
        return transposed(ledger, node, x, weight, bias, stride, padding, extra, groups, dilation)
    zero = [0] * len(padding)
    return convolution(ledger, node, x, weight, bias, stride, 0 if list(padding) == zero else padding, dilation, groups)


RULES = {
    "aten.linear.default": linear,
    "aten.matmul.default": product,
    "aten.mm.default": product,
    "aten.addmm.default": affine,
    "aten.conv1d.default": convolution,
    "aten.conv2d.default": convolution,
    "aten.conv3d.default": convolution,
    "aten.conv1d.padding": convolution,
    "aten.conv2d.padding": convolution,
    "aten.conv3d.padding": convolution,
    "aten.convolution.default": general,
    "aten.conv_transpose1d.default": transposed,
    "aten.conv_transpose2d.input": transposed,
    "aten.conv_transpose3d.input": transposed,
    "aten.embedding.default": embedding,
}
