"""Rules: how an operation relates the bases of what goes in and what comes out.

A rule is `rule(tensor_axes, node, *args) -> units`, with an array of units for every activation. An operation without a rule
holds what it touches, so that a missing rule can only make the group smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from isoflat.symmetry.finding.axes import CASTS, but, origin
from isoflat.symmetry.finding.bases.tensor_axes import TensorAxes, TensorAxis
from isoflat.symmetry.finding.rules.views import COPIES, MOVES, RESHAPES, lean
from isoflat.symmetry.finding.values import Known, Slice, StoredTensor

Value = Any
"""An array of units, a `Stored` tensor, a `Known` value, or what an operation takes besides."""


def held(tensor_axes: TensorAxes, node: Node, *args: Value, **kwargs: Value) -> Value:
    """An operation that is not understood, or that no mixing passes."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            tensor_axes.partition.hold(value)
        elif isinstance(value, StoredTensor | Slice):
            tensor_axes.use(value)
        elif isinstance(value, list | tuple):
            held(tensor_axes, node, *value)
    return fixed(node)


def fixed(node: Node) -> Value:
    """Nothing that comes out is mixed."""
    made = node.meta.get("val")
    if isinstance(made, Tensor):
        return _none(made.shape)
    return [_none(part.shape) if isinstance(part, Tensor) else Known(part) for part in made or ()]


def linear(tensor_axes: TensorAxes, node: Node, x: Value, weight: Value, bias: Value = None) -> Tensor:
    """`y = x Wᵀ + b`: reads its inputs' basis, writes one of its own."""
    return _contract(tensor_axes, node, x, weight, bias, (0, 1), -1)


def product(tensor_axes: TensorAxes, node: Node, x: Value, weight: Value, bias: Value = None) -> Tensor:
    """`y = x W + b`, or a product of two activations."""
    if isinstance(weight, StoredTensor | Slice) and len(weight.shape) == 2:
        return _contract(tensor_axes, node, x, weight, bias, (1, 0), -1)
    a, b = (tensor_axes.entries(value) if isinstance(value, StoredTensor | Slice) else value for value in (x, weight))
    if bias is not None and not isinstance(bias, Known):
        held(tensor_axes, node, bias)
    return _paired(tensor_axes, node, _units(a), _units(b))


def affine(
    tensor_axes: TensorAxes, node: Node, bias: Value, x: Value, weight: Value, beta: Any = 1, alpha: Any = 1
) -> Tensor:
    """`addmm` and `baddbmm`: `y = b + x W`."""
    if isinstance(weight, StoredTensor | Slice) and (beta, alpha) != (1, 1):
        return held(tensor_axes, node, bias, x, weight)
    return product(tensor_axes, node, x, weight, bias)


