"""Common parts of stochastic estimators: result, pass over probes, deflation, and the test of an interval's coverage."""

from __future__ import annotations

import math
import time
from abc import ABC
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar, final

import torch
from torch import Tensor

from isoflat.core import space
from isoflat.core.errors import UsageError
from isoflat.linalg.solver import Domain, Request, SolverWithVectors, Steps
from isoflat.linalg.vectors import Distribution, remove

R = TypeVar("R")

REACHED = "tolerance reached"
"""Reason that a run gives for its end where it met the tolerance."""

SETTLED = 80
"""Probes that one dominant eigenvalue takes until Student's 95 % cover 93 %; measured, see `doubt`."""


@final
@dataclass(frozen=True)
class TraceEstimate:
    """A trace with its Student t-interval.

    Attributes:
        value: the estimate.
        standard_error: standard error of the value; after a pilot, with the pilot's variance.
        half_width: t-quantile times the standard error, plus `rounding`.
        confidence: nominal coverage of `value ± half_width`.
        products: number of products used.
        samples: one unbiased estimate of the trace per probe, in the order of drawing. Runs with the same stream have
            the same probes: differences of their samples are paired.
        rounding: possible rounding error, in order of magnitude.
        concentration: `tr(B⁴)/tr(B²)²`, B the part that was sampled without its mean diagonal: 1 for a single
            eigenvalue, 1/r for r equal ones; None where it was not looked at.
        effective_rank: `tr(A)²/‖A‖_F²` of the part that was sampled; None where it was not looked at.
        doubt: reason that the interval may cover less often than stated; empty where nothing speaks against it.
        reached: flag that the tolerance was reached; without one, that all probes were taken.
        stopped: reason for the end of the run, in words.
    """

    value: float
    standard_error: float
    half_width: float
    confidence: float
    products: int
    samples: tuple[float, ...] = ()
    rounding: float = 0.0
    concentration: float | None = None
    effective_rank: float | None = None
    doubt: str = ""
    reached: bool = True
    stopped: str = ""

    def interval(self) -> tuple[float, float]:
        """Both ends of the interval."""
        return self.value - self.half_width, self.value + self.half_width


@dataclass(frozen=True, eq=False)
class Deflating(SolverWithVectors[R], ABC):
    """Solver with given directions: the operator is exact along them, the rest is sampled.

    Attributes:
        directions: orthonormal columns, shape `(n, d)`: converged eigenvectors of outliers; None for none.
    """

    directions: Tensor | None = field(default=None, kw_only=True, repr=False)

    @final
    def basis(self, domain: Domain) -> tuple[Tensor, ...]:
        """The directions as rows of shape `(n,)`, in the precision of the products.

        Raises:
            UsageError: they do not fit the operator, or are not orthonormal.
        """
        if self.directions is None:
            return ()
        if self.directions.ndim != 2 or self.directions.shape[0] != domain.n:
            shape = tuple(self.directions.shape)
            raise UsageError(f"expected directions as columns of length {domain.n}, got a tensor of shape {shape}")
        rows = self.directions.to(device=domain.device, dtype=domain.dtype).T.unbind()
        allowed = max(torch.finfo(a.dtype).eps for a in (self.directions, *rows)) ** 0.5
        for j, row in enumerate(rows):
            products = space.inner(rows[: j + 1], row)
            products[j] -= 1
            if space.largest(products) > allowed:
                raise UsageError(
                    f"expected orthonormal directions, but direction {j} is off by {space.largest(products):.1e}: "
                    "orthonormalise them, with torch.linalg.qr for instance"
                )
        return rows


