"""Number of directions that share the curvature."""

from __future__ import annotations

from collections.abc import Mapping

from isoflat.linalg.density.deflated import Deflated
from isoflat.measures.base import Direction, Measure, Question, SolverQuery
from isoflat.measures.entries.stochastic import CONFIDENCE
from isoflat.measures.settings import Settings


def _needs(settings: Settings, options: Mapping[str, float]) -> tuple[Question, ...]:
    outliers, probes, steps = (int(options[key]) for key in ("outliers", "probes", "steps"))
    confidence = CONFIDENCE if settings.confidence is None else settings.confidence
    price = min(Deflated.price(outliers, probes, steps, None), max(settings.budget.products, 2 * (probes + 1)))
    return (SolverQuery(Deflated(outliers, probes, steps, confidence, price, settings.budget.seconds)),)


MEASURE = Measure(
    name="quotient_effective_rank",
    formula=r"(\mathrm{tr}\, A)^2 / \lVert A \rVert_F^2, \quad A = E^\top \nabla^2 L\, E",
    definition="How many directions share the curvature, in units of the metric: 1 if one has it all.",
    reference="chen2021, arXiv:2105.06595; lin2016, arXiv:1308.5467",
    units="eigenvalues",
    direction=Direction.HIGHER_IS_FLATTER,
    loss_degree=0,
    needs=_needs,
    evaluate=lambda findings: findings.answers[0].result.participation(),
    options={"outliers": 24, "probes": 4, "steps": 32},
    pitfalls="isoflat.spectrum gives the whole density. Negative curvatures cancel in the trace and not below it.",
)