def convolution(
    tensor_axes: TensorAxes, node: Node, x: Value, weight: Value, bias: Value = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """`y = W ∗ x + b`, in one group: linear in the channels at every place."""
    if groups != 1 or node.meta["val"].ndim != len(getattr(weight, "shape", ())):
        return held(tensor_axes, node, x, weight, bias)
    return _contract(tensor_axes, node, x, weight, bias, (0, 1), 1)


def embedding(tensor_axes: TensorAxes, node: Node, weight: Value, index: Value, *args: Any) -> Tensor:
    """Rows of a table: vectors in its own basis."""
    if not isinstance(weight, StoredTensor):
        return held(tensor_axes, node, weight)
    units = tensor_axes.partition.fresh(weight.shape[1], ("rows", node))
    tensor_axes.use(weight, {1: TensorAxis(units, False, ("rows", weight.name))})
    return units.expand(node.meta["val"].shape)


def total(tensor_axes: TensorAxes, node: Node, a: Value, b: Value, alpha: Any = 1) -> Tensor:
    """A sum or difference: both in one basis."""
    if not isinstance(a, Tensor | StoredTensor | Slice) or not isinstance(b, Tensor | StoredTensor | Slice):
        zero = [value for value in (a, b) if not isinstance(value, Tensor | StoredTensor | Slice) and _is_zero(value)]
        return _pass(tensor_axes, node, a if isinstance(a, Tensor) else b) if zero else held(tensor_axes, node, a, b)
    a, b = (tensor_axes.entries(value) if isinstance(value, StoredTensor | Slice) else value for value in (a, b))
    tensor_axes.partition.tie(a, b)
    return torch.broadcast_tensors(a, b)[0]


def scaled(tensor_axes: TensorAxes, node: Node, a: Value, b: Value) -> Tensor:
    """A product: by something that is the same for all units, by a gain, or of a vector with itself."""
    if isinstance(a, Tensor) and a is b:
        tensor_axes.squares[node] = a
        return _none(a.shape)
    if "mul" in str(node.target):
        for gain, x, made in ((a, b, node.args[1]), (b, a, node.args[0])):
            normal = isinstance(made, Node) and origin(made) in tensor_axes.normalised
            if isinstance(gain, StoredTensor) and isinstance(x, Tensor) and normal:
                return _gained(tensor_axes, node, x, gain)
        if not isinstance(a, Tensor):
            a, b = b, a
    if not isinstance(a, Tensor) or not _uniform(b, a):
        return held(tensor_axes, node, a, b)
    if isinstance(b, Tensor):
        tensor_axes.partition.hold(b)
    elif isinstance(b, StoredTensor | Slice):
        tensor_axes.use(b)
    return a.expand(node.meta["val"].shape)


def power(tensor_axes: TensorAxes, node: Node, x: Value, exponent: Any) -> Tensor:
    """A square: a sum of all of them does not see a rotation."""
    if exponent == 2 and isinstance(x, Tensor):
        tensor_axes.squares[node] = x
        return _none(x.shape)
    return held(tensor_axes, node, x)


def averaged(tensor_axes: TensorAxes, node: Node, x: Value, dim: Any = None, *args: Any, **kwargs: Any) -> Tensor:
    """A mean or sum: over places it keeps the basis; of squares over all units it does not see rotations."""
    if not isinstance(x, Tensor):
        return held(tensor_axes, node, x)
    axes = sorted({axis % x.ndim for axis in ([dim] if isinstance(dim, int) else dim or range(x.ndim))})
    keepdim = bool(args and args[0]) or bool(kwargs.get("keepdim", False))
    source: Any = node.args[0]
    squared = tensor_axes.squares.pop(origin(source), None)
    if squared is not None and _only_read_as(source) and len(axes) == 1:
        tensor_axes.partition.turn(tensor_axes.partition.line(squared, axes[0]))
        return fixed(node)
    if squared is not None:
        tensor_axes.partition.hold(squared)
        return fixed(node)
    units = tensor_axes.partition.along(x, *(axis for axis in range(x.ndim) if axis not in axes))
    for axis in axes if keepdim else ():
        units = units.unsqueeze(axis)
    return units


def layer_norm(
    tensor_axes: TensorAxes,
    node: Node,
    x: Value,
    shape: Sequence[int],
    gain: Value = None,
    offset: Value = None,
    *args: Any,
) -> Value:
    """LayerNorm over the last axis: rotations that leave the mean alone pass, if the gain goes into what reads it."""
    return _normed(tensor_axes, node, x, shape, gain, offset, centred=True)


def rms_norm(
    tensor_axes: TensorAxes, node: Node, x: Value, shape: Sequence[int], gain: Value = None, *args: Any
) -> Value:
    """RMSNorm over the last axis: rotations pass."""
    return _normed(tensor_axes, node, x, shape, gain, None, centred=False)


def attention(
    tensor_axes: TensorAxes, node: Node, query: Value, key: Value, value: Value, mask: Value = None, drop: float = 0.0,
    causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`softmax(q kᵀ + mask) v`: queries in the dual basis of the keys; values pass."""
    q, k, v = map(_units, (query, key, value))
    if isinstance(mask, Tensor | StoredTensor):
        held(tensor_axes, node, mask)
    if enable_gqa:
        k, v = (part.repeat_interleave(q.shape[-3] // part.shape[-3], dim=-3) for part in (k, v))
    queries, keys, values = (tensor_axes.partition.along(part, *but(part, -2)) for part in (q, k, v))
    for part in (queries, keys, values):
        tensor_axes.partition.apart(part, -1)
    tensor_axes.partition.tie(queries, keys, dual=True)
    return values[..., None, :].expand(node.meta["val"].shape)


def moved(tensor_axes: TensorAxes, node: Node, x: Value, *args: Value, **kwargs: Value) -> Value:
    """Operations that only move elements about: the same operation moves their units."""
    if isinstance(x, StoredTensor | Slice) and str(node.target) in COPIES | CASTS:
        return x
    if isinstance(x, StoredTensor) and str(node.target) in _CUTS and (parts := _cut(node, x)) is not None:
        return parts
    if any(isinstance(value, Tensor | StoredTensor | Slice) for value in (*args, *kwargs.values())):
        return held(tensor_axes, node, x, *args)  # an index that depends on the input
    x = tensor_axes.entries(x) if isinstance(x, StoredTensor | Slice) else x
    if str(node.target) in COPIES | CASTS:
        return x
    if str(node.target) in RESHAPES:
        return lean(x.reshape(node.meta["val"].shape))
    operation: Any = node.target
    rest = [value.value if isinstance(value, Known) else value for value in args]
    return operation(x, *rest, **{k: v.value if isinstance(v, Known) else v for k, v in kwargs.items()})


def joined(tensor_axes: TensorAxes, node: Node, parts: list[Value], dim: int = 0) -> Tensor:
    """Side by side."""
    operation: Any = node.target
    return operation(
        [tensor_axes.entries(part) if isinstance(part, StoredTensor | Slice) else _units(part) for part in parts], dim
    )


def negative(tensor_axes: TensorAxes, node: Node, x: Value) -> Tensor:
    """`−x`, in the same basis."""
    return x if isinstance(x, Tensor) else held(tensor_axes, node, x)


def _contract(
    tensor_axes: TensorAxes, node: Node, x: Value, weight: Value, bias: Value, axes: tuple[int, int], axis: int
) -> Tensor:
    """A contraction with a stored weight: `axes` are those of its outputs and inputs, `axis` the activation's."""
    if not isinstance(weight, StoredTensor | Slice) or not isinstance(x, Tensor):
        return held(tensor_axes, node, x, weight, bias)
    rows, shape = weight.shape[axes[0]], node.meta["val"].shape
    source = node.args[1] if "add" in str(node.target) else node.args[0]
    simple = bias is None or (isinstance(bias, StoredTensor | Slice) and tuple(bias.shape) == (rows,))
    # Outputs of one input side by side may be mixed, by weights that are seen alike.
    alike = (source, tuple(weight.shape[2:]), *map(str, node.args[3:]), bias is None)
    units = tensor_axes.partition.fresh(rows, alike)
    reads = TensorAxis(tensor_axes.partition.line(x, axis), True, ("reads", node))
    writes = TensorAxis(units, False, ("writes", alike))
    tensor_axes.use(weight, {axes[0]: writes, axes[1]: reads})
    if isinstance(bias, StoredTensor | Slice) and simple:
        tensor_axes.use(bias, {0: TensorAxis(units, False, ("offsets", alike))})
    elif not simple:
        tensor_axes.partition.hold(units)
        held(tensor_axes, node, bias)
    return units.view(-1, *[1] * (len(shape) - 2 if axis == 1 else 0)).expand(shape)


def _paired(tensor_axes: TensorAxes, node: Node, a: Tensor, b: Tensor) -> Tensor:
    """`Σ_k a[…, n, k] b[…, k, m]`: units along k against each other, or weights that mix places of the other."""
    if min(a.ndim, b.ndim) < 2:
        return held(tensor_axes, node, a, b)
    if not bool(a.any()) or not bool(b.any()):
        other, over = (b, -2) if bool(b.any()) else (a, -1)
        if not bool(other.any()) or lean(other).stride(over % other.ndim):
            return held(tensor_axes, node, a, b)
        units = tensor_axes.partition.along(other, *but(other, over))
        tensor_axes.partition.apart(units, -1)
        return units.unsqueeze(over).expand(node.meta["val"].shape)
    queries, keys = tensor_axes.partition.along(a, *but(a, -2)), tensor_axes.partition.along(b, *but(b, -1))
    tensor_axes.partition.apart(queries, -1)
    tensor_axes.partition.apart(keys, -1)
    tensor_axes.partition.tie(queries, keys, dual=True)
    return fixed(node)


def _normed(
    tensor_axes: TensorAxes, node: Node, x: Value, shape: Sequence[int], gain: Value, offset: Value, centred: bool
) -> Value:
    several = not isinstance(node.meta["val"], Tensor)
    plain = all(part is None or isinstance(part, StoredTensor) for part in (gain, offset))
    if not isinstance(x, Tensor) or len(shape) != 1 or not plain:
        return held(tensor_axes, node, x, gain, offset)
    units = tensor_axes.partition.line(x, -1)
    tensor_axes.partition.turn(units, centred)
    if isinstance(gain, StoredTensor):
        if gain.name not in tensor_axes.foldable:
            return held(tensor_axes, node, x, gain, offset)
        tensor_axes.use(gain)
        units = tensor_axes.through(gain, units)
    if isinstance(offset, StoredTensor):
        tensor_axes.use(offset, {0: TensorAxis(units, False, ("offsets", offset.name))})
    made = units.expand(x.shape)
    return [made, *fixed(node)[1:]] if several else made


def _gained(tensor_axes: TensorAxes, node: Node, x: Tensor, gain: StoredTensor) -> Tensor:
    """A gain after a normalisation written by hand."""
    if gain.name not in tensor_axes.foldable or len(gain.shape) != 1:
        return held(tensor_axes, node, x, gain)
    tensor_axes.use(gain)
    return tensor_axes.through(gain, tensor_axes.partition.line(x, -1)).expand(x.shape)


_CUTS = {
    "aten.slice.Tensor",
    "aten.narrow.default",
    "aten.split.Tensor",
    "aten.split_with_sizes.default",
    "aten.chunk.default",
}


def _cut(node: Node, x: StoredTensor) -> Value:
    """Parts of a stored tensor along one axis; None where they are not consecutive slices."""
    operation: Any = node.target
    places = {"aten.slice.Tensor": 1, "aten.narrow.default": 1}
    place = places.get(str(node.target), 2)
    args: list[Any] = list(node.args)
    axis = int(args[place]) % len(x.shape) if len(args) > place else 0
    args[0] = torch.arange(x.shape[axis])
    args[place : place + 1] = [0]
    made = operation(*args)
    parts = [made] if isinstance(made, Tensor) else list(made)

    def part(indices: Tensor) -> Slice:
        shape = torch.Size(len(indices) if place == axis else n for place, n in enumerate(x.shape))
        return Slice(x.name, shape, axis, int(indices[0]))

    if not all(len(p) and bool((p.diff() == 1).all()) for p in parts):
        return None
    return part(made) if isinstance(made, Tensor) else [part(p) for p in parts]


def _pass(tensor_axes: TensorAxes, node: Node, x: Value) -> Tensor:
    x = tensor_axes.entries(x) if isinstance(x, StoredTensor | Slice) else x
    return x.expand(node.meta["val"].shape)


def _units(value: Value) -> Tensor:
    """Units of an activation; none of what is known."""
    return value if isinstance(value, Tensor) else _none(torch.as_tensor(value.value).shape)


def _uniform(factor: Value, x: Tensor) -> bool:
    """Test whether a factor is the same along every axis along which units differ."""
    if isinstance(factor, StoredTensor | Slice | Tensor):
        shape: Sequence[int] = factor.shape
    else:
        content = torch.as_tensor(factor.value if isinstance(factor, Known) else factor)
        shape = [
            1 if bool((content == content.narrow(axis, 0, 1)).all()) else n for axis, n in enumerate(content.shape)
        ]
    units = lean(x)
    wide = [1] * (x.ndim - len(shape)) + list(shape)[max(0, len(shape) - x.ndim) :]
    return len(shape) <= x.ndim and all(
        n == 1 or not units.stride(axis) or x.shape[axis] == 1 for axis, n in enumerate(wide)
    )


def _is_zero(value: Value) -> bool:
    content = value.value if isinstance(value, Known) else value
    return bool((torch.as_tensor(content) == 0).all())


def _only_read_as(node: Node) -> bool:
    """Test whether nothing reads a node but the one after it, nor what it was cast or copied from."""
    first = origin(node)
    while node is not first:
        if len(node.users) != 1:
            return False
        node = node.args[0]  # pyrefly: ignore
    return len(first.users) == 1


def _none(shape: Sequence[int]) -> Tensor:
    return torch.zeros((), dtype=torch.int64).expand(tuple(shape))


RULES: dict[str, Callable[..., Value]] = {
    **dict.fromkeys((*MOVES, *COPIES, *CASTS), moved),
    "aten.linear.default": linear,
    "aten.matmul.default": product,
    "aten.mm.default": product,
    "aten.bmm.default": product,
    "aten.addmm.default": affine,
    "aten.baddbmm.default": affine,
    "aten.scaled_dot_product_attention.default": attention,
    "aten.conv1d.default": convolution,
    "aten.conv2d.default": convolution,
    "aten.conv3d.default": convolution,
    "aten.conv1d.padding": convolution,
    "aten.conv2d.padding": convolution,
    "aten.embedding.default": embedding,
    "aten.add.Tensor": total,
    "aten.sub.Tensor": total,
    "aten.mul.Tensor": scaled,
    "aten.mul.Scalar": scaled,
    "aten.div.Tensor": scaled,
    "aten.div.Scalar": scaled,
    "aten.neg.default": negative,
    "aten.pow.Tensor_Scalar": power,
    "aten.square.default": lambda tensor_axes, node, x: power(tensor_axes, node, x, 2),
    "aten.mean.dim": averaged,
    "aten.sum.dim_IntList": averaged,
    "aten.layer_norm.default": layer_norm,
    "aten.native_layer_norm.default": layer_norm,
    "aten.rms_norm.default": rms_norm,
    "aten.cat.default": joined,
    "aten.stack.default": joined,
}
