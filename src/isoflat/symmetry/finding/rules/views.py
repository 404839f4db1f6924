"""Operations that only move elements about: the same operation moves their unknowns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from isoflat.symmetry.finding.constraints import Constraints
from isoflat.symmetry.finding.values import Activation, Known, StoredTensor, Value, shifted_only


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Known) else value


def same(constraints: Constraints, node: Node, x: Value, *args: Any, **kwargs: Any) -> Value:
    """The operation itself, on the unknowns of an activation; what only copies keeps a stored tensor as it is."""
    if isinstance(x, StoredTensor) and str(node.target) in COPIES:
        return x
    value = constraints.activation(x, constraints.where(node))
    if str(node.target) in COPIES:
        return value
    if str(node.target) in RESHAPES:  # unknowns are expanded where activations are not: no view of them may exist
        return Activation(*(lean(ids.reshape(node.meta["val"].shape)) for ids in (value.scale, value.shift)))
    operation: Any = node.target
    rest, named = [_plain(a) for a in args], {key: _plain(a) for key, a in kwargs.items()}
    if any(isinstance(a, Activation | StoredTensor) for a in (*rest, *named.values())):
        return _forget(constraints, node, value)  # an index that depends on the input
    scales, shifts = (operation(ids, *rest, **named) for ids in (value.scale, value.shift))
    if isinstance(scales, Tensor):
        return Activation(scales, shifts)
    return tuple(Activation(a, b) for a, b in zip(scales, shifts, strict=True))


def lean(ids: Tensor) -> Tensor:
    """The same ids, expanded (stride 0) along every axis over which they repeat: merging axes writes them out."""
    for axis in range(ids.ndim):
        first = ids.narrow(axis, 0, min(1, ids.shape[axis]))
        if ids.stride(axis) and ids.shape[axis] > 1 and bool((ids == first).all()):
            ids = first.expand(ids.shape)
    return ids


def cast(constraints: Constraints, node: Node, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Between floating-point types nothing happens; anything else forgets what the elements were."""
    if node.meta["val"].is_floating_point() and node.args[0].meta["val"].is_floating_point():  # pyrefly: ignore
        return x
    return _forget(constraints, node, x)


def joined(constraints: Constraints, node: Node, parts: list[Value], dim: int = 0) -> Activation:
    """Concatenation, or stacking."""
    values = [constraints.activation(part, constraints.where(node)) for part in parts]
    operation: Any = node.target
    return Activation(operation([v.scale for v in values], dim), operation([v.shift for v in values], dim))


def padded(constraints: Constraints, node: Node, x: Value, amounts: list[int], value: Any = None) -> Value:
    """Zeros around: they have every scale, but no shift."""
    if value not in (None, 0, 0.0):
        return _forget(constraints, node, x)
    x = constraints.activation(x, constraints.where(node))
    pad = torch.nn.functional.pad
    return Activation(pad(x.scale, amounts, value=1), pad(x.shift, amounts, value=0))


def wrapped(
    constraints: Constraints, node: Node, x: Value, amounts: list[int], mode: str = "constant", value: Any = None
) -> Value:
    """Padding by any mode: entries are repeated, or zeros."""
    if mode == "constant":
        return padded(constraints, node, x, amounts, value)
    x = constraints.activation(x, constraints.where(node))
    # Padding by reflection is made for floating-point numbers; ids are far below 2^53.
    pad = torch.nn.functional.pad
    return Activation(*(pad(ids.double(), amounts, mode=mode).long() for ids in (x.scale, x.shift)))


def _forget(constraints: Constraints, node: Node, x: Value) -> Activation:
    constraints.pin([x], constraints.where(node))
    return shifted_only(node.meta["val"].shape)


COPIES = {
    "aten.clone.default", "aten.contiguous.default", "aten.alias.default", "aten.detach.default",
    "aten.detach_.default", "aten.lift_fresh_copy.default", "aten.dropout.default", "aten.feature_dropout.default",
    "aten.alpha_dropout.default", "aten.native_dropout.default", "aten._assert_tensor_metadata.default",
}  # fmt: skip

RESHAPES = {
    "aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.flatten.using_ints",
    "aten.unflatten.int",
}  # fmt: skip

_MOVES = (
    "view.default", "reshape.default", "_unsafe_view.default", "unsqueeze.default", "squeeze.dim", "squeeze.dims",
    "squeeze.default", "flatten.using_ints", "unflatten.int", "transpose.int", "t.default", "permute.default",
    "movedim.int", "expand.default", "slice.Tensor", "select.int", "narrow.default", "split.Tensor",
    "split_with_sizes.default", "chunk.default", "unbind.int", "repeat.default", "flip.default", "roll.default",
    "channel_shuffle.default", "pixel_shuffle.default", "pixel_unshuffle.default", "index_select.default",
    "repeat_interleave.self_int", "squeeze_.dim", "mT.default", "numpy_T.default",
)  # fmt: skip

MOVES = {f"aten.{name}" for name in _MOVES}
"""Operations that move, repeat or leave out elements."""

RULES = {
    **dict.fromkeys(MOVES, same),
    **dict.fromkeys(COPIES, same),
    "aten._to_copy.default": cast,
    "aten.to.dtype": cast,
    "aten.to.dtype_layout": cast,
    "aten.to.device": cast,
    "aten.type_as.default": cast,
    "aten.cat.default": joined,
    "aten.stack.default": joined,
    "aten.pad.default": wrapped,
    **{
        f"aten.{kind}_pad{n}d.default": lambda constraints, node, x, pad, mode=mode: wrapped(
            constraints, node, x, pad, mode
        )
        for kind, mode in (("reflection", "reflect"), ("replication", "replicate"))
        for n in (1, 2, 3)
    },
    "aten.constant_pad_nd.default": padded,
}
