"""Arithmetic of several activations: sums need one scale, products add their logarithms."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from isoflat.symmetry.finding.axes import origin
from isoflat.symmetry.finding.constraints import Constraints
from isoflat.symmetry.finding.values import Activation, Known, StoredTensor, Value, shifted_only
from isoflat.symmetry.motions import Norm
from isoflat.symmetry.relations import ANY, distinct


def total(constraints: Constraints, node: Node, a: Value, b: Value, alpha: Any = 1) -> Activation:
    """`a + αb`: equal scales; shifts add up."""
    return _sum(constraints, node, a, b, Fraction(alpha))


def difference(constraints: Constraints, node: Node, a: Value, b: Value, alpha: Any = 1) -> Activation:
    """`a − αb`."""
    return total(constraints, node, a, b, -alpha)


def extremum(constraints: Constraints, node: Node, a: Value, b: Value) -> Activation:
    """Larger or smaller of two: equal scales, equal shifts."""
    x, y = (constraints.activation(value, constraints.where(node)) for value in (a, b))
    constraints.scales.tie(x.scale, y.scale)
    constraints.shifts.tie(x.shift, y.shift)
    constraints.bend(x.scale)
    return Activation(_either(x.scale, y.scale), torch.broadcast_tensors(x.shift, y.shift)[0])


def chosen(constraints: Constraints, node: Node, condition: Value, a: Value, b: Value) -> Activation:
    """`where`: equal scales, equal shifts."""
    made = extremum(constraints, node, a, b)
    shape = node.meta["val"].shape
    return Activation(made.scale.expand(shape), made.shift.expand(shape))


def filled(constraints: Constraints, node: Node, x: Value, mask: Value, value: Value) -> Activation:
    """`masked_fill`: the same as `where(mask, value, x)`."""
    return chosen(constraints, node, mask, value, x)


def product(constraints: Constraints, node: Node, a: Value, b: Value) -> Activation:
    """`a · b`."""
    return _product(constraints, node, a, b, 1)


def quotient(constraints: Constraints, node: Node, a: Value, b: Value) -> Activation:
    """`a / b`."""
    return _product(constraints, node, a, b, -1)


def negative(constraints: Constraints, node: Node, x: Value) -> Activation:
    """`−x`."""
    x = constraints.activation(x, constraints.where(node))
    return Activation(x.scale, constraints.shifts.combine((-1, x.shift)))


def root(exponent: Fraction) -> Any:
    """The rule for `x^exponent` with a fixed exponent that is no whole number, or negative."""

    def rule(constraints: Constraints, node: Node, x: Value) -> Activation:
        x = constraints.activation(x, constraints.where(node))
        constraints.no_shift(constraints.where(node), x)
        if exponent < 0:
            divided(constraints, constraints.where(node), constraints.scales.combine((-exponent, x.scale)))
        return Activation(constraints.scales.combine((exponent, x.scale)), shifted_only(x.shape).shift)

    return rule


def divided(constraints: Constraints, reason: str, scale: Tensor) -> None:
    """A scale that something is divided by must not vanish: it is divided out as by a normalisation without epsilon."""
    factors = tuple(u for u in distinct(scale) if u > ANY)
    if factors:
        constraints.norms.append(Norm(reason, None, 0.0, factors))


def _sum(constraints: Constraints, node: Node, a: Value, b: Value, sign: Fraction) -> Activation:
    reason = constraints.where(node)
    if (epsilon := _epsilon(constraints, node, a, b)) is not None:
        x = constraints.activation(a if isinstance(b, Known | float | int) else b, reason)
        constraints.no_shift(reason, x)
        halves = constraints.scales.combine((Fraction(1, 2), x.scale))
        factors = tuple(u for u in distinct(halves) if u != ANY)
        constraints.norms.append(Norm(reason, constraints.epsilon_of(node, epsilon), epsilon, factors))
        return x
    x, y = (constraints.activation(value, reason) for value in (a, b))
    constraints.scales.tie(x.scale, y.scale)
    return Activation(_either(x.scale, y.scale), constraints.shifts.combine((1, x.shift), (sign, y.shift)))


def _epsilon(constraints: Constraints, node: Node, a: Value, b: Value) -> float | None:
    """The tiny number in `sqrt(v + ε)`, which a normalisation written by hand adds; None if this is another sum.

    One that a module holds by a name like "eps" may be of any size: it has moved with its factor.
    """
    constant = b if isinstance(b, Known | float | int) else a
    content = constant.value if isinstance(constant, Known) else constant
    if isinstance(content, Activation | StoredTensor) or not isinstance(a if constant is b else b, Activation):
        return None
    small = isinstance(content, float) or (isinstance(content, Tensor) and content.numel() == 1)
    read = {str(user.target) for user in node.users}
    roots = {"aten.rsqrt.default", "aten.sqrt.default", "aten.pow.Tensor_Scalar"}
    powers = [user.args[1] for user in node.users if str(user.target) == "aten.pow.Tensor_Scalar"]
    if not small or not read or not read <= roots or not set(powers) <= {0.5, -0.5}:
        return None
    value = float(content)
    return value if value > 0 and (value <= 1e-2 or constraints.epsilon_of(node, value) is not None) else None


def _product(constraints: Constraints, node: Node, a: Value, b: Value, power: int) -> Activation:
    reason = constraints.where(node)
    if (factor := _number(b, power)) is not None and not isinstance(a, Known):
        x = constraints.activation(a, reason)
        return Activation(x.scale, constraints.shifts.combine((factor, x.shift)))
    if power == 1 and (factor := _number(a, 1)) is not None and not isinstance(b, Known):
        return _product(constraints, node, b, a, 1)
    constraints.multiplies(a, reason)
    constraints.multiplies(b, reason)
    if _normalises(node, power):
        constraints.normalised.add(node)
    for value, other in ((a, node.args[1]), (b, node.args[0])):
        if (
            isinstance(value, StoredTensor)
            and power > 0
            and isinstance(other, Node)
            and origin(other) in constraints.normalised
        ):
            constraints.gains.add(value.name)
    x, y = (constraints.activation(value, reason) for value in (a, b))
    constraints.no_shift(reason, x, y)
    if power < 0:
        divided(constraints, reason, y.scale)
    scale = constraints.scales.combine((1, x.scale), (power, y.scale))
    return Activation(scale, shifted_only(scale.shape).shift)


def _normalises(node: Node, power: int) -> bool:
    """Test whether something is divided by a root, as a normalisation written by hand does."""
    roots = (("aten.rsqrt.default",), -0.5) if power > 0 else (("aten.sqrt.default",), 0.5)
    for part in node.args if power > 0 else node.args[1:]:
        made = origin(part) if isinstance(part, Node) else None
        if made is not None and (
            str(made.target) in roots[0] or (str(made.target) == "aten.pow.Tensor_Scalar" and made.args[1] == roots[1])
        ):
            return True
    return False


def _number(value: Value, power: int) -> Fraction | None:
    """A single known number other than zero, or its reciprocal, exactly."""
    content = value.value if isinstance(value, Known) else value
    if isinstance(content, Tensor) and content.numel() == 1 and content.ndim == 0:
        content = content.item()
    if not isinstance(content, int | float) or isinstance(content, bool) or not math.isfinite(content) or not content:
        return None
    return Fraction(content) ** power


def _either(a: Tensor, b: Tensor) -> Tensor:
    """Ids of a sum: those of the first, but of the second where the first is a literal zero."""
    a, b = torch.broadcast_tensors(a, b)
    return torch.where(a == ANY, b, a) if ANY in distinct(a) else a


RULES = {
    "aten.add.Tensor": total,
    "aten.add.Scalar": total,
    "aten.add_.Tensor": total,
    "aten.sub.Tensor": difference,
    "aten.sub.Scalar": difference,
    "aten.maximum.default": extremum,
    "aten.minimum.default": extremum,
    "aten.where.self": chosen,
    "aten.where.ScalarOther": chosen,
    "aten.where.ScalarSelf": chosen,
    "aten.masked_fill.Scalar": filled,
    "aten.mul.Tensor": product,
    "aten.mul.Scalar": product,
    "aten.div.Tensor": quotient,
    "aten.div.Scalar": quotient,
    "aten.neg.default": negative,
    "aten.sqrt.default": root(Fraction(1, 2)),
    "aten.rsqrt.default": root(Fraction(-1, 2)),
    "aten.reciprocal.default": root(Fraction(-1)),
}
