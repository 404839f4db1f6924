"""Likelihoods of functions of output and target, told from the losses of torch that they add up.

The function runs once under watch: each call of a known loss in torch.nn.functional is noted with its input as a function
of the output, and its value is replaced by a constant. What remains must be a sum of these with weights. Labels are then
drawn for each of them, and residuals and tangents pass between its input and the output by the Jacobian.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from isoflat.core.errors import UsageError
from isoflat.core.rng import stream
from isoflat.risk.likelihood.known import of_criterion
from isoflat.risk.likelihood.records import Likelihood, entries
from isoflat.risk.losses import TargetLoss, divisor

Given = Mapping[str, Any]
"""Arguments of a call by name."""


@final
@dataclass(frozen=True)
class Joint(Likelihood):
    """Labels of several losses, row by row side by side.

    Attributes:
        z: output, a leaf of the graph of the inputs.
        parts: likelihood of each loss.
        inputs: input of each loss, as a function of z.
    """

    z: Tensor
    parts: tuple[Likelihood, ...]
    inputs: tuple[Tensor, ...]

    @property
    def canonical(self) -> bool:
        """Flag that all losses are, of linear functions of the output."""
        seeds, image = self._transposed
        drawn = [torch.randn(x.shape, generator=stream(0, "linear", k)).to(x) for k, x in enumerate(self.inputs)]
        with torch.enable_grad():
            moved = torch.autograd.grad(image, seeds, torch.ones_like(image), create_graph=True, materialize_grads=True)
        bent = [(part * other).sum() for part, other in zip(moved, drawn, strict=True) if part.requires_grad]
        found = torch.autograd.grad(torch.stack(bent).sum(), self.z, allow_unused=True)[0] if bent else None
        straight = found is None or not bool((found != 0).any())
        return straight and all(part.canonical for part in self.parts)

    def draw(self, z: Tensor, uniform: Tensor) -> Tensor:
        """Labels of all losses, shape `(rows, labels)`, float64."""
        shares = uniform.split([part.mass.numel() // len(uniform) for part in self.parts], 1)
        made = [
            part.draw(x.detach(), share.reshape(part.mass.shape)).reshape(len(uniform), -1).double()
            for part, x, share in zip(self.parts, self.inputs, shares, strict=True)
        ]
        return torch.cat(made, 1)

    def residual(self, z: Tensor, labels: Tensor) -> Tensor:
        """Residuals in the inputs of all losses, flat."""
        own = labels.split([part.mass.numel() // len(labels) for part in self.parts], 1)
        made = [
            part.residual(x.detach(), share.reshape(part.mass.shape)).reshape(-1)
            for part, x, share in zip(self.parts, self.inputs, own, strict=True)
        ]
        return torch.cat(made)

    def curvature(self, z: Tensor, tangent: Tensor) -> Tensor:
        """`Jᵀ F J u` with the Jacobian J of the inputs."""
        pushed = zip(self.parts, self.inputs, self._pushed(tangent), strict=True)
        return self._pulled([part.curvature(x, u) for part, x, u in pushed])

    def factors(self, z: Tensor) -> Iterator[Tensor]:
        """Square roots of each loss in turn, pulled back."""
        for place, (part, x) in enumerate(zip(self.parts, self.inputs, strict=True)):
            for factor in _by_row(part, x.detach(), len(self.z)):
                cotangents = [torch.zeros_like(other) for other in self.inputs]
                cotangents[place] = factor
                yield self._pulled(cotangents)

    def outer(self, residual: Tensor, tangent: Tensor) -> Tensor:
        """`Jᵀ r̃_t ⟨r̃_t, J u⟩`, summed over the targets t of a row."""
        own = residual.split([x.numel() for x in self.inputs])
        made = zip(self.parts, own, self._pushed(tangent), strict=True)
        return self._pulled([part.outer(share.reshape(u.shape), u) for part, share, u in made])

    @cached_property
    def _transposed(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """Vectors w, and `Jᵀ w` with its graph."""
        with torch.enable_grad():
            seeds = tuple(torch.zeros_like(x, requires_grad=True) for x in self.inputs)
            return seeds, torch.autograd.grad(self.inputs, self.z, seeds, create_graph=True)[0]

    def _pushed(self, tangent: Tensor) -> Sequence[Tensor]:
        seeds, image = self._transposed
        return torch.autograd.grad(image, seeds, tangent, retain_graph=True, materialize_grads=True)

    def _pulled(self, cotangents: Sequence[Tensor]) -> Tensor:
        return torch.autograd.grad(self.inputs, self.z, cotangents, retain_graph=True)[0]


def of_function(loss: TargetLoss, z: Tensor, target: Any) -> Joint | None:
    """The likelihood of a function of output and target; None where it is no sum of known losses, row by row.

    Raises:
        UsageError: it is one whose labels cannot be drawn row by row.
    """
    with torch.enable_grad():
        leaf = z.detach().requires_grad_(True)
        with _Watch() as watch:
            total = loss.summed(leaf, target)
        if not watch.calls or not total.requires_grad:
            return None
        weights = _weights(total, leaf, [call.value for call in watch.calls])
        if weights is None:
            return None
        pairs = zip(watch.calls, weights, strict=True)
        read = [(call, weight) for call, weight in pairs if weight is not None and call.x.requires_grad]
        parts = [_weighed(call, weight) for call, weight in read]
    inputs = tuple(call.x for call, _ in read)
    if not parts or None in parts:
        return None
    for part, x in zip(parts, inputs, strict=True):
        _check_rows(part, x, leaf)  # pyrefly: ignore
    mass = torch.cat([part.mass.reshape(len(z), -1) for part in parts if part is not None], 1)
    return Joint(mass, leaf, tuple(part for part in parts if part is not None), inputs)


@final
@dataclass(frozen=True)
class _Call:
    """A call of a known loss.

    Attributes:
        criterion: the loss as a criterion.
        x: its input.
        target: its target.
        value: constant in the place of its value.
        factor: further weights of the entries.
    """

    criterion: Any
    x: Tensor
    target: Tensor
    value: Tensor
    factor: Tensor | None


class _Watch(TorchFunctionMode):
    """Notes the calls of known losses."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        value = func(*args, **kwargs)
        if func not in _CRITERIA:
            return value
        given = inspect.signature(func).bind(*args, **kwargs)
        given.apply_defaults()
        named = given.arguments
        if named.get("size_average") is not None or named.get("reduce") is not None:
            return value
        constant = value.detach().requires_grad_(True)
        x = _pair(named) if func is F.gaussian_nll_loss else named["input"]
        factor = named.get("weight") if func is F.mse_loss else None
        self.calls.append(_Call(_CRITERIA[func](named), x, named["target"], constant, factor))
        return constant


