"""The metric that an adaptive optimiser steps in: its preconditioner, as it stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.optim import RMSprop
from torch.optim.adagrad import Adagrad
from torch.optim.adam import Adam
from torch.optim.adamw import AdamW
from torch.optim.optimizer import Optimizer

from isoflat.core.errors import UsageError
from isoflat.core.state import State, fingerprint
from isoflat.geometry.base import Chart, Geometry, tensors_hash
from isoflat.linalg.maps import Diagonal
from isoflat.linalg.operator import Operator


@final
@dataclass(frozen=True)
class Preconditioned(Geometry):
    """`E = P^{-1/2}`, so that `Eᵀ H E` has the eigenvalues of `P⁻¹ H` (Cohen et al. 2022).

    P is what the optimiser divided its last step by, bias corrections included, `θ ← θ − η P⁻¹ m`. For Adam and AdamW
    `P = (1 − β₁ᵗ) (√(v / (1 − β₂ᵗ)) + ε)`, for RMSprop `√v + ε`, for Adagrad `(1 + (t − 1) d) (√s + ε)`, d its decay of the
    learning rate. P stands still: rescaling or permuting the weights does not move it, so nothing is claimed.

    Attributes:
        optimizer: class of the optimiser.
        rate: η.
        limit: largest eigenvalue of `P⁻¹ H` that a quadratic can have without the steps growing, P held fixed.
        digest: hash of the preconditioner; it tells two of these geometries apart, beside η and the limit.
        preconditioner: the diagonal of P by the tensors' names, float64, in their shapes.
        warnings: parts that the limit leaves out.
    """

    name: str = "preconditioned"
    title: str = "the metric of an adaptive optimiser's steps (Cohen et al. 2022)"
    group: str = "none (the preconditioner stays where it is when the weights are moved)"
    version: int = 1
    constant: bool = field(default=True, kw_only=True)
    optimizer: str = field(kw_only=True)
    rate: float = field(kw_only=True)
    limit: float = field(kw_only=True)
    digest: str = field(kw_only=True)
    preconditioner: Mapping[str, Tensor] = field(kw_only=True, compare=False, repr=False)
    warnings: tuple[str, ...] = field(kw_only=True, default=())

    @staticmethod
    def of(optimizer: Optimizer, model: torch.nn.Module) -> Preconditioned:
        """The metric of an optimiser's last step; the optimiser is only read.

        Args:
            optimizer: a torch.optim Adam, AdamW, RMSprop or Adagrad that has taken a step.
            model: the network it trains, without wrappers such as DistributedDataParallel.

        Raises:
            UsageError: it is another optimiser, has taken no step, or does not have one rate and momentum for all.

        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> adam = torch.optim.Adam(net.parameters(), lr=0.1, eps=0.0)
        >>> net(torch.full((1, 1), 3.0)).sum().backward()
        >>> adam.step()
        >>> metric = Preconditioned.of(adam, net)
        >>> round(metric.limit, 6), round(float(metric.preconditioner["weight"]), 6)  # (1 − 0.9) · |3|
        (380.0, 0.3)
        """
        rule = _RULES.get(type(optimizer))
        if rule is None:
            known = ", ".join(kind.__name__ for kind in _RULES)
            raise UsageError(
                f"the preconditioner of {type(optimizer).__name__} is not known; known are those of torch.optim's {known}"
            )
        owner = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        found: dict[str, Tensor] = {}
        groups: list[Mapping[str, Any]] = []
        for name, parameter in model.named_parameters():
            state = optimizer.state.get(parameter, {})
            if parameter not in owner or not float(state.get("step", 0)) > 0:
                continue
            group = owner[parameter]
            found[name] = rule.diagonal(group, state)
            groups.append(group)
            if not bool((found[name] > 0).all()):
                raise UsageError(
                    f"the preconditioner of '{name}' has entries that are not positive: its ε is too small"
                )
        if not found:
            raise UsageError(
                f"this {type(optimizer).__name__} has taken no step with the model's parameters, so it has no preconditioner "
                "yet: build the geometry after training, or load the optimiser's state first"
            )
        if any(group.get("maximize") for group in groups) or not all(group["lr"] > 0 for group in groups):
            raise UsageError(
                "the optimiser climbs, or stands still: expected maximize=False and a positive learning rate"
            )
        rates = {float(group["lr"]) for group in groups}
        limits = {rule.limit(group) for group in groups}
        if len(rates) > 1 or len(limits) > 1:
            raise UsageError(
                "the optimiser's parameter groups differ in learning rate or momentum, so there is no single edge of "
                f"stability: learning rates {', '.join(f'{rate:g}' for rate in sorted(rates))}"
            )
        decays = any(group["weight_decay"] for group in groups)
        return Preconditioned(
            optimizer=type(optimizer).__name__,
            rate=rates.pop(),
            limit=limits.pop(),
            digest=digest_of(found),
            preconditioner=found,
            warnings=("the optimiser's weight decay is not part of the loss that is measured",) if decays else (),
        )

    def chart(self, state: State) -> Chart:
        """`P^{-1/2}`.

        Raises:
            UsageError: a tensor that is measured has no preconditioner.
        """
        shapes = {name: self.preconditioner[name].shape for name in state.parameters if name in self.preconditioner}
        missing = [name for name, tensor in state.parameters.items() if shapes.get(name) != tensor.shape]
        if missing:
            raise UsageError(
                f"the optimiser holds no preconditioner of {', '.join(missing[:5])} in the shape it is measured in: pass "
                "params=[...] with the tensors that it trains, and to Preconditioned.of the network without wrappers"
            )
        scale = state.space.flatten(self.preconditioner).to(state.device)
        group_hash = fingerprint(tensors_hash(self.name, self.version, state), self.digest)
        return Chart(state, Diagonal(scale.rsqrt()), (), self.group, group_hash, self.warnings)

    def connection(self, state: State, gradient: Tensor) -> Operator | None:
        """No term: the preconditioner is held fixed, and the metric flat."""
        return None


def digest_of(preconditioner: Mapping[str, Tensor]) -> str:
    """Hash of a preconditioner's content."""
    parts: list[str | bytes] = []
    for name, tensor in sorted(preconditioner.items()):
        parts += [repr((name, tuple(tensor.shape))), tensor.cpu().contiguous().numpy().tobytes()]
    return fingerprint(*parts)


