"""Scale-adaptive central moments of the loss: how much it varies under noise in proportion to each weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from isoflat.core.errors import NonFinite, UsageError
from isoflat.core.estimate import Estimate
from isoflat.core.rng import stream
from isoflat.geometry.base import Invariance
from isoflat.measures.base import Findings, Measure, Question, Steps
from isoflat.measures.entries.stochastic import mean_of
from isoflat.measures.point import EvaluationPoint
from isoflat.measures.settings import Settings
from isoflat.risk.moved import AtWeights


@final
@dataclass(frozen=True)
class _Losses(Question):
    """The risk at `θ_j (1 + σ z_j)`, z standard normal, draw by draw: in float64, so that small noise is not lost.

    Attributes:
        sigma: σ.
        draws: number of draws.
    """

    framed = False

    sigma: float
    draws: int

    def steps(self, point: EvaluationPoint, *found: Any) -> Steps[Tensor]:
        """A forward pass for each draw: shape `(draws,)`, float64, on the CPU."""
        state = point.state.to(dtype=torch.float64)
        weights, losses = state.vector, []
        random = stream(point.settings.seed, "scale-adaptive noise")
        for draw in range(self.draws):
            noise = torch.randn(len(weights), generator=random, dtype=torch.float64).to(state.device)
            moved = state.replace(state.space.unflatten(weights + self.sigma * weights * noise))
            loss = (yield AtWeights(point.risk, moved, status=f"draw {draw + 1} of {self.draws}")).loss
            if not math.isfinite(loss):
                raise NonFinite(f"the loss is {loss} under noise of sa_cms: lower its sigma")
            losses.append(loss)
        return torch.tensor(losses, dtype=torch.float64)


def _root_moment(losses: Tensor, order: int) -> Tensor:
    """Root of the central moment, with the moment's sign."""
    moment = (losses - losses.mean()).pow(order).mean()
    return moment.sign() * moment.abs().pow(1 / order)


def _needs(settings: Settings, options: Mapping[str, float]) -> tuple[Question, ...]:
    sigma, order, draws = (options[key] for key in ("sigma", "order", "draws"))
    if not sigma > 0 or order < 2 or order != int(order) or draws < 4 or draws != int(draws):
        raise UsageError(
            f"sa_cms takes a positive sigma, whole orders from 2 on and whole draws from 4 on, got {dict(options)}"
        )
    return (_Losses(sigma, int(draws)),)


def _evaluate(findings: Findings) -> Estimate:
    losses: Tensor = findings.answers[0].result
    draws, order = len(losses), int(findings.options["order"])
    others = torch.stack([_root_moment(torch.cat([losses[:i], losses[i + 1 :]]), order) for i in range(draws)])
    # The jackknife's pseudo-values: their mean lacks the bias of first order in 1/draws, and they tell its error.
    samples = draws * _root_moment(losses, order) - (draws - 1) * others
    return mean_of(findings, samples.tolist(), remedy="raise the option draws")


MEASURE = Measure(
    name="sa_cms",
    formula=r"\left( \mathbb{E}_z\, (L(\theta + \sigma |\theta| z) - \mathbb{E}_z L)^k \right)^{1/k}",
    definition="How much the loss varies under Gaussian noise in proportion to each weight: its k-th central moment's root.",
    reference="chen2022, IEEE Transactions on Neural Networks and Learning Systems (no preprint found)",
    needs=_needs,
    evaluate=_evaluate,
    geometry="euclidean",
    claims=frozenset({Invariance.LAYERS, Invariance.UNITS, Invariance.NORMS, Invariance.ORDER}),
    provisional=(
        "From the paper's abstract, which says a scale-invariant central moment of given order: its text was not seen, and "
        "code of its authors was not found. Uncertain are whether noise is in proportion to single weights or to the norm "
        "of filters, whether moments are about the mean of the perturbed loss or about the loss itself, and the size of "
        "the noise."
    ),
    options={"sigma": 0.05, "order": 2, "draws": 32},
    pitfalls=(
        "Order 2 is the standard deviation of the loss under noise. With σ small it is σ‖θ · ∇L‖, of the gradient, and "
        "σ²/√2 ‖D H D‖_F with D = diag|θ| at a minimum: one number mixes both. Odd orders may be negative. Zeros stay "
        "zeros, biases at initialisation for instance. Noise is drawn entry by entry: changes of basis move it. Values of "
        "one seed have the same noise. Few draws and high orders make the interval too short."
    ),
)
