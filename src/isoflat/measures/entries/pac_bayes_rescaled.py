"""A PAC-Bayes bound that rescaling cannot move: the least over all scales of the units, and over the posterior's widths.

Networks drawn from a posterior Q compute what those drawn from D Q compute, D a rescaling that keeps the function: the expected
losses are one, and the bound holds with the smallest `KL(D Q ‖ P)` (deterministic lifting). For `Q = N(θ, diag s)` and
`P = N(0, σ² I)`, with the quadratic model of `pac_bayes_curvature_posterior`, s can be eliminated, and

`K(z) = ½ Σ_j e^{x_j} θ_j²/σ² + ln(1 + βN σ² h_j e^{−x_j})`, x = 2 ln D linear in the logarithms z of the units' scales,

is left, which is convex in z. It depends on the orbit alone, since h scales as 1/D². The prior is centred at zero because
around θ₀ it would have `(D_j θ_j − θ_{0j})²`, which is not convex in ln D_j where both have one sign; and moving θ₀ and the
prior's widths along with D would change no KL at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor

from isoflat.core.errors import UnsupportedModel
from isoflat.core.estimate import Estimate
from isoflat.geometry.base import Invariance
from isoflat.geometry.traced import Traced
from isoflat.measures.base import DataStatistic, Findings, Measure, Question
from isoflat.measures.entries.pac_bayes import BOUNDED, catoni, check_mean, check_options
from isoflat.measures.entries.statistics import GaussNewtonDiagonal
from isoflat.measures.point import EvaluationPoint
from isoflat.measures.settings import Settings
from isoflat.symmetry.groups.units import Exponents

NAME = "pac_bayes_rescaled"

STEPS = 400
"""Newton steps. From a unit that lies a factor of e^±140 off it takes as many."""

Vector = NDArray[np.float64]


@final
@dataclass(frozen=True)
class _TensorShare:
    """One tensor's share of K.

    Attributes:
        scaling: the dependence of its scale on z.
        norms: `θ²/σ²`, in the scaling's view.
        widths: `ln(βN σ² h)`, likewise; −∞ without curvature.
    """

    scaling: Exponents
    norms: Tensor
    widths: Tensor

    def at(self, z: Tensor) -> tuple[float, Tensor, Tensor]:
        """Value, and both derivatives in x summed over what scales alike: shapes `(g, i, j)`."""
        x = 2 * self.scaling.log(z)
        grown, left = x.exp() * self.norms, self.widths - x
        share = left.sigmoid()
        value = 0.5 * float((grown + torch.logaddexp(torch.zeros_like(left), left)).sum())
        return value, 0.5 * (grown - share).sum(3), 0.5 * (grown + share * (1 - share)).sum(3)

    def pull(self, sums: Tensor, power: int = 1) -> Vector:
        """Sums over all entries, each times the power of its two rates: shape `(d,)`."""
        e = self.scaling
        first, second = (
            form.power(power).T @ (sums.sum(axis).reshape(-1) if form.shape[0] > 1 else sums.sum().reshape(1)).numpy()
            for form, axis in ((e.first, 2), (e.second, 1))
        )
        found: Vector = first + e.sign**power * second
        return found


def least(tensors: Sequence[_TensorShare], size: int) -> float:
    """The smallest value of K over z, to rounding, by Newton's method with conjugate gradients.

    Third derivatives in x are no larger than second ones: steps damped by `ln(1 + m)/m`, m the largest change of an x, always
    descend.

    Args:
        tensors: the tensors that some scale moves.
        size: dimension of z.

    Raises:
        UnsupportedModel: the minimum was not reached.
    """
    z = torch.zeros(size, dtype=torch.float64)
    for _ in range(STEPS):
        parts = [part.at(z) for part in tensors]
        value = sum(part[0] for part in parts)
        gradient = 2 * sum((t.pull(part[1]) for t, part in zip(tensors, parts, strict=True)), np.zeros(size))
        direction = _newton(tensors, [part[2] for part in parts], gradient)
        # Twice what the quadratic model has left to gain.
        if -float(gradient @ direction) <= 1e-13 * value:
            return value
        move = torch.from_numpy(direction)
        reach = max(2 * float(part.scaling.log(move).abs().max()) for part in tensors)
        z = z + move * (math.log1p(reach) / reach)
    raise UnsupportedModel(
        f"{NAME}: the best scales were not reached in {STEPS} Newton steps; please report the network"
    )


def _newton(tensors: Sequence[_TensorShare], curvatures: Sequence[Tensor], gradient: Vector) -> Vector:
    pairs = list(zip(tensors, curvatures, strict=True))
    size = len(gradient)

    def product(direction: Vector) -> Vector:
        move = torch.from_numpy(np.ravel(direction))
        return 4 * sum((t.pull(curve * t.scaling.log(move)[..., 0]) for t, curve in pairs), np.zeros(size))

    diagonal = 4 * sum((t.pull(curve, power=2) for t, curve in pairs), np.zeros(size))
    scale = np.where(diagonal > 0, diagonal, 1.0)
    hessian = LinearOperator((size, size), matvec=product, dtype=np.float64)  # pyrefly: ignore
    conditioned = LinearOperator((size, size), matvec=lambda vector: np.ravel(vector) / scale, dtype=np.float64)  # pyrefly: ignore
    solved: Vector = cg(hessian, -gradient, rtol=1e-3, maxiter=2000, M=conditioned)[0]
    return solved


@final
@dataclass(frozen=True)
class _LeastComplexity(DataStatistic):
    """`min K` over all scales of units, and N."""

    sigma: float
    beta: float

    def requires(self, point: EvaluationPoint) -> tuple[Question, ...]:
        """The diagonal of the Gauss-Newton matrix, where the loss is a mean."""
        check_mean(point)
        return (GaussNewtonDiagonal(),)

    def finish(self, point: EvaluationPoint, total: Tensor | None, *found: Any) -> tuple[float, int]:
        """Newton's method, without data."""
        assert isinstance(point.geometry, Traced)
        assert point.geometry.found is not None
        group, space, rows = point.geometry.found.scaling, point.state.space, point.survey.rows
        factor = self.beta * rows * self.sigma**2
        diagonal = space.unflatten(found[0])
        moving = {e.name: e for e in group.tensors}
        # Fixed tensors that the frame reaches come last: no prior is over them.
        own = [name for name, where in space.slices.items() if where.stop <= point.chart.frame.columns]
        tensors, still = [], 0.0
        for name in own:
            norms = point.state.parameters[name].detach().cpu().double().square() / self.sigma**2
            spread = factor * diagonal[name].cpu().view_as(norms)
            if name in moving:
                e = moving[name]
                tensors.append(_TensorShare(e, norms.reshape(e.view), spread.log().reshape(e.view)))
            else:
                still += 0.5 * float((norms + spread.log1p()).sum())
        return still + (least(tensors, group.size) if tensors else 0.0), rows