class _OptimizerStep(NamedTuple):
    """Step rule of an optimiser, as its parameter groups and its state of one tensor tell it."""

    diagonal: Callable[[Mapping[str, Any], Mapping[str, Any]], Tensor]
    limit: Callable[[Mapping[str, Any]], float]


def _wide(state: Mapping[str, Any], key: str) -> Tensor:
    return state[key].detach().double()


def _adam(group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
    first, second = (1 - float(beta) ** float(state["step"]) for beta in group["betas"])
    square = _wide(state, "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq")
    return first * ((square / second).sqrt() + group["eps"])


def _adam_limit(group: Mapping[str, Any]) -> float:
    """`(2 + 2β₁) / ((1 − β₁) η)`: an averaged gradient is heavy ball with the step `(1 − β₁) η`."""
    rate, beta = float(group["lr"]), float(group["betas"][0])
    return (2 + 2 * beta) / ((1 - beta) * rate)


def _rmsprop(group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
    square = _wide(state, "square_avg")
    return (square - _wide(state, "grad_avg").square() if group["centered"] else square).sqrt() + group["eps"]


def _adagrad(group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
    return (1 + (float(state["step"]) - 1) * group["lr_decay"]) * (_wide(state, "sum").sqrt() + group["eps"])


_RULES: Mapping[type[Optimizer], _OptimizerStep] = {
    Adam: _OptimizerStep(_adam, _adam_limit),
    AdamW: _OptimizerStep(_adam, _adam_limit),
    RMSprop: _OptimizerStep(_rmsprop, lambda group: (2 + 2 * float(group["momentum"])) / float(group["lr"])),
    Adagrad: _OptimizerStep(_adagrad, lambda group: 2 / float(group["lr"])),
}
"""Step rules of exactly these classes: a subclass may step otherwise."""
