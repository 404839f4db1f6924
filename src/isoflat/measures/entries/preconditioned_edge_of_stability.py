"""Sharpness in units of what an adaptive optimiser can follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from isoflat.core.errors import UsageError
from isoflat.core.estimate import Estimate
from isoflat.geometry.preconditioned import Preconditioned
from isoflat.linalg.eigen.extremes import Which
from isoflat.measures.base import DataStatistic, Findings, Measure, Question
from isoflat.measures.entries.eigenvalues import eigenvalue, extremes
from isoflat.measures.point import EvaluationPoint
from isoflat.measures.settings import Settings


@final
@dataclass(frozen=True)
class _Limit(DataStatistic):
    """The geometry, if it is that of an optimiser."""

    def finish(self, point: EvaluationPoint, total: Tensor | None, *found: Any) -> Preconditioned:
        """The geometry, which knows the largest curvature that the optimiser can follow."""
        if not isinstance(point.geometry, Preconditioned):
            raise UsageError(
                "preconditioned_edge_of_stability needs the state of the optimiser: pass "
                "geometry=isoflat.Preconditioned.of(optimizer, model)"
            )
        return point.geometry


def _needs(settings: Settings, options: Mapping[str, float]) -> tuple[Question, ...]:
    return (*extremes(Which.LARGEST)(settings, options), _Limit())


def _evaluate(findings: Findings) -> Estimate:
    metric = findings.answers[1].result
    note = f"{metric.optimizer} with learning rate {metric.rate:g} follows curvatures up to {metric.limit:.4g}"
    return eigenvalue(findings).scaled(1 / metric.limit).with_notes(note)


MEASURE = Measure(
    name="preconditioned_edge_of_stability",
    formula=r"\eta\, \lambda_{\max}(P^{-1} \nabla^2 L)\, (1 - \beta_1) / (2 + 2\beta_1)",
    definition="Largest curvature, in the optimiser's metric, over the largest that its steps can follow: 1 at the edge.",
    reference="cohen2022, arXiv:2207.14484",
    units="none (1 is the edge)",
    needs=_needs,
    evaluate=_evaluate,
    claims=frozenset(),
    pitfalls=(
        "Needs geometry=isoflat.Preconditioned.of(optimizer, model), with the state of Adam, AdamW, RMSprop or Adagrad as of "
        "the last step; learning rate and momentum are the optimiser's. For Adam with β₁ = 0.9 the edge is at 38/η; RMSprop "
        "and Adagrad do not average gradients, and have (2 + 2β)/η with a momentum β, 2/η without. The preconditioner is held "
        "fixed, steps are of the full batch, and the loss is a mean, without weight decay. loss_degree holds for a P that "
        "stays: in training P grows with the loss."
    ),
)
