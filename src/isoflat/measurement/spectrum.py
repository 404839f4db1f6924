"""`spectrum`: every eigenvalue at once, as a density with a band, outliers apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Unpack

import torch

from isoflat.core.density import Density
from isoflat.core.errors import UsageError
from isoflat.core.estimate import Estimate
from isoflat.core.spectrum import Spectrum
from isoflat.geometry.base import Geometry
from isoflat.linalg.density.deflated import Deflated
from isoflat.measurement.engine import opened
from isoflat.measurement.records import Refusal
from isoflat.measurement.run import planned
from isoflat.measurement.subject import subject
from isoflat.measures.base import Findings, Measure, SolverQuery
from isoflat.measures.settings import Budget, Settings, SharedKeywords, takes_settings
from isoflat.risk.ranks import Ranks

VERTICAL = (
    "directions that keep the function count among the eigenvalues: they lie at zero where the gradient is zero, and near "
    "it elsewhere"
)
"""Note on the zeros of a spectrum."""


@takes_settings(
    "rtol",
    "certify",
    "sample",
    "initial",
    budget="number of products in all, or a `Budget`; fewer steps are taken where it is too small for all.",
    dtype=""" "float32" or "float64"; None for the weights' own. Rounding in float32 hides eigenvalues below about 1e-5 of
    the largest that is not taken out.""".strip(),
)
def spectrum(  # noqa: PLR0913
    model: torch.nn.Module,
    data: Any,
    loss: Any = None,
    *,
    geometry: str | Geometry = "auto",
    outliers: int = 24,
    probes: int = 4,
    steps: int = 64,
    confidence: float = 0.95,
    label: str = "",
    **settings: Unpack[SharedKeywords],
) -> Spectrum:
    """Measure all curvatures of a minimum: a density with a band that holds everywhere, and outliers apart.

    Stochastic Lanczos quadrature on `Eᵀ H E`, E the geometry's frame, after eigenvectors that a first run has separated
    from the rest are taken out (`linalg.density`). Where a network has no more parameters than there would be products, all
    eigenvalues are computed.

    Args:
        model: as for `isoflat.measure`; it is not changed.
        data: as for `isoflat.measure`.
        loss: as for `isoflat.measure`.
        geometry: as for `isoflat.measure`.
        outliers: at most so many eigenvalues are taken out, as many as are separated; 0 for none.
        probes: random probes. Counts of few eigenvalues and their sums are known to about `1/√probes`.
        steps: products per probe, and of the run that looks for outliers: what the band can resolve is about `1/steps` of
            the range without outliers.
        confidence: probability that the band holds everywhere.
        label: name of this network in the record.
        **settings: the fields of `isoflat.Settings`.

    Returns:
        The spectrum; print it, or ask `density` for quantiles, counts, ranks, each with a confidence interval.

    Raises:
        IsoflatError: as for `isoflat.measure`.
        UsageError: a setting has no meaning.

    >>> x, y = torch.tensor([[1.0], [2.0]], dtype=torch.float64), torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    >>> net = torch.nn.Linear(1, 1, dtype=torch.float64)
    >>> found = spectrum(net, (x, y), torch.nn.MSELoss(), geometry="euclidean")
    >>> [round(value, 6) for value in found.density.low.points]  # H = 2 E [x; 1] [x; 1]ᵀ
    [0.145898, 6.854102]
    """
    if settings.get("dtype") in (torch.bfloat16, "bfloat16"):
        raise UsageError("a spectrum is measured in float32 or float64: rounding in bfloat16 hides all but its ends")
    budget = settings.pop("budget", None)
    limits = budget if isinstance(budget, Budget) else Budget(Deflated.price(outliers, probes, steps, budget))
    solver = Deflated(outliers, probes, steps, confidence, limits.products, limits.seconds)
    chosen = Settings(confidence=confidence, budget=limits, **settings)  # pyrefly: ignore
    own = {"outliers": outliers, "probes": probes, "steps": steps}
    entry = replace(_ENTRY, options=own, needs=(SolverQuery(solver),))
    ranks, plan = Ranks.here(chosen.reproducible_sum), planned([entry], [geometry])
    with opened(lambda: subject(model, data, loss, chosen), plan, chosen, ranks, label) as measurement:
        (result,) = measurement.results()
        if isinstance(result, Refusal):
            raise result.error
        record = ranks.from_first(result.record)
    shared = {key: value for key, value in record.settings.items() if key != "rtol"}
    return Spectrum(replace(record, settings=shared | own | {"confidence": confidence}), _density(result.findings))


def _density(findings: Findings) -> Density:
    return findings.answers[0].result


def _effective_rank(findings: Findings) -> Estimate:
    density = _density(findings)
    return density.participation().with_notes(*_notes(density, int(findings.options["outliers"])))


_ENTRY = Measure(
    name="spectrum",
    formula=r"(\mathrm{tr}\, A)^2 / \|A\|_F^2,\ A = E^\top \nabla^2 L\, E",
    definition="Effective rank of the curvature, from its whole spectrum.",
    reference="chen2021, arXiv:2105.06595; lin2016, arXiv:1308.5467",
    units="eigenvalues",
    loss_degree=0,
    needs=(),
    evaluate=_effective_rank,
    curvature=lambda findings: _density(findings).largest,
)


def _notes(density: Density, outliers: int) -> tuple[str, ...]:
    """Notes for the reader of a spectrum."""
    notes = [VERTICAL]
    if density.exact:
        notes.append(density.stopped)
    elif not density.reached:
        notes.append(f"{density.stopped}: the band is wider than it would be")
    if 0 < outliers == len(density.outliers):
        notes.append(f"{outliers} outliers were taken out, as many as were allowed: there may be more")
    return tuple(notes)
