"""Many eigenpairs at both ends of a spectrum: found from any start, certified from a fresh random one.

1. *Search.* Block Lanczos (`Eigenpairs`) or LOBPCG (`linalg.lobpcg`) from warm vectors, random ones, or both, until its
   own residuals are small enough. Nothing here needs to be random, or right.
2. *Verify.* Fresh products of the vectors found, in float64, and Rayleigh and Ritz once more: values and residuals come
   from here only.
3. *Certify.* `linalg.outside` bounds the spectrum on the complement, from a random start that knows nothing of the
   search; the eigenvalues of a small comparison matrix then bound those of A (`docs/concepts/certificate.md`). If the
   complement holds an eigenvalue that belongs among the wanted ones, it goes into the search, and all begins again.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isoflat.core import space
from isoflat.core.errors import UsageError
from isoflat.core.fingerprint import fingerprint
from isoflat.core.streams import stream as fresh_stream
from isoflat.linalg.krylov.block import BlockRecurrence
from isoflat.linalg.krylov.orthogonal import orthogonalise
from isoflat.linalg.outside import Aim, Outside, Trial, gram, outside
from isoflat.linalg.probes import sphere
from isoflat.linalg.solver import Domain, Request, Solver, Steps

Reals = NDArray[np.float64]

REACHED = "tolerance reached"
"""Why a run ended that did what was asked."""

ROUNDING = "as tight as rounding allows"
"""Why a run ended whose tolerance lies below what the precision of the products can give."""

USUAL = 4
"""Width of a block where none is asked for: multiplicities up to it need no help from the certificate."""


@final
@dataclass(frozen=True)
class Pair:
    """An eigenvalue with its enclosure, and an approximate eigenvector.

    Attributes:
        value: a Ritz value of fresh products; the eigenvalue lies beyond it, up to rounding.
        lower: the eigenvalue is at least this.
        upper: the eigenvalue is at most this.
        residual: `‖A x − value·x‖`, from a product of its own.
        vector: x, shape `(n,)`, float64, of length 1.
        clustered: whether another eigenvalue may lie in the enclosure: then the value is certified, the vector is not.
        angle: bound on the sine of the angle between x and the eigenvector; 1 where nothing is known.
    """

    value: float
    lower: float
    upper: float
    residual: float
    vector: Tensor
    clustered: bool
    angle: float


@final
@dataclass(frozen=True)
class Pairs:
    """Both ends of a spectrum, several eigenvalues each.

    Attributes:
        largest: descending; the j-th encloses the j-th largest eigenvalue, counted with multiplicity.
        smallest: ascending, alike. All of the spectrum where more was asked for than there is.
        reached: whether the tolerance was reached for every pair.
        confidence: probability that all enclosures hold; 0 if uncertified, where outer ends are infinite.
        noise: estimated rounding error of a product.
        products: products used, fresh ones and those of the certificate included.
        stopped: why the run ended, in words.
    """

    largest: tuple[Pair, ...]
    smallest: tuple[Pair, ...]
    reached: bool
    confidence: float
    noise: float
    products: int
    stopped: str


@dataclass(frozen=True, eq=False)
class Many(Solver[Pairs], ABC):
    """What solvers for many eigenpairs share: the question, the budget, and everything but the search.

    Two solvers are equal where all settings are and the start is the same tensor.

    Attributes:
        largest: how many of the largest eigenvalues; all there are if that is fewer.
        smallest: how many of the smallest.
        start: vectors to begin from as columns, shape `(n, m)`, in any position; None for random ones only. However
            bad they are, they cost products, not truth.
        rtol: width of each enclosure (certified), or true residual (uncertified), relative to the value.
        confidence: probability that all enclosures hold.
        certify: False stops on the residuals, skips float64 and the certificate, and leaves the outer ends infinite.
        max_products: budget, fresh products and the certificate's included.
        seconds: budget of wall-clock time, looked at between passes; None for no limit.
    """

    largest: int = 1
    smallest: int = 0
    start: Tensor | None = field(default=None, kw_only=True, repr=False)
    rtol: float = field(default=1e-3, kw_only=True)
    confidence: float = field(default=1 - 1e-6, kw_only=True)
    certify: bool = field(default=True, kw_only=True)
    max_products: int = field(default=500, kw_only=True)
    seconds: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse settings without meaning."""
        wanted = self.largest + self.smallest
        if min(self.largest, self.smallest) < 0 or not wanted:
            raise UsageError(f"expected at least one eigenpair, got {self.largest} largest, {self.smallest} smallest")
        if not (0 < self.confidence < 1 and self.rtol >= 0):
            raise UsageError(f"expected 0 < confidence < 1 and rtol ≥ 0, got {self.confidence} and {self.rtol}")
        if self.max_products < 2 * wanted + self.certify:
            raise UsageError(
                f"{wanted} eigenpairs need {2 * wanted + self.certify} products, one to look and one to verify for each"
                f"{' and one for the certificate' if self.certify else ''}, got {self.max_products}"
            )

    @final
    def __eq__(self, other: object) -> bool:
        """Whether class and settings agree."""
        return type(other) is type(self) and self._key() == other._key()  # pyrefly: ignore

    @final
    def __hash__(self) -> int:
        """In line with equality."""
        return hash(self._key())

    @abstractmethod
    def search(self, domain: Domain, stream: torch.Generator) -> Search:
        """A search that has not begun."""

    @final
    def steps(self, domain: Domain, stream: torch.Generator) -> Steps[Pairs]:
        """Search, verify, certify; again from the start where the certificate shows that something was missed."""
        return (yield from _Run(self, domain, stream).steps())

    @final
    def columns(self, domain: Domain, width: int, stream: torch.Generator) -> Tensor:
        """The warm start, padded with random columns to a width, or to n: shape `(n, at least width)`, float64.

        Raises:
            UsageError: the warm start does not fit the operator, or is not finite.
        """
        given = [] if self.start is None else [column for column in self._warm(domain).unbind(1) if space.norm(column)]
        while len(given) < min(width, domain.n):
            given.append(sphere(domain.n, stream).to(domain.device))
        return torch.stack(given[: domain.n], dim=1)

    def _warm(self, domain: Domain) -> Tensor:
        start = self.start
        if start is None or start.ndim != 2 or start.shape[0] != domain.n or not start.is_floating_point():
            shape = "none" if start is None else f"{tuple(start.shape)} of {start.dtype}"
            raise UsageError(f"expected a start of real columns of length {domain.n}, got a tensor of shape {shape}")
        if not bool(torch.isfinite(start).all()):
            raise UsageError("the start has entries that are NaN or infinite: leave out the columns they are in")
        return start.detach().to(device=domain.device, dtype=torch.float64)

    def _key(self) -> tuple[object, ...]:
        values = (getattr(self, item.name) for item in fields(self))
        return tuple(id(value) if isinstance(value, Tensor) else value for value in values)


