"""Functions of one element: homogeneous ones let a positive scale through, others fix it."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch.fx import Node

from isoflat.symmetry.finding.constraints import Ledger
from isoflat.symmetry.finding.rules.arithmetic import divided
from isoflat.symmetry.finding.values import Activation, Known, Value, shifted_only


def homogeneous(ledger: Ledger, node: Node, x: Value, *args: Any) -> Activation:
    """Degree one: `f(a x) = a f(x)` for a > 0; with a kink at zero, so that constants do not pass."""
    x = ledger.activation(x, ledger.where(node))
    ledger.no_shift(ledger.where(node), x)
    ledger.bend(x.scale)
    return Activation(x.scale, shifted_only(x.shape).shift)


def parametric(ledger: Ledger, node: Node, x: Value, slope: Value) -> Activation:
    """PReLU: slopes are ratios and keep their size."""
    ledger.pin([slope], f"{ledger.where(node)}: a slope is a ratio")
    return homogeneous(ledger, node, x)


def clamped(ledger: Ledger, node: Node, x: Value, low: Any = None, high: Any = None) -> Activation:
    """Homogeneous if it clamps at zero only."""
    if all(bound is None or (not isinstance(bound, Activation) and bound == 0) for bound in (low, high)):
        return homogeneous(ledger, node, x)
    return nonlinear(ledger, node, x)


def threshold(ledger: Ledger, node: Node, x: Value, at: float, value: float) -> Activation:
    """Homogeneous if everything below zero becomes zero."""
    return homogeneous(ledger, node, x) if at == 0 and value == 0 else nonlinear(ledger, node, x)


def nonlinear(ledger: Ledger, node: Node, *args: Any, **kwargs: Any) -> Any:
    """A function that no scale and no constant passes."""
    for value in args:
        if isinstance(value, Activation):
            ledger.bend(value.scale)
    ledger.pin([*args, *kwargs.values()], ledger.where(node))
    made = node.meta["val"]
    if isinstance(made, torch.Tensor):
        return shifted_only(made.shape)
    return tuple(shifted_only(part.shape) if isinstance(part, torch.Tensor) else Known(part) for part in made)


def sign(ledger: Ledger, node: Node, x: Value, *args: Any) -> Activation:
    """Depends on signs only: a positive scale is neither seen nor passed on."""
    if args and not _is_zero(args[0]):
        return nonlinear(ledger, node, x, *args)
    x = ledger.activation(x, ledger.where(node))
    ledger.no_shift(ledger.where(node), x)
    ledger.bend(x.scale)
    return shifted_only(x.shape)


def softmax(ledger: Ledger, node: Node, x: Value, dim: int, *args: Any) -> Activation:
    """Softmax and its logarithm fix every scale, and forget a constant common to all entries along their axis."""
    x = ledger.activation(x, ledger.where(node))
    ledger.scales.pin(x.scale, ledger.where(node))
    ledger.shifts.along(x.shift, *(axis for axis in range(x.scale.ndim) if axis != dim % x.scale.ndim))
    return shifted_only(x.shape)


def power(ledger: Ledger, node: Node, x: Value, exponent: Any) -> Activation:
    """`x^n` for a number n: n times the scale; below zero, x is divided by."""
    n = exponent.value if isinstance(exponent, Known) else exponent
    if isinstance(n, torch.Tensor):
        n = n.item() if n.numel() == 1 else None
    if not isinstance(n, int | float) or not math.isfinite(n) or n == 0:
        return nonlinear(ledger, node, x)
    x = ledger.activation(x, ledger.where(node))
    if n == 1:
        return x
    ledger.no_shift(ledger.where(node), x)
    if n < 0:
        divided(ledger, ledger.where(node), ledger.scales.combine((-Fraction(n), x.scale)))
    return Activation(ledger.scales.combine((Fraction(n), x.scale)), shifted_only(x.shape).shift)


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
    "aten.clamp_min.default": lambda ledger, node, x, low: clamped(ledger, node, x, low),
    "aten.clamp_max.default": lambda ledger, node, x, high: clamped(ledger, node, x, None, high),
    "aten.threshold.default": threshold,
    "aten.pow.Tensor_Scalar": power,
    "aten.square.default": lambda ledger, node, x: power(ledger, node, x, 2),
    "aten.sign.default": sign,
    **{f"aten.{name}.Scalar": sign for name in ("gt", "lt", "ge", "le")},
    **{name: nonlinear for function in _NONLINEAR for name in _both(function)},
    "aten.softmax.int": softmax,
    "aten._softmax.default": softmax,
    "aten._safe_softmax.default": softmax,
    "aten.log_softmax.int": softmax,
    "aten._log_softmax.default": softmax,
}
