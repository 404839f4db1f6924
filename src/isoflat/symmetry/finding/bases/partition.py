"""Partition of units into cells that may be mixed, refined by every operation that treats some apart from others.

See docs/concepts/bases.md, "Cells".

A unit is one coordinate of a vector that flows through the network. Units of one cell may be mixed by a matrix X,
`x ↦ X x` as a velocity; tied cells share their matrix, or one has `−Xᵀ`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from torch import Tensor

FIXED = 0
"""The unit that nothing mixes: inputs, outputs, and whatever has passed an operation without a rule."""


@final
@dataclass(frozen=True)
class CellBlock:
    """Cells that share one matrix.

    Attributes:
        cells: units of each cell, in one order, shape `(cells, d)`.
        dual: for each cell, whether its units are mixed by `−Xᵀ`.
        orthogonal: whether X must be antisymmetric.
        centred: whether X must also send the vector of ones to zero.
    """

    cells: NDArray[np.int64]
    dual: tuple[bool, ...]
    orthogonal: bool
    centred: bool


class Partition:
    """A growing set of units with ties, and the sets that may be mixed among themselves only.

    >>> partition = Partition()
    >>> a, b = partition.fresh(4, "a"), partition.fresh(2, "b")
    >>> partition.tie(a[:2], b, dual=True)
    >>> [(block.cells.tolist(), block.dual) for block in partition.solve()]
    [([[1, 2], [5, 6]], (False, True)), ([[3, 4]], (False,))]
    """

    def __init__(self) -> None:
        self._count = 1
        self._labels: list[NDArray[np.int64]] = [np.zeros(1, dtype=np.int64)]
        self._keys: dict[Hashable, int] = {}
        self._lines: list[NDArray[np.int64]] = []
        self._ties: list[tuple[NDArray[np.int64], bool]] = []
        self._held: set[int] = {FIXED}
        self._orthogonal: list[tuple[NDArray[np.int64], bool]] = []

    def fresh(self, count: int, key: Hashable) -> Tensor:
        """New units, shape `(count,)`, that may be mixed among themselves and with others of the same key."""
        label = self._keys.setdefault(key, len(self._keys) + 1)
        self._labels.append(np.full(count, label))
        self._count += count
        return torch.arange(self._count - count, self._count)

    def line(self, ids: Tensor, axis: int) -> Tensor:
        """One vector along an axis, whatever the place on the other axes; its units mix among themselves only."""
        units = self.along(ids, axis)
        self.apart(units, -1)
        return units

    def along(self, ids: Tensor, *kept: int) -> Tensor:
        """Tie what differs on other axes than the kept ones only; ids of the kept axes, in their order."""
        axes = [axis % ids.ndim for axis in kept]
        rest = [axis for axis in range(ids.ndim) if axis not in axes]
        flat = _lean(ids.permute(*axes, *rest), len(axes)).reshape(*(ids.shape[axis] for axis in axes), -1)
        first = flat[..., 0]
        self.tie(flat, first[..., None])
        return first

    def apart(self, ids: Tensor, axis: int) -> None:
        """Along an axis, units mix with those that are on the same lines as often as they are."""
        if not bool(ids.any()):
            return
        lines = _lean(ids.movedim(axis, 0), 1).reshape(ids.shape[axis], -1).T
        rows = torch.unique(lines, dim=0).numpy()
        self._lines.append(rows)

    def tie(self, a: Tensor, b: Tensor, dual: bool = False) -> None:
        """Units that are mixed alike, element by element (shapes broadcast); by `−Xᵀ` on one side if dual."""
        a, b = torch.broadcast_tensors(a, b)
        lean = tuple(slice(None) if a.stride(i) or b.stride(i) else slice(0, 1) for i in range(a.ndim))
        pairs = torch.stack([a[lean].reshape(-1), b[lean].reshape(-1)], 1)
        pairs = pairs[pairs.any(1) & ((pairs[:, 0] != pairs[:, 1]) | dual)]
        if not len(pairs):
            return
        pairs = torch.unique(pairs, dim=0)
        fixed = (pairs == FIXED).any(1)
        self._held.update(pairs[fixed].reshape(-1).tolist())
        self._ties.append((pairs[~fixed].numpy(), dual))

    def hold(self, ids: Tensor) -> None:
        """These units are not mixed with any other."""
        self._held.update(torch.unique(_lean(ids)).tolist())

    def turn(self, ids: Tensor, centred: bool = False) -> None:
        """These units are mixed by rotations only; centred: that leave the vector of ones alone."""
        self._orthogonal.append((torch.unique(_lean(ids)).numpy(), centred))

    def solve(self) -> tuple[CellBlock, ...]:
        """The coarsest cells that every operation allows, with two units or more."""
        from scipy.sparse.csgraph import connected_components

        pairs = np.concatenate([np.zeros((0, 2), dtype=np.int64), *(p for p, _ in self._ties)])
        flips = np.concatenate([np.zeros(0, dtype=bool), *(np.full(len(p), dual) for p, dual in self._ties)])
        graph = scipy.sparse.coo_matrix((np.ones(len(pairs)), pairs.T), shape=(self._count, self._count))
        _, classes = connected_components(graph, directed=False)
        parity, clash = _parities(pairs, flips, self._count)
        labels = self._refined(classes)
        cells = [part for part in _groups(labels) if len(part) > 1 and part[0] != FIXED]
        turned, centred = np.zeros(self._count, dtype=bool), np.zeros(self._count, dtype=bool)
        turned[clash] = True
        for ids, about_ones in self._orthogonal:
            turned[ids] = True
            centred[ids] |= about_ones
        blocks: dict[tuple[int, ...], list[NDArray[np.int64]]] = defaultdict(list)
        for cell in cells:
            ordered = cell[np.argsort(classes[cell])]
            blocks[tuple(classes[ordered].tolist())].append(ordered)
        found = []
        for members in sorted(blocks.values(), key=lambda cells: int(cells[0][0])):
            stacked = np.stack(sorted(members, key=lambda cell: int(cell[0])))
            relative = parity[stacked] ^ parity[stacked[:1]]
            if not (relative == relative[:, :1]).all():
                continue  # some units with a sign and some without: no matrix does both
            found.append(
                CellBlock(
                    stacked,
                    tuple(bool(row[0]) for row in relative),
                    bool(turned[stacked].any()),
                    bool(centred[stacked].any()),
                )
            )
        return tuple(found)

    def _refined(self, classes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Labels of the units' cells: split by every line, and until tied cells are split alike."""
        random = np.random.default_rng(0)  # of hashes of sets: sums of random numbers of 63 bits
        labels = np.concatenate(self._labels)
        for rows in self._lines:
            weights = random.integers(1, 1 << 62, size=len(rows))
            signature = np.zeros(self._count, dtype=np.int64)
            np.add.at(signature, rows, weights[:, None])
            labels = _numbered(labels, signature)
        held = np.zeros(self._count, dtype=bool)
        held[sorted(self._held)] = True
        before = -1
        while True:
            in_class = np.zeros(classes.max() + 1, dtype=bool)
            in_class[classes[held]] = True
            held = in_class[classes]
            labels = _numbered(labels, np.where(held, np.arange(self._count) + 1, 0))
            count = labels.max()
            if count == before:
                return labels
            before = count
            weights = random.integers(1, 1 << 62, size=count + 1)
            signature = np.zeros(classes.max() + 1, dtype=np.int64)
            np.add.at(signature, classes, weights[labels])
            labels = _numbered(labels, signature[classes])
            # Two units of one cell that are one and the same for others cannot be told apart: they are held.
            both = _numbered(labels, classes)
            held |= (np.bincount(both) > 1)[both]


