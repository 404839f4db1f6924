"""Axes of activations followed through the traced graph, and directions to which their readers are blind."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torch.fx import Node

from isoflat.symmetry.finding.graph import TracedGraph
from isoflat.symmetry.finding.rules.views import COPIES, MOVES, RESHAPES

SOFTMAX = {
    "aten._softmax.default", "aten._log_softmax.default", "aten.softmax.int", "aten.log_softmax.int",
    "aten._safe_softmax.default",
}  # fmt: skip
"""Operations that forget a constant common to all entries along their axis (their second argument)."""

CASTS = {
    "aten._to_copy.default", "aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten.type_as.default",
}  # fmt: skip

_SAME = {
    *COPIES, *CASTS, "aten.neg.default", "aten.avg_pool1d.default", "aten.avg_pool2d.default", "aten.avg_pool3d.default",
    "aten.adaptive_avg_pool1d.default", "aten.adaptive_avg_pool2d.default", "aten.adaptive_avg_pool3d.default",
}  # fmt: skip
"""Operations that keep the axes and treat all channels alike."""

_SCALED = {"aten.mul.Tensor", "aten.div.Tensor", "aten.mul.Scalar", "aten.div.Scalar"}
_MASKED = {"aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.masked_fill.Scalar"}


def origin(node: Node) -> Node:
    """The node before casts and copies."""
    while str(node.target) in COPIES | CASTS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def but(tensor: Tensor, axis: int) -> tuple[int, ...]:
    """All axes of a tensor but one."""
    return tuple(place for place in range(tensor.ndim) if place != axis % tensor.ndim)


@final
class Readers:
    """Readers of each node, and the constants along an axis that all of them ignore."""

    def __init__(self, graph: TracedGraph, blind: bool) -> None:
        """Start with nothing remembered.

        Args:
            graph: the traced network.
            blind: whether the loss ignores a constant added to all scores of an example.
        """
        self._graph = graph
        self.blind = blind
        self._memo: dict[tuple[Node, int], bool] = {}

    def subtract(self, node: Node, axis: int) -> bool:
        """Test whether every reader subtracts the mean over an axis, or loses a constant along it in softmax or the loss."""
        axis %= node.meta["val"].ndim
        if (node, axis) not in self._memo:
            self._memo[node, axis] = bool(node.users) and all(self._subtracts(user, node, axis) for user in node.users)
        return self._memo[node, axis]

    def _subtracts(self, user: Node, node: Node, axis: int) -> bool:
        shape = node.meta["val"].shape
        name = str(user.target)
        if user.op == "output":
            return self.blind and self._graph.outputs == (node,) and axis == 1
        if name.startswith("aten._assert"):
            return True
        if name in _MASKED:
            return _is_masked(user, node) and self.subtract(user, axis + user.meta["val"].ndim - len(shape))
        if user.args[0] is not node and name not in (
            "aten.add.Tensor", "aten.sub.Tensor", "aten.cat.default", "aten.mul.Tensor", *CASTS,
        ):  # fmt: skip
            return False
        if name in ("aten.layer_norm.default", "aten.native_layer_norm.default"):
            return axis == len(shape) - 1 and tuple(user.args[1]) == (shape[-1],)  # pyrefly: ignore
        if name == "aten.group_norm.default":
            return len(shape) == 2 and axis == 1 and bool(user.args[1] == 1)
        if name in SOFTMAX:
            return int(user.args[1]) % len(shape) == axis  # pyrefly: ignore
        after = axis_after(user, node, axis)
        return after is not None and self.subtract(user, after)


def sums_to_one(node: Node) -> int | None:
    """The axis along which a node's entries add up to one, whatever the weights are; None if there is none."""
    name = str(node.target)
    if name in SOFTMAX and "log" not in name:
        return int(node.args[1]) % node.meta["val"].ndim  # pyrefly: ignore
    known = name in COPIES or name in CASTS or name in MOVES
    if not known or not node.args or not isinstance(node.args[0], Node) or name == "aten.slice.Tensor":
        return None
    before = sums_to_one(node.args[0])
    return None if before is None else axis_after(node, node.args[0], before)


def masked_softmax(node: Node) -> Node | None:
    """The softmax that a node's entries come from, if it is one that gives zeros where nothing is left of a row."""
    while str(node.target) not in SOFTMAX:
        node = node.args[0]  # pyrefly: ignore
    return node if "_safe_softmax" in str(node.target) else None


def axis_after(user: Node, node: Node, axis: int) -> int | None:
    """Place of an axis of channels after an operation that adds, averages or moves whole channels; None for others."""
    name, before, value = str(user.target), node.meta["val"].shape, user.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    if name in _SAME:
        return axis
    if name in ("aten.add.Tensor", "aten.sub.Tensor"):
        after = axis + value.ndim - len(before)
        return after if value.shape[after] == before[axis] and not user.kwargs else None
    if name in _SCALED:
        return _scaled(user, node, axis)
    if name == "aten.cat.default":
        dim = int(user.args[1]) % len(before) if len(user.args) > 1 else 0  # pyrefly: ignore
        return axis if dim != axis else None
    if (name != "aten.mean.dim" and name not in MOVES) or user.all_input_nodes != [node]:
        return None
    # The operation itself, on the channels' numbers: they must come out whole and in order along one axis.
    numbers = torch.arange(before[axis], dtype=torch.float64).view(-1, *[1] * (len(before) - 1 - axis)).expand(before)
    operation: Any = user.target
    made = numbers.reshape(value.shape) if name in RESHAPES else operation(numbers, *user.args[1:], **user.kwargs)
    if not isinstance(made, Tensor):
        return None
    for after, size in enumerate(made.shape):
        wanted = torch.arange(size, dtype=torch.float64).view(-1, *[1] * (made.ndim - 1 - after))
        if size == before[axis] and torch.equal(made, wanted.expand(made.shape)):
            return after
    return None


def _scaled(user: Node, node: Node, axis: int) -> int | None:
    """An axis after a product with a number, or with a tensor that is one and the same along it."""
    after = axis + user.meta["val"].ndim - node.meta["val"].ndim
    others = [part for part in user.args if part is not node]
    if len(others) != 1:
        return None
    if isinstance(others[0], Node):
        shape = others[0].meta["val"].shape
        place = axis + len(shape) - node.meta["val"].ndim
        return after if place < 0 or shape[place] == 1 else None
    return after


def _is_masked(user: Node, node: Node) -> bool:
    """Test whether a choice leaves a node's entries or sends them to minus infinity, or to the lowest number there is."""
    name = str(user.target)
    if name == "aten.masked_fill.Scalar":
        return user.args[0] is node and _lowest(user.args[2], node)
    if name == "aten.where.ScalarOther":
        return user.args[1] is node and _lowest(user.args[2], node)
    if name == "aten.where.ScalarSelf":
        return user.args[2] is node and _lowest(user.args[1], node)
    others = [part for part in user.args[1:] if part is not node]
    return user.args[0] is not node and len(others) == 1 and _lowest(others[0], node)


def _lowest(value: Any, node: Node) -> bool:
    """Test whether a number is minus infinity, or the type's lowest: softmax makes it zero whatever is added elsewhere."""
    if isinstance(value, Node):  # a constant that is made in the graph
        made = str(value.target) in ("aten.full.default", "aten.scalar_tensor.default")
        value = value.args[-1] if made and value.args else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value <= torch.finfo(node.meta["val"].dtype).min
