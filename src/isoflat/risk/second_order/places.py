"""Selection of entries of planes by their places, which max-pooling is once its maxima are known."""

from __future__ import annotations

from torch import Tensor


def pick(planes: Tensor, places: Tensor, across: bool = False) -> Tensor:
    """The entries, shape `(…, h, w)` from `(…, H, W)`; places count along the rows of a plane.

    Args:
        planes: planes of one or more channels.
        places: places of the entries to pick.
        across: flag that both have channels side by side in memory, and the entries are to have them; four dimensions.
    """
    if across:
        picked = _beside(planes).flatten(1, 2).gather(1, _beside(places).flatten(1, 2))
        return picked.view(_beside(places).shape).permute(0, 3, 1, 2)
    return planes.flatten(-2).gather(-1, places.flatten(-2)).view(places.shape)


def spread(values: Tensor, places: Tensor, size: tuple[int, int], disjoint: bool, across: bool = False) -> Tensor:
    """The transpose: entries go back to their places in planes of this size, and add up where they are not disjoint."""
    if across:
        beside, where = _beside(values), _beside(places)
        planes = values.new_zeros(len(values), size[0] * size[1], values.shape[1])
        filled = _put(planes, 1, where.flatten(1, 2), beside.flatten(1, 2), disjoint)
        return filled.unflatten(1, size).permute(0, 3, 1, 2)
    planes = values.new_zeros(*values.shape[:-2], size[0] * size[1])
    return _put(planes, -1, places.flatten(-2), values.flatten(-2), disjoint).unflatten(-1, size)


def _beside(tensor: Tensor) -> Tensor:
    """Tensor with its channels last in memory."""
    return tensor.permute(0, 2, 3, 1)


def _put(planes: Tensor, axis: int, places: Tensor, values: Tensor, disjoint: bool) -> Tensor:
    return (planes.scatter_ if disjoint else planes.scatter_add_)(axis, places, values)
