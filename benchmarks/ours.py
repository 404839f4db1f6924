"""Whole answers of isoflat, the paper's own method on isoflat's products, and what is true, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from answers import RESIDUAL, Answer, Meter, Work
from problems import CRITERION, PROBLEMS, Case
from torch import Tensor

import isoflat
from isoflat.core.rng import stream
from isoflat.curvature.block_trace import block_traces
from isoflat.geometry.layerwise import GEOMETRY as LAYERWISE
from isoflat.linalg.eigen.lanczos import Lanczos
from isoflat.linalg.eigen.power import PowerMethod
from isoflat.linalg.maps import LinearMap
from isoflat.linalg.solver import Domain, Solver
from isoflat.linalg.trace.base import TraceEstimate
from isoflat.risk.network import exactly
from isoflat.risk.routes.reverse import Recomputed

R = TypeVar("R")

TRUTH = 1e-5
"""Residual of the references, in units of the value."""


def measured(name: str, **options: Any) -> Callable[[Case, Meter], Work]:
    """`isoflat.measure` as anybody calls it."""

    def prepare(case: Case, _: Meter) -> Work:
        def work() -> Answer:
            found = isoflat.measure(case.model, case.data, CRITERION, measure=name, **options)
            note = "" if found.converged else "says itself that it has not converged"
            return Answer(found.value, None, found.residual, found.lower, found.upper, float(found.cost.products), note)

        return work

    return prepare


def certified(name: str, geometry: str, confidence: float | None = None) -> Callable[[Case, Meter], Work]:
    """The enclosure to the tolerance; to 0.1 for the decoder, whose eigenvalues lie close together."""

    def prepare(case: Case, meter: Meter) -> Work:
        rtol = 0.1 if case.name == PROBLEMS["decoder"].name else RESIDUAL
        return measured(name, geometry=geometry, rtol=rtol, confidence=confidence)(case, meter)

    return prepare


def driven(solver: Solver[R], case: Case, meter: Meter, frame: LinearMap | None = None, keep: bool = True) -> R:
    """A solver alone, on products through graphs that stay, or are built for each product, seen through a frame."""
    rebuilt = Recomputed(case.risk, case.state)
    route = rebuilt.keep() if keep else rebuilt
    steps = solver.steps(
        Domain(case.state.space.size, case.state.dtype, case.state.device), stream(0, "peers", type(solver).__name__)
    )
    reply: Tensor | None = None
    while True:
        try:
            request = steps.send(reply)  # type: ignore
        except StopIteration as done:
            return done.value
        vectors = request.vectors
        meter.count(vectors.shape[1], request.status)
        pushed = vectors if frame is None else frame.push(vectors)
        products = route.products(pushed.to(case.state.dtype))
        reply = products if frame is None else frame.pull(products)


def power(case: Case, meter: Meter) -> Work:
    """The paper's method under its own stopping rule; each product builds its graph, as in the paper's code."""

    def work() -> Answer:
        with exactly(case.state.device):
            frame = LAYERWISE.chart(case.state).frame
            found = driven(PowerMethod(frame=frame, tol=1e-8, max_products=1000), case, meter, frame, keep=False)
            return Answer(abs(found.wanted.value), residual=found.wanted.residual, note=found.stopped)

    return work


def traced(solver: Solver[TraceEstimate]) -> Callable[[Case, Meter], Work]:
    """One of our estimators."""

    def prepare(case: Case, meter: Meter) -> Work:
        def work() -> Answer:
            with exactly(case.state.device):
                found = driven(solver, case, meter)
            half = found.half_width
            return Answer(found.value, None, None, found.value - half, found.value + half, note=found.doubt)

        return work

    return prepare


def true_top(geometry: str) -> Callable[[Case, Meter], Work]:
    """Lanczos from another start than any contestant's; then the Rayleigh quotient of a product in float64 by torch alone.

    It is off by the square of that product's residual, divided by the gap to the next eigenvalue: by about 1e-10.
    """

    def prepare(case: Case, meter: Meter) -> Work:
        def work() -> Answer:
            with exactly(case.state.device):
                frame = LAYERWISE.chart(case.state).frame if geometry == "layerwise" else None
                vector = driven(Lanczos(rtol=TRUTH, certify=False), case, meter, frame).wanted.vector.double()
            vector /= vector.norm()
            pushed = vector if frame is None else frame.push(vector[:, None])[:, 0]
            meter.count()
            product = case.exact()(pushed)
            product = product if frame is None else frame.pull(product[:, None])[:, 0]
            value = float(vector @ product)
            return Answer(abs(value), residual=float((product - value * vector).norm()))

        return work

    return prepare


def true_trace(case: Case, _: Meter) -> Work:
    """The sum of all block traces: exact, without a product."""
    double = case.double()
    return lambda: Answer(sum(block_traces(double.risk, double.state).values()))
