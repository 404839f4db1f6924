"""Values that flow through a traced network while its units are inferred."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor


@final
@dataclass(frozen=True)
class Activation:
    """Something that depends on the network's input, or on parameters in a way that is no longer a plain tensor.

    Attributes:
        scale: unknown log-scale of each element, shape of the activation (expanded where units repeat).
        shift: unknown constant added to each element, the same for every input; same shape.
    """

    scale: Tensor
    shift: Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of the activation."""
        return self.scale.shape


@final
@dataclass(frozen=True)
class StoredTensor:
    """A parameter or floating-point buffer, read as it is stored.

    Attributes:
        name: canonical name; tied tensors have one.
        shape: its shape.
    """

    name: str
    shape: torch.Size


@final
@dataclass(frozen=True)
class Slice:
    """Consecutive slices of a stored tensor along one axis, such as the query's rows of a packed weight.

    Attributes:
        name: name of the tensor.
        shape: shape of the part.
        axis: along which it is cut.
        start: index of the first slice.
    """

    name: str
    shape: torch.Size
    axis: int
    start: int


@final
@dataclass(frozen=True)
class Known:
    """A value that depends on neither parameters nor input: it is computed for real."""

    value: Any


Value = Activation | StoredTensor | Known | Any
"""Values of a node; tuples of them where an operation returns several."""


def shifted_only(shape: torch.Size | tuple[int, ...], shift: Tensor | None = None) -> Activation:
    """An activation whose scale cannot change.

    >>> shifted_only((2, 3)).scale.tolist()
    [[0, 0, 0], [0, 0, 0]]
    """
    zero = torch.zeros((), dtype=torch.int64).expand(shape)
    return Activation(zero, zero if shift is None else shift)
