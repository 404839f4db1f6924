"""Contractions with weights: a unit's row scales with it, its column against it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from isoflat.symmetry.finding.averages import average
from isoflat.symmetry.finding.axes import but, masked_softmax, sums_to_one
from isoflat.symmetry.finding.constraints import Constraints
from isoflat.symmetry.finding.values import Activation, StoredTensor, Value, shifted_only
from isoflat.symmetry.motions import Absorbed, Additive, Field
from isoflat.symmetry.relations import ANY

TERMS = 1 << 22
"""Terms of a product of two activations up to which they are related one by one."""


def linear(constraints: Constraints, node: Node, x: Value, weight: Value, bias: Value = None) -> Activation:
    """`y = x Wᵀ + b`."""
    x = constraints.activation(x, constraints.where(node))
    if not isinstance(weight, StoredTensor):
        made = constraints.activation(weight, "")
        turned = Activation(made.scale.mT, made.shift.mT)
        return _with_bias(constraints, node, contraction(constraints, node, x, turned), bias)
    rows, columns = weight.shape
    out = _weigh(constraints, node, weight, (1, rows, columns, 1), constraints.scales.along(x.scale, -1)[None])
    shift = _shift(
        constraints, node, weight, (1, rows, columns, 1), constraints.shifts.along(x.shift, -1)[None], out, bias
    )
    shape = (*x.shape[:-1], rows)
    return Activation(out.reshape(-1).expand(shape), shift.reshape(-1).expand(shape))


def convolution(
    constraints: Constraints,
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
    reason = constraints.where(node)
    out_shape = node.meta["val"].shape
    if not isinstance(weight, StoredTensor) or len(out_shape) != len(weight.shape):
        constraints.pin([x, weight, bias], reason)
        return shifted_only(out_shape)
    x = constraints.activation(x, reason)
    rows, columns = weight.shape[0] // groups, weight.shape[1]
    view = (groups, rows, columns, math.prod(weight.shape[2:]))
    out = _weigh(constraints, node, weight, view, constraints.scales.along(x.scale, 1).view(groups, columns))
    shift = constraints.shifts.along(x.shift, 1)
    if padding not in (0, [0], [0, 0], [0, 0, 0], "valid"):
        constraints.shifts.pin(shift, f"{reason}: zero padding")
    moved = _shift(constraints, node, weight, view, shift.view(groups, columns), out, bias)
    return Activation(*(ids.reshape(-1)[:, *[None] * (len(out_shape) - 2)].expand(out_shape) for ids in (out, moved)))


def transposed(
    constraints: Constraints,
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
    reason = constraints.where(node)
    out_shape = node.meta["val"].shape
    if not isinstance(weight, StoredTensor) or len(out_shape) != len(weight.shape):
        constraints.pin([x, weight, bias], reason)
        return shifted_only(out_shape)
    x = constraints.activation(x, reason)
    constraints.no_shift(reason, x)
    columns, rows = weight.shape[0] // groups, weight.shape[1]
    constraints.multiplies(weight, reason)
    out = constraints.scales.fresh(groups * rows).view(groups, rows)
    entering = constraints.scales.combine((-1, constraints.scales.along(x.scale, 1).view(groups, columns)))
    view = (groups, columns, rows, math.prod(weight.shape[2:]))
    constraints.scale_by(weight.name, Field(weight.name, view, entering, out, 1))
    shift = _offset(constraints, node, out, bias)
    return Activation(*(ids.reshape(-1)[:, *[None] * (len(out_shape) - 2)].expand(out_shape) for ids in (out, shift)))


def product(constraints: Constraints, node: Node, x: Value, weight: Value, bias: Value = None) -> Activation:
    """`y = x W + b`, with a weight that holds its inputs first."""
    reason = constraints.where(node)
    if not isinstance(weight, StoredTensor) or len(weight.shape) != 2 or isinstance(x, StoredTensor):
        constraints.multiplies(x, reason)
        constraints.multiplies(weight, reason)
        a, b = constraints.activation(x, reason), constraints.activation(weight, reason)
        return _with_bias(constraints, node, contraction(constraints, node, a, b), bias)
    x = constraints.activation(x, reason)
    columns, rows = weight.shape
    constraints.multiplies(weight, reason)
    out = constraints.scales.fresh(rows)[None]
    against = constraints.scales.combine((-1, constraints.scales.along(x.scale, -1)[None]))
    constraints.scale_by(weight.name, Field(weight.name, (1, columns, rows, 1), against, out, 1))
    constants = constraints.shifts.along(x.shift, -1)[None]
    simple = isinstance(bias, StoredTensor) and tuple(bias.shape) == (rows,)
    own = bias if simple else None
    shift = _shift(constraints, node, weight, (1, rows, columns, 1), constants, out, own, turned=True)
    shape = (*x.shape[:-1], rows)
    made = Activation(out.reshape(-1).expand(shape), shift.reshape(-1).expand(shape))
    return made if simple else _with_bias(constraints, node, made, bias)


def affine(
    constraints: Constraints, node: Node, bias: Value, x: Value, weight: Value, beta: Any = 1, alpha: Any = 1
) -> Value:
    """`addmm`: `y = b + x W`."""
    if (beta, alpha) != (1, 1):
        return _pinned(constraints, node, bias, x, weight)
    return product(constraints, node, x, weight, bias)


def offset_product(
    constraints: Constraints, node: Node, bias: Value, x: Value, weight: Value, beta: Any = 1, alpha: Any = 1
) -> Value:
    """`baddbmm`: `y = β b + α x W`, as attention with a mask is sometimes written."""
    made = contraction(constraints, node, constraints.activation(x, ""), constraints.activation(weight, ""))
    return _with_bias(constraints, node, made, bias)


def contraction(constraints: Constraints, node: Node, a: Activation, b: Activation) -> Activation:
    """`y[…, n, m] = Σ_k a[…, n, k] b[…, k, m]`: every term of a sum has one scale.

    Constants of b pass where the entries of a add up to one (attention's values), and do not matter where everything
    that reads y is blind to what is common along m (attention's keys); likewise for a.
    """
    reason = constraints.where(node)
    shape = node.meta["val"].shape
    left, right = (value.scale for value in (a, b))
    left = left[None] if left.ndim == 1 else left
    right = right[:, None] if right.ndim == 1 else right
    tall = [ids.size(axis) if ids.stride(axis) else 1 for ids, axis in ((left, -2), (right, -1))]
    if math.prod(torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])) * math.prod(tall) * left.shape[-1] > TERMS:
        constraints.pin([a, b], f"{reason}: more than {TERMS} products")
        return shifted_only(shape)
    terms = constraints.scales.combine((1, left[..., None]), (1, right[..., None, :, :]))
    out = constraints.scales.along(terms, *but(terms, -2))
    return Activation(
        out.reshape(shape) if out.shape != shape else out, _through(constraints, node, a, b).expand(shape)
    )


def _through(constraints: Constraints, node: Node, a: Activation, b: Activation) -> Tensor:
    """Constants that a product of two activations lets through; the others are held, or forgotten by its readers."""
    reason, none = constraints.where(node), torch.zeros((), dtype=torch.int64)
    if min(len(a.shape), len(b.shape), node.meta["val"].ndim) < 2:
        constraints.no_shift(reason, a, b)
        return none
    first = node.args[-2]
    if isinstance(first, Node) and sums_to_one(first) == len(a.shape) - 1:
        constraints.no_shift(reason, a)
        passing = constraints.shifts.along(b.shift, *but(b.shift, -2))
        if (weights := masked_softmax(first)) is not None:
            average(constraints, node, weights, passing)
        return passing[..., None, :]
    for value, axis in ((a, -2), (b, -1)):
        if constraints.forgets(node, axis):
            constraints.shifts.along(value.shift, *but(value.shift, axis))
        else:
            constraints.no_shift(reason, value)
    return none


def attention(
    constraints: Constraints, node: Node, query: Value, key: Value, value: Value, mask: Value = None, drop: float = 0.0,
    causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Activation:  # fmt: skip
    """`softmax(q kᵀ + mask) v`: queries against keys, values through; constants of keys are forgotten."""
    reason = constraints.where(node)
    q, k, v = (constraints.activation(part, reason) for part in (query, key, value))
    if enable_gqa:
        k, v = (_repeated(part, q.shape[-3] // part.shape[-3]) for part in (k, v))
    constraints.no_shift(reason, q)
    queries, keys, values = (constraints.scales.along(part.scale, *but(part.scale, -2)) for part in (q, k, v))
    constraints.scales.pin(constraints.scales.combine((1, queries), (1, keys)), reason)
    constraints.shifts.along(k.shift, *but(k.shift, -2))
    if isinstance(mask, Activation | StoredTensor):
        bias = constraints.activation(mask, reason)
        constraints.scales.pin(bias.scale, reason)
        constraints.shifts.along(bias.shift, *but(bias.shift, -1))
    shape = node.meta["val"].shape
    constants = constraints.shifts.along(v.shift, *but(v.shift, -2))
    place = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if isinstance(place, Node) and not isinstance(mask, StoredTensor):  # a stored one is finite: every row keeps a key
        average(constraints, node, place, constants, mask)
    return Activation(values[..., None, :].expand(shape), constants[..., None, :].expand(shape))


def _repeated(value: Activation, times: int) -> Activation:
    """Key or value heads, each for several query heads."""
    return Activation(*(ids.repeat_interleave(times, dim=-3) for ids in (value.scale, value.shift)))


def embedding(
    constraints: Constraints,
    node: Node,
    weight: Value,
    index: Value,
    padding: int = -1,
    by_frequency: bool = False,
    sparse: bool = False,
) -> Value:
    """Rows of a table: which ones depends on the input, so all rows scale and shift alike."""
    shape = node.meta["val"].shape
    if not isinstance(weight, StoredTensor):
        constraints.pin([weight], constraints.where(node))
        return shifted_only(shape)
    rows, columns = weight.shape
    out = constraints.scales.fresh(columns)
    zero = torch.zeros(1, 1, dtype=torch.int64)
    constraints.scale_by(weight.name, Field(weight.name, (1, rows, columns, 1), zero, out[None], 1))
    shift = constraints.shifts.fresh(columns)
    constraints.add_to(weight.name, Additive(weight.name, 1, shift))
    if padding >= 0:
        constraints.shifts.pin(shift, f"{constraints.where(node)}: a padding row stays zero")
    return Activation(out.expand(shape), shift.expand(shape))


def _weigh(
    constraints: Constraints, node: Node, weight: StoredTensor, view: tuple[int, int, int, int], entering: Tensor
) -> Tensor:
    """A weight that multiplies: `s(W) = s(y) − s(x)`; the new units, shape `(groups, rows)`."""
    if not _forgotten(constraints, node):
        constraints.multiplies(weight, constraints.where(node))
    out = constraints.scales.fresh(view[0] * view[1]).view(view[:2])
    constraints.scale_by(weight.name, Field(weight.name, view, out, entering))
    return out


def _forgotten(constraints: Constraints, node: Node) -> bool:
    """Test whether a vector added to all rows of a linear map does not matter: a head's, where the loss ignores it."""
    return "linear" in str(node.target) and constraints.forgets(node, -1)


def _shift(
    constraints: Constraints,
    node: Node,
    weight: StoredTensor,
    view: tuple[int, int, int, int],
    entering: Tensor,
    out: Tensor,
    bias: Value,
    turned: bool = False,
) -> Tensor:
    """Constants after a contraction: the bias takes `−W t(x)` and gives what it likes; without one, the running means do."""
    if bias is None and node.users and all(constraints.centred(user) and user.args[0] is node for user in node.users):
        constraints.pending[node] = Absorbed(weight.name, view, entering, turned)
        return torch.zeros_like(out)
    if not isinstance(bias, StoredTensor) or math.prod(bias.shape) != out.numel():
        constraints.shifts.pin(entering, f"{constraints.where(node)}: no bias")
        return _offset(constraints, node, out, bias)
    _scaled_like(constraints, bias, out)
    shift = constraints.shifts.fresh(out.numel())
    absorbed = Absorbed(weight.name, view, entering, turned)
    return constraints.added(Additive(bias.name, None, shift, absorbed)).view(out.shape)


def _offset(constraints: Constraints, node: Node, out: Tensor, bias: Value) -> Tensor:
    """The shift of a bias that absorbs nothing, shape of `out`."""
    if bias is None:
        return torch.zeros_like(out)
    if not isinstance(bias, StoredTensor) or math.prod(bias.shape) != out.numel():
        value = constraints.activation(bias, "")
        constraints.scales.tie(out.reshape(-1), value.scale)
        return value.shift.expand(out.numel()).reshape(out.shape)
    _scaled_like(constraints, bias, out)
    return constraints.added(Additive(bias.name, None, constraints.shifts.fresh(out.numel()))).view(out.shape)


def _scaled_like(constraints: Constraints, bias: StoredTensor, out: Tensor) -> None:
    constraints.scale_by(bias.name, Field(bias.name, (1, out.numel(), 1, 1), out.reshape(1, -1)))


def _with_bias(constraints: Constraints, node: Node, y: Activation, bias: Value) -> Activation:
    if bias is None:
        return y
    if isinstance(bias, StoredTensor) and tuple(bias.shape) == (y.shape[-1],):
        return Activation(
            y.scale, _offset(constraints, node, constraints.scales.along(y.scale, -1), bias).expand(y.shape)
        )
    value = constraints.activation(bias, constraints.where(node))
    constraints.scales.tie(y.scale, value.scale)
    scale = torch.where(y.scale == ANY, value.scale, y.scale)
    return Activation(scale, constraints.shifts.combine((1, y.shift), (1, value.shift)))


def _pinned(constraints: Constraints, node: Node, *values: Value) -> Activation:
    constraints.pin(values, constraints.where(node))
    return shifted_only(node.meta["val"].shape)


def general(
    constraints: Constraints, node: Node, x: Value, weight: Value, bias: Value, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], turned: bool, extra: Sequence[int], groups: int,
) -> Value:  # fmt: skip
    """`aten.convolution`."""
    if turned:
        return transposed(constraints, node, x, weight, bias, stride, padding, extra, groups, dilation)
    zero = [0] * len(padding)
    return convolution(
        constraints, node, x, weight, bias, stride, 0 if list(padding) == zero else padding, dilation, groups
    )


RULES = {
    "aten.linear.default": linear,
    "aten.matmul.default": product,
    "aten.mm.default": product,
    "aten.bmm.default": product,
    "aten.addmm.default": affine,
    "aten.baddbmm.default": offset_product,
    "aten.scaled_dot_product_attention.default": attention,
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