class Search(ABC):
    """Approximate eigenpairs that get better by products; steered by its own residuals, which are never reported."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """A power of two near the size of the products."""

    @property
    @abstractmethod
    def rounding(self) -> float:
        """What rounding amounts to in the precision of the products."""

    @property
    @abstractmethod
    def size(self) -> float:
        """The largest magnitude seen so far: of a Ritz value, or of a product."""

    @property
    @abstractmethod
    def stuck(self) -> bool:
        """Whether no product could make it better: the whole space is spanned, or rounding is all that is left."""

    @abstractmethod
    def ritz(self) -> tuple[Reals, Reals]:
        """All Ritz values, ascending, and their residuals alike."""

    @abstractmethod
    def pairs(self, chosen: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Ritz vectors, float64, and what their products should be."""

    @abstractmethod
    def advance(self, goals: dict[int, float], room: int) -> Steps[int]:
        """Make some of the pairs better.

        Args:
            goals: residuals to reach, by the place of the Ritz value; empty where there are too few of them yet.
            room: at most so many products.

        Returns:
            Number of products taken.
        """

    @abstractmethod
    def admit(self, vectors: Sequence[Tensor]) -> Steps[int]:
        """Take in further vectors; returns the number of products taken, 0 where they add nothing."""


@final
@dataclass(frozen=True, eq=False)
class Eigenpairs(Many):
    """Several eigenpairs at both ends by block Lanczos with full re-orthogonalisation, each with its enclosure.

    Only residuals of pairs that are not good enough yet are multiplied (`krylov.block`). A start of some vectors finds an
    eigenvalue as often as there are vectors; what they leave out of a larger multiplicity is found by the certificate, at
    more cost. The basis takes one vector per product.

    Attributes:
        block: vectors that share a pass over the data, at most; a start of fewer is padded to as many with random ones.
            None for as many as are wanted, at most 4, or as the warm start has.

    >>> from isoflat.core.streams import stream
    >>> from isoflat.linalg.operator import Dense
    >>> operator = Dense(torch.diag(torch.tensor([5.0, 5.0, 4.0, 1.0, 0.5, 0.0, -3.0], dtype=torch.float64)))
    >>> run = Eigenpairs(largest=3, smallest=1, rtol=1e-9)(operator, stream(0))
    >>> [round(pair.value, 9) for pair in run.largest + run.smallest], run.reached
    ([5.0, 5.0, 4.0, -3.0], True)
    """

    block: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse settings without meaning."""
        super().__post_init__()
        if self.block is not None and self.block < 1:
            raise UsageError(f"expected a block of at least one vector, got {self.block}")

    def search(self, domain: Domain, stream: torch.Generator) -> Search:
        """Block Lanczos from the warm start, padded."""
        width = self.block or min(self.largest + self.smallest, USUAL)
        return _BlockLanczos(BlockRecurrence(self.columns(domain, width, stream), domain.dtype), self.block)


@final
class _BlockLanczos(Search):
    """Block Lanczos, one step at a time.

    Attributes:
        unseen: vectors of the start that have not been multiplied yet.
    """

    def __init__(self, recurrence: BlockRecurrence, block: int | None) -> None:
        self.recurrence = recurrence
        self.block = block
        self.unseen = recurrence.waiting
        self._ritz: tuple[Reals, Reals] = np.zeros(0), np.zeros((0, 0))

    @property
    def scale(self) -> float:
        return self.recurrence.scale

    @property
    def rounding(self) -> float:
        return self.recurrence.rounding * self.scale

    @property
    def size(self) -> float:
        return self.recurrence.size * self.scale

    @property
    def stuck(self) -> bool:
        return self.recurrence.exhausted

    def ritz(self) -> tuple[Reals, Reals]:
        if self.unseen:
            return np.zeros(0), np.zeros(0)
        values, vectors = self._ritz
        return values * self.scale, np.linalg.norm(self.recurrence.residuals(vectors), axis=0) * self.scale

    def pairs(self, chosen: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        values, vectors = self._ritz
        found = [self.recurrence.combine(vectors[:, j]) for j in chosen]
        images = [
            self.recurrence.predicted(float(values[j]), vectors[:, j], vector).mul_(self.scale)
            for j, vector in zip(chosen, found, strict=True)
        ]
        return found, images

    def advance(self, goals: dict[int, float], room: int) -> Steps[int]:
        run = self.recurrence
        width = min(room, self.block or run.waiting)
        if goals:
            wanted = run.residuals(self._ritz[1][:, list(goals)]) / (np.array(list(goals.values())) / self.scale)
            directions, sizes, _ = np.linalg.svd(wanted, full_matrices=False)
            # A pair that is not good enough has a column longer than 1 here.
            run.steer(directions[:, : min(width, max(1, int((sizes > 0.5).sum())))])
        else:
            run.lead(min(width, self.unseen or run.waiting))
            # With a start that is more than the budget, what there is room for must do.
            self.unseen = max(self.unseen - width, 0) if width < room else 0
        return (yield from self._multiply())

    def admit(self, vectors: Sequence[Tensor]) -> Steps[int]:
        run = self.recurrence
        before = run.waiting
        for vector in vectors:
            run.admit(vector)
        if run.waiting == before:
            return 0
        run.steer(np.eye(run.waiting)[:, before:])
        return (yield from self._multiply())

    def _multiply(self) -> Steps[int]:
        run = self.recurrence
        width = run.active
        values = self._ritz[0]
        range_ = f": {values[0] * self.scale:.4g} … {values[-1] * self.scale:.4g}" if len(values) else ""
        run.extend((yield Request(run.block, status=f"block Lanczos {run.k}{range_}")))
        self._ritz = run.ritz()
        return width


@final
@dataclass(frozen=True)
class _Verified:
    """The wanted vectors with fresh products; arrays are of the largest, descending, then of the smallest, ascending.

    Attributes:
        trial: the vectors, in units of `scale`.
        root: C, with `Cᵀ C = Rᵀ R` for the residuals R, shape `(d, d)`, in the same units.
        scale: a power of two.
        top: how many of the largest are wanted.
        bottom: how many of the smallest.
        surprise: distance of the products from what the search predicted.
        rounding: what rounding amounts to in the search.
        size: the largest magnitude that it met.
        working: precision of the search's products, and of those of a certificate.
        final: of the fresh ones.
    """

    trial: Trial
    root: Reals
    scale: float
    top: int
    bottom: int
    surprise: float
    rounding: float
    size: float
    working: float
    final: float

    @property
    def values(self) -> Reals:
        """All Ritz values, ascending, absolute."""
        return self.trial.values * self.scale

    @property
    def wanted(self) -> Reals:
        """The values that are asked for."""
        return self.values[_slots(len(self.values), self.top, self.bottom)]

    @property
    def defects(self) -> Reals:
        """Their residuals."""
        found = [self.trial.defect(j) * self.scale for j in range(len(self.values))]
        return np.array(found)[_slots(len(found), self.top, self.bottom)]

    def noise(self, reach: float, steps: int = 0) -> float:
        """Rounding error of products, after so many steps on the complement, where magnitudes reach so far."""
        return self.surprise + self.rounding + (self.working * steps + self._sums) * max(self.size, reach)

    def slack(self, reach: float) -> float:
        """Rounding error of the values."""
        own = 4 * self.final * (len(self.values) + 1)
        return self.surprise * self.final / self.working + (own + self._sums) * max(self.size, reach)

    @property
    def _sums(self) -> float:
        """Relative error of a sum over n entries, which is in float64 in any case."""
        return torch.finfo(torch.float64).eps * math.sqrt(self.trial.vectors[0].shape[0])

    def bounds(self, lower: float, upper: float, heard: _Heard) -> tuple[Reals, Reals]:
        """Where the spectrum on the complement lies between two ends, according to a run there.

        Returns:
            Bounds from above on the largest eigenvalues, descending, and on the next one after them; and from below on the
            smallest, ascending, and on the next one.
        """
        noise, slack = self.noise(heard.reach, heard.steps), self.slack(heard.reach)
        lower, upper = lower - noise, upper + noise
        high, low = self._compared(upper)[::-1] + slack, self._compared(lower)[: len(self.values)] - slack
        high = high[: len(self.values)]
        return np.append(high, upper)[: self.top + 1], np.append(low, lower)[: self.bottom + 1]

    def _compared(self, end: float) -> Reals:
        """Eigenvalues of the comparison matrix: what `Trial.bounds` says, without a look at the vectors each time."""
        d = len(self.values)
        if not math.isfinite(end):
            return np.full(2 * d, end)
        both = np.zeros((2 * d, 2 * d))
        both[:d, :d], both[d:, :d] = np.diag(self.trial.values), self.root
        both[d:, d:] = np.eye(d) * (end / self.scale)
        return np.linalg.eigvalsh(both).astype(np.float64) * self.scale

    def exact(self) -> tuple[Reals, Reals]:
        """The same where there is no complement."""
        high, low = np.append(self.values[::-1], -math.inf), np.append(self.values, math.inf)
        return high[: self.top + 1] + self.slack(0.0), low[: self.bottom + 1] - self.slack(0.0)

    def widths(self, highs: Reals, lows: Reals, reach: float) -> Reals:
        """Of the enclosures that such bounds make."""
        outer, inner = np.concatenate([highs[: self.top], -lows[: self.bottom]]), self.wanted.copy()
        inner[self.top :] *= -1
        return outer - inner + self.slack(reach)


class _Run:
    """One run under way.

    Attributes:
        top: how many of the largest are wanted, clamped.
        bottom: how many of the smallest.
        wanted: how many pairs that are together; n where they meet.
        spent: products.
        attempts: at a certificate.
        length: products that the last of them took; 0 where it did not come to its end.
        final: whether it is to make the best of what there is, because the search has no budget left.
        tight: what the search is asked for, as a part of what the tolerance allows, for each pair.
        poor: which of the pairs will not do, whatever is found out about the rest.
        blamed: whose residuals are to blame for it.
        highs: the best of all bounds from above, as `_Verified.bounds` orders them.
        lows: from below.
        reach: the largest magnitude met on complements.
    """

    def __init__(self, task: Many, domain: Domain, stream: torch.Generator) -> None:
        self.task, self.domain = task, domain
        self.started = time.monotonic()
        self.top, self.bottom = min(task.largest, domain.n), min(task.smallest, domain.n)
        self.wanted = min(self.top + self.bottom, domain.n)
        self.spent = self.attempts = self.length = 0
        self.final, self.reach = False, 0.0
        self.tight = np.full(self.top + self.bottom, 0.25 if task.certify else 1.0)
        self.poor = self.blamed = np.zeros(self.top + self.bottom, dtype=bool)
        self.highs, self.lows = np.full(self.top + 1, math.inf), np.full(self.bottom + 1, -math.inf)
        draw = int(torch.randint(2**62, (1,), generator=stream))
        self.search = task.search(domain, stream)
        # A warm start may come from an earlier run with the same stream, and know what is drawn from it.
        seen = "" if task.start is None else task.start.detach().double().cpu().numpy().tobytes()
        self.stream = fresh_stream(draw, "certificate", fingerprint(seen))

    def steps(self) -> Steps[Pairs]:
        """All of it."""
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
        """Why so many products more cannot be spent; empty if they can."""
        task = self.task
        if self.spent + more > task.max_products:
            return f"budget of {task.max_products} products spent"
        if task.seconds is not None and time.monotonic() - self.started > task.seconds:
            return f"budget of {task.seconds:g} seconds spent"
        return ""

    def _reserve(self) -> int:
        """What the search leaves of the budget: for fresh products, and a certificate about as long as the last one."""
        certificate = self.length + 2 if self.length else max(self.task.max_products // 4, 1)
        return self.wanted + (certificate if self.task.certify else 0)

    def _targets(self, verified: _Verified) -> Reals:
        """Widths, or residuals, to reach."""
        return self.task.rtol * np.abs(verified.wanted)

    def _good(self, verified: _Verified) -> bool:
        """Whether every pair is as good as was asked for."""
        reached = verified.widths(self.highs, self.lows, self.reach) if self.task.certify else verified.defects
        return bool((reached <= self._targets(verified)).all())

    def _goals(self) -> dict[int, float]:
        """Residuals to reach, of those pairs that have not reached theirs.

        A residual r widens the enclosure of its own pair by r where nothing is known, and by about r²/gap where the rest of
        the spectrum keeps away: by e if `r² = e (e + gap)`. By as much it moves the end of the rest, which must not reach
        the last of the wanted there.
        """
        scale = self.search.scale
        values, residuals = (numbers / scale for numbers in self.search.ritz())
        slots = _slots(len(values), self.top, self.bottom)
        excess = self.tight * self.task.rtol * np.abs(values[slots])
        goals = excess.copy()
        if self.task.certify and len(values) > self.wanted:
            gaps = np.zeros(len(slots))
            limits = []
            for count, last, near in (
                (self.top, self.top - 1, len(values) - 1 - self.top),
                (self.bottom, len(slots) - 1, self.bottom),
            ):
                away = np.abs(values[slots] - values[near])
                mine = slice(last + 1 - count, last + 1)
                gaps[mine] = np.maximum(away[mine] - residuals[near], 0)
                if count:
                    moved = max(excess[last], gaps[last] / 4)
                    limits.append(np.sqrt(moved * (moved + away)))
            goals = np.minimum(np.sqrt(excess * (excess + gaps)), np.min(limits, axis=0))
        goals = np.maximum(goals, self.search.rounding / scale)
        return {j: float(goal) * scale for j, goal in zip(slots, goals, strict=True) if residuals[j] > goal}

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
        """Which of the pairs the search cannot make better."""
        residuals = self.search.ritz()[1]
        small = residuals[_slots(len(residuals), self.top, self.bottom)] <= self.search.rounding
        return small | self.search.stuck | self.final

    def _tighten(self) -> bool:
        """Ask the search for more, of those pairs that need it; False if rounding leaves nothing to ask for."""
        better = ~self._settled()
        chosen = better & self.blamed if (better & self.blamed).any() else better & self.poor
        while chosen.any():
            goals = self._goals()
            self.tight[chosen] /= 8
            if goals:
                return True
        return False

    def _verified(self) -> Steps[_Verified]:
        """Fresh products of the wanted vectors: values, residuals, and the noise."""
        search, double = self.search, self.task.certify
        found = len(search.ritz()[0])
        vectors, images = search.pairs(sorted(set(_slots(found, self.top, self.bottom))))
        orthonormalise(vectors, images)
        status = f"fresh products of {len(vectors)} vectors"
        fresh = (yield Request(torch.stack(vectors, dim=1), double=double, status=status)).unbind(1)
        self.spent += len(vectors)
        surprise = max(space.norm(image.sub_(product)) for image, product in zip(images, fresh, strict=True))
        trial = Trial.of(vectors, [product / search.scale for product in fresh])
        squares, turn = np.linalg.eigh(gram(trial.residuals, trial.residuals))
        working = torch.finfo(self.domain.dtype).eps
        verified = _Verified(
            trial=trial,
            root=np.sqrt(squares.clip(min=0))[:, None] * turn.T,
            scale=search.scale,
            top=self.top,
            bottom=self.bottom,
            surprise=surprise,
            rounding=search.rounding,
            size=max(search.size, float(np.abs(trial.values).max()) * search.scale),
            working=working,
            final=torch.finfo(torch.float64).eps if double else working,
        )
        self.poor = self.blamed = verified.defects > self._targets(verified)
        return verified

    def _certify(self, verified: _Verified) -> Steps[list[Tensor]]:
        """Bound what the complement can hold; returns Ritz vectors from there that belong among the wanted."""
        if self.wanted == self.domain.n:
            self.highs, self.lows = verified.exact()
            return []
        self.attempts += 1
        before, targets, settled = self.spent, self._targets(verified), self._settled()
        heard = _Heard(verified.trial.vectors)

        def least() -> Reals:
            """The widths that are left if the Ritz values on the complement are its ends."""
            return verified.widths(*verified.bounds(*heard.ends, heard), heard.reach)

        def rounding() -> float:
            """Widths that products in this precision cannot tell from zero."""
            return 4 * (verified.noise(heard.reach) + verified.slack(heard.reach))

        def enough(left: Outside) -> bool:
            """As tight as was asked for; of pairs with which the search is done, about as tight as they can become."""
            possible = least()
            limits = np.where((possible > 0.75 * targets) & (settled | (possible <= rounding())), 2 * possible, targets)
            widths = verified.widths(*verified.bounds(left.lower, left.upper, heard), heard.reach)
            return bool((widths <= limits).all())

        aim = Aim(
            failure=(1 - self.task.confidence) / (self.attempts * (self.attempts + 1)),
            enough=enough,
            affordable=lambda more: not self._over(math.ceil(more)),
            status=f"certificate of {self.wanted} pairs",
        )
        left = yield from heard.through(outside(verified.trial, self.domain, self.stream, (None,), aim))
        self.spent, self.length = before + heard.steps, heard.steps if left.reached else 0
        self.poor = least() > np.maximum(0.75 * targets, rounding())
        self.blamed = self._blame(verified, heard)
        # All attempts' bounds hold together.
        highs, lows = verified.bounds(left.lower, left.upper, heard)
        self.reach = max(self.reach, heard.reach)
        self.highs, self.lows = np.minimum(self.highs, highs), np.maximum(self.lows, lows)
        above, below = math.inf, -math.inf
        if self.top:
            above = verified.wanted[self.top - 1] + max(verified.noise(heard.reach), targets[self.top - 1] / 4)
        if self.bottom:
            below = verified.wanted[-1] - max(verified.noise(heard.reach), targets[-1] / 4)
        return heard.beyond(below, above)

    def _blame(self, verified: _Verified, heard: _Heard) -> NDArray[np.bool_]:
        """Whose residuals widen the poor pairs' enclosures: those that move the end of the rest by much."""
        blamed, targets = np.zeros(len(self.poor), dtype=bool), self._targets(verified)
        for end, mine in ((heard.ends[1], slice(0, self.top)), (heard.ends[0], slice(self.top, None))):
            if self.poor[mine].any():
                half = np.abs(verified.wanted - end) / 2
                moved = np.hypot(half, verified.defects) - half
                blamed |= moved > targets[mine][self.poor[mine]].min() / 8
        return blamed

    def _result(self, verified: _Verified, stopped: str) -> Pairs:
        found = [self._pair(verified, j) for j in _slots(len(verified.values), self.top, self.bottom)]
        return Pairs(
            largest=tuple(found[: self.top]),
            smallest=tuple(found[self.top :]),
            reached=stopped == REACHED,
            confidence=self.task.confidence if self.task.certify else 0.0,
            noise=verified.noise(self.reach),
            products=self.spent,
            stopped=stopped,
        )

    def _enclosure(self, verified: _Verified, j: int) -> tuple[float, float]:
        """Of the j-th of the verified values, ascending."""
        place, value, slack = len(verified.values) - 1 - j, float(verified.values[j]), verified.slack(self.reach)
        lower, upper = -math.inf, math.inf
        if place < self.top:
            lower, upper = value - slack, max(float(self.highs[place]), value)
        if j < self.bottom:
            lower, upper = max(lower, min(float(self.lows[j]), value)), min(upper, value + slack)
        return lower, upper

    def _pair(self, verified: _Verified, j: int) -> Pair:
        value, (lower, upper) = float(verified.values[j]), self._enclosure(verified, j)
        others = [self._enclosure(verified, i) for i in range(self.wanted) if i != j]
        if self.wanted < self.domain.n:
            # All other eigenvalues lie here.
            others.append((float(self.lows[-1]), float(self.highs[-1])))
        distance = min((max(low - value, value - high, 0.0) for low, high in others), default=math.inf)
        residual = verified.trial.defect(j) * verified.scale
        return Pair(
            value=value,
            lower=lower,
            upper=upper,
            residual=residual,
            vector=verified.trial.vectors[j],
            clustered=any(low <= upper and lower <= high for low, high in others),
            angle=min(1.0, (residual + verified.slack(self.reach)) / distance) if distance else 1.0,
        )