def _needs(settings: Settings, options: Mapping[str, float]) -> tuple[Question, ...]:
    check_options(NAME, options)
    return (_LeastComplexity(options["sigma"], options["beta"]),)


def _evaluate(findings: Findings) -> Estimate:
    (complexity, rows), options = findings.answers[0].result, findings.options
    return Estimate.exact(catoni(complexity, rows, options["delta"], options["beta"]))


MEASURE = Measure(
    name=NAME,
    formula=(
        r"\frac{1}{\beta N}\Big[\min_{D} \frac12 \sum_j \Big(\frac{D_j^2\theta_j^2}{\sigma^2} + "
        r"\ln\big(1 + \beta N \sigma^2 h_{jj}/D_j^2\big)\Big) + \ln\frac1\delta\Big] + \frac{\beta}{8} "
        r"= \min_{D, s} \frac12 \sum_j h_{jj} s_j + \frac{\mathrm{KL}(D\,\mathcal N(\theta, \mathrm{diag}\, s) \,\|\, "
        r"\mathcal N(0, \sigma^2 I)) + \ln(1/\delta)}{\beta N} + \frac{\beta}{8}"
    ),
    definition=(
        "By how much the expected loss of weights around these may exceed the training loss here, if the loss is quadratic: "
        "each weight as uncertain as is best, and units in the scales that cost least under a prior around zero."
    ),
    reference="rouchouse2025, arXiv:2509.26149 (rescaling); pitas2019, arXiv:1909.03009 (posterior)",
    units="loss, for losses in [0, 1]",
    loss_degree=None,
    needs=_needs,
    evaluate=_evaluate,
    geometry="auto",
    claims=frozenset({Invariance.LAYERS, Invariance.UNITS, Invariance.NORMS, Invariance.ORDER}),
    provisional=(
        "The least KL over rescalings of the posterior is the paper's, of which we know the abstract; its posteriors, the centre "
        "of its prior and its constants are unverified. That the posterior's widths are optimised along, in the quadratic "
        "model, is ours: with widths that do not scale along, the number would not be invariant."
    ),
    options={"sigma": 0.1, "beta": 1.0, "delta": 0.05},
    pitfalls=(
        f"{BOUNDED} beta, too, must be chosen without the data. h is the Gauss-Newton matrix's diagonal: the Hessian's where "
        "the network is piecewise linear. The prior is centred at zero, not at the weights before training: with those the "
        "problem is not convex. Fixed tensors and statistics are rescaled along at no cost."
    ),
)
