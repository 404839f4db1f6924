"""Likelihoods of torch's criteria."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from isoflat.risk.likelihood.records import (
    Bernoulli,
    BernoulliProbability,
    Categorical,
    Gaussian,
    GaussianVariance,
    Likelihood,
    LogCategorical,
    Poisson,
    PoissonRate,
)
from isoflat.risk.losses import class_axis


def of_criterion(criterion: Any, z: Tensor, target: Tensor) -> Likelihood | None:
    """The likelihood of which a criterion, summed, is the negative logarithm; None where labels cannot be drawn from it.

    Args:
        criterion: instance of a loss of torch.nn.
        z: its input; for GaussianNLLLoss mean and variance along the last dimension.
        target: its target.
    """
    found = _KNOWN.get(type(criterion)) or next(
        (make for kind, make in _KNOWN.items() if isinstance(criterion, kind)), None
    )
    return None if found is None else found(criterion, z, target)


def _categorical(criterion: nn.CrossEntropyLoss, z: Tensor, target: Tensor) -> Likelihood:
    return Categorical(_class_mass(criterion, z, target))


def _log_categorical(criterion: nn.NLLLoss, z: Tensor, target: Tensor) -> Likelihood:
    counted = target != criterion.ignore_index
    weight = z.new_ones(z.shape[class_axis(z)]) if criterion.weight is None else criterion.weight.to(z)
    return LogCategorical(weight[target.where(counted, 0)] * counted)


def _bernoulli(criterion: nn.BCEWithLogitsLoss, z: Tensor, target: Tensor) -> Likelihood:
    return Bernoulli(_label_mass(criterion, z, target))


def _probability(criterion: nn.BCELoss, z: Tensor, target: Tensor) -> Likelihood:
    return BernoulliProbability(_evenly(z) if criterion.weight is None else criterion.weight.to(z) * _evenly(z))


def _gaussian(criterion: nn.MSELoss, z: Tensor, target: Tensor) -> Likelihood | None:
    return Gaussian(_evenly(z)) if z.shape == target.shape else None


def _variance(criterion: nn.GaussianNLLLoss, z: Tensor, target: Tensor) -> Likelihood | None:
    return GaussianVariance(_evenly(z[..., 0])) if z.shape[:-1] == target.shape else None


def _poisson(criterion: nn.PoissonNLLLoss, z: Tensor, target: Tensor) -> Likelihood | None:
    if z.shape != target.shape:
        return None
    return (Poisson if criterion.log_input else PoissonRate)(_evenly(z))


_KNOWN: Mapping[type[nn.Module], Callable[[Any, Tensor, Tensor], Likelihood | None]] = {
    nn.CrossEntropyLoss: _categorical,
    nn.NLLLoss: _log_categorical,
    nn.BCEWithLogitsLoss: _bernoulli,
    nn.BCELoss: _probability,
    nn.MSELoss: _gaussian,
    nn.GaussianNLLLoss: _variance,
    nn.PoissonNLLLoss: _poisson,
}


def _evenly(z: Tensor) -> Tensor:
    return torch.ones_like(z)


def _class_mass(criterion: nn.CrossEntropyLoss, z: Tensor, target: Tensor) -> Tensor:
    """`Σ_c a_c` where the loss of a target is `Σ_c a_c (−log p_c)`: weights and smoothing move mass only."""
    axis = class_axis(z)
    classes = z.shape[axis]
    weight = z.new_ones(classes) if criterion.weight is None else criterion.weight.to(z)
    smoothing = criterion.label_smoothing
    if target.is_floating_point():
        smooth = target * (1 - smoothing) + smoothing / classes
        return smooth.movedim(axis, -1) @ weight
    counted = target != criterion.ignore_index
    own = weight[target.where(counted, 0)]
    return ((1 - smoothing) * own + smoothing * weight.mean()) * counted


def _label_mass(criterion: nn.BCEWithLogitsLoss, z: Tensor, target: Tensor) -> Tensor:
    """`w (P y + 1 − y)`, with the weight w of an entry and P of positive labels."""
    mass = torch.ones_like(z)
    if criterion.pos_weight is not None:
        mass = criterion.pos_weight.to(z) * target + (1 - target)
    return mass if criterion.weight is None else criterion.weight.to(z) * mass