class QuadraticForms:
    """Quadratic forms `wᵀ A w` of probes, taken in one by one, with statistics of their products.

    Products of different probes that point the same way betray a matrix dominated by few eigenvalues. With
    `c_j = cos²` of the angle between a product and the one before, `E[c_j s_j² s_{j−1}²]/E[s_j² s_{j−1}²]`, s their
    lengths, is `tr(A⁴)/tr(A²)²` for Gaussian probes. Where all probes v have the same length, as signs do, a multiple of
    the identity moves no form: then only the part of the product that is orthogonal to v counts. It takes the storage of
    one vector.

    Attributes:
        values: quadratic forms, in order.
        norms: `‖A w‖`, in order.
        noise: possible rounding error of each form, in order.
        level: flag that all probes have the same length before they are projected.
    """

    def __init__(self, level: bool = True) -> None:
        self.level = level
        self.values: list[float] = []
        self.norms: list[float] = []
        self.noise: list[float] = []
        self._lengths: list[float] = []
        self._overlaps: list[float] = []
        self._before: tuple[Tensor, ...] = ()

    def take(self, probe: Tensor, product: Tensor, removed: Tensor | None = None) -> None:
        """Take in a probe and its product.

        Args:
            probe: vector w, shape `(n,)`, in the precision of the products.
            product: `A w`, or `P A w`, shape `(n,)`, float64.
            removed: components that the projection took from the probe, shape `(d,)`; None where there was none.
        """
        form, size = float(space.inner([probe], product)[0]), space.norm(probe)
        self.values.append(form)
        self.norms.append(space.norm(product))
        self.noise.append(unit(probe.dtype, len(probe)) * size * self.norms[-1])
        hidden = torch.zeros(0, dtype=torch.float64, device=product.device) if removed is None else removed
        whole = math.hypot(size, space.norm(hidden))
        share = form / whole**2 if self.level and whole else 0.0
        parts = (torch.sub(product, probe.double(), alpha=share), share * hidden)
        length = math.hypot(*(space.norm(part) for part in parts))
        parts = tuple(part / length for part in parts) if length else parts
        if self._before:
            pairs = zip(self._before, parts, strict=True)
            self._overlaps.append(math.fsum(float(space.inner([one], other)[0]) for one, other in pairs) ** 2)
        self._lengths.append(length)
        self._before = parts

    @property
    def rounding(self) -> float:
        """Possible rounding error of the mean of the forms."""
        return mean(self.noise)

    @property
    def concentration(self) -> float:
        """Estimate of `tr(B⁴)/tr(B²)²`; 0 where every form is the same."""
        longest = max(self._lengths, default=0.0)
        if longest == 0:
            return 0.0
        squares = [(length / longest) ** 2 for length in self._lengths]
        weights = [a * b for a, b in pairwise(squares)]
        total = math.fsum(weights)
        return math.fsum(w * c for w, c in zip(weights, self._overlaps, strict=True)) / total if total else 0.0

    @property
    def effective_rank(self) -> float:
        """Estimate of `tr(A)²/‖A‖_F²`; 0 for the zero matrix."""
        size = math.hypot(*self.norms)
        return (mean(self.values) / size) ** 2 * len(self.norms) if size else 0.0


def ask(
    draw: Callable[[int], Tensor],
    take: Callable[[Tensor, Tensor], None],
    count: int,
    block: int,
    domain: Domain,
    status: str,
    over: Callable[[int], bool] = lambda _: False,
) -> Steps[int]:
    """Ask for the products of `count` vectors, some at a time.

    Args:
        draw: function that gives the next k vectors as columns, shape `(n, k)`.
        take: function called with each vector, in the precision of the products, and its product, both of shape `(n,)`.
        count: number of vectors.
        block: largest number of vectors that share a pass over the data.
        domain: domain of the operator.
        status: current activity in words, for a progress bar.
        over: test, called with the number of vectors done, of whether to stop there.

    Returns:
        Number of products taken.
    """
    done = 0
    while done < count and not over(done):
        k = min(block, count - done)
        vectors = draw(k).to(device=domain.device, dtype=domain.dtype)
        products = yield Request(vectors, status=f"{status} {done + 1} of {count}")
        for j in range(k):
            take(vectors[:, j], products[:, j])
        done += k
    return done


def along(rows: Sequence[Tensor]) -> Callable[[int], Tensor]:
    """Source of given rows for `ask`: some at a time, as columns."""
    waiting = list(rows)

    def draw(k: int) -> Tensor:
        columns = torch.stack(waiting[:k], dim=1)
        del waiting[:k]
        return columns

    return draw


class ProjectedProbes:
    """Source of random columns for `ask`, projected off orthonormal rows.

    Attributes:
        forms: quadratic forms of the projected operator, from the products given to `take`.
    """

    def __init__(
        self, rows: Sequence[Tensor], domain: Domain, distribution: Distribution, stream: torch.Generator
    ) -> None:
        self.forms = QuadraticForms(level=distribution.level)
        self._rows, self._domain, self._distribution, self._stream = rows, domain, distribution, stream
        self._removed: deque[Tensor] = deque()

    def draw(self, k: int) -> Tensor:
        """The next k columns, shape `(n, k)`."""
        columns = self._distribution.columns(self._domain.n, k, self._stream).to(self._domain.device)
        if self._rows:
            self._removed.extend(remove(self._rows, column) for column in columns.T)
        return columns

    def take(self, probe: Tensor, product: Tensor) -> None:
        """Take in a drawn column and its product, which is projected as well."""
        if not self._rows:
            return self.forms.take(probe, product)
        product = product.clone()
        remove(self._rows, product)
        return self.forms.take(probe, product, self._removed.popleft())


