"""Logical tensors: a stored tensor that packs several, such as query, key and value, counts as several.

Derivation: docs/concepts/bases.md, "Blocks are logical tensors".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor
from torch.fx import Node

from isoflat.symmetry.finding.axes import CASTS
from isoflat.symmetry.finding.graph import TracedGraph
from isoflat.symmetry.finding.rules.views import COPIES, MOVES, RESHAPES
from isoflat.symmetry.finding.values import StoredTensor
from isoflat.symmetry.groups.basis import BasisChange
from isoflat.symmetry.relations import distinct

_WEIGHTS = {
    # Which arguments are weight and bias, the weight's axis of outputs, and the axis of channels in what comes out.
    "aten.linear.default": (1, 2, 0, -1),
    "aten.conv1d.default": (1, 2, 0, 1),
    "aten.conv2d.default": (1, 2, 0, 1),
    "aten.conv3d.default": (1, 2, 0, 1),
    "aten.conv1d.padding": (1, 2, 0, 1),
    "aten.conv2d.padding": (1, 2, 0, 1),
    "aten.mm.default": (1, None, 1, -1),
    "aten.matmul.default": (1, None, 1, -1),
    "aten.addmm.default": (2, 0, 1, -1),
}


def blocks(graph: TracedGraph, basis: BasisChange) -> dict[str, tuple[int, Tensor]]:
    """Blocks of every stored tensor that is not one block by itself: an axis, and the number of the block along it.

    Outputs of a weight that no operation ever sees together belong to different blocks: query, key and value, gate and
    up. What a change of basis mixes is one block, be it in several tensors.
    """
    parts: dict[str, tuple[int, Tensor]] = {}
    count = 0
    for name, nodes in _stored(graph).items():
        axis, labels = _parts(nodes)
        parts[name] = axis, labels + count
        count += int(labels.max()) + 1
    joined: list[tuple[int, int]] = []
    for family in basis.families:
        for side in family.sides:
            for block in range(family.count):
                mixed = [
                    number
                    for piece in side.pieces
                    for axis, labels in (parts[piece.name],)
                    if axis == piece.axis
                    for number in torch.unique(labels[piece.places[block]]).tolist()
                ]
                joined += [(mixed[0], other) for other in mixed[1:]]
    together = _classes(count, joined)
    made = {name: (axis, together[labels]) for name, (axis, labels) in parts.items()}
    owners = torch.bincount(torch.tensor([b for _, labels in made.values() for b in distinct(labels)]), minlength=count)
    return {n: (axis, part) for n, (axis, part) in made.items() if len(distinct(part)) > 1 or owners[part[0]] > 1}


def _stored(graph: TracedGraph) -> dict[str, list[Node]]:
    """Nodes of each parameter with an axis."""
    nodes: dict[str, list[Node]] = {}
    for node, value in graph.inputs.items():
        if isinstance(value, StoredTensor) and value.shape:
            nodes.setdefault(value.name, []).append(node)
    return nodes


def _parts(nodes: list[Node]) -> tuple[int, Tensor]:
    """The axis of a tensor's outputs, and for each index along it the number of its part, shape `(n,)`."""
    uses = [(node, user) for node in nodes for user in node.users]
    turned = [_WEIGHTS[str(u.target)][2] for n, u in uses if _place(n, u) == "weight"]
    shape = nodes[0].meta["val"].shape
    axis = 1 if turned and all(place == 1 for place in turned) and len(shape) == 2 else 0
    numbers = torch.arange(shape[axis]).view(-1, *[1] * (len(shape) - 1 - axis)).expand(shape)
    groups = [seen for node in nodes for seen in _seen(node, numbers)]
    pairs = [(group[0], other) for group in groups for other in group[1:]]
    unseen = sorted(set(range(shape[axis])) - {index for group in groups for index in group})
    pairs += [(unseen[0], other) for other in unseen[1:]]
    return axis, _classes(shape[axis], pairs)


def _seen(node: Node, numbers: Tensor) -> Iterator[list[int]]:
    """Indices that every operation sees that does more than move them; −1 stands for none."""
    for user in node.users:
        name = str(user.target)
        place = _place(node, user)
        value: Any = user.meta.get("val")
        if name in COPIES | CASTS:
            yield from _seen(user, numbers)
        elif place is not None:
            channel = _WEIGHTS[name][3] % value.ndim
            along = _along(numbers, 0 if place == "bias" else _WEIGHTS[name][2])
            if along is None or len(along) != value.shape[channel]:
                yield [index for index in distinct(numbers) if index >= 0]
            else:
                yield from _seen(user, along.view(-1, *[1] * (value.ndim - 1 - channel)).expand(value.shape))
        elif name in MOVES and user.all_input_nodes == [node]:
            yield from _seen_moved(user, numbers)
        elif not name.startswith("aten._assert"):
            yield [index for index in distinct(numbers) if index >= 0]


def _seen_moved(user: Node, numbers: Tensor) -> Iterator[list[int]]:
    """Indices seen after an operation that moves elements; one that gives several parts is followed part by part."""
    operation: Any = user.target
    value = user.meta["val"]
    if isinstance(value, Tensor):
        moved = (
            numbers.reshape(value.shape)
            if str(user.target) in RESHAPES
            else operation(numbers, *user.args[1:], **user.kwargs)
        )
        yield from _seen(user, moved)
        return
    parts = operation(numbers, *user.args[1:], **user.kwargs)
    for taken in user.users:
        yield from _seen(taken, parts[taken.args[1]])  # pyrefly: ignore


def _place(node: Node, user: Node) -> str | None:
    """Test whether a node is an operation's weight, or its bias."""
    weight, bias, *_ = _WEIGHTS.get(str(user.target), (None, None))
    if weight is not None and len(user.args) > weight and user.args[weight] is node:
        return "weight"
    return "bias" if bias is not None and len(user.args) > bias and user.args[bias] is node else None


def _along(numbers: Tensor, axis: int) -> Tensor | None:
    """The indices along one axis, if they are the same everywhere else."""
    rows = numbers.movedim(axis, 0).flatten(1) if numbers.ndim > 1 else numbers[:, None]
    return rows[:, 0] if bool((rows == rows[:, :1]).all()) else None


def _classes(count: int, pairs: list[tuple[int, int]]) -> Tensor:
    """Numbers from zero for what is joined, shape `(count,)`."""
    from scipy.sparse.csgraph import connected_components

    edges = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    graph = scipy.sparse.coo_matrix((np.ones(len(edges)), edges.T), shape=(count, count))
    return torch.from_numpy(connected_components(graph, directed=False)[1].astype(np.int64))
