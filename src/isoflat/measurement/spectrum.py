"""`spectrum`: every eigenvalue at once, as a density with a band, outliers apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from isoflat.core.density import Density
from isoflat.core.errors import UsageError
from isoflat.core.estimate import Estimate
from isoflat.core.spectrum import Spectrum
from isoflat.geometry.base import Geometry
from isoflat.linalg.density.deflated import Deflated
from isoflat.measurement.prepare import subject
from isoflat.measurement.run import checked, opened, planned
from isoflat.measurement.scribe import Refusal
from isoflat.measures.base import Budget, Direction, Findings, Measure, Settings, SolverQuery, Subject
from isoflat.risk.linearise import ProductCheck
from isoflat.risk.network import Selector
from isoflat.risk.ranks import Ranks
from isoflat.symmetry.found import Found
from isoflat.symmetry.groups.base import Symmetry

VERTICAL = (
    "directions that keep the function count among the eigenvalues: they lie at zero where the gradient is zero, and near "
    "it elsewhere"
)
"""What a reader of a spectrum must know about its zeros."""


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
    params: Selector = None,
    symmetries: Found | Sequence[Symmetry] | None = None,
    budget: Budget | int | None = None,
    logits: str | None = None,
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    check: ProductCheck | str = ProductCheck.REFUSE,
    reproducible_sum: bool = False,
    label: str = "",
) -> Spectrum:
    """All curvatures of a minimum: a density with a band that holds everywhere, and outliers apart.

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
        params: as for `isoflat.measure`.
        symmetries: as for `isoflat.measure`.
        budget: number of products in all, or a `Budget`; fewer steps are taken where it is too small for all.
        logits: as for `isoflat.measure`.
        seed: of the random probes.
        dtype: "float32" or "float64"; default the weights' own. Rounding in float32 hides eigenvalues below about 1e-5 of
            the largest that is not taken out.
        device: as for `isoflat.measure`.
        progress: as for `isoflat.measure`.
        check: as for `isoflat.measure`.
        reproducible_sum: as for `isoflat.measure`.
        label: what to call this network.

    Returns:
        The spectrum; print it, or ask `density` for quantiles, counts, ranks, each with an enclosure.

    Raises:
        IsoflatError: as for `isoflat.measure`.
        UsageError: a setting has no meaning.

    >>> x, y = torch.tensor([[1.0], [2.0]], dtype=torch.float64), torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    >>> net = torch.nn.Linear(1, 1, dtype=torch.float64)
    >>> found = spectrum(net, (x, y), torch.nn.MSELoss(), geometry="euclidean")
    >>> [round(value, 6) for value in found.density.low.points]  # H = 2 E [x; 1] [x; 1]ᵀ
    [0.145898, 6.854102]
    """
    if dtype in (torch.bfloat16, "bfloat16"):
        raise UsageError("a spectrum is measured in float32 or float64: rounding in bfloat16 hides all but its ends")
    limits = budget if isinstance(budget, Budget) else Budget(Deflated.price(outliers, probes, steps, budget))
    solver = Deflated(outliers, probes, steps, confidence, limits.products, limits.seconds)
    settings = Settings(confidence=confidence, budget=limits, seed=seed, check=checked(check))
    own = {"outliers": outliers, "probes": probes, "steps": steps}
    entry = replace(_ENTRY, options=own, needs=lambda settings, options: (SolverQuery(solver),))
    ranks = Ranks.here(reproducible_sum)

    def prepare() -> Subject:
        return subject(model, data, loss, params, dtype, device, logits)

    with opened(prepare, planned([entry], [geometry]), settings, symmetries, ranks, label, progress) as session:
        (result,) = session.results()
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
    direction=Direction.LOWER_IS_FLATTER,
    loss_degree=0,
    needs=lambda settings, options: (),
    evaluate=_effective_rank,
    curvature=lambda findings: _density(findings).largest,
)


def _notes(density: Density, outliers: int) -> tuple[str, ...]:
    """What a reader must know."""
    notes = [VERTICAL]
    if density.exact:
        notes.append(density.stopped)
    elif not density.reached:
        notes.append(f"{density.stopped}: the band is wider than it would be")
    if 0 < outliers == len(density.outliers):
        notes.append(f"{outliers} outliers were taken out, as many as were allowed: there may be more")
    return tuple(notes)