def exact_trace(domain: Domain, block: int, confidence: float) -> Steps[TraceEstimate]:
    """Compute the trace exactly by n products with unit vectors, for where an estimate would cost no less."""
    entries: list[float] = []
    noise: list[float] = []
    eps = unit(domain.dtype, domain.n)

    def draw(k: int) -> Tensor:
        columns = torch.zeros(domain.n, k, dtype=torch.float64)
        columns[range(len(entries), len(entries) + k), range(k)] = 1
        return columns

    def take(_: Tensor, product: Tensor) -> None:
        noise.append(eps * space.norm(product))
        entries.append(float(product[len(entries)]))

    products = yield from ask(draw, take, domain.n, block, domain, "trace: unit vector")
    rounding = math.fsum(noise)
    return TraceEstimate(
        value=math.fsum(entries),
        standard_error=0.0,
        half_width=rounding,
        confidence=confidence,
        products=products,
        rounding=rounding,
        stopped=f"{products} products give the trace exactly",
    )


def unit(dtype: torch.dtype, n: int) -> float:
    """Relative rounding error of a product and of a sum of n terms, which is in float64 in any case."""
    return torch.finfo(dtype).eps + torch.finfo(torch.float64).eps * math.sqrt(n)


def mean(samples: Sequence[float]) -> float:
    """Arithmetic mean, correctly rounded sum."""
    return math.fsum(samples) / len(samples)


def deviation(samples: Sequence[float]) -> float:
    """Sample standard deviation; in units of the largest deviation, so that no square over- or underflows."""
    centre = mean(samples)
    apart = [sample - centre for sample in samples]
    return math.hypot(*apart) / math.sqrt(len(apart) - 1)


def quantile(confidence: float, degrees: int) -> float:
    """Two-sided Student t-quantile."""
    from scipy.stats import t as student

    return float(student.isf((1 - confidence) / 2, degrees))


def doubt(probes: int, concentration: float, negligible: bool) -> str:
    """Reason that a t-interval may cover less often than stated; empty if nothing speaks against it.

    The excess kurtosis of a Gaussian form is 12 times the concentration κ, and its skewness at most √(8 κ), whatever
    the signs of the eigenvalues. Measured at nominal 95 %: a single eigenvalue (κ = 1) covers 86 % with 10 probes, 91 %
    with 32, 93 % with 64; two equal ones (κ = 1/2) 90, 92 and 94 %; five 93, 94 and 95 %. Coverage falls below 93 %
    where there are fewer than about 64 κ probes; the rule says 80 κ, because κ is itself an estimate. The effective
    rank `tr(A)²/‖A‖_F²` would not do: it is 0 for `tr A = 0`, where the interval is fine, and n for the identity plus
    one outlier, where it covers 87 % with 10 probes.

    Args:
        probes: number of samples that the variance is from.
        concentration: concentration κ of the sampled part.
        negligible: flag that the sampling error is below rounding, so that coverage does not depend on it.

    >>> doubt(64, 0.1, False)
    ''
    """
    if negligible or probes >= SETTLED * concentration:
        return ""
    return (
        f"about {max(1 / concentration, 1):.2g} eigenvalues dominate what was sampled: with {probes} probes Student's "
        f"interval covers less often than it says; deflate them, or take {math.ceil(SETTLED * concentration)} probes"
    )


def check(probes: int, confidence: float, block: int) -> None:
    """Refuse settings without meaning.

    Raises:
        UsageError: there are fewer than 2 probes, an empty block, or a confidence outside (0, 1).
    """
    if probes < 2 or block < 1:
        raise UsageError(f"a standard error needs at least 2 probes, got {probes} in blocks of {block}")
    if not 0 < confidence < 1:
        raise UsageError(f"confidence must lie strictly between 0 and 1, got {confidence}")


def clock(seconds: float | None) -> Callable[[], bool]:
    """Test of whether a budget of wall-clock time, which starts now, is spent."""
    started = time.monotonic()
    return lambda: seconds is not None and time.monotonic() - started > seconds
