"""Unknowns, one for each unit, and the linear relations that a network's operations put between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import final

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from torch import Tensor

ZERO = 0
"""The unknown that is zero: a scale that cannot change, a shift that is none."""

ANY = 1
"""A literal zero of the network: it has every scale at once, and relates to nothing."""

Number = int | Fraction
"""An exact coefficient; nearly all are whole, and whole numbers are ten times as fast."""

Form = Mapping[int, Number]
"""A linear form in unknowns."""


@final
@dataclass(frozen=True)
class Solution:
    """All solutions of the relations: unknowns as linear forms in independent ones.

    Attributes:
        roots: the representative of each unknown, shape `(unknowns,)`.
        forms: sparse, shape `(unknowns, d)`; rows of representatives are filled. Value of unknown i: `forms[roots[i]] z`.
    """

    roots: NDArray[np.int64]
    forms: scipy.sparse.csr_matrix

    @property
    def dimension(self) -> int:
        """Number d of independent unknowns."""
        return self.forms.shape[1]

    def rows(self, ids: Tensor) -> scipy.sparse.csr_matrix:
        """Forms of several unknowns, shape `(number of ids, d)`."""
        return some(self.forms, self.roots[ids.reshape(-1).numpy()])

    def restricted(self, columns: NDArray[np.bool_]) -> Solution:
        """The solutions in which the other independent unknowns are zero."""
        return Solution(self.roots, scipy.sparse.csr_matrix(self.forms[:, np.flatnonzero(columns)]))


class Relations:
    """A growing set of unknowns (`int64` ids) with equalities and linear definitions.

    Arrays of ids have the shape of the activation they belong to; they are usually expanded (stride 0) along the axes
    over which a unit is one and the same, so that nothing is ever repeated.

    >>> relations = Relations()
    >>> a, b = relations.fresh(2)
    >>> double = relations.combine((2, a[None]))
    >>> relations.tie(double, b[None])
    >>> relations.solve().rows(torch.stack([a, b])).toarray().tolist()
    [[1.0], [2.0]]
    """

    def __init__(self) -> None:
        self._parent: list[int] = [ZERO, ANY]
        self._kin: list[int] = [ZERO, ANY]  # as _parent, but what is pinned to zero keeps its kin: for the reasons
        self._definitions: list[tuple[int, tuple[tuple[Number, int], ...]]] = []
        self._known: dict[tuple[tuple[Number, int], ...], int] = {}
        self._pins: list[tuple[int, str]] = []

    def fresh(self, count: int) -> Tensor:
        """New unknowns, shape `(count,)`."""
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        self._kin.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Make unknowns equal, element by element (shapes broadcast)."""
        for x, y in _pairs(a, b):
            if x != ANY and y != ANY:
                self._union(self._parent, x, y)
                if ZERO not in (x, y):
                    self._union(self._kin, x, y)

    def pin(self, ids: Tensor, reason: str) -> None:
        """Make unknowns zero, and remember why."""
        for x in distinct(ids):
            if x > ANY:
                self._pins.append((x, reason))
                self._union(self._parent, x, ZERO)

    def along(self, ids: Tensor, *kept: int) -> Tensor:
        """Tie all elements that differ in other axes than the kept ones; ids of the kept axes, in their order."""
        rest = [axis for axis in range(ids.ndim) if axis not in {k % ids.ndim for k in kept}]
        moved = ids.permute(*(k % ids.ndim for k in kept), *rest)
        shape = moved.shape[: len(kept)]
        lean = moved[tuple(slice(None) if i < len(kept) or moved.stride(i) else slice(0, 1) for i in range(moved.ndim))]
        flat = lean.reshape(*shape, -1)
        # A literal zero must not stand for the others: the largest id of each row does, or the pinned one.
        first = flat.max(dim=-1).values
        first = torch.where((first == ANY) & (flat == ZERO).any(dim=-1), ZERO, first)
        self.tie(flat, first[..., None])
        return first

    def combine(self, *terms: tuple[Number, Tensor]) -> Tensor:
        """Unknowns that are linear combinations, element by element, of others; the same combination once only.

        Where a term is a literal zero, so is the result.
        """
        shape = torch.broadcast_shapes(*(ids.shape for _, ids in terms))
        terms = tuple((c, ids) for c, ids in terms if c and not is_all(ids, ZERO))
        if not terms:
            return torch.zeros((), dtype=torch.int64).expand(shape)
        if len(terms) == 1 and terms[0][0] == 1:
            return terms[0][1].expand(shape)
        arrays = torch.broadcast_tensors(*(ids for _, ids in terms))
        lean = [
            array[tuple(slice(None) if any(a.stride(i) for a in arrays) else slice(0, 1) for i in range(array.ndim))]
            for array in arrays
        ]
        columns = np.stack([array.reshape(-1).numpy() for array in lean])
        unique, inverse = np.unique(columns, axis=1, return_inverse=True)
        made = [self._define(zip((c for c, _ in terms), column, strict=True)) for column in unique.T.tolist()]
        result = torch.tensor(made, dtype=torch.int64)[torch.from_numpy(inverse.reshape(-1))]
        return result.view(lean[0].shape).expand(shape)

    def solve(self, zero: Sequence[Form] = ()) -> Solution:
        """Every solution, by exact sparse elimination.

        Args:
            zero: further forms that must vanish.
        """
        roots = np.array(self._parent)
        while not np.array_equal(up := roots[roots], roots):
            roots = up
        root = roots.tolist()
        eliminated: dict[int, dict[int, Number]] = {ZERO: {}, ANY: {}}
        for own, terms in self._definitions:
            form = _reduced([(-1, root[own]), *((c, root[x]) for c, x in terms)], eliminated)
            _eliminate(form, root[own], eliminated)
        for equation in zero:
            _eliminate(_reduced([(c, root[x]) for x, c in equation.items()], eliminated), -1, eliminated)
        free = [x for x in np.unique(roots).tolist() if x not in eliminated]
        number = {x: j for j, x in enumerate(free)}
        entries: list[tuple[int, int, float]] = [(x, j, 1.0) for x, j in number.items()]
        for own in eliminated:
            form = _reduced([(1, own)], eliminated)
            entries += [(own, number[x], float(c)) for x, c in form.items()]
        rows, columns, values = (np.array(part) for part in zip(*entries, strict=True)) if entries else ([], [], [])
        return Solution(roots, scipy.sparse.csr_matrix((values, (rows, columns)), shape=(len(roots), len(free))))

    def reasons(self, ids: Tensor) -> list[str]:
        """Why unknowns are zero: what pinned them, or something they were tied to."""
        classes = {self._find(self._kin, x) for x in distinct(ids)}
        found = [reason for x, reason in self._pins if self._find(self._kin, x) in classes]
        return list(dict.fromkeys(found))

    def _define(self, terms: Iterable[tuple[Number, int]]) -> int:
        total: dict[int, Number] = {}
        for c, x in terms:
            root = self._find(self._parent, x)
            if root == ANY:
                return ANY
            total[root] = total.get(root, 0) + c
        key = tuple(sorted(((_whole(c), x) for x, c in total.items() if c and x != ZERO), key=lambda term: term[1]))
        if not key:
            return ZERO
        if len(key) == 1 and key[0][0] == 1:
            return key[0][1]
        if key not in self._known:
            self._known[key] = int(self.fresh(1)[0])
            self._definitions.append((self._known[key], key))
        return self._known[key]

    @staticmethod
    def _find(parent: list[int], x: int) -> int:
        root = x
        while parent[root] != root:
            root = parent[root]
        while parent[x] != root:
            parent[x], x = root, parent[x]
        return root

    def _union(self, parent: list[int], x: int, y: int) -> None:
        a, b = self._find(parent, x), self._find(parent, y)
        parent[max(a, b)] = min(a, b)


