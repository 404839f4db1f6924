"""Common vectors: weights and tables to whose output every reader is blind in one direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from isoflat.symmetry.graph import Graph
from isoflat.symmetry.ledger import Mean
from isoflat.symmetry.rules import rules
from isoflat.symmetry.rules.views import COPIES, RESHAPES, same
from isoflat.symmetry.values import Stored


def means(graph: Graph, blind: bool) -> tuple[Mean, ...]:
    """Weights and tables to whose output a common vector may be added, because every reader subtracts the mean."""
    stored = {node: value.name for node, value in graph.inputs.items() if isinstance(value, Stored)}
    readers: dict[str, list[tuple[Node, Node]]] = {}
    for node, name in stored.items():
        readers.setdefault(name, []).extend((node, user) for user in node.users)
    memo: dict[tuple[Node, int], bool] = {}
    found = []
    for name, uses in readers.items():
        axes = {_writes(node, user) for node, user in uses}
        if len(axes) != 1 or None in axes:
            continue
        ((axis, channel),) = axes  # pyrefly: ignore
        if all(_subtracted(graph, user, channel % user.meta["val"].ndim, blind, memo) for _, user in uses):
            found.append(Mean(name, axis))
    return tuple(found)


_LINEAR = {
    # Which argument is the weight, its axis of output units, and the axis of channels in what comes out.
    "aten.linear.default": (1, 0, -1),
    "aten.conv1d.default": (1, 0, 1),
    "aten.conv2d.default": (1, 0, 1),
    "aten.conv3d.default": (1, 0, 1),
    "aten.conv1d.padding": (1, 0, 1),
    "aten.conv2d.padding": (1, 0, 1),
    "aten.mm.default": (1, 1, -1),
    "aten.matmul.default": (1, 1, -1),
    "aten.addmm.default": (2, 1, -1),
    "aten.embedding.default": (0, 1, -1),
}


def _writes(weight: Node, user: Node) -> tuple[int, int] | None:
    """Axis of output units of a weight, and of channels in what it makes; None if it is read in any other way."""
    place, axis, channel = _LINEAR.get(str(user.target), (None, 0, 0))
    if place is None or user.args[place] is not weight or list(user.all_input_nodes).count(weight) != 1:
        return None
    if "embedding" in str(user.target) and len(user.args) > 2 and user.args[2] != -1:
        return None  # a padding row stays zero
    if "conv" in str(user.target) and len(user.args) > 6 and user.args[6] != 1:
        return None  # groups read different inputs
    return (axis, channel) if weight.meta["val"].ndim == 2 or "conv" in str(user.target) else None


_SAME = {
    *COPIES, "aten.neg.default", "aten.avg_pool1d.default", "aten.avg_pool2d.default", "aten.avg_pool3d.default",
    "aten.adaptive_avg_pool1d.default", "aten.adaptive_avg_pool2d.default", "aten.adaptive_avg_pool3d.default",
}  # fmt: skip
"""Operations that keep the axes and treat all channels alike."""


def _subtracted(graph: Graph, node: Node, axis: int, blind: bool, memo: dict[tuple[Node, int], bool]) -> bool:
    """Whether everything that reads this node subtracts the mean over an axis, or loses it in the loss."""
    if (node, axis) not in memo:
        memo[node, axis] = bool(node.users) and all(
            _subtracts(graph, user, node, axis, blind, memo) for user in node.users
        )
    return memo[node, axis]


def _subtracts(
    graph: Graph, user: Node, node: Node, axis: int, blind: bool, memo: dict[tuple[Node, int], bool]
) -> bool:
    shape = node.meta["val"].shape
    name = str(user.target)
    if user.op == "output":
        return blind and graph.outputs == (node,) and axis == 1
    if name.startswith("aten._assert"):
        return True
    if user.args[0] is not node and name not in ("aten.add.Tensor", "aten.sub.Tensor", "aten.cat.default"):
        return False
    if name in ("aten.layer_norm.default", "aten.native_layer_norm.default"):
        return axis == len(shape) - 1 and tuple(user.args[1]) == (shape[-1],)  # pyrefly: ignore
    if name == "aten.group_norm.default":
        return len(shape) == 2 and axis == 1 and bool(user.args[1] == 1)
    if name in ("aten._softmax.default", "aten._log_softmax.default", "aten.softmax.int", "aten.log_softmax.int"):
        return int(user.args[1]) % len(shape) == axis  # pyrefly: ignore
    after = _axis_after(user, node, axis)
    return after is not None and _subtracted(graph, user, after, blind, memo)


def _axis_after(user: Node, node: Node, axis: int) -> int | None:
    """Where an axis of channels is after an operation that adds, averages or moves whole channels; None for others."""
    name, before, value = str(user.target), node.meta["val"].shape, user.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    if name in _SAME:
        return axis
    if name in ("aten.add.Tensor", "aten.sub.Tensor"):
        after = axis + value.ndim - len(before)
        return after if value.shape[after] == before[axis] and not user.kwargs else None
    if name in ("aten.mul.Tensor", "aten.div.Tensor"):
        return axis if isinstance(user.args[1], int | float) else None
    if name == "aten.cat.default":
        dim = int(user.args[1]) % len(before) if len(user.args) > 1 else 0  # pyrefly: ignore
        return axis if dim != axis else None
    if (name != "aten.mean.dim" and rules().get(name) is not same) or user.all_input_nodes != [node]:
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