def _pair(given: Given) -> Tensor:
    """Mean and variance along the last dimension; the variance as the loss floors it."""
    mean, variance = given["input"], given["var"]
    variance = torch.as_tensor(variance, dtype=mean.dtype, device=mean.device)
    if variance.shape == mean.shape[:-1] and variance.ndim:
        variance = variance.unsqueeze(-1)
    floored = variance + (variance.clamp(min=given["eps"]) - variance).detach()
    return torch.stack([mean, floored.expand_as(mean)], -1)


def _class_loss(given: Given) -> nn.Module:
    return nn.CrossEntropyLoss(
        weight=given["weight"],
        ignore_index=given["ignore_index"],
        reduction=given["reduction"],
        label_smoothing=given["label_smoothing"],
    )


_CRITERIA: Mapping[Any, Callable[[Given], nn.Module]] = {
    F.cross_entropy: _class_loss,
    F.nll_loss: lambda given: nn.NLLLoss(given["weight"], None, given["ignore_index"], None, given["reduction"]),
    F.mse_loss: lambda given: nn.MSELoss(reduction=given["reduction"]),
    F.binary_cross_entropy: lambda given: nn.BCELoss(given["weight"], reduction=given["reduction"]),
    F.binary_cross_entropy_with_logits: lambda given: nn.BCEWithLogitsLoss(
        given["weight"], reduction=given["reduction"], pos_weight=given["pos_weight"]
    ),
    F.poisson_nll_loss: lambda given: nn.PoissonNLLLoss(
        given["log_input"], given["full"], eps=given["eps"], reduction=given["reduction"]
    ),
    F.gaussian_nll_loss: lambda given: nn.GaussianNLLLoss(
        full=given["full"], eps=given["eps"], reduction=given["reduction"]
    ),
}


def _weights(total: Tensor, z: Tensor, values: Sequence[Tensor]) -> list[Tensor | None] | None:
    """Weights of a sum of values; None where the total is none, or depends on the output beside them."""
    beside, *slopes = torch.autograd.grad(total, [z, *values], create_graph=True, allow_unused=True)
    if beside is not None and bool((beside != 0).any()):
        return None
    bent = [slope.sum() for slope in slopes if slope is not None and slope.requires_grad]
    if bent:
        found = torch.autograd.grad(torch.stack(bent).sum(), [z, *values], allow_unused=True)
        if any(part is not None and bool((part != 0).any()) for part in found):
            return None
    if any(slope is not None and bool((slope < 0).any()) for slope in slopes):
        return None
    return [None if slope is None else slope.detach() for slope in slopes]


def _weighed(call: _Call, weight: Tensor) -> Likelihood | None:
    """The likelihood of one loss, its targets weighed as the total weighs them."""
    found = of_criterion(call.criterion, call.x, call.target)
    if found is None:
        return None
    mass = found.mass * weight
    if call.criterion.reduction == "mean":
        mass = mass / divisor(call.criterion, call.x, call.target)
    if call.factor is not None:
        mass = mass * call.factor
    return type(found)(mass.detach())


def _check_rows(part: Likelihood, x: Tensor, z: Tensor) -> None:
    """Check that labels come row by row: those of the first row, and of the last, depend on that row of the output alone.

    Raises:
        UsageError: they do not.
    """
    rows = len(z) if z.ndim else 0
    wrong = not rows or part.mass.numel() % rows or x.numel() % rows
    for row in () if wrong else (0, rows - 1):
        chosen = torch.zeros_like(x).reshape(rows, -1)
        chosen[row] = 1 + torch.arange(chosen.shape[1], device=x.device)
        found = torch.autograd.grad(x, z, chosen.reshape(x.shape), retain_graph=True)[0].clone()
        found[row] = 0
        wrong = wrong or bool((found != 0).any())
    if wrong:
        raise UsageError(
            f"labels cannot be drawn from the loss: its inputs of shape {tuple(x.shape)} do not come row by row from an output "
            f"of shape {tuple(z.shape)}. Flatten outputs and targets with the rows first. The Gauss-Newton matrix needs no "
            "labels"
        )


def _by_row(part: Likelihood, x: Tensor, rows: int) -> Iterator[Tensor]:
    """Square roots of a loss whose targets are those of a row in turn, also where all targets lie along one dimension."""
    if len(x) == rows:
        yield from part.factors(x)
        return
    for factor in part.factors(x):
        for chosen in entries(torch.ones(rows, len(x) // rows, device=x.device)):
            yield factor * chosen.reshape(-1, *[1] * (x.ndim - 1)).to(x)
