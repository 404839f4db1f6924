"""Common vectors: weights and tables to whose output every reader is blind in one direction.

Derivation: docs/concepts/symmetries.md, "Common vectors".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch.fx import Node

from isoflat.symmetry.finding.axes import CASTS, Readers, axis_after
from isoflat.symmetry.finding.graph import TracedGraph
from isoflat.symmetry.finding.rules.views import COPIES, MOVES
from isoflat.symmetry.finding.values import StoredTensor
from isoflat.symmetry.motions import Mean


def means(graph: TracedGraph, readers: Readers) -> tuple[Mean, ...]:
    """Weights and tables to which a common vector may be added: readers subtract its mean, or inputs have none."""
    stored = {node: value.name for node, value in graph.inputs.items() if isinstance(value, StoredTensor)}
    read: dict[str, list[tuple[Node, Node]]] = {}
    for node, name in stored.items():
        read.setdefault(name, []).extend((node, user) for user in node.users)
    found = []
    for name, uses in read.items():
        if (blind := _blind(stored, uses)) is not None:
            found.append(replace(blind, name=name))
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


def _blind(stored: Mapping[Node, str], uses: Sequence[tuple[Node, Node]]) -> Mean | None:
    """A weight whose inputs have no mean, because a LayerNorm alone makes them."""
    if len(uses) != 1:
        return None
    weight, user = uses[0]
    place, axis, channel = _LINEAR.get(str(user.target), (None, 0, 0))
    if place not in (1, 2) or channel != -1 or user.args[place] is not weight or weight.meta["val"].ndim != 2:
        return None
    source = user.args[place - 1]
    norm = _centred(source, source.meta["val"].ndim - 1) if isinstance(source, Node) else None
    if norm is None:
        return None
    gain, offset = (norm.args[i] if len(norm.args) > i else None for i in (2, 3))
    bias = user.args[0] if place == 2 else user.args[2] if len(user.args) > 2 else None
    parts: dict[str, Any] = {
        key: stored.get(part)
        for key, part in (("gain", gain), ("offset", offset), ("bias", bias))
        if isinstance(part, Node)
    }
    if None in parts.values() or (offset is not None and bias is None):
        return None
    return Mean("", 1 - axis, True, **parts)


def _centred(node: Node, axis: int) -> Node | None:
    """The LayerNorm whose output a node is, moved about; None if it is none, or an axis is not the one it centres."""
    name = str(node.target)
    if name == "aten.layer_norm.default":
        return node if axis == node.meta["val"].ndim - 1 and len(node.args[1]) == 1 else None  # pyrefly: ignore
    if not node.args or not isinstance(node.args[0], Node) or name not in COPIES | CASTS | MOVES:
        return None
    before = node.args[0]
    for candidate in range(before.meta["val"].ndim):
        if (
            before.meta["val"].shape[candidate] == node.meta["val"].shape[axis]
            and axis_after(node, before, candidate) == axis
        ):
            return _centred(before, candidate)
    return None
