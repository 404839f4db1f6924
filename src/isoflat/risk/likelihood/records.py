"""Likelihoods that losses are negative logarithms of: `total = Σ_t m_t (−log p(y_t | z_t))`, up to a constant.

Drawing labels ỹ from `p(· | z)` gives residuals `r̃_t = √m_t ∂(−log p(ỹ_t | z_t))/∂z_t` with `E r̃_t r̃_tᵀ = m_t F_t`, F the
Fisher matrix of the label in z; for *canonical* ones it is the loss's Hessian in the output (Martens 2020, section 9.2).
Nothing here is a difference of numbers next to 1: networks are sure of what they have learned.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from isoflat.risk.losses import class_axis


def sure(dtype: torch.dtype) -> float:
    """Chance of all other labels below which that of the likeliest is told by them: half of the digits of `1 − p` are lost.

    Above it the common arithmetic is kept, to the last bit.
    """
    return math.sqrt(torch.finfo(dtype).eps)


@dataclass(frozen=True)
class Likelihood(ABC):
    """The distribution of a batch's targets, given its output.

    Attributes:
        mass: weight m of each target, zero for ignored ones. A class weight multiplies by the data's own class,
            as if the example were there so often.
    """

    mass: Tensor

    @property
    def canonical(self) -> bool:
        """Flag that `curvature` is the Hessian of the loss in z, whatever the targets are."""
        return True

    @abstractmethod
    def draw(self, z: Tensor, uniform: Tensor) -> Tensor:
        """Labels from uniform numbers in (0, 1) in the shape of the mass, by inverting the distribution function."""

    @abstractmethod
    def residual(self, z: Tensor, labels: Tensor) -> Tensor:
        """Residual r̃ at given labels, in the shape of z."""

    @abstractmethod
    def curvature(self, z: Tensor, tangent: Tensor) -> Tensor:
        """`m_t F_t u_t` for each target t: the shape of z."""

    @abstractmethod
    def factors(self, z: Tensor) -> Iterator[Tensor]:
        """Square roots of the curvature, all rows at once: tensors s of the shape of z with `Σ_s s_i s_iᵀ = F` of row i."""

    def outer(self, residual: Tensor, tangent: Tensor) -> Tensor:
        """`r̃_t ⟨r̃_t, u_t⟩` for each target t, here of one entry of z: the shape of z."""
        return residual.square() * tangent


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
        chosen = F.one_hot(labels.long(), z.shape[axis]).movedim(-1, axis) == 1
        p, others = probabilities(z.detach())
        return torch.where(chosen, -others, p) * self.mass.sqrt().unsqueeze(axis)

    def curvature(self, z: Tensor, tangent: Tensor) -> Tensor:
        """`m (p ∘ u − p ⟨p, u⟩)`, from differences of u to that of the likeliest class."""
        axis = class_axis(z)
        p = z.detach().softmax(axis)
        apart = tangent - tangent.gather(axis, p.argmax(axis, keepdim=True))
        return p * (apart - (p * apart).sum(axis, keepdim=True)) * self.mass.unsqueeze(axis)

    def factors(self, z: Tensor) -> Iterator[Tensor]:
        """`√(m p_c) (e_c − p)` for every class c, and every position of a row in turn."""
        axis = class_axis(z)
        # The square of what is rounded in `1 − p` counts here, beside `1 − p` itself.
        p, others = probabilities(z, torch.finfo(z.dtype).eps)
        row = (slice(None),) * axis
        for place, c in product(_places(z.shape[axis + 1 :]), range(z.shape[axis])):
            factor = torch.zeros_like(z)
            factor[(*row, slice(None), *place)] = -p[(*row, slice(None), *place)]
            factor[(*row, c, *place)] = others[(*row, c, *place)]
            here = (self.mass[(*row, *place)] * p[(*row, c, *place)]).sqrt()
            factor[(*row, slice(None), *place)] *= here.unsqueeze(axis)
            yield factor

    def outer(self, residual: Tensor, tangent: Tensor) -> Tensor:
        """Inner products over the classes."""
        return residual * (residual * tangent).sum(class_axis(residual), keepdim=True)


@final
@dataclass(frozen=True)
class LogCategorical(Likelihood):
    """Negative log likelihood of a class where z is the logarithm of the probabilities, along dimension 1."""

    @property
    def canonical(self) -> bool:
        """False: the Hessian depends on the target."""
        return False

    def draw(self, z: Tensor, uniform: Tensor) -> Tensor:
        """Classes, in the shape of the targets."""
        return Categorical(self.mass).draw(z, uniform)

    def residual(self, z: Tensor, labels: Tensor) -> Tensor:
        """`−√m e_ỹ`."""
        axis = class_axis(z)
        return -F.one_hot(labels.long(), z.shape[axis]).movedim(-1, axis).to(z.dtype) * self.mass.sqrt().unsqueeze(axis)

    def curvature(self, z: Tensor, tangent: Tensor) -> Tensor:
        """`m p ∘ u`."""
        return z.detach().exp() * tangent * self.mass.unsqueeze(class_axis(z))

    def factors(self, z: Tensor) -> Iterator[Tensor]:
        """`√(m p_c) e_c`."""
        return entries((z.exp() * self.mass.unsqueeze(class_axis(z))).sqrt())

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
        z = z.detach()
        p, other = z.sigmoid(), (-z).sigmoid()
        return torch.where((labels == 1) & (other < sure(z.dtype)), -other, p - labels.to(z.dtype)) * self.mass.sqrt()

    def curvature(self, z: Tensor, tangent: Tensor) -> Tensor:
        """`m p (1 − p) u`."""
        return self._variance(z.detach()) * tangent

    def factors(self, z: Tensor) -> Iterator[Tensor]:
        """`√(m p (1 − p)) e_k` for every entry k of a row."""
        return entries(self._variance(z).sqrt())

    def _variance(self, z: Tensor) -> Tensor:
        return z.sigmoid() * (-z).sigmoid() * self.mass


@final
@dataclass(frozen=True)
class BernoulliProbability(Likelihood):
    """Binary cross-entropy of probabilities: each entry of z is the chance of a label of its own."""

    @property
    def canonical(self) -> bool:
        """False: the Hessian depends on the target."""
        return False

    def draw(self, z: Tensor, uniform: Tensor) -> Tensor:
        """True or False, in the shape of z."""
        return uniform < z.detach().double()

    def residual(self, z: Tensor, labels: Tensor) -> Tensor:
        """`−√m / z` for a true label, `√m / (1 − z)` for a false one."""
        z = z.detach()
        return torch.where(labels == 1, -1 / z, 1 / (1 - z)) * self.mass.sqrt()

    def curvature(self, z: Tensor, tangent: Tensor) -> Tensor:
        """`m u / (z (1 − z))`."""
        z = z.detach()
        return self.mass * tangent / (z * (1 - z))

    def factors(self, z: Tensor) -> Iterator[Tensor]:
        """`√(m / (z (1 − z))) e_k` for every entry k of a row."""
        return entries((self.mass / (z * (1 - z))).sqrt())


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

    def curvature(self, z: Tensor, tangent: Tensor) -> Tensor:
        """`2 m u`."""
        return 2 * self.mass * tangent

    def factors(self, z: Tensor) -> Iterator[Tensor]:
        """`√(2 m) e_k` for every entry k of a row."""
        return entries((2 * self.mass).sqrt())


@final
@dataclass(frozen=True)
class GaussianVariance(Likelihood):
    """Gaussian negative log likelihood: mean μ and variance v of a label lie along the last dimension of z."""

    @property
    def canonical(self) -> bool:
        """False: the Hessian depends on the target."""
        return False

    def draw(self, z: Tensor, uniform: Tensor) -> Tensor:
        """Distances of labels from the mean in standard deviations."""
        return torch.special.ndtri(uniform)

    def residual(self, z: Tensor, labels: Tensor) -> Tensor:
        """`√m (−ε/√v, (1 − ε²)/(2v))` for a label `μ + √v ε`."""
        far, variance = labels.to(z.dtype), z.detach()[..., 1]
        pair = torch.stack([-far / variance.sqrt(), (1 - far.square()) / (2 * variance)], -1)
        return pair * self.mass.sqrt().unsqueeze(-1)

    def curvature(self, z: Tensor, tangent: Tensor) -> Tensor:
        """`m (u_μ / v, u_v / (2 v²))`."""
        return self._diagonal(z.detach()) * tangent

    def factors(self, z: Tensor) -> Iterator[Tensor]:
        """`√(m/v) e_μ` and `√(m/2)/v e_v` for every label of a row."""
        return entries(self._diagonal(z).sqrt())

    def outer(self, residual: Tensor, tangent: Tensor) -> Tensor:
        """Inner products over mean and variance."""
        return residual * (residual * tangent).sum(-1, keepdim=True)

    def _diagonal(self, z: Tensor) -> Tensor:
        variance = z[..., 1]
        return torch.stack([1 / variance, 1 / (2 * variance.square())], -1) * self.mass.unsqueeze(-1)


@final
@dataclass(frozen=True)
class Poisson(Likelihood):
    """Poisson negative log likelihood: each entry of z is the logarithm of the rate of a count of its own."""

    def draw(self, z: Tensor, uniform: Tensor) -> Tensor:
        """Counts, in the shape of z."""
        return counts(z.detach().double().exp(), uniform)

    def residual(self, z: Tensor, labels: Tensor) -> Tensor:
        """`√m (exp z − ỹ)`."""
        return (z.detach().exp() - labels.to(z.dtype)) * self.mass.sqrt()

    def curvature(self, z: Tensor, tangent: Tensor) -> Tensor:
        """`m exp(z) u`."""
        return self.mass * z.detach().exp() * tangent

    def factors(self, z: Tensor) -> Iterator[Tensor]:
        """`√(m exp z) e_k` for every entry k of a row."""
        return entries((self.mass * z.exp()).sqrt())


@final
@dataclass(frozen=True)
class PoissonRate(Likelihood):
    """Poisson negative log likelihood of rates: each entry of z is the rate of a count of its own."""

    @property
    def canonical(self) -> bool:
        """False: the Hessian depends on the target."""
        return False

    def draw(self, z: Tensor, uniform: Tensor) -> Tensor:
        """Counts, in the shape of z."""
        return counts(z.detach().double(), uniform)

    def residual(self, z: Tensor, labels: Tensor) -> Tensor:
        """`√m (1 − ỹ/z)`."""
        return (1 - labels.to(z.dtype) / z.detach()) * self.mass.sqrt()

    def curvature(self, z: Tensor, tangent: Tensor) -> Tensor:
        """`m u / z`."""
        return self.mass * tangent / z.detach()

    def factors(self, z: Tensor) -> Iterator[Tensor]:
        """`√(m / z) e_k` for every entry k of a row."""
        return entries((self.mass / z).sqrt())


def probabilities(z: Tensor, below: float | None = None) -> tuple[Tensor, Tensor]:
    """Softmax p over the classes, and `1 − p`: the sum of the others where that is below a number, by default `sure`.

    >>> _, others = probabilities(torch.tensor([[50.0, 0.0]], dtype=torch.float64))
    >>> others.tolist()
    [[1.9287498479639178e-22, 1.0]]
    """
    axis = class_axis(z)
    p = z.softmax(axis)
    top = p.argmax(axis, keepdim=True)
    left = p.scatter(axis, top, 0.0).sum(axis, keepdim=True)
    small = left < (sure(z.dtype) if below is None else below)
    return p, (1 - p).scatter(axis, top, torch.where(small, left, 1 - p.gather(axis, top)))


def spread(p: Tensor, weight: Tensor) -> Tensor:
    """`Σ_c p_c ‖w_c‖² − ‖Σ_c p_c w_c‖²` of each row: the trace of the covariance of w, for p of shape `(rows, classes)`."""
    sizes = weight.square().sum(1)
    plain = p @ sizes - (p @ weight).square().sum(1)
    q, left, top = _beside(p)
    own, first = q @ weight, weight[top]
    mean = own - left[:, None] * first
    close = q @ sizes - 2 * (own * first).sum(1) + left * sizes[top] - mean.square().sum(1)
    return torch.where(left < sure(p.dtype), close, plain)


def covariance(p: Tensor, weight: Tensor) -> Tensor:
    """`Σ_c p_c w_c w_cᵀ − (Σ_c p_c w_c) (Σ_c p_c w_c)ᵀ` of each row, shape `(rows, k, k)`."""
    mean = p @ weight
    plain = torch.einsum("nk,kc,kd->ncd", p, weight, weight) - mean[:, :, None] * mean[:, None, :]
    q, left, top = _beside(p)
    small = left < sure(p.dtype)
    if not bool(small.any()):
        return plain
    q, left, first = q[small], left[small], weight[top[small]]
    own = q @ weight
    mean = own - left[:, None] * first
    cross = own[:, :, None] * first[:, None, :]
    close = torch.einsum("nk,kc,kd->ncd", q, weight, weight) - cross - cross.mT
    close += left[:, None, None] * first[:, :, None] * first[:, None, :] - mean[:, :, None] * mean[:, None, :]
    plain[small] = close
    return plain


def _beside(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities without the likeliest class, their sum, and that class."""
    top = p.argmax(1)
    q = p.scatter(1, top[:, None], 0.0)
    return q, q.sum(1), top


def entries(scale: Tensor) -> Iterator[Tensor]:
    """Tensors with one entry of each row in turn, all rows at once."""
    for place in _places(scale.shape[1:]):
        found = torch.zeros_like(scale)
        found[(slice(None), *place)] = scale[(slice(None), *place)]
        yield found


def counts(rate: Tensor, uniform: Tensor) -> Tensor:
    """Counts of Poisson distributions at given values of their distribution functions."""
    from scipy.stats import poisson

    found = poisson.ppf(uniform.cpu().numpy(), rate.cpu().numpy())
    return torch.as_tensor(found, dtype=torch.float64).to(rate.device)


def _places(shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return product(*map(range, shape))
