"""Common vectors: weights and tables to whose output every reader is blind in one direction."""

from __future__ import annotations

from torch.fx import Node

from isoflat.symmetry.axes import Readers
from isoflat.symmetry.graph import Graph
from isoflat.symmetry.ledger import Mean
from isoflat.symmetry.values import Stored


def means(graph: Graph, readers: Readers) -> tuple[Mean, ...]:
    """Weights and tables to whose output a common vector may be added, because every reader subtracts the mean."""
    stored = {node: value.name for node, value in graph.inputs.items() if isinstance(value, Stored)}
    read: dict[str, list[tuple[Node, Node]]] = {}
    for node, name in stored.items():
        read.setdefault(name, []).extend((node, user) for user in node.users)
    found = []
    for name, uses in read.items():
        axes = {_writes(node, user) for node, user in uses}
        if len(axes) != 1 or None in axes:
            continue
        ((axis, channel),) = axes  # pyrefly: ignore
        if all(readers.subtract(user, channel % user.meta["val"].ndim) for _, user in uses):
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