def _numbered(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers of pairs, in order of their values."""
    parts = [np.unique(part, return_inverse=True)[1].reshape(-1) for part in (a, b)]
    return np.unique(parts[0] * (parts[1].max() + 1) + parts[1], return_inverse=True)[1].reshape(-1)


def _groups(labels: NDArray[np.int64]) -> Sequence[NDArray[np.int64]]:
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def _parities(
    pairs: NDArray[np.int64], flips: NDArray[np.bool_], count: int
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Parity of each unit, whether it is dual to the first of its class; and units that would be dual to themselves.

    Each unit is doubled, plain and dual; a tie joins plain with plain, or plain with dual.
    """
    from scipy.sparse.csgraph import connected_components

    plain = np.where(flips[:, None], pairs + np.array([0, count]), pairs)
    other = np.where(flips[:, None], pairs + np.array([count, 0]), pairs + count)
    edges = np.concatenate([plain, other])
    graph = scipy.sparse.coo_matrix((np.ones(len(edges)), edges.T), shape=(2 * count, 2 * count))
    _, sheet = connected_components(graph, directed=False)
    up, down = sheet[:count], sheet[count:]
    return up > down, np.flatnonzero(up == down)


def _lean(ids: Tensor, kept: int = 0) -> Tensor:
    """One element along every expanded axis but the first few."""
    return ids[tuple(slice(None) if i < kept or ids.stride(i) else slice(0, 1) for i in range(ids.ndim))]
