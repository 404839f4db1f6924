"""Estimates from extreme eigenvalues: shared by every spectral measure."""

from __future__ import annotations

from collections.abc import Mapping

from isoflat.core.estimate import Estimate, Kind
from isoflat.curvature.matrix import Matrix
from isoflat.linalg.eigen.extremes import REACHED, Extremes, Which
from isoflat.linalg.eigen.hard_first import HardFirst
from isoflat.linalg.eigen.lanczos import Lanczos
from isoflat.measures.base import Findings, Needs, Question, SolverQuery
from isoflat.measures.settings import Settings

CONFIDENCE = 1 - 1e-6
"""Default for eigenvalues: the number of products grows with the logarithm of the failure probability only."""


def extremes(which: Which, covariant: bool = False, matrix: Matrix = Matrix.HESSIAN) -> Needs:
    """The question for one end of the spectrum of a curvature matrix, as a measure's `needs`."""

    def needs(settings: Settings, options: Mapping[str, float]) -> tuple[Question, ...]:
        solver = Lanczos(
            which=which,
            rtol=settings.rtol,
            confidence=CONFIDENCE if settings.confidence is None else settings.confidence,
            certify=settings.certify,
            precise=settings.inside is not None,
            max_products=settings.budget.products,
            seconds=settings.budget.seconds,
        )
        return (SolverQuery(HardFirst(solver), covariant, matrix),)

    return needs


def eigenvalue(findings: Findings) -> Estimate:
    """The eigenvalue, or the spectral norm, that the first question asked for."""
    result: Extremes = findings.answers[0].result
    end = result.wanted
    norm = result.which is Which.MAGNITUDE
    value = abs(end.value) if norm else end.value
    lower, upper = result.interval()
    return Estimate(
        value=value,
        lower=min(lower, value),
        upper=max(upper, value),
        confidence=result.confidence,
        kind=Kind.ENCLOSURE if result.confidence else Kind.UNCERTIFIED,
        converged=result.reached,
        residual=end.residual,
        notes=_notes(result, value),
    )


def curvature(findings: Findings) -> float:
    """The absolute eigenvalue behind a measure."""
    return abs(findings.answers[0].result.wanted.value)


def _notes(result: Extremes, value: float) -> tuple[str, ...]:
    notes = []
    if not result.confidence:
        notes.append("uncertified: a lower bound with a true residual; nothing is claimed about the upper end")
    if not result.reached:
        why = result.stopped
        if why == REACHED:
            why = f"rounding noise of a product is {result.noise / value:.1e} of the value; try dtype=float64"
        notes.append(f"not converged: {why}")
    if result.which is Which.MAGNITUDE and result.wanted.value < 0:
        notes.append("the dominant eigenvalue is negative: not a minimum")
    if value == 0:
        notes.append("every product vanished: there is no curvature in what the geometry sees")
    return tuple(notes)
