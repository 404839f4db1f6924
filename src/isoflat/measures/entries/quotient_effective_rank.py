"""In how many directions the curvature lies."""

from __future__ import annotations

from collections.abc import Mapping

from isoflat.core.density import Density
from isoflat.core.estimate import Estimate
from isoflat.linalg.density.deflated import Deflated
from isoflat.measures.base import Direction, Effort, Findings, Measure, Question, Spectral
from isoflat.measures.entries.stochastic import CONFIDENCE


def _needs(effort: Effort, options: Mapping[str, float]) -> tuple[Question, ...]:
    outliers, probes, steps = (int(options[key]) for key in ("outliers", "probes", "steps"))
    confidence = CONFIDENCE if effort.confidence is None else effort.confidence
    price = min(Deflated.price(outliers, probes, steps, None), max(effort.budget.products, 2 * (probes + 1)))
    return (Spectral(Deflated(outliers, probes, steps, confidence, price, effort.budget.seconds)),)


def _evaluate(findings: Findings) -> Estimate:
    density: Density = findings.answers[0].result
    return density.participation()


MEASURE = Measure(
    name="quotient_effective_rank",
    formula=r"(\mathrm{tr}\, A)^2 / \lVert A \rVert_F^2, \quad A = E^\top \nabla^2 L\, E",
    definition="How many directions share the curvature, in units of the metric: 1 if one has it all.",
    reference="chen2021, arXiv:2105.06595; lin2016, arXiv:1308.5467",
    units="eigenvalues",
    direction=Direction.HIGHER_IS_FLATTER,
    loss_degree=0,
    needs=_needs,
    evaluate=_evaluate,
    options={"outliers": 24, "probes": 4, "steps": 32},
    pitfalls="isoflat.spectrum gives the whole density. Negative curvatures cancel in the trace and not below it.",
)
