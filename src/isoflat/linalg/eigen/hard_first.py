"""The extreme eigenvalue of a sum whose first part carries most of it: found there, verified on the whole.

Of a trained classifier's Hessian nearly all sits on the few examples that are not yet classified with confidence. So

1. Lanczos on the first part alone finds a vector, at a fraction of the cost;
2. a product with the whole gives its Rayleigh quotient and true residual. Where that is too large, Lanczos on the
   surrogate `A_S + D Xᵀ + X Dᵀ − X (Xᵀ D) Xᵀ` with `D = (A − A_S) X`, which agrees with A on all vectors X multiplied
   so far, finds the next one, again at the first part's cost. If the surrogate is poor the part is enlarged, until it is
   the whole and the method is Lanczos from a good start;
3. `linalg.eigen.complement` bounds what is left on the complement, from fresh random starts, part by part.

The bounds hold however the vectors of 1 and 2 were found (`docs/concepts/hard-examples-first.md`).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from isoflat.core import space
from isoflat.linalg.eigen.complement import ComplementBounds, RitzBasis, StoppingRule, complement_bounds
from isoflat.linalg.eigen.extremes import REACHED, ROUNDING, End, Extremes, Which
from isoflat.linalg.eigen.lanczos import Lanczos
from isoflat.linalg.krylov.recurrence import Recurrence
from isoflat.linalg.operator import Parts
from isoflat.linalg.solver import Domain, Request, Solver, Steps
from isoflat.linalg.vectors import orthogonalise, sphere

FEWEST = 8
"""Products without which it is not worth beginning: Lanczos on the whole makes more of a smaller budget."""

LONGEST = 20
"""Steps on a surrogate at most: it is not the operator, and need not be solved well."""

BLUR = 0.01
"""Relative residual on the explored parts that is small beside what the other parts add to it, at first; later in units
of the residual that is left."""

USEFUL = 0.3
"""Factor by which a surrogate must reduce the residual, or the part is enlarged."""


@final
@dataclass(frozen=True)
class HardFirst(Solver[Extremes]):
    """Solver for the extreme eigenvalue of a sum, its heaviest part first; `Lanczos` where there are no parts.

    For the smallest eigenvalue, which may sit anywhere in the data, it is `Lanczos` too.

    Attributes:
        whole: solver of an operator without parts; it has tolerance, confidence and budget.

    >>> from isoflat.core.rng import stream
    >>> from isoflat.linalg.operator import Dense, Sum
    >>> heavy = Dense(torch.diag(torch.linspace(0, 1, 50, dtype=torch.float64) ** 4))
    >>> both = Sum((heavy, Dense(1e-3 * torch.eye(50, dtype=torch.float64))), costs=(1.0, 9.0))
    >>> run = HardFirst(Lanczos(rtol=1e-6))(both, stream(0))
    >>> round(run.top.value, 6), run.reached
    (1.001, True)
    """

    label: ClassVar[str] = "HardFirst"

    whole: Lanczos

    def steps(self, domain: Domain, stream: torch.Generator) -> Steps[Extremes]:
        """Find a vector on the first part, verify it on the whole, certify it."""
        if len(domain.shares) == 1 or self.whole.which is Which.SMALLEST or self.whole.max_products < FEWEST:
            return (yield from self.whole.steps(domain, stream))
        return (yield from _HardFirstRun(self.whole, domain, stream).steps())


@final
@dataclass(frozen=True)
class _VerifiedVector:
    """The best vector found, with its product in full precision.

    Attributes:
        trial: all vectors that were multiplied, with their products.
        chosen: place of the best one among the Ritz values.
        value: Rayleigh quotient of the best vector x.
        residual: `‖A x − value·x‖`.
        discrepancy: distance of the precise product with the explored parts from the predicted one.
        slack: rounding error of the value.
        rounding: least rounding error of a product.
        size: Rayleigh quotient of x with the explored parts alone.
    """

    whole: Lanczos
    trial: RitzBasis
    chosen: int
    value: float
    residual: float
    discrepancy: float
    slack: float
    rounding: float
    size: float

    def noise(self, weight: float) -> float:
        """Rounding error of a product with all parts, if the unexplored ones, of norm `weight`, round alike."""
        return self.discrepancy * (1 + weight / abs(self.size) if self.size else 1.0) + self.rounding

    def bounds(self, left: ComplementBounds) -> tuple[float, float]:
        """Lower and upper bound on the whole spectrum."""
        noise = self.noise(left.weight)
        upper, lower = self.trial.bounds(left.lower, left.upper)
        return min(float(lower[0]) - noise, self.value), max(float(upper[-1]) + noise, self.value)

    def enough(self, left: ComplementBounds) -> bool:
        """Test of whether the enclosure meets the tolerance."""
        lower, upper = self.bounds(left)
        end = upper if self.whole.which is Which.LARGEST else max(upper, -lower)
        inner = self.value if self.whole.which is Which.LARGEST else abs(self.value)
        return end - inner + self.slack <= self.whole.rtol * abs(self.value)


class _HardFirstRun:
    """State of one run.

    Attributes:
        hard: places of the explored parts S.
        vectors: X, orthonormal, float64.
        images: `A X`.
        near: `A_S X`, products with the explored parts.
        gap: relative gap of the two Ritz values of largest magnitude on the explored parts.
        relative_residual: relative residual of the best vector so far.
    """

    def __init__(self, whole: Lanczos, domain: Domain, stream: torch.Generator) -> None:
        self.whole = whole
        self.domain = domain
        self.stream = stream
        self.started = time.monotonic()
        self.spent = 0.0
        self.hard: tuple[int, ...] = (0,)
        self.vectors: list[Tensor] = []
        self.images: list[Tensor] = []
        self.near: list[Tensor] = []
        self.gap = 1.0
        self.relative_residual = 1.0

    @property
    def products(self) -> int:
        """Cost so far in products with the whole, rounded up; shares add up to one but for rounding."""
        return math.ceil(round(self.spent, 9))

    @property
    def rest(self) -> tuple[int, ...]:
        """The parts that are not explored."""
        return tuple(p for p in range(len(self.domain.shares)) if p not in self.hard)

    @property
    def failure(self) -> float:
        """Probability that is left to each of the two ways to a certificate."""
        return (1 - self.whole.confidence) / 2

    def steps(self) -> Steps[Extremes]:
        """Run to the end; where parts are of no help, by Lanczos on the whole with what is left of the budget."""
        trial, stopped = yield from self._found()
        verified = yield from self._verified(trial)
        if not self.whole.certify:
            return self._extremes(verified, None, stopped)
        if self.rest:
            rule = StoppingRule(self.failure, verified.enough, self._affordable, f"{verified.value:.5g}")
            groups: list[Parts] = [self.hard, *((p,) for p in self.rest)]
            left = yield from complement_bounds(verified.trial, self.domain, self.stream, groups, rule)
            self.spent += left.products
            if left.reached or not self._affordable(FEWEST):
                return self._extremes(verified, left, REACHED if left.reached else self._exhausted())
        rest = self.whole.max_products - self.products
        seconds = None if self.whole.seconds is None else self.whole.seconds - (time.monotonic() - self.started)
        again = replace(self.whole, confidence=1 - self.failure, max_products=max(rest, 2), seconds=seconds)
        result = yield from again.steps(self.domain, self.stream)
        return replace(result, products=result.products + self.products, confidence=self.whole.confidence)

    def _found(self) -> Steps[tuple[RitzBasis, str]]:
        """Search for a vector whose residual is small enough; returns the basis, and the reason for the end."""
        vector = yield from self._explored(None)
        before = math.inf
        while True:
            added = yield from self._multiply(vector)
            trial = RitzBasis.of(self.vectors, self.images)
            chosen = self._chosen(trial)
            residual, size = trial.residual(chosen), abs(float(trial.values[chosen]))
            if residual <= self._goal() * size:
                return trial, REACHED
            if not added:
                return trial, ROUNDING
            if not self._affordable(1.0 + self.domain.share(self.hard)):
                return trial, self._exhausted()
            if residual > USEFUL * before:
                yield from self._enlarge()
            before, self.relative_residual = residual, residual / size if size else 0.0
            vector = yield from self._explored(trial)

    def _goal(self) -> float:
        """The relative residual to reach; of a certificate only the square enters, divided by the gap."""
        tight = self.whole.rtol
        return max(tight, math.sqrt(tight * self.gap) / 2) if self.whole.certify else tight

    def _explored(self, trial: RitzBasis | None) -> Steps[Tensor]:
        """The best vector by Lanczos on the explored parts, or on the surrogate of the whole that they make."""
        domain = self.domain
        start = sphere(domain.n, self.stream).to(domain.device) if trial is None else trial.vectors[self._chosen(trial)]
        run = Recurrence(start, domain.dtype)
        # What the parts that are left out do to the vector need not be undercut by much.
        blur = BLUR * self.relative_residual
        far = [torch.sub(image, near) for image, near in zip(self.images, self.near, strict=True)]
        while True:
            if trial is not None and not run.k:
                product = trial.images[self._chosen(trial)].clone()
            else:
                status = f"exploring {domain.share(self.hard):.0%} of the data, step {run.k + 1}"
                product = yield from self._ask(run.last, self.hard, status)
                self._correct(product, run.last[:, 0].double(), far)
            run.extend(product)
            ritz, coefficients = run.ritz()
            order = abs(ritz).argsort() if self.whole.which is Which.MAGNITUDE else ritz.argsort()
            best = int(order[-1])
            if run.k > 1:
                self.gap = min(1.0, abs(ritz[best] - ritz[int(order[-2])]) / abs(ritz[best])) if ritz[best] else 1.0
            residual = 0.0 if run.exhausted else run.betas[-1] * abs(coefficients[-1, best])
            if (
                residual <= max(self._goal() / 3, blur) * abs(ritz[best])
                or run.k >= LONGEST
                or not self._affordable(1.0)
            ):
                return run.combine(coefficients[:, best])

    def _correct(self, product: Tensor, vector: Tensor, far: list[Tensor]) -> None:
        """Turn `A_S z` into the surrogate's product, in place."""
        if far:
            along, across = space.inner(self.vectors, vector), space.inner(far, vector)
            inside = torch.stack([space.inner(self.vectors, row) for row in far], dim=1)
            space.add(product, along, far)
            space.add(product, across - inside @ along, self.vectors)

    def _multiply(self, vector: Tensor) -> Steps[bool]:
        """Take a vector in, with its products; False where it is one that is known, but for rounding."""
        unit = vector.double().clone()
        size = orthogonalise(self.vectors, unit)[1]
        if size <= torch.finfo(self.domain.dtype).eps:
            return False
        unit.div_(size)
        near = yield from self._ask(unit[:, None], self.hard, "verifying")
        image = near
        if self.rest:
            image = near + (yield from self._ask(unit[:, None], self.rest, "verifying on all data"))
        self.vectors.append(unit)
        self.near.append(near)
        self.images.append(image)
        return True

    def _enlarge(self) -> Steps[None]:
        """Explore one part more."""
        if self.rest:
            added = self.rest[:1]
            for k, vector in enumerate(self.vectors):
                self.near[k] = self.near[k] + (
                    yield from self._ask(vector[:, None], added, "exploring more of the data")
                )
            self.hard += added

    def _verified(self, trial: RitzBasis) -> Steps[_VerifiedVector]:
        """Take one precise product: with the explored parts for the noise of a certificate, with all if `precise` is set."""
        chosen = self._chosen(trial)
        vector, predicted = trial.vectors[chosen], trial.images[chosen]
        working = torch.finfo(self.domain.dtype).eps
        rounding = working * len(self.vectors) * abs(float(trial.values[chosen]))
        if not (self.whole.certify or self.whole.precise):
            value = float(trial.values[chosen])
            return _VerifiedVector(
                self.whole, trial, chosen, value, trial.residual(chosen), 0.0, rounding, rounding, value
            )
        parts = None if self.whole.precise else self.hard
        turn = space.inner(self.vectors, vector)
        expected = predicted if parts is None else space.combine(turn, self.near)
        fresh = yield from self._ask(vector[:, None], parts, "precise product", double=True)
        discrepancy = space.norm(fresh - expected)
        image = predicted + (fresh - expected)
        value = float(space.inner([vector], image)[0])
        size = float(space.inner([vector], fresh)[0])
        beyond = abs(value - size)
        final = torch.finfo(torch.float64).eps
        slack = discrepancy * (final / working + (beyond / abs(size) if size else 0.0)) + rounding * final / working
        residual = space.norm(torch.sub(image, vector, alpha=value))
        return _VerifiedVector(self.whole, trial, chosen, value, residual, discrepancy, slack, rounding, size)

    def _extremes(self, verified: _VerifiedVector, left: ComplementBounds | None, stopped: str) -> Extremes:
        """Both ends in the common form. At the other end only the bound is new: any vector's Rayleigh quotient lies there."""
        lower, upper = (-math.inf, math.inf) if left is None else verified.bounds(left)
        trial, which = verified.trial, self.whole.which
        top = which is Which.LARGEST or verified.value >= 0
        mine = End(
            verified.value, upper if top else lower, verified.slack, verified.residual, trial.vectors[verified.chosen]
        )
        other = 0 if top else -1
        value = min(float(trial.values[0]), verified.value) if top else max(float(trial.values[-1]), verified.value)
        noise = verified.noise(0.0 if left is None else left.weight)
        theirs = End(value, lower if top else upper, noise, None, trial.vectors[other])
        small = verified.residual <= self.whole.rtol * abs(verified.value)
        return Extremes(
            bottom=theirs if top else mine,
            top=mine if top else theirs,
            which=which,
            reached=small if left is None else verified.enough(left),
            confidence=self.whole.confidence if left is not None else 0.0,
            noise=noise,
            products=self.products,
            stopped=stopped,
        )

    def _chosen(self, trial: RitzBasis) -> int:
        """The wanted one of the Ritz values."""
        values = trial.values
        return int(abs(values).argmax() if self.whole.which is Which.MAGNITUDE else values.argmax())

    def _ask(self, vectors: Tensor, parts: Parts, status: str, double: bool = False) -> Steps[Tensor]:
        """The product with a single column, shape `(n,)`."""
        self.spent += self.domain.share(parts)
        return (yield Request(vectors, double=double, status=status, parts=parts))[:, 0]

    def _affordable(self, more: float) -> bool:
        """Test of whether so many products more can be spent, with one kept for the end."""
        late = self.whole.seconds is not None and time.monotonic() - self.started > self.whole.seconds
        return self.spent + more <= self.whole.max_products - 1 and not late

    def _exhausted(self) -> str:
        """Name of the budget that is spent, in words."""
        if self.whole.seconds is not None and time.monotonic() - self.started > self.whole.seconds:
            return f"budget of {self.whole.seconds:g} seconds spent"
        return f"budget of {self.whole.max_products} products spent"
