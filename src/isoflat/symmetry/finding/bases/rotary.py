"""Constant linear maps of a vector, such as rotary embeddings: what commutes with all of them may mix its units.

Derivation: docs/concepts/bases.md, "Rotary pairs".
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from isoflat.symmetry.finding.axes import CASTS
from isoflat.symmetry.finding.bases.partition import Partition
from isoflat.symmetry.finding.graph import arguments
from isoflat.symmetry.finding.rules.views import COPIES, MOVES
from isoflat.symmetry.finding.values import Known

_LINEAR = {
    *MOVES, *COPIES, *CASTS, "aten.neg.default", "aten.cat.default", "aten.stack.default", "aten.add.Tensor",
    "aten.sub.Tensor", "aten.mul.Tensor", "aten.mul.Scalar", "aten.div.Scalar",
}  # fmt: skip

_LONGEST = 64
"""Operations after which no end is looked for any more."""


@final
@dataclass(frozen=True)
class LinearRun:
    """Operations between one node and another that together are a constant linear map of the last axis at every place.

    Attributes:
        start: where it begins.
        nodes: operations in order; the last of them is all that is read afterwards.
    """

    start: Node
    nodes: tuple[Node, ...]


def run_from(start: Node, values: Mapping[Node, Any]) -> LinearRun | None:
    """The shortest run from a node that multiplies by a known tensor; None if there is none."""
    if len(start.users) < 2:
        return None
    inside: list[Node] = [start]
    varied = False
    node = start
    for _ in range(_LONGEST):
        node = node.next
        sources = [part for part in node.all_input_nodes if not isinstance(values.get(part), Known)]
        if not set(sources) & set(inside):
            continue
        if (str(node.target) not in _LINEAR and node.target is not operator.getitem) or not set(sources) <= set(inside):
            return None
        if str(node.target).startswith("aten.mul") and len(sources) > 1:
            return None
        varied = varied or (str(node.target) == "aten.mul.Tensor" and len(node.all_input_nodes) > 1)
        inside.append(node)
        alive = [part for part in inside if any(user not in inside for user in part.users)]
        if alive == [node] and varied and node.meta["val"].shape == start.meta["val"].shape:
            return LinearRun(start, tuple(inside[1:]))
    return None


def commute(partition: Partition, run: LinearRun, ids: Tensor, values: Mapping[Node, Any]) -> None:
    """Leave to the units at the start of a run what commutes with it.

    Units whose factors are the same everywhere may be mixed among themselves, a pair that is rotated by rotations of
    its own; the others are held.
    """
    from scipy.sparse.csgraph import connected_components

    matrices = _matrices(run, values)
    if matrices is None:
        partition.hold(ids)
        return
    touching = (matrices != 0).any(0).numpy()
    _, labels = connected_components(touching, directed=False)
    alike: dict[tuple[float, ...], list[int]] = defaultdict(list)
    for label in range(labels.max() + 1):
        members = np.flatnonzero(labels == label).tolist()
        if len(members) == 1:
            alike[tuple(matrices[:, members[0], members[0]].tolist())].append(members[0])
        elif len(members) == 2 and _rotates(matrices[:, members][:, :, members]):
            partition.apart(ids[..., members], -1)
            partition.turn(ids[..., members])
        else:
            partition.hold(ids[..., members])
    for members in alike.values():
        partition.apart(ids[..., members], -1)


def _matrices(run: LinearRun, values: Mapping[Node, Any]) -> Tensor | None:
    """The map at every place, shape `(places, d, d)`; None if it is not one that acts at each place by itself."""
    shape = run.start.meta["val"].shape
    columns = []
    for j in range(shape[-1]):
        basis = torch.zeros(shape, dtype=torch.float64)
        basis[..., j] = 1.0
        columns.append(_applied(run, basis, values))
    matrices = torch.stack(columns, -1)
    random = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = (matrices @ random[..., None])[..., 0]
    if (_applied(run, random, values) - expected).abs().max() > 1e-12 * expected.abs().max():
        return None
    return torch.unique(matrices.reshape(-1, shape[-1], shape[-1]), dim=0)


def _applied(run: LinearRun, start: Tensor, values: Mapping[Node, Any]) -> Tensor:
    made: dict[Node, Any] = {run.start: start}

    def content(part: Node) -> Any:
        if part in made:
            return made[part]
        known = values[part].value
        return known.double() if isinstance(known, Tensor) and known.is_floating_point() else known

    for node in run.nodes:
        operation: Any = node.target
        args, kwargs = arguments(node, content)
        made[node] = args[0] if str(node.target) in COPIES | CASTS else operation(*args, **kwargs)
    return made[run.nodes[-1]]


def _rotates(pairs: Tensor) -> bool:
    """Test whether every matrix is a multiple of a rotation of the plane, shape `(places, 2, 2)`."""
    size = pairs.abs().amax()
    even = (pairs[:, 0, 0] - pairs[:, 1, 1]).abs().max()
    odd = (pairs[:, 0, 1] + pairs[:, 1, 0]).abs().max()
    return bool(torch.maximum(even, odd) <= 1e-6 * size)
