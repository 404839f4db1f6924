"""Extreme eigenvalues by Lanczos from a random start, certified by the run itself."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch

from isoflat.core import space
from isoflat.core.errors import UsageError
from isoflat.linalg.certificate import outer_bounds
from isoflat.linalg.eigen.extremes import REACHED, ROUNDING, End, Extremes, Which
from isoflat.linalg.krylov.recurrence import Recurrence
from isoflat.linalg.solver import Domain, Request, Solver, Steps
from isoflat.linalg.vectors import sphere


@final
@dataclass(frozen=True)
class Lanczos(Solver[Extremes]):
    """Lanczos from a random start with full re-orthogonalisation, stopped by its own error bound.

    The recurrence is `krylov.recurrence`, whose docstring numbers what departs from the textbook. Here, numbered where it
    happens:

    1. The start is uniform on the sphere, and independent of the operator: the certificate rests on it
       (`docs/concepts/certificate.md`, "One event behind both upper bounds").
    2. The run stops by its own error bound (`linalg.certificate`), which holds for all steps at once with probability
       `confidence`; residuals of the recurrence steer an uncertified run only.
    3. The value is the Rayleigh quotient of one fresh product at the end, in float64, never the recurrence's
       ("The lower end").
    4. The distance of that product from the recurrence's prediction is the rounding noise, which widens the enclosure
       ("Rounding").

    Attributes:
        which: end that is refined.
        rtol: relative width of the enclosure (certified) or relative true residual (uncertified) to reach.
        confidence: probability that the enclosure holds.
        certify: switch of the certificate; False stops on the residual, skips the float64 product and leaves the outer ends
            infinite.
        precise: switch that takes the last product in float64 although nothing is certified.
        max_products: largest number of products, the final one included.
        seconds: budget of wall-clock time; None for no limit.

    >>> from isoflat.core.rng import stream
    >>> from isoflat.linalg.operator import Dense
    >>> run = Lanczos(rtol=1e-9)(Dense(torch.diag(torch.arange(-3.0, 3.0, dtype=torch.float64))), stream(0))
    >>> round(run.bottom.value, 9), round(run.top.value, 9), run.reached
    (-3.0, 2.0, True)
    """

    label: ClassVar[str] = "Lanczos"

    which: Which = Which.MAGNITUDE
    rtol: float = 1e-3
    confidence: float = 1 - 1e-6
    certify: bool = True
    precise: bool = False
    max_products: int = 300
    seconds: float | None = None

    def __post_init__(self) -> None:
        """Refuse settings without meaning."""
        if not (0 < self.confidence < 1 and self.rtol >= 0):
            raise UsageError(f"expected 0 < confidence < 1 and rtol ≥ 0, got {self.confidence} and {self.rtol}")
        if self.max_products < 2:
            raise UsageError(f"Lanczos needs 2 products, one to look and one to verify, got {self.max_products}")

    def steps(self, domain: Domain, stream: torch.Generator) -> Steps[Extremes]:
        """Grow the Krylov space until the bound is tight; then certify.

        The rounding noise is known only after the fresh product. Where it alone makes the enclosure too wide, though it
        leaves room, the run goes on once, with that much less to spend.
        """
        started = time.monotonic()
        noise, verified = 0.0, 0
        recurrence = Recurrence(sphere(domain.n, stream).to(domain.device), domain.dtype)  # 1
        status = "Lanczos: start"
        while True:
            product = yield Request(recurrence.last, status=status)
            recurrence.extend(product[:, 0])
            view = self._view(recurrence)
            status = f"Lanczos {recurrence.k}: {view.wanted.value:.5g}, width {view_width(view):.1e}"
            stopped = self._stop(recurrence, view, time.monotonic() - started, noise, verified)  # 2
            if not stopped:
                continue
            result = replace((yield from self._finish(recurrence, stopped)), products=recurrence.k + 1 + verified)
            room = self.rtol * abs(result.wanted.value) - 2 * result.noise
            if (
                result.reached
                or stopped != REACHED
                or verified
                or room <= 0
                or result.products >= self.max_products - 1
            ):
                return result
            noise, verified = 2 * result.noise, 1

    def _view(self, recurrence: Recurrence) -> Extremes:
        """The extremes as the recurrence alone sees them (its residuals steer, but are never reported)."""
        ritz, coefficients = recurrence.ritz()
        scale = recurrence.scale
        lower, upper = -math.inf, math.inf
        if self.certify:
            lower, upper = outer_bounds(ritz, recurrence.log_couplings, recurrence.n, 1 - self.confidence)
        coupling = 0.0 if recurrence.exhausted else recurrence.betas[-1]
        ends = [
            End(ritz[j] * scale, bound * scale, 0.0, coupling * abs(coefficients[-1, j]) * scale, torch.empty(0))
            for j, bound in ((0, lower), (-1, upper))
        ]
        return Extremes(ends[0], ends[1], self.which, False, 0.0, 0.0, recurrence.k, "")

    def _stop(self, recurrence: Recurrence, view: Extremes, seconds: float, noise: float, verified: int) -> str:
        """Reason to stop now, in words; empty to go on."""
        if recurrence.exhausted:
            return "the Krylov space is the whole space"
        error = self._error(view)
        if error + noise <= self.rtol * abs(view.wanted.value):
            return REACHED
        if error <= recurrence.rounding * recurrence.scale:
            return ROUNDING
        if recurrence.k + 1 + verified >= self.max_products:
            return f"budget of {self.max_products} products spent"
        if self.seconds is not None and seconds > self.seconds:
            return f"budget of {self.seconds:g} seconds spent"
        return ""

    def _error(self, view: Extremes) -> float:
        """Quantity that the tolerance limits: the width of the enclosure, or the residual."""
        if self.certify:
            lower, upper = view.interval()
            return upper - lower
        return math.inf if view.wanted.residual is None else view.wanted.residual

    def _finish(self, recurrence: Recurrence, stopped: str) -> Steps[Extremes]:
        """Multiply the wanted Ritz vector afresh: true residual, noise, and the reported value."""
        view = self._view(recurrence)
        ritz, coefficients = recurrence.ritz()
        scale = recurrence.scale
        chosen = -1 if view.wanted is view.top else 0
        vector = recurrence.combine(coefficients[:, chosen])
        double = self.certify or self.precise
        fresh = (yield Request(vector[:, None], double=double, status="Lanczos: fresh product"))[:, 0] / scale
        value = float(space.inner([vector], fresh)[0])  # 3
        residual = space.norm(torch.sub(fresh, vector, alpha=value))
        predicted = recurrence.predicted(float(ritz[chosen]), coefficients[:, chosen], vector)
        discrepancy = space.norm(predicted.sub_(fresh))  # 4
        noise = discrepancy + recurrence.rounding
        working = torch.finfo(recurrence.last.dtype).eps
        final = torch.finfo(torch.float64).eps if double else working
        slack = discrepancy * final / working + recurrence.rounding_at(final)

        def end(j: int, bound: float) -> End:
            mine = j == chosen
            rayleigh = value if mine else float(ritz[j])
            return End(
                value=rayleigh * scale,
                bound=(max(bound + noise, rayleigh) if j else min(bound - noise, rayleigh)) * scale,
                slack=(slack if mine else noise) * scale,
                residual=residual * scale if mine else None,
                vector=vector if mine else recurrence.combine(coefficients[:, j]),
            )

        result = Extremes(
            bottom=end(0, view.bottom.bound / scale),
            top=end(-1, view.top.bound / scale),
            which=self.which,
            reached=False,
            confidence=self.confidence if self.certify else 0.0,
            noise=noise * scale,
            products=recurrence.k + 1,
            stopped=stopped,
        )
        return replace(result, reached=self._error(result) <= self.rtol * abs(result.wanted.value))


def view_width(view: Extremes) -> float:
    """Relative width of the interval, for a status line."""
    lower, upper = view.interval()
    size = abs(view.wanted.value)
    return (upper - lower) / size if size else math.inf
