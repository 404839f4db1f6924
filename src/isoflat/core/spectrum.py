"""A network's spectrum with its provenance; prints itself, and goes to JSON and back."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass, field
from typing import Any, final

from rich.console import Console, Group
from rich.table import Table as Grid
from rich.text import Text

from isoflat.core.density import Density
from isoflat.core.errors import UsageError
from isoflat.core.estimate import Estimate
from isoflat.core.record import Record

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
class Spectrum:
    """The spectrum of a curvature in a geometry.

    Attributes:
        record: what was measured and where; its estimate is the effective rank `(tr A)²/‖A‖_F²`.
        density: the spectrum between two others that enclose it, with every quantity that follows from it.
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
        """`(tr A)²/‖A‖_F²` with its enclosure and the cost of it all."""
        return self.record.estimate

    def soft_rank(self, mu: float | None = None) -> Estimate:
        """`Σ λ/(λ + μ)` over the positive eigenvalues.

        Args:
            mu: in the units of the eigenvalues; None for `NEAR` times the largest magnitude.
        """
        # Of zeros the soft rank is zero, whatever the unit.
        return self.density.soft_rank((self.threshold or 1.0) if mu is None else mu)

    @property
    def threshold(self) -> float:
        """Up to where eigenvalues are called near zero."""
        return NEAR * self.density.largest

    def __rich__(self) -> Group:
        """For `rich.print`."""
        grid = Grid.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, text in self.facts():
            grid.add_row(name, Text(text))
        return Group(Text(self.title, style="bold"), *self.grids(), grid)

    @property
    def title(self) -> str:
        """What it is a spectrum of."""
        return f"{self.record.label or 'spectrum'} ({self.record.geometry}): {self.density.n} eigenvalues"

    def __str__(self) -> str:
        """Plain text, as wide as it needs to be."""
        console = Console(width=160, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def _repr_html_(self) -> str:
        """For notebooks."""
        console = Console(width=160, record=True, file=io.StringIO())
        console.print(self)
        return console.export_html(inline_styles=True, code_format="<pre style='line-height:1.3'>{code}</pre>")

    def grids(self) -> tuple[Grid, ...]:
        """The outliers, if there are any, and the quantiles."""
        quantiles = _grid("share at or below", "eigenvalue", "between")
        for share in SHARES:
            found = self.density.quantile(share)
            name = {0.0: "smallest", 1.0: "largest"}.get(share, f"{100 * share:g} %")
            quantiles.add_row(name, f"{found.value:.4g}", ends(found))
        if not self.density.outliers:
            return (quantiles,)
        outliers = _grid("outlier", "residual")
        ordered = sorted(self.density.outliers, key=lambda outlier: -abs(outlier.value))
        for outlier in ordered[:LISTED]:
            outliers.add_row(f"{outlier.value:.6g}", f"{outlier.residual:.1e}")
        if len(ordered) > LISTED:
            outliers.add_row(f"and {len(ordered) - LISTED} more", "")
        return outliers, quantiles

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
            ("cost", f"{cost.products:g} products, {cost.gradient_passes:.1f} gradient passes, {cost.seconds:.2f} s"),
            *(("note", note) for note in self.effective_rank.notes),
        ]

    @property
    def _certainty(self) -> str:
        """What the intervals are worth."""
        if not self.record.settings.get("certify", True):
            return "none: products are differences of gradients, and the intervals know nothing of their error"
        if self.density.exact:
            return "exact up to rounding"
        return f"every interval at once with confidence {self.density.confidence:g}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {"schema": SCHEMA, "record": self.record.to_dict(), "density": self.density.to_dict()}

    def to_json(self) -> str:
        """One line of strict JSON; floats return bit for bit."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Spectrum:
        """Inverse of `to_dict`.

        Raises:
            UsageError: it was written by another schema version.
        """
        if data.get("schema") != SCHEMA:
            raise UsageError(f"expected a spectrum of schema {SCHEMA}, got {data.get('schema')!r}; measure again")
        return Spectrum(Record.from_dict(data["record"]), Density.from_dict(data["density"]))

    @staticmethod
    def from_json(text: str) -> Spectrum:
        """Inverse of `to_json`."""
        return Spectrum.from_dict(json.loads(text))


def _grid(*heads: str) -> Grid:
    grid = Grid(*heads, header_style="bold")
    for column in grid.columns:
        column.justify = "right"
    return grid


def ends(found: Estimate, unit: float = 1.0) -> str:
    """The ends of an enclosure in some unit, rounded outwards; where they hardly differ, how far they are at most.

    >>> from isoflat.core.estimate import Kind
    >>> ends(Estimate(0.5, 0.12345, 0.98765, 0.95, Kind.ENCLOSURE, True))
    '[0.123, 0.988]'
    >>> ends(Estimate(0.5, 0.5 - 2e-9, 0.5 + 1e-9, 0.95, Kind.ENCLOSURE, True))
    '± 2e-09'
    """
    furthest = max(found.upper - found.value, found.value - found.lower)
    if 0 < furthest <= 1e-6 * abs(found.value):
        return f"± {_outwards(unit * furthest, 1, 1)}"
    digits = 3 if furthest > 1e-2 * abs(found.value) else 6
    return f"[{_outwards(unit * found.lower, -1, digits)}, {_outwards(unit * found.upper, 1, digits)}]"


def number(found: Estimate) -> str:
    """A number with the ends of its enclosure."""
    return f"{found.value:.4g} {ends(found)}"


def percent(found: Estimate) -> str:
    """A share with the ends of its enclosure, in per cent."""
    return f"{100 * found.value:.4g} % {ends(found, 100.0)}"


def _outwards(value: float, direction: int, digits: int) -> str:
    text = f"{value:.{digits}g}"
    if (float(text) - value) * direction < 0:
        exponent = int(f"{value:.{digits - 1}e}".split("e")[1])
        text = f"{float(text) + direction * 10.0 ** (exponent - digits + 1):.{digits}g}"
    return text