def some(matrix: scipy.sparse.csr_matrix, rows: NDArray[np.int64]) -> scipy.sparse.csr_matrix:
    """Some rows of a sparse matrix."""
    return scipy.sparse.csr_matrix(matrix[rows])


def distinct(ids: Tensor) -> list[int]:
    """The ids in an array, each once."""
    lean = ids[tuple(slice(None) if ids.stride(i) else slice(0, 1) for i in range(ids.ndim))]
    return torch.unique(lean).tolist()


def is_all(ids: Tensor, value: int) -> bool:
    """Test whether every id in an array is this one."""
    return distinct(ids) == [value]


def _pairs(a: Tensor, b: Tensor) -> list[tuple[int, int]]:
    """Different ids that meet at some element, each pair once."""
    a, b = torch.broadcast_tensors(a, b)
    lean = tuple(slice(None) if a.stride(i) or b.stride(i) else slice(0, 1) for i in range(a.ndim))
    x, y = a[lean].reshape(-1), b[lean].reshape(-1)
    differ = x != y
    if not bool(differ.any()):
        return []
    return [tuple(pair) for pair in torch.unique(torch.stack([x[differ], y[differ]], 1), dim=0).tolist()]  # pyrefly: ignore


def _reduced(terms: Iterable[tuple[Number, int]], eliminated: dict[int, dict[int, Number]]) -> dict[int, Number]:
    """The form of some terms in unknowns that are not eliminated; shortens what it looks up."""
    total: dict[int, Number] = {}
    stack = list(terms)
    while stack:
        c, x = stack.pop()
        known = eliminated.get(x)
        if known is None:
            total[x] = total.get(x, 0) + c
            continue
        if not eliminated.keys().isdisjoint(known):
            known = eliminated[x] = _reduced([(d, y) for y, d in known.items()], eliminated)
        stack += [(c * d, y) for y, d in known.items()]
    return {x: _whole(c) for x, c in total.items() if c}


def _eliminate(form: dict[int, Number], preferred: int, eliminated: dict[int, dict[int, Number]]) -> None:
    """Solve `form = 0` for one unknown: the preferred one if it is there, else the newest."""
    if form:
        pivot = preferred if preferred in form else max(form)
        over = Fraction(-1) / form[pivot]
        eliminated[pivot] = {x: _whole(c * over) for x, c in form.items() if x != pivot}


def _whole(number: Number) -> Number:
    return number if isinstance(number, int) or number.denominator != 1 else number.numerator
