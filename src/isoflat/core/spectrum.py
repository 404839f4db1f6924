"""A network's spectrum with its provenance; prints itself, and goes to JSON and back."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

from isoflat.core import render
from isoflat.core.density import Density
from isoflat.core.estimate import Estimate
from isoflat.core.plain import attributes, check_schema
from isoflat.core.record import Record

if TYPE_CHECKING:
    from rich.console import Group

    from isoflat.core.fitted import FittedTable

SCHEMA = 1
"""Version of the JSON layout; raised whenever a field changes its meaning."""

NEAR = 1e-3
"""Eigenvalues are called near zero up to this part of the largest magnitude, where no threshold is given."""

SHARES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
"""Quantiles that are printed."""

LISTED = 12
"""Outliers that are printed, those of largest magnitude."""


@final
@dataclass(frozen=True)
class Spectrum(render.Printed):
    """The spectrum of a curvature in a geometry.

    Attributes:
        record: provenance; its estimate is the effective rank `(tr A)²/‖A‖_F²`.
        density: the spectrum, known to lie between two others, with every quantity that follows from it.
    """

    record: Record
    density: Density = field(repr=False)

    @property
    def group(self) -> str:
        """Reparametrisations that the spectrum is invariant to, in words."""
        return self.record.group

    @property
    def group_hash(self) -> str:
        """Hash of that group on these tensors."""
        return self.record.group_hash

    @property
    def effective_rank(self) -> Estimate:
        """`(tr A)²/‖A‖_F²` with its interval and the cost of the whole spectrum."""
        return self.record.estimate

    def soft_rank(self, mu: float | None = None) -> Estimate:
        """`Σ λ/(λ + μ)` over the positive eigenvalues.

        Args:
            mu: μ, in the units of the eigenvalues; None for `NEAR` times the largest magnitude.
        """
        # Of zeros the soft rank is zero, whatever the unit.
        return self.density.soft_rank((self.threshold or 1.0) if mu is None else mu)

    @property
    def threshold(self) -> float:
        """Largest magnitude that is called near zero."""
        return NEAR * self.density.largest

    def __rich__(self) -> Group:
        """Draw the outliers, the quantiles, and the facts below."""
        from rich.console import Group

        from isoflat.core.fitted import fact_list, literal

        return Group(literal(self.title, "bold"), *self.grids(), fact_list(self.facts()))

    @property
    def title(self) -> str:
        """Network, geometry and number of eigenvalues."""
        return f"{self.record.label or 'spectrum'} ({self.record.geometry}): {self.density.n} eigenvalues"

    def grids(self) -> tuple[FittedTable, ...]:
        """Tables of the outliers, if there are any, and of the quantiles."""
        from isoflat.core.fitted import FittedTable

        quantiles = []
        for share in SHARES:
            found = self.density.quantile(share)
            name = {0.0: "smallest", 1.0: "largest"}.get(share, f"{100 * share:g} %")
            quantiles.append((name, _value(found), ends(found)))
        drawn = FittedTable(("share at or below", "eigenvalue", "between"), quantiles, words=0)
        if not self.density.outliers:
            return (drawn,)
        ordered = sorted(self.density.outliers, key=lambda outlier: -abs(outlier.value))
        outliers = [(f"{outlier.value:.6g}", f"{outlier.residual:.1e}") for outlier in ordered[:LISTED]]
        if len(ordered) > LISTED:
            outliers.append((f"and {len(ordered) - LISTED} more", ""))
        return FittedTable(("outlier", "residual"), outliers, words=0), drawn

    def facts(self) -> list[tuple[str, str]]:
        """Shares, ranks, errors and cost, in words."""
        density, cost, near = self.density, self.effective_rank.cost, self.threshold
        negative, zero = density.below(math.nextafter(-near, -math.inf)), density.between(-near, near)
        return [
            ("below", f"−{near:.3g}: {percent(negative)} of the eigenvalues"),
            ("near zero", f"within ±{near:.3g} ({100 * NEAR:g} % of the largest magnitude): {percent(zero)}"),
            ("above", f"{near:.3g}: {number(density.count(near))} eigenvalues"),
            ("effective rank", f"{number(self.effective_rank)}, as (tr A)² / ‖A‖_F²"),
            ("soft rank", f"{number(self.soft_rank())}, as Σ λ/(λ + {near:.3g}) over λ > 0"),
            ("Wasserstein", f"eigenvalues are off by at most {density.wasserstein:.3g} on average"),
            ("certainty", self._certainty),
            ("resolution", f"rounding and residuals move eigenvalues by at most {density.slack:.1e}"),
            ("invariant to", self.group),
            (
                "cost",
                f"{cost.products:g} Hessian-vector products, {cost.gradient_passes:.1f} gradient passes, {cost.seconds:.2f} s",
            ),
            *(("note", note) for note in self.effective_rank.notes),
        ]

    @property
    def _certainty(self) -> str:
        """Confidence of the intervals, in words."""
        if not self.record.settings.get("certify", True):
            return "none: products are differences of gradients, and the intervals know nothing of their error"
        if self.density.exact:
            return "exact up to rounding"
        return f"every interval at once with confidence {self.density.confidence:g}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {"schema": SCHEMA, **attributes(self)}

    def to_json(self) -> str:
        """One line of strict JSON; floats return bit for bit."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Spectrum:
        """Inverse of `to_dict`.

        Raises:
            UsageError: it was written by another schema version.
        """
        check_schema(data, "spectrum", SCHEMA)
        return Spectrum(Record.from_dict(data["record"]), Density.from_dict(data["density"]))

    @staticmethod
    def from_json(text: str) -> Spectrum:
        """Inverse of `to_json`."""
        return Spectrum.from_dict(json.loads(text))


def ends(found: Estimate, unit: int = 1) -> str:
    """The ends of an interval in some unit, rounded outwards.

    >>> from isoflat.core.estimate import Kind
    >>> ends(Estimate(0.5, 0.12345, 0.98765, 0.95, Kind.ENCLOSURE, True))
    '[0.123, 0.988]'
    """
    furthest = max(found.upper - found.value, found.value - found.lower)
    digits = 3 if furthest > 1e-2 * abs(found.value) else 6
    low, high = (render.outwards(end, digits, way, unit=unit) for end, way in ((found.lower, -1), (found.upper, 1)))
    return f"[{low}, {high}]"


def number(found: Estimate) -> str:
    """A number with the ends of its interval."""
    return f"{_value(found)} {ends(found)}"


def percent(found: Estimate) -> str:
    """A share with the ends of its interval, in per cent."""
    return f"{_value(found, 100)} % {ends(found, 100)}"


def _value(found: Estimate, unit: int = 1) -> str:
    """A number with four significant digits, or more where its interval is narrower than four digits can say."""
    return render.significant(found.value, found.lower, found.upper, 4, unit)
