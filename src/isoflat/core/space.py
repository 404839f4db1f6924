"""Named tensors as one flat vector, and every inner product of vectors.

All sums of squares and inner products of the library go through `inner`, `norm` and `ParameterSpace.block_norms`, in
float64 whatever the vectors are stored in, so that sharded vectors would need a change here only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import final

import torch
from torch import Tensor

CHUNK = 1 << 17
"""Entries converted to float64 at a time: the working copies of some ten rows stay in cache. Measured on two cores with
long rows: smaller pieces leave a core idle, larger ones the cache."""


@final
@dataclass(frozen=True)
class ParameterSpace:
    """ℝⁿ with its coordinates grouped into named tensors, in a fixed order.

    >>> space = ParameterSpace(("weight", "bias"), ((2, 3), (2,)))
    >>> space.size, space.slices["bias"]
    (8, slice(6, 8, None))
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each tensor."""
        return tuple(map(math.prod, self.shapes))

    @cached_property
    def size(self) -> int:
        """Dimension n."""
        return sum(self.sizes)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Range of each tensor's entries in the flat vector, by name."""
        ends = tuple(accumulate(self.sizes, initial=0))
        return {name: slice(a, b) for name, a, b in zip(self.names, ends, ends[1:], strict=False)}

    def flatten(self, tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
        """Tensors of this space's shapes, as one vector of shape `(n,)`."""
        values = [tensors[name] for name in self.names] if isinstance(tensors, Mapping) else tensors
        return torch.cat([value.reshape(-1) for value in values]) if values else torch.empty(0)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a vector of shape `(n,)`, by name."""
        return dict(zip(self.names, map(Tensor.view, vector.split(self.sizes), self.shapes), strict=True))

    def block_norms(self, vector: Tensor) -> Tensor:
        """Euclidean norm of each tensor's part, float64, shape `(number of tensors,)`."""
        return torch.tensor(list(map(norm, vector.split(self.sizes))), dtype=torch.float64)

    def spread(self, per_block: Tensor) -> Tensor:
        """Vector of shape `(n,)` that repeats one value per tensor for each of its entries."""
        return per_block.repeat_interleave(torch.tensor(self.sizes, device=per_block.device))


def inner(rows: Sequence[Tensor], vector: Tensor) -> Tensor:
    """Inner products of each row with a vector, accumulated in float64.

    Args:
        rows: k vectors of shape `(n,)`.
        vector: shape `(n,)`.

    Returns:
        Shape `(k,)`, float64, on the vectors' device.
    """
    total = torch.zeros(len(rows), dtype=torch.float64, device=vector.device)
    for piece, wide in _widened(rows, vector):
        part = vector[piece].double()
        total += torch.stack([torch.dot(row, part) for row in wide]) if isinstance(wide, list) else wide @ part
    return total


def rough_inner(rows: Sequence[Tensor], vector: Tensor, size: float) -> Tensor:
    """Inner products in the precision of the rows where these are long, which is faster than `inner`; shape `(k,)`, float64.

    Args:
        rows: k vectors of shape `(n,)`.
        vector: shape `(n,)`.
        size: approximate norm of the vector, which is brought to 1 so that nothing overflows.
    """
    if len(vector) <= CHUNK or rows[0].dtype == torch.float64 or size == 0 or not math.isfinite(size):
        return inner(rows, vector)
    scale = math.ldexp(1.0, min(-math.frexp(size)[1], 1023))
    total = torch.zeros(len(rows), dtype=torch.float64, device=vector.device)
    for piece in _pieces(vector):
        narrow = (vector[piece] * scale).to(rows[0].dtype)
        total += torch.stack([torch.dot(row[piece], narrow) for row in rows]).double()
    return total / scale


def subtract_combination(vector: Tensor, coefficients: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Subtract `Σ_j coefficients_j rows_j` from a vector in place, in float64; the inner products of what is left with each row.

    One pass over the rows does both.
    """
    total = torch.zeros(len(rows), dtype=torch.float64, device=vector.device)
    weights = coefficients.tolist()
    for piece, wide in _widened(rows, vector):
        part = vector[piece]
        if isinstance(wide, list):
            for weight, row in zip(weights, wide, strict=True):
                part.add_(row, alpha=-weight)
            total += torch.stack([torch.dot(row, part) for row in wide])
        else:
            part -= coefficients.to(part) @ wide
            total += wide @ part
    return total


def combine(coefficients: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Linear combination of k rows of shape `(n,)`, in float64: `Σ_j coefficients_j rows_j`, shape `(n,)`."""
    out = torch.zeros(rows[0].shape[0], dtype=torch.float64, device=rows[0].device)
    add(out, coefficients, rows)
    return out


def add(vector: Tensor, coefficients: Tensor, rows: Sequence[Tensor]) -> None:
    """`vector += Σ_j coefficients_j rows_j` in place, for a vector in float64."""
    if len(vector) <= CHUNK:
        vector += coefficients.to(vector) @ torch.stack(list(rows)).double()
        return
    weights = coefficients.tolist()
    for piece in _pieces(vector):
        for weight, row in zip(weights, rows, strict=True):
            vector[piece].add_(row[piece], alpha=weight)


def norm(vector: Tensor) -> float:
    """Euclidean norm, accumulated in float64, safe against overflow and underflow of the squares."""
    flat = vector.reshape(-1)
    if flat.numel() == 0:
        return 0.0
    size = largest(flat)
    if size == 0 or not math.isfinite(size):
        return size
    # A power of two keeps every rounding the same at every scale, so that rescaled networks agree bit for bit.
    scale = math.ldexp(1.0, min(-math.frexp(size)[1], 1023))
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    for piece in _pieces(flat):
        part = flat[piece].double() * scale
        total += part @ part
    return math.sqrt(total) / scale


def largest(vector: Tensor) -> float:
    """Largest magnitude of an entry, without a copy; NaN if there is one."""
    low, high = torch.aminmax(vector)
    return max(-float(low), float(high))


def _pieces(vector: Tensor) -> Iterator[slice]:
    """Ranges of entries that fit into a cache, or that are worth an accelerator's while."""
    width = CHUNK if vector.device.type == "cpu" else CHUNK << 7
    for start in range(0, len(vector), width):
        yield slice(start, start + width)


def _widened(rows: Sequence[Tensor], vector: Tensor) -> Iterator[tuple[slice, Tensor | list[Tensor]]]:
    """The rows in float64 piece by piece; short ones as one matrix, long ones in a buffer that each piece overwrites."""
    if len(rows) == 0:
        return
    if len(vector) <= CHUNK:
        yield slice(None), torch.stack(list(rows)).double()
        return
    buffer: list[Tensor] = []
    for piece in _pieces(vector):
        parts = [row[piece] for row in rows]
        buffer = buffer or [part.new_empty(len(part), dtype=torch.float64) for part in parts]
        yield piece, [own[: len(part)].copy_(part) for own, part in zip(buffer, parts, strict=True)]
