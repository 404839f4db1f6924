"""Max-pooling: once it is known which entries win, it selects entries of planes by their places, which is linear."""

from __future__ import annotations

from typing import Any, final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd import Function
from torch.nn.modules.utils import _pair

from isoflat.risk.second_order import SecondOrderRule, Trace, eligible
from isoflat.risk.second_order.relu import rectified


@final
class _Picked(Function):
    """Entries of each plane, by their places in it: shape `(…, h, w)` from `(…, H, W)`."""

    @staticmethod
    def forward(ctx: Any, planes: Tensor, places: Tensor, disjoint: bool) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size, ctx.disjoint = (planes.shape[-2], planes.shape[-1]), disjoint
        return pick(planes, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyrefly: ignore
        (places,) = ctx.saved_tensors
        return _Spread.apply(gradient, places, ctx.size, ctx.disjoint), None, None


@final
class _Spread(Function):
    """The transpose: entries go back to their places, and add up where windows overlap."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor, size: tuple[int, int], disjoint: bool) -> Tensor:
        ctx.save_for_backward(places)
        ctx.disjoint = disjoint
        return spread(values, places, size, disjoint)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # pyrefly: ignore
        (places,) = ctx.saved_tensors
        return _Picked.apply(gradient, places, ctx.disjoint), None, None, None


def _apply(  # noqa: PLR0913
    trace: Trace,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Places are found once. A ReLU before the pooling is taken after it, where fewer entries are left: both grow.

    A convolution before that is made one with the pooling.
    """
    if return_indices or not eligible(input) or not input.is_contiguous() or input.ndim not in (3, 4):
        return NotImplemented
    source = trace.recall("relu", input)
    planes = input if source is None else source
    kernel, steps = _pair(kernel_size), _pair(stride or kernel_size)
    places = _places(planes.detach(), kernel, steps, padding, dilation, ceil_mode)
    disjoint = _pair(dilation) == (1, 1) and all(step >= size for step, size in zip(steps, kernel, strict=True))
    convolved = trace.recall("convolution", planes)
    picked = (
        _Picked.apply(planes, places, disjoint)
        if convolved is None
        else convolved.pooled(planes.detach(), places, disjoint)
    )
    return picked if source is None else rectified(picked, False)


def _places(planes: Tensor, *window: Any) -> Tensor:
    """Places in its plane of each window's first maximum; channels side by side, which vectorises on a processor."""
    if planes.ndim == 4 and planes.device.type == "cpu":
        planes = planes.contiguous(memory_format=torch.channels_last)
    return F.max_pool2d_with_indices(planes, *window)[1].contiguous()


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


RULE = SecondOrderRule("pooling", {F.max_pool2d: _apply, torch.max_pool2d: _apply})
