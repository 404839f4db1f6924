"""Pooling, sums and extrema: what is reduced together has one scale."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from isoflat.symmetry.finding.constraints import Constraints
from isoflat.symmetry.finding.values import Activation, Value, shifted_only


def pooling(space: int, maximum: bool, padded: bool = True) -> Any:
    """The rule for pooling over the last axes: the same unit everywhere.

    A maximum lets constants through, and so does a mean without zero padding.

    Args:
        space: number of axes that are pooled.
        maximum: whether the largest is taken, or the mean.
        padded: whether the operation's fourth argument is its padding.
    """

    def rule(constraints: Constraints, node: Node, x: Value, *args: Any, **kwargs: Any) -> Any:
        x = constraints.activation(x, constraints.where(node))
        made = node.meta["val"]
        shape = made[0].shape if _several(made) else made.shape
        kept = tuple(range(len(shape) - space))
        scale, shift = constraints.scales.along(x.scale, *kept), constraints.shifts.along(x.shift, *kept)
        if maximum:
            constraints.bend(x.scale)
        elif padded and not _plain_mean(args):
            constraints.shifts.pin(shift, f"{constraints.where(node)}: zero padding")
        elif padded and len(args) > 5 and args[5] is not None:
            constraints.shifts.pin(
                shift, f"{constraints.where(node)}: divided by another number than that of the terms"
            )
        wide = (..., *[None] * space)
        result = Activation(scale[wide].expand(shape), shift[wide].expand(shape))
        return (result, shifted_only(shape)) if _several(made) else result

    return rule


def _plain_mean(args: tuple[Any, ...]) -> bool:
    """Test whether an average counts its entries: kernel, stride, padding, ceil, count padding, divisor."""
    padding, counted, divisor = (args[i] if len(args) > i else default for i, default in ((2, 0), (4, True), (5, None)))
    return divisor is None and not (counted and bool(torch.as_tensor(padding).any()))


def summed(
    constraints: Constraints, node: Node, x: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> Activation:
    """A sum over axes; a constant would be counted as often as there are terms."""
    x = constraints.activation(x, constraints.where(node))
    constraints.no_shift(constraints.where(node), x)
    return averaged(constraints, node, x, dim, keepdim)


def averaged(
    constraints: Constraints, node: Node, x: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> Activation:
    """A mean over axes."""
    x = constraints.activation(x, constraints.where(node))
    axes = _axes(dim, x.scale.ndim)
    kept = tuple(axis for axis in range(x.scale.ndim) if axis not in axes)
    scale, shift = constraints.scales.along(x.scale, *kept), constraints.shifts.along(x.shift, *kept)
    return Activation(*(_kept(ids, axes, keepdim) for ids in (scale, shift)))


def largest(constraints: Constraints, node: Node, x: Value, dim: Any = None, keepdim: bool = False) -> Any:
    """A maximum or minimum over axes, with or without the place."""
    value = constraints.activation(x, constraints.where(node))
    constraints.bend(value.scale)
    made = averaged(constraints, node, value, dim, keepdim)
    return (made, shifted_only(made.shape)) if _several(node.meta["val"]) else made


def spread(power: Fraction) -> Any:
    """The rule for the variance (power 2) or standard deviation (power 1): it forgets a common constant."""

    def rule(
        constraints: Constraints,
        node: Node,
        x: Value,
        dim: Any = None,
        *args: Any,
        keepdim: bool = False,
        **kwargs: Any,
    ) -> Activation:
        keepdim = keepdim or (len(args) > 1 and bool(args[1]))
        made = averaged(constraints, node, constraints.activation(x, constraints.where(node)), dim, keepdim)
        return Activation(constraints.scales.combine((power, made.scale)), shifted_only(made.shape).shift)

    return rule


def normed(
    constraints: Constraints,
    node: Node,
    x: Value,
    order: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    **kwargs: Any,
) -> Activation:
    """A vector norm over axes."""
    x = constraints.activation(x, constraints.where(node))
    constraints.no_shift(constraints.where(node), x)
    return averaged(constraints, node, x, dim, keepdim)


def accumulated(constraints: Constraints, node: Node, x: Value, dim: int, **kwargs: Any) -> Activation:
    """Running sums along an axis."""
    shape = node.meta["val"].shape
    made = summed(constraints, node, x, dim, keepdim=True)
    return Activation(made.scale.expand(shape), shifted_only(shape).shift)


def _several(made: Any) -> bool:
    return isinstance(made, tuple | list)


def _axes(dim: Any, ndim: int) -> set[int]:
    if dim is None or dim == []:
        return set(range(ndim))
    dims: Sequence[int] = [dim] if isinstance(dim, int) else dim
    return {axis % ndim for axis in dims}


def _kept(ids: Tensor, axes: set[int], keepdim: bool) -> Tensor:
    for axis in sorted(axes) if keepdim else ():
        ids = ids.unsqueeze(axis)
    return ids


_INTERPOLATED = {
    **{f"nearest{n}d": n for n in (1, 2, 3)}, "_nearest_exact1d": 1, "_nearest_exact2d": 2, "linear1d": 1, "bilinear2d": 2,
    "bicubic2d": 2, "trilinear3d": 3,
}  # fmt: skip

RULES = {
    **{f"aten.max_pool{n}d.default": pooling(n, maximum=True) for n in (1, 2, 3)},
    **{f"aten.max_pool{n}d_with_indices.default": pooling(n, maximum=True) for n in (2, 3)},
    **{f"aten.adaptive_max_pool{n}d.default": pooling(n, maximum=True) for n in (1, 2, 3)},
    **{f"aten.avg_pool{n}d.default": pooling(n, maximum=False) for n in (1, 2, 3)},
    **{f"aten.adaptive_avg_pool{n}d.default": pooling(n, maximum=False, padded=False) for n in (1, 2, 3)},
    **{f"aten._adaptive_avg_pool{n}d.default": pooling(n, maximum=False, padded=False) for n in (2, 3)},
    # Weights of an interpolation add up to one: it lets scales and constants through as a mean does.
    **{
        f"aten.upsample_{kind}.{form}": pooling(n, maximum=False, padded=False)
        for kind, n in _INTERPOLATED.items()
        for form in ("default", "vec")
    },
    "aten.sum.default": summed,
    "aten.sum.dim_IntList": summed,
    "aten.cumsum.default": accumulated,
    "aten.mean.default": averaged,
    "aten.mean.dim": averaged,
    "aten.amax.default": largest,
    "aten.amin.default": largest,
    "aten.max.dim": largest,
    "aten.min.dim": largest,
    "aten.max.default": largest,
    "aten.min.default": largest,
    "aten.std.correction": spread(Fraction(1)),
    "aten.std.dim": spread(Fraction(1)),
    "aten.var.correction": spread(Fraction(2)),
    "aten.var.dim": spread(Fraction(2)),
    "aten.linalg_vector_norm.default": normed,
}
