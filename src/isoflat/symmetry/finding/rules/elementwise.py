"""Functions of one element: homogeneous ones let a positive scale through, others fix it."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch.fx import Node

from isoflat.symmetry.finding.constraints import Constraints
from isoflat.symmetry.finding.rules.arithmetic import divided
from isoflat.symmetry.finding.values import Activation, Known, Value, shifted_only


def homogeneous(constraints: Constraints, node: Node, x: Value, *args: Any) -> Activation:
    """Degree one: `f(a x) = a f(x)` for a > 0; with a kink at zero, so that constants do not pass."""
    x = constraints.activation(x, constraints.where(node))
    constraints.no_shift(constraints.where(node), x)
    constraints.bend(x.scale)
    return Activation(x.scale, shifted_only(x.shape).shift)


def parametric(constraints: Constraints, node: Node, x: Value, slope: Value) -> Activation:
    """PReLU: slopes are ratios and keep their size."""
    constraints.pin([slope], f"{constraints.where(node)}: a slope is a ratio")
    return homogeneous(constraints, node, x)


def clamped(constraints: Constraints, node: Node, x: Value, low: Any = None, high: Any = None) -> Activation:
    """Clamp, homogeneous if it clamps at zero only."""
    if all(bound is None or (not isinstance(bound, Activation) and bound == 0) for bound in (low, high)):
        return homogeneous(constraints, node, x)
    return nonlinear(constraints, node, x)


def threshold(constraints: Constraints, node: Node, x: Value, at: float, value: float) -> Activation:
    """Threshold, homogeneous if everything below zero becomes zero."""
    return homogeneous(constraints, node, x) if at == 0 and value == 0 else nonlinear(constraints, node, x)


def nonlinear(constraints: Constraints, node: Node, *args: Any, **kwargs: Any) -> Any:
    """A function that no scale and no constant passes."""
    for value in args:
        if isinstance(value, Activation):
            constraints.bend(value.scale)
    constraints.pin([*args, *kwargs.values()], constraints.where(node))
    made = node.meta["val"]
    if isinstance(made, torch.Tensor):
        return shifted_only(made.shape)
    return tuple(shifted_only(part.shape) if isinstance(part, torch.Tensor) else Known(part) for part in made)


def sign(constraints: Constraints, node: Node, x: Value, *args: Any) -> Activation:
    """Function of signs only: a positive scale is neither seen nor passed on."""
    if args and not _is_zero(args[0]):
        return nonlinear(constraints, node, x, *args)
    x = constraints.activation(x, constraints.where(node))
    constraints.no_shift(constraints.where(node), x)
    constraints.bend(x.scale)
    return shifted_only(x.shape)


def softmax(constraints: Constraints, node: Node, x: Value, dim: int, *args: Any) -> Activation:
    """Softmax and its logarithm fix every scale, and forget a constant common to all entries along their axis."""
    x = constraints.activation(x, constraints.where(node))
    constraints.scales.pin(x.scale, constraints.where(node))
    constraints.shifts.along(x.shift, *(axis for axis in range(x.scale.ndim) if axis != dim % x.scale.ndim))
    return shifted_only(x.shape)


def power(constraints: Constraints, node: Node, x: Value, exponent: Any) -> Activation:
    """`x^n` for a number n: n times the scale; below zero, x is divided by."""
    n = exponent.value if isinstance(exponent, Known) else exponent
    if isinstance(n, torch.Tensor):
        n = n.item() if n.numel() == 1 else None
    if not isinstance(n, int | float) or not math.isfinite(n) or n == 0:
        return nonlinear(constraints, node, x)
    x = constraints.activation(x, constraints.where(node))
    if n == 1:
        return x
    constraints.no_shift(constraints.where(node), x)
    if n < 0:
        divided(constraints, constraints.where(node), constraints.scales.combine((-Fraction(n), x.scale)))
    return Activation(constraints.scales.combine((Fraction(n), x.scale)), shifted_only(x.shape).shift)


def _is_zero(value: Any) -> bool:
    content = value.value if isinstance(value, Known) else value
    return not isinstance(content, Activation) and bool((torch.as_tensor(content) == 0).all())


def _both(name: str) -> tuple[str, str]:
    return f"aten.{name}.default", f"aten.{name}_.default"


_NONLINEAR = (
    "gelu", "silu", "sigmoid", "tanh", "mish", "elu", "selu", "celu", "softplus", "hardswish", "hardsigmoid",
    "hardtanh", "relu6", "log_sigmoid", "exp", "log", "sin", "cos", "erf", "softsign", "tanhshrink", "softshrink",
    "hardshrink", "expm1", "log1p",
)  # fmt: skip

RULES = {
    **dict.fromkeys((*_both("relu"), *_both("leaky_relu"), *_both("abs")), homogeneous),
    "aten.prelu.default": parametric,
    "aten._prelu_kernel.default": parametric,
    "aten.clamp.default": clamped,
    "aten.clamp_min.default": lambda constraints, node, x, low: clamped(constraints, node, x, low),
    "aten.clamp_max.default": lambda constraints, node, x, high: clamped(constraints, node, x, None, high),
    "aten.threshold.default": threshold,
    "aten.pow.Tensor_Scalar": power,
    "aten.square.default": lambda constraints, node, x: power(constraints, node, x, 2),
    "aten.sign.default": sign,
    **{f"aten.{name}.Scalar": sign for name in ("gt", "lt", "ge", "le")},
    **{name: nonlinear for function in _NONLINEAR for name in _both(function)},
    "aten.softmax.int": softmax,
    "aten._softmax.default": softmax,
    "aten._safe_softmax.default": softmax,
    "aten.log_softmax.int": softmax,
    "aten._log_softmax.default": softmax,
}
