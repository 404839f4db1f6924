"""An orthonormal basis that grows by one column at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from isoflat.linalg.vectors import orthogonalise


class Span:
    """An orthonormal basis of what its columns span, stored once, in the precision of the products.

    Columns that depend on earlier ones add nothing. A column is never dropped because it is small: what is left of it
    is compared with rounding alone, by Gram–Schmidt that is repeated until the norm stands still.

    Attributes:
        rows: the basis, shape `(r, n)`.
        images: coefficients of each column in the basis as it was then, `(r,)` and shorter, float64.

    >>> span = Span(3, 2, torch.float64, torch.device("cpu"))
    >>> for column in torch.tensor([[0.0, 2.0, 0.0], [0.0, 3.0, 0.0]], dtype=torch.float64):
    ...     span.take(column)
    >>> span.rows.tolist(), [image.tolist() for image in span.images]
    ([[0.0, 1.0, 0.0]], [[2.0], [3.0]])
    """

    def __init__(self, n: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        """An empty basis with room for `capacity` vectors of ℝⁿ."""
        self.images: list[Tensor] = []
        self._store = torch.empty(capacity, n, dtype=dtype, device=device)
        self._size = 0

    @property
    def rows(self) -> Tensor:
        """The basis so far, a view."""
        return self._store[: self._size]

    def take(self, column: Tensor) -> None:
        """Extend the basis by what a column of shape `(n,)` adds to it."""
        residual = column.double().clone()
        removed, size = orthogonalise(self.rows.unbind(), residual)
        image = removed.cpu()
        if size:
            self._store[self._size] = residual / size
            self._size += 1
            image = torch.cat([image, torch.tensor([size], dtype=torch.float64)])
        self.images.append(image)
