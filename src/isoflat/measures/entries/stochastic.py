"""Estimates from random probes: shared by every trace and every Frobenius norm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from isoflat.core.estimate import Estimate, Kind
from isoflat.curvature.matrix import Matrix
from isoflat.linalg.trace.base import TraceEstimate, deviation, quantile
from isoflat.linalg.trace.frobenius import Frobenius, FrobeniusEstimate
from isoflat.linalg.trace.hutchinson import Hutchinson
from isoflat.measures.base import Findings, Needs, Question, SolverQuery
from isoflat.measures.settings import Settings

CONFIDENCE = 0.95
"""Default for t-intervals: what random probes leave open shrinks with their number only as `1/√probes`."""


def trace_of(matrix: Matrix) -> Needs:
    """The question for the trace of a curvature matrix, as a measure's `needs`."""

    def needs(settings: Settings, options: Mapping[str, float]) -> tuple[Question, ...]:
        return (SolverQuery(Hutchinson(probes=settings.probes, confidence=_confidence(settings)), matrix=matrix),)

    return needs


def frobenius_of(matrix: Matrix) -> Needs:
    """The question for the Frobenius norm of a curvature matrix, as a measure's `needs`."""

    def needs(settings: Settings, options: Mapping[str, float]) -> tuple[Question, ...]:
        return (SolverQuery(Frobenius(probes=settings.probes, confidence=_confidence(settings)), matrix=matrix),)

    return needs


def trace(findings: Findings) -> Estimate:
    """The trace that the first question asked for."""
    found: TraceEstimate = findings.answers[0].result
    ends = found.value - found.half_width, found.value + found.half_width
    return _estimate(findings, found, ends, found.samples)


def frobenius(findings: Findings) -> Estimate:
    """The Frobenius norm that the first question asked for."""
    found: FrobeniusEstimate = findings.answers[0].result
    return _estimate(findings, found, found.interval(), ())


def mean_of(findings: Findings, samples: Sequence[float], *notes: str, remedy: str) -> Estimate:
    """The mean of independent samples with Student's interval.

    Args:
        findings: whose settings say how wide it may be, and with what confidence it is to hold.
        samples: two or more.
        *notes: remarks to print with it.
        remedy: advice that narrows the interval, given where it is too wide.
    """
    confidence, count = _confidence(findings.settings), len(samples)
    value, error = fmean(samples), deviation(samples) / math.sqrt(count)
    width = quantile(confidence, count - 1) * error
    converged = 2 * width <= findings.settings.rtol * abs(value)
    return Estimate(
        value=value,
        lower=value - width,
        upper=value + width,
        confidence=confidence,
        kind=Kind.STANDARD_ERROR,
        converged=converged,
        standard_error=error,
        notes=notes if converged else (*notes, f"{count} samples do not reach the tolerance; {remedy}"),
        samples=tuple(samples),
    )


def _estimate(
    findings: Findings,
    found: TraceEstimate | FrobeniusEstimate,
    ends: tuple[float, float],
    samples: tuple[float, ...],
) -> Estimate:
    lower, upper = ends
    converged = upper - lower <= findings.settings.rtol * abs(found.value)
    return Estimate(
        value=found.value,
        lower=lower,
        upper=upper,
        confidence=found.confidence,
        kind=Kind.STANDARD_ERROR,
        converged=converged,
        standard_error=found.standard_error,
        notes=() if converged else (f"{found.products} probes do not reach the tolerance; raise probes",),
        samples=samples,
    )


def _confidence(settings: Settings) -> float:
    return CONFIDENCE if settings.confidence is None else settings.confidence
