"""Trace of the Hessian in the metric."""

from isoflat.core.estimate import Cost, Estimate, Kind
from isoflat.linalg.trace.base import TraceEstimate
from isoflat.linalg.trace.hutchinson import Hutchinson
from isoflat.measures.base import Direction, Effort, Findings, Measure, Question


def _needs(effort: Effort) -> tuple[Question, ...]:
    confidence = 0.95 if effort.confidence is None else effort.confidence
    return (Question(Hutchinson(probes=effort.probes, confidence=confidence)),)


def _evaluate(findings: Findings) -> Estimate:
    outcome = findings.answers[0]
    result: TraceEstimate = outcome.result
    converged = 2 * result.half_width <= findings.effort.rtol * abs(result.value)
    return Estimate(
        value=result.value,
        lower=result.value - result.half_width,
        upper=result.value + result.half_width,
        confidence=result.confidence,
        kind=Kind.STANDARD_ERROR,
        converged=converged,
        cost=Cost(products=outcome.products, seconds=outcome.seconds),
        standard_error=result.standard_error,
        notes=() if converged else (f"{result.products} probes do not reach the tolerance; raise probes",),
        samples=result.samples,
    )


MEASURE = Measure(
    name="quotient_trace",
    formula=r"\mathrm{tr}(E^\top \nabla^2 L\, E)",
    definition="Sum of all curvatures in units of each tensor's norm, estimated with random signs.",
    reference="rangamani2019, arXiv:1902.02434; hutchinson1990",
    units="loss",
    direction=Direction.LOWER_IS_FLATTER,
    loss_degree=1,
    needs=_needs,
    evaluate=_evaluate,
    pitfalls="Off a minimum the covariant trace differs by Σ(2 − n_i)⟨g_i, W_i⟩, n_i the size of tensor i.",
)
