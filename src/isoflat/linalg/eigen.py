"""Extreme eigenvalues: certified Lanczos, and the power method of the paper for comparison."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import final

import torch
from torch import Tensor

from isoflat.core import space
from isoflat.core.errors import UsageError
from isoflat.linalg.certificate import outer_bounds
from isoflat.linalg.krylov.recurrence import Recurrence
from isoflat.linalg.maps import LinearMap
from isoflat.linalg.probes import sphere
from isoflat.linalg.solver import Domain, Request, Solver, Steps

REACHED = "tolerance reached"
"""Why a run ended that did what was asked."""


class Which(StrEnum):
    """Which eigenvalue is asked for."""

    LARGEST = "largest"
    SMALLEST = "smallest"
    MAGNITUDE = "magnitude"


@final
@dataclass(frozen=True)
class End:
    """What is known of one end of the spectrum.

    Attributes:
        value: a Rayleigh quotient: the eigenvalue lies beyond it, up to `slack`.
        bound: the eigenvalue lies before it, with the run's confidence; infinite if uncertified.
        slack: error of `value` itself, from the rounding of products.
        residual: `‖A x − value·x‖` from a product of its own; None if only the recurrence looked at this end.
        vector: the Ritz vector x, shape `(n,)`.
    """

    value: float
    bound: float
    slack: float
    residual: float | None
    vector: Tensor


@final
@dataclass(frozen=True)
class Extremes:
    """Both ends of a spectrum.

    Attributes:
        bottom: smallest eigenvalue.
        top: largest eigenvalue.
        which: the end that was refined until `reached`.
        reached: whether the tolerance was reached.
        confidence: probability that every bound holds; 0 if uncertified.
        noise: estimated rounding error of a product along the Ritz vector.
        products: products used, the final ones included.
        stopped: why the run ended, in words.
    """

    bottom: End
    top: End
    which: Which
    reached: bool
    confidence: float
    noise: float
    products: int
    stopped: str

    @property
    def wanted(self) -> End:
        """The end asked for; for `Which.MAGNITUDE` the one that is larger in absolute value.

        Only one end has had a product of its own in the end; on a tie, where rounding decides, it is that one.
        """
        if self.which is Which.MAGNITUDE:
            return max(self.top, self.bottom, key=lambda end: (end.residual is not None, abs(end.value)))
        return self.top if self.which is Which.LARGEST else self.bottom

    def interval(self) -> tuple[float, float]:
        """Enclosure of the eigenvalue asked for; of the spectral norm for `Which.MAGNITUDE`."""
        end = self.wanted
        if self.which is Which.MAGNITUDE:
            return max(abs(end.value) - end.slack, 0.0), max(self.top.bound, -self.bottom.bound, abs(end.value))
        inner = end.value - end.slack if end is self.top else end.value + end.slack
        return (inner, end.bound) if end is self.top else (end.bound, inner)


@final
@dataclass(frozen=True)
class Lanczos(Solver[Extremes]):
    """Lanczos from a random start with full re-orthogonalisation, stopped by its own error bound.

    The bounds are those of `linalg.certificate`; they hold with probability `confidence` over the start vector. The
    value is the Rayleigh quotient of one fresh product at the end, in float64, never the recurrence's; comparing that
    product with the recurrence's prediction gives the rounding noise, which widens the enclosure.

    Attributes:
        which: the end that is refined.
        rtol: relative width of the enclosure (certified) or relative true residual (uncertified) to reach.
        confidence: probability that the enclosure holds.
        certify: False stops on the residual, skips the float64 product and leaves the outer ends infinite.
        precise: take the last product in float64 although nothing is certified.
        max_products: budget, the final product included.
        seconds: budget of wall-clock time; None for no limit.

    >>> from isoflat.core.streams import stream
    >>> from isoflat.linalg.operator import Dense
    >>> run = Lanczos(rtol=1e-9)(Dense(torch.diag(torch.arange(-3.0, 3.0, dtype=torch.float64))), stream(0))
    >>> round(run.bottom.value, 9), round(run.top.value, 9), run.reached
    (-3.0, 2.0, True)
    """

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
        recurrence = Recurrence(sphere(domain.n, stream).to(domain.device), domain.dtype)
        status = "Lanczos: start"
        while True:
            product = yield Request(recurrence.last, status=status)
            recurrence.extend(product[:, 0])
            view = self._view(recurrence)
            status = f"Lanczos {recurrence.k}: {view.wanted.value:.5g}, width {view_width(view):.1e}"
            stopped = self._stop(recurrence, view, time.monotonic() - started, noise, verified)
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
        """Why to stop now; empty to go on."""
        if recurrence.exhausted:
            return "the Krylov space is the whole space"
        error = self._error(view)
        if error + noise <= self.rtol * abs(view.wanted.value):
            return REACHED
        if error <= recurrence.rounding * recurrence.scale:
            return "as tight as rounding allows"
        if recurrence.k + 1 + verified >= self.max_products:
            return f"budget of {self.max_products} products spent"
        if self.seconds is not None and seconds > self.seconds:
            return f"budget of {self.seconds:g} seconds spent"
        return ""

    def _error(self, view: Extremes) -> float:
        """What the tolerance is about: the width of the enclosure, or the residual."""
        if self.certify:
            lower, upper = view.interval()
            return upper - lower
        return math.inf if view.wanted.residual is None else view.wanted.residual

    def _finish(self, recurrence: Recurrence, stopped: str) -> Steps[Extremes]:
        """One fresh product with the Ritz vector asked for: true residual, noise, and the reported value."""
        view = self._view(recurrence)
        ritz, coefficients = recurrence.ritz()
        scale = recurrence.scale
        chosen = -1 if view.wanted is view.top else 0
        vector = recurrence.combine(coefficients[:, chosen])
        double = self.certify or self.precise
        fresh = (yield Request(vector[:, None], double=double, status="Lanczos: fresh product"))[:, 0] / scale
        value = float(space.inner([vector], fresh)[0])
        residual = space.norm(torch.sub(fresh, vector, alpha=value))
        predicted = recurrence.predicted(float(ritz[chosen]), coefficients[:, chosen], vector)
        surprise = space.norm(predicted.sub_(fresh))
        noise = surprise + recurrence.rounding
        working = torch.finfo(recurrence.last.dtype).eps
        final = torch.finfo(torch.float64).eps if double else working
        slack = surprise * final / working + recurrence.rounding_at(final)

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


@final
@dataclass(frozen=True)
class PowerMethod(Solver[Extremes]):
    """The Riemannian power method of Rangamani et al. 2019, kept for comparison; made safe against the sign.

    `v ← D² H v`, normalised in the metric, is `u ← Eᵀ H E u` in the frame's coordinates `v = E u`. It stops when the
    relative Euclidean change of v is below `tol`. NOTE: the published code compares `v` with its predecessor as it is,
    so that a dominant negative eigenvalue, for which v changes sign at each step, never stops; here the change is
    taken up to the sign. It says nothing about the error: there is no outer bound.

    Attributes:
        frame: E, used by the stopping rule only; None for the identity.
        tol: relative change of v at which to stop; the paper's 1e-8.
        max_products: at most so many products; the paper's 1000.

    >>> from isoflat.core.streams import stream
    >>> from isoflat.linalg.operator import Dense
    >>> run = PowerMethod()(Dense(torch.diag(torch.tensor([1.0, -2.0], dtype=torch.float64))), stream(0))
    >>> round(run.wanted.value, 12), run.reached
    (-2.0, True)
    """

    frame: LinearMap | None = None
    tol: float = 1e-8
    max_products: int = 1000

    def steps(self, domain: Domain, stream: torch.Generator) -> Steps[Extremes]:
        """Multiply and normalise until the direction stands still."""
        u = sphere(domain.n, stream).to(domain.device)
        change, products, stopped = math.inf, 0, ""
        while True:
            reply = yield Request(u[:, None].to(domain.dtype), status=f"power {products}: change {change:.1e}")
            product = reply[:, 0]
            products += 1
            value = float(space.inner([u], product)[0])
            size = space.norm(product)
            if size == 0:
                stopped = "every product vanished"
            elif change < self.tol:
                stopped = "tolerance reached"
            elif products >= self.max_products:
                stopped = f"budget of {self.max_products} products spent"
            if stopped:
                break
            following = product / size
            old, new = self._push(u), self._push(following)
            change = min(space.norm(new - old), space.norm(new + old)) / space.norm(old)
            u = following
        residual = space.norm(product - value * u)
        # A Rayleigh quotient lies within the spectrum, whichever end it has run to.
        found, other = End(value, math.inf, residual, residual, u), End(value, -math.inf, residual, None, u)
        if value < 0:
            found, other = replace(found, bound=-math.inf), replace(other, bound=math.inf)
        bottom, top = (found, other) if value < 0 else (other, found)
        reached = size == 0 or change < self.tol
        return Extremes(bottom, top, Which.MAGNITUDE, reached, 0.0, 0.0, products, stopped)

    def _push(self, u: Tensor) -> Tensor:
        return u if self.frame is None else self.frame.push(u[:, None])[:, 0]