class _Heard:
    """A certificate's run, overheard: what its Krylov space says of the complement, beside the bounds.

    Attributes:
        steps: products so far.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        self.steps = 0
        self._known = known
        self._basis: list[Tensor] = []
        self._matrix = np.zeros((0, 0))
        self._ends: tuple[float, float] | None = None

    def through(self, steps: Steps[Outside]) -> Steps[Outside]:
        """Hand requests and products on, and listen."""
        request = next(steps)
        while True:
            products = yield request
            self._take(request.vectors[:, 0], products[:, 0])
            try:
                request = steps.send(products)
            except StopIteration as done:
                return done.value

    def _take(self, vector: Tensor, product: Tensor) -> None:
        self._basis.append(vector)
        column = space.inner(self._basis, product).cpu().numpy()
        self._matrix = np.block([[self._matrix, column[:-1, None]], [column[None, :-1], column[-1:, None]]])
        self.steps, self._ends = self.steps + 1, None

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest Ritz value."""
        if self._ends is None:
            values = np.linalg.eigvalsh(self._matrix)
            self._ends = float(values[0]), float(values[-1])
        return self._ends

    @property
    def reach(self) -> float:
        """The larger of their magnitudes."""
        return max(-self.ends[0], self.ends[1])

    def beyond(self, below: float, above: float) -> list[Tensor]:
        """Ritz vectors of the complement with values beyond either of two."""
        values, vectors = np.linalg.eigh(self._matrix)
        found = []
        for value, coefficients in zip(values, vectors.T, strict=True):
            if below <= value <= above:
                continue
            vector = space.combine(torch.from_numpy(np.ascontiguousarray(coefficients)), self._basis)
            size = orthogonalise(self._known, vector)[1]
            if size:
                found.append(vector.div_(size))
        return found


def orthonormalise(vectors: list[Tensor], images: list[Tensor]) -> None:
    """Gram–Schmidt in place; images, which are linear in the vectors, go along."""
    for j, vector in enumerate(vectors):
        removed, size = orthogonalise(vectors[:j], vector)
        if j:
            space.add(images[j], -removed, images[:j])
        vector.div_(size)
        images[j].div_(size)


def _slots(found: int, top: int, bottom: int) -> list[int]:
    """The places, among so many ascending values, of the largest, descending, then of the smallest, ascending.

    >>> _slots(10, 2, 3)
    [9, 8, 0, 1, 2]
    """
    return [*range(found - 1, found - 1 - top, -1), *range(bottom)]
