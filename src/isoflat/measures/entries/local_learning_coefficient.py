"""The local learning coefficient: how many directions a posterior around the minimum has left."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from isoflat.core.errors import UsageError
from isoflat.core.estimate import Estimate
from isoflat.core.rng import stream
from isoflat.core.state import State
from isoflat.curvature.matrix import Curvature
from isoflat.linalg.eigen.lanczos import Lanczos
from isoflat.linalg.operator import Pullback
from isoflat.linalg.solver import products_of
from isoflat.measures.base import Findings, Measure, Question, Steps
from isoflat.measures.entries.stochastic import mean_of
from isoflat.measures.point import EvaluationPoint
from isoflat.measures.settings import Settings
from isoflat.risk.linearise import choose
from isoflat.risk.moved import AtWeights

SAFE = 0.2
"""Step in units of the largest that the largest curvature would allow."""

SIZE = 1e-2
"""Relative residual to which that curvature is known: steps must hardly depend on where its solver starts."""


@final
@dataclass(frozen=True)
class _Chains(Question):
    """Stochastic gradient Langevin dynamics in the coordinates u of the metric's frame, `θ = θ* + E u`.

    Each step is `u ← u − ε/2 (nβ Eᵀ∇L_B + γ u) + √ε ξ`, with nβ = N / ln N.

    Attributes:
        chains: number of independent runs.
        draws: number of steps that count.
        burn: number of steps before them.
        localisation: γ.
        rows: rows of a minibatch.
    """

    chains: int
    draws: int
    burn: int
    localisation: float
    rows: int

    def steps(self, point: EvaluationPoint, *found: Any) -> Steps[Tensor]:
        """Mean rise of the loss, times nβ, of each chain and each of its halves: shape `(chains, 2)`, float64."""
        total = point.survey.rows
        if total < 2:
            raise UsageError("local_learning_coefficient needs N / ln N, and there is 1 example: give it more")
        beta = total / math.log(total)
        curvature = yield from _curvature(point)
        step = SAFE * 2 / (beta * curvature + self.localisation)
        chains = []
        for chain in range(self.chains):
            rises = yield from self._chain(point, chain, beta, step)
            halves = torch.tensor(rises, dtype=torch.float64).tensor_split(2)
            chains.append(torch.stack([beta * half.mean() for half in halves]))
        return torch.stack(chains)

    def _chain(self, point: EvaluationPoint, chain: int, beta: float, step: float) -> Steps[list[float]]:
        """Rises of the loss along one chain, draw by draw."""
        random, frame = stream(point.settings.seed, "langevin", chain), point.chart.frame
        batches = self._minibatches(point, random)
        start = torch.zeros(frame.columns, dtype=torch.float64, device=point.state.device)
        u, rises, last, rest = start, [], None, 0.0
        for draw in range(self.burn + self.draws):
            status = f"chain {chain + 1} of {self.chains}, step {draw}" if draw % 10 == 0 else ""
            batch = next(batches)
            here = yield AtWeights(point.risk, _moved(point, u), gradient=True, batch=batch, status=status)
            slope = frame.pull(here.gradient[:, None])[:, 0]
            if draw >= self.burn:
                if batch is not last:
                    # The same rows at the minimum: what is random in both cancels.
                    rest = (yield AtWeights(point.risk, _moved(point, start), batch=batch)).loss
                    last = batch
                rises.append(here.loss - rest)
            noise = torch.randn(len(u), generator=random, dtype=torch.float64).to(u.device)
            u = u - step / 2 * (beta * slope + self.localisation * u) + math.sqrt(step) * noise
            if not bool(torch.isfinite(u).all()):
                raise UsageError("a chain of local_learning_coefficient ran away: raise localisation")
        return rises

    def _minibatches(self, point: EvaluationPoint, random: torch.Generator) -> Iterator[Any]:
        """Random rows without end; all of them, read once, where that is no more than a minibatch has."""
        total, batches = point.survey.rows, point.risk.batches
        if total <= self.rows:
            yield from itertools.repeat(next(iter(batches.only(torch.arange(total), total))))
        while True:
            yield from batches.only(torch.randperm(total, generator=random)[: self.rows].sort().values, self.rows)


def _curvature(point: EvaluationPoint) -> Steps[float]:
    """The largest curvature, to a hundredth or so."""
    route = choose(point.risk, point.state, point.settings.check).route
    hessian = Curvature(route(point.risk, point.state.to(dtype=torch.float64)))
    pulled, random = Pullback(hessian, point.chart.frame), stream(point.settings.seed, "langevin")
    found = yield from products_of(Lanczos(rtol=SIZE, certify=False), pulled, random)
    return abs(found.wanted.value)


def _moved(point: EvaluationPoint, u: Tensor) -> State:
    """The state at θ* + E u."""
    state = point.state
    moved = state.space.unflatten(state.vector.double() + point.chart.frame.push(u[:, None])[:, 0])
    return state.replace({name: tensor.to(state.dtype) for name, tensor in moved.items()})


def _needs(settings: Settings, options: Mapping[str, float]) -> tuple[Question, ...]:
    chains, draws, burn, rows = (int(options[key]) for key in ("chains", "draws", "burn", "rows"))
    if chains < 2 or draws < 2 or burn < 0 or rows < 1 or not options["localisation"] > 0:
        raise UsageError(
            "local_learning_coefficient takes chains and draws from 2 on, a burn-in that is not negative, rows from 1 on and "
            f"a positive localisation, got {dict(options)}"
        )
    return (_Chains(chains, draws, burn, options["localisation"], rows),)


def _evaluate(findings: Findings) -> Estimate:
    halves: Tensor = findings.answers[0].result
    trend = halves[:, 1] - halves[:, 0]
    still = float(trend.mean()) <= 2 * float(trend.std()) / math.sqrt(len(trend))
    notes = [] if still else ["the loss still rises from one half of the draws to the other: raise burn"]
    if float(halves.mean()) < 0:
        notes.append("negative: the chains found lower losses, so that this is no minimum")
    return mean_of(findings, halves.mean(1).tolist(), *notes, remedy="raise the option chains")


MEASURE = Measure(
    name="local_learning_coefficient",
    formula=r"n\beta\, (\mathbb{E}_\beta L - L(\theta^*)), \quad n\beta = N / \ln N",
    definition="Mean rise of the loss in a tempered posterior around the minimum: half the number of directions that it feels.",
    reference="lau2023, arXiv:2308.12108; watanabe2013",
    units="none (half a number of directions)",
    loss_degree=None,
    needs=_needs,
    evaluate=_evaluate,
    options={"chains": 4, "draws": 200, "burn": 200, "localisation": 100.0, "rows": 512},
    pitfalls=(
        "The localisation γ keeps chains near the minimum and decides the value with it: compare equal γ only. "
        "geometry='euclidean' is the usual estimator, which rescaling moves; in another geometry noise and localisation are "
        "in its units, and it is invariant to what the geometry is. β counts all N examples: devinterp's default counts "
        "those of a minibatch. Steps are a fifth of what the largest curvature at the point allows, and bias the value by "
        "about a tenth; where that curvature vanishes only γ limits them. The interval is that of chains, not of the bias. "
        "Each step reads the data once to find its minibatch: give tensors, not a loader that decodes."
    ),
)
