"""Likelihoods that losses are negative logarithms of: `total = Σ_t m_t (−log p(y_t | z_t))`, up to a constant.

Drawing labels ỹ from `p(· | z)` gives residuals `r̃_t = √m_t ∂(−log p(ỹ_t | z_t))/∂z_t` with `E r̃_t r̃_tᵀ = m_t ∂²(−log
p)/∂z_t²`, the loss's Hessian in the output (Martens 2020, section 9.2).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from isoflat.core.errors import UsageError
from isoflat.risk.losses import Loss, TargetLoss, class_axis


@dataclass(frozen=True)
class Likelihood(ABC):
    """The distribution of a batch's targets, given its output.

    Attributes:
        mass: weight m of each target, zero for ignored ones. A class weight multiplies by the data's own class,
            as if the example were there so often.
    """

    mass: Tensor

    @abstractmethod
    def draw(self, z: Tensor, uniform: Tensor) -> Tensor:
        """Labels from uniform numbers in (0, 1) in the shape of the mass, by inverting the distribution function."""

    @abstractmethod
    def residual(self, z: Tensor, labels: Tensor) -> Tensor:
        """Residual r̃ at given labels, in the shape of z."""

    @abstractmethod
    def outer(self, residual: Tensor, tangent: Tensor) -> Tensor:
        """`r̃_t ⟨r̃_t, u_t⟩` for each target t: the shape of z."""


@final
@dataclass(frozen=True)
class Categorical(Likelihood):
    """Softmax cross-entropy: one class of C. The classes lie along dimension 1 of z (dimension 0 of a single row).

    >>> z = torch.zeros(1, 2)
    >>> Categorical(torch.ones(1)).residual(z, torch.tensor([1])).tolist()
    [[0.5, -0.5]]
    """

    def draw(self, z: Tensor, uniform: Tensor) -> Tensor:
        """Classes, in the shape of the targets."""
        below = z.detach().double().movedim(class_axis(z), -1).softmax(-1).cumsum(-1)
        reached = uniform.unsqueeze(-1) * below[..., -1:]
        return torch.searchsorted(below, reached, right=True).squeeze(-1).clamp_(max=below.shape[-1] - 1)

    def residual(self, z: Tensor, labels: Tensor) -> Tensor:
        """`√m (p − e_ỹ)`."""
        axis = class_axis(z)
        chosen = F.one_hot(labels, z.shape[axis]).movedim(-1, axis)
        return (z.detach().softmax(axis) - chosen) * self.mass.sqrt().unsqueeze(axis)

    def outer(self, residual: Tensor, tangent: Tensor) -> Tensor:
        """Inner products over the classes."""
        return residual * (residual * tangent).sum(class_axis(residual), keepdim=True)


@final
@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Binary cross-entropy with logits: each entry of z is the log odds of a label of its own."""

    def draw(self, z: Tensor, uniform: Tensor) -> Tensor:
        """True or False, in the shape of z."""
        return uniform < z.detach().double().sigmoid()

    def residual(self, z: Tensor, labels: Tensor) -> Tensor:
        """`√m (p − ỹ)`."""
        return (z.detach().sigmoid() - labels.to(z.dtype)) * self.mass.sqrt()

    def outer(self, residual: Tensor, tangent: Tensor) -> Tensor:
        """Products `r̃ (r̃ u)`, entry by entry."""
        return residual.square() * tangent


@final
@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Squared error `(z − y)²`: each entry of z is the mean of a label of its own, of variance 1/2."""

    def draw(self, z: Tensor, uniform: Tensor) -> Tensor:
        """Distances of labels from z in standard deviations, in the shape of z."""
        return torch.special.ndtri(uniform)

    def residual(self, z: Tensor, labels: Tensor) -> Tensor:
        """`2 √m (z − ỹ)`."""
        return -(2.0**0.5) * labels.to(z.dtype) * self.mass.sqrt()

    def outer(self, residual: Tensor, tangent: Tensor) -> Tensor:
        """Products `r̃ (r̃ u)`, entry by entry."""
        return residual.square() * tangent


def likelihood(loss: Loss, z: Tensor, target: Tensor | None) -> Likelihood:
    """The likelihood of which a loss is the negative logarithm.

    Raises:
        UsageError: it is of no kind that labels can be drawn from.
    """
    criterion = loss.criterion if isinstance(loss, TargetLoss) else None
    if target is not None:
        if isinstance(criterion, nn.CrossEntropyLoss):
            return Categorical(_class_mass(criterion, z, target))
        if isinstance(criterion, nn.BCEWithLogitsLoss):
            return Bernoulli(_label_mass(criterion, z, target))
        if isinstance(criterion, nn.MSELoss) and z.shape == target.shape:
            return Gaussian(torch.ones_like(z))
    came = loss.label if criterion is None else type(criterion).__name__
    raise UsageError(
        f"labels cannot be drawn from the loss ({came}): expected CrossEntropyLoss, BCEWithLogitsLoss, or MSELoss with "
        "targets in the output's shape, from torch.nn, with batches (inputs, targets). The Gauss-Newton matrix needs "
        "no labels"
    )


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
