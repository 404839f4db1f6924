"""A run for many eigenpairs: search, verify, certify, as often as it takes."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isoflat.core import space
from isoflat.core.rng import stream as fresh_stream
from isoflat.core.state import fingerprint
from isoflat.linalg.eigen.complement import ComplementBounds, RitzBasis, StoppingRule, complement_bounds
from isoflat.linalg.eigen.extremes import REACHED, ROUNDING
from isoflat.linalg.eigen.pairs import Eigenpair, EigenpairSolver, Pairs, Reals
from isoflat.linalg.solver import Domain, Request, Steps
from isoflat.linalg.vectors import orthonormalise


@final
@dataclass(frozen=True)
class Verified:
    """The wanted vectors with fresh products; arrays are of the largest, descending, then of the smallest, ascending.

    Attributes:
        trial: wanted vectors with their products.
        top: number of largest eigenvalues wanted.
        bottom: number of smallest eigenvalues wanted.
        discrepancy: distance of the products from what the search predicted.
        rounding: rounding error of the search.
        size: largest magnitude that the search met.
        working: precision of the search's products, and of those of a certificate.
        final: precision of the fresh products.
    """

    trial: RitzBasis
    top: int
    bottom: int
    discrepancy: float
    rounding: float
    size: float
    working: float
    final: float

    @property
    def values(self) -> Reals:
        """Ritz values, ascending."""
        return self.trial.values

    @property
    def wanted(self) -> Reals:
        """Ritz values that are asked for, in the order of `slots`."""
        return self.values[slots(len(self.values), self.top, self.bottom)]

    @property
    def residuals(self) -> Reals:
        """Residuals of the wanted values, in the same order."""
        found = [self.trial.residual(j) for j in range(len(self.values))]
        return np.array(found)[slots(len(found), self.top, self.bottom)]

    def noise(self, magnitude: float, steps: int = 0) -> float:
        """Rounding error of products, after so many steps on the complement, where magnitudes reach so far."""
        return self.discrepancy + self.rounding + (self.working * steps + self._sums) * max(self.size, magnitude)

    def slack(self, magnitude: float) -> float:
        """Rounding error of the values."""
        own = 4 * self.final * (len(self.values) + 1)
        return self.discrepancy * self.final / self.working + (own + self._sums) * max(self.size, magnitude)

    @property
    def _sums(self) -> float:
        """Relative error of a sum over n entries, which is in float64 in any case."""
        return torch.finfo(torch.float64).eps * math.sqrt(self.trial.vectors[0].shape[0])

    def bounds(self, left: ComplementBounds) -> tuple[Reals, Reals]:
        """Bounds on the wanted eigenvalues and on the next ones, from bounds on the complement.

        Returns:
            Bounds from above on the largest eigenvalues, descending, and on the next one after them; and from below on the
            smallest, ascending, and on the next one.
        """
        noise, slack = self.noise(left.magnitude, left.steps), self.slack(left.magnitude)
        lower, upper = left.lower - noise, left.upper + noise
        high, low = self.trial.bounds(lower, upper)
        return np.append(high[::-1] + slack, upper)[: self.top + 1], np.append(low - slack, lower)[: self.bottom + 1]

    def exact(self) -> tuple[Reals, Reals]:
        """Bounds where the vectors span the whole space, so that there is no complement."""
        high, low = np.append(self.values[::-1], -math.inf), np.append(self.values, math.inf)
        return high[: self.top + 1] + self.slack(0.0), low[: self.bottom + 1] - self.slack(0.0)

    def widths(self, highs: Reals, lows: Reals, magnitude: float) -> Reals:
        """Widths of the enclosures that such bounds make, in the order of `slots`."""
        outer, inner = np.concatenate([highs[: self.top], -lows[: self.bottom]]), self.wanted.copy()
        inner[self.top :] *= -1
        return outer - inner + self.slack(magnitude)


def slots(found: int, top: int, bottom: int) -> list[int]:
    """Places, among so many ascending values, of the largest, descending, then of the smallest, ascending.

    >>> slots(10, 2, 3)
    [9, 8, 0, 1, 2]
    """
    return [*range(found - 1, found - 1 - top, -1), *range(bottom)]


class Attempt:
    """State of one run for many eigenpairs (`docs/concepts/certificate.md`, "Several eigenvalues, from any start").

    Attributes:
        top: number of largest eigenvalues wanted, at most n.
        bottom: number of smallest eigenvalues wanted, at most n.
        wanted: number of pairs in all, at most n.
        spent: products spent so far.
        attempts: number of attempts at a certificate.
        length: products of the last certificate; 0 where it did not come to its end.
        final: flag that the search has no budget left, so that its present vectors must do.
        factors: factor on the tolerance that the search aims for, for each pair.
        insufficient: mask of pairs that miss the tolerance whatever the bounds on the rest.
        responsible: mask of pairs whose residuals are the reason.
        highs: best bounds from above so far, in the order of `Verified.bounds`.
        lows: best bounds from below so far, in the same order.
        magnitude: largest magnitude met on complements.
    """

    def __init__(self, task: EigenpairSolver, domain: Domain, stream: torch.Generator) -> None:
        self.task, self.domain = task, domain
        self.started = time.monotonic()
        self.top, self.bottom = min(task.largest, domain.n), min(task.smallest, domain.n)
        self.wanted = min(self.top + self.bottom, domain.n)
        self.spent = self.attempts = self.length = 0
        self.final, self.magnitude = False, 0.0
        self.factors = np.full(self.top + self.bottom, 0.25 if task.certify else 1.0)
        self.insufficient = self.responsible = np.zeros(self.top + self.bottom, dtype=bool)
        self.highs, self.lows = np.full(self.top + 1, math.inf), np.full(self.bottom + 1, -math.inf)
        draw = int(torch.randint(2**62, (1,), generator=stream))
        self.search = task.search(domain, stream)
        # A warm start may come from an earlier run with the same stream, and know what is drawn from it.
        warm = "" if task.start is None else task.start.detach().double().cpu().numpy().tobytes()
        self.stream = fresh_stream(draw, "certificate", fingerprint(warm))

    def steps(self) -> Steps[Pairs]:
        """Search, verify and certify until every pair is good enough or the budget is spent."""
        while True:
            yield from self._find()
            verified = yield from self._verified()
            missed = (yield from self._certify(verified)) if self.task.certify else []
            stopped = REACHED if self._good(verified) else self._over(len(missed) + self._reserve() + 1)
            if not stopped:
                taken = (yield from self.search.admit(missed)) if missed else 0
                self.spent += taken
                # Where one was missed among many that are close, more may be: what comes next must be better.
                stopped = "" if self._tighten() or taken else ROUNDING
            if not stopped:
                continue
            if self.task.certify and stopped != REACHED and not self.length and not self._over(1):
                self.final = True
                yield from self._certify(verified)
            return self._result(verified, REACHED if self._good(verified) else stopped)

    def _over(self, more: int) -> str:
        """Reason that so many products more cannot be spent, in words; empty if they can."""
        task = self.task
        if self.spent + more > task.max_products:
            return f"budget of {task.max_products} products spent"
        if task.seconds is not None and time.monotonic() - self.started > task.seconds:
            return f"budget of {task.seconds:g} seconds spent"
        return ""

    def _reserve(self) -> int:
        """Products that the search must leave: for fresh products, and for a certificate about as long as the last one."""
        certificate = self.length + 2 if self.length else max(self.task.max_products // 4, 1)
        return self.wanted + (certificate if self.task.certify else 0)

    def _targets(self, verified: Verified) -> Reals:
        """Widths, or residuals, to reach."""
        return self.task.rtol * np.abs(verified.wanted)

    def _good(self, verified: Verified) -> bool:
        """Test of whether every pair meets the tolerance."""
        reached = verified.widths(self.highs, self.lows, self.magnitude) if self.task.certify else verified.residuals
        return bool((reached <= self._targets(verified)).all())

    def _goals(self) -> dict[int, float]:
        """Residuals to reach, of those pairs that have not reached theirs.

        A residual r widens the enclosure of its own pair by r where nothing is known, and by about r²/gap where the rest of
        the spectrum keeps away: by e if `r² = e (e + gap)`. By as much it moves the end of the rest, which must not reach
        the last of the wanted there.
        """
        scale = self.search.scale
        values, residuals = (numbers / scale for numbers in self.search.ritz())
        places = slots(len(values), self.top, self.bottom)
        excess = self.factors * self.task.rtol * np.abs(values[places])
        goals = excess.copy()
        if self.task.certify and len(values) > self.wanted:
            gaps = np.zeros(len(places))
            limits = []
            for count, last, near in (
                (self.top, self.top - 1, len(values) - 1 - self.top),
                (self.bottom, len(places) - 1, self.bottom),
            ):
                away = np.abs(values[places] - values[near])
                mine = slice(last + 1 - count, last + 1)
                gaps[mine] = np.maximum(away[mine] - residuals[near], 0)
                if count:
                    moved = max(excess[last], gaps[last] / 4)
                    limits.append(np.sqrt(moved * (moved + away)))
            goals = np.minimum(np.sqrt(excess * (excess + gaps)), np.min(limits, axis=0))
        goals = np.maximum(goals, self.search.rounding / scale)
        return {j: float(goal) * scale for j, goal in zip(places, goals, strict=True) if residuals[j] > goal}

    def _find(self) -> Steps[None]:
        """Search until the goals are met, or the budget has no more than what verifying and certifying need."""
        reserve = self._reserve()
        while not self.search.stuck:
            ready = len(self.search.ritz()[0]) >= self.wanted
            goals = self._goals() if ready else {}
            if ready and (not goals or self._over(reserve + 1)):
                self.final = bool(goals)
                return
            kept = reserve if ready else self.wanted + self.task.certify  # there must be a Ritz value for every pair
            self.spent += yield from self.search.advance(goals, self.task.max_products - self.spent - kept)

    def _settled(self) -> NDArray[np.bool_]:
        """Mask of the pairs that the search cannot make better."""
        residuals = self.search.ritz()[1]
        small = residuals[slots(len(residuals), self.top, self.bottom)] <= self.search.rounding
        return small | self.search.stuck | self.final

    def _tighten(self) -> bool:
        """Ask the search for more, of those pairs that need it; False if rounding leaves nothing to ask for."""
        better = ~self._settled()
        chosen = better & self.responsible if (better & self.responsible).any() else better & self.insufficient
        while chosen.any():
            goals = self._goals()
            self.factors[chosen] /= 8
            if goals:
                return True
        return False

    def _verified(self) -> Steps[Verified]:
        """Fresh products of the wanted vectors: values, residuals, and the noise."""
        search, double = self.search, self.task.certify
        found = len(search.ritz()[0])
        vectors, images = search.pairs(sorted(set(slots(found, self.top, self.bottom))))
        orthonormalise(vectors, images)
        status = f"fresh products of {len(vectors)} vectors"
        fresh = (yield Request(torch.stack(vectors, dim=1), double=double, status=status)).unbind(1)
        self.spent += len(vectors)
        discrepancy = max(space.norm(image.sub_(product)) for image, product in zip(images, fresh, strict=True))
        trial = RitzBasis.of(vectors, list(fresh))
        working = torch.finfo(self.domain.dtype).eps
        verified = Verified(
            trial=trial,
            top=self.top,
            bottom=self.bottom,
            discrepancy=discrepancy,
            rounding=search.rounding,
            size=max(search.size, float(np.abs(trial.values).max())),
            working=working,
            final=torch.finfo(torch.float64).eps if double else working,
        )
        self.insufficient = self.responsible = verified.residuals > self._targets(verified)
        return verified

    def _certify(self, verified: Verified) -> Steps[list[Tensor]]:
        """Bound what the complement can hold; returns Ritz vectors from there that belong among the wanted."""
        if self.wanted == self.domain.n:
            self.highs, self.lows = verified.exact()
            return []
        self.attempts += 1
        targets, settled = self._targets(verified), self._settled()

        def least(left: ComplementBounds) -> Reals:
            """The widths that are left if the Ritz values on the complement are its ends."""
            return verified.widths(*verified.bounds(replace(left, lower=left.bottom, upper=left.top)), left.magnitude)

        def rounding(left: ComplementBounds) -> float:
            """Widths that products in this precision cannot tell from zero."""
            return 4 * (verified.noise(left.magnitude) + verified.slack(left.magnitude))

        def enough(left: ComplementBounds) -> bool:
            """Test of the tolerance; pairs that cannot improve need about their tightest width only."""
            possible = least(left)
            final = settled | (possible <= rounding(left))
            limits = np.where((possible > 0.75 * targets) & final, 2 * possible, targets)
            return bool((verified.widths(*verified.bounds(left), left.magnitude) <= limits).all())

        rule = StoppingRule(
            failure=(1 - self.task.confidence) / (self.attempts * (self.attempts + 1)),
            enough=enough,
            affordable=lambda more: not self._over(math.ceil(more)),
            status=f"certificate of {self.wanted} pairs",
        )
        left = yield from complement_bounds(verified.trial, self.domain, self.stream, (None,), rule)
        self.spent += left.steps
        self.length = left.steps if left.reached else 0
        self.insufficient = least(left) > np.maximum(0.75 * targets, rounding(left))
        self.responsible = self._responsible(verified, left)
        # All attempts' bounds hold together.
        highs, lows = verified.bounds(left)
        self.magnitude = max(self.magnitude, left.magnitude)
        self.highs, self.lows = np.minimum(self.highs, highs), np.maximum(self.lows, lows)
        noise = verified.noise(left.magnitude)
        above = verified.wanted[self.top - 1] + max(noise, targets[self.top - 1] / 4) if self.top else math.inf
        below = verified.wanted[-1] - max(noise, targets[-1] / 4) if self.bottom else -math.inf
        return left.beyond(below, above)

    def _responsible(self, verified: Verified, left: ComplementBounds) -> NDArray[np.bool_]:
        """Whose residuals widen the poor pairs' enclosures: those that move the end of the rest by much."""
        responsible, targets = np.zeros(len(self.insufficient), dtype=bool), self._targets(verified)
        for end, mine in ((left.top, slice(0, self.top)), (left.bottom, slice(self.top, None))):
            if self.insufficient[mine].any():
                half = np.abs(verified.wanted - end) / 2
                moved = np.hypot(half, verified.residuals) - half
                responsible |= moved > targets[mine][self.insufficient[mine]].min() / 8
        return responsible

    def _result(self, verified: Verified, stopped: str) -> Pairs:
        found = [self._pair(verified, j) for j in slots(len(verified.values), self.top, self.bottom)]
        return Pairs(
            largest=tuple(found[: self.top]),
            smallest=tuple(found[self.top :]),
            reached=stopped == REACHED,
            confidence=self.task.confidence if self.task.certify else 0.0,
            noise=verified.noise(self.magnitude),
            products=self.spent,
            stopped=stopped,
        )

    def _enclosure(self, verified: Verified, j: int) -> tuple[float, float]:
        """Enclosure of the j-th of the verified values, ascending."""
        place, value, slack = len(verified.values) - 1 - j, float(verified.values[j]), verified.slack(self.magnitude)
        lower, upper = -math.inf, math.inf
        if place < self.top:
            lower, upper = value - slack, max(float(self.highs[place]), value)
        if j < self.bottom:
            lower, upper = max(lower, min(float(self.lows[j]), value)), min(upper, value + slack)
        return lower, upper

    def _pair(self, verified: Verified, j: int) -> Eigenpair:
        value, (lower, upper) = float(verified.values[j]), self._enclosure(verified, j)
        others = [self._enclosure(verified, i) for i in range(self.wanted) if i != j]
        if self.wanted < self.domain.n:
            # All other eigenvalues lie here.
            others.append((float(self.lows[-1]), float(self.highs[-1])))
        distance = min((max(low - value, value - high, 0.0) for low, high in others), default=math.inf)
        residual = verified.trial.residual(j)
        return Eigenpair(
            value=value,
            lower=lower,
            upper=upper,
            residual=residual,
            vector=verified.trial.vectors[j],
            clustered=any(low <= upper and lower <= high for low, high in others),
            angle=min(1.0, (residual + verified.slack(self.magnitude)) / distance) if distance else 1.0,
        )
