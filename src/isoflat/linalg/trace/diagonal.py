"""The diagonal, and the traces of diagonal blocks, from the same products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import ClassVar, final

import torch
from torch import Tensor

from isoflat.core.errors import UsageError
from isoflat.linalg.solver import Domain, Solver, Steps
from isoflat.linalg.trace.base import QuadraticForms, TraceEstimate, ask, check, deviation, doubt, mean, quantile
from isoflat.linalg.vectors import rademacher


@final
@dataclass(frozen=True, eq=False)
class DiagonalEstimate:
    """A diagonal with standard errors, and traces of its blocks with intervals.

    Attributes:
        diagonal: estimates of the entries, shape `(n,)`, float64.
        standard_errors: standard error of each entry, shape `(n,)`, float64.
        blocks: trace of each diagonal block, in order; all from the same probes.
        confidence: nominal coverage of each block's interval, or of all at once.
        products: number of products used.
    """

    diagonal: Tensor
    standard_errors: Tensor
    blocks: tuple[TraceEstimate, ...]
    confidence: float
    products: int


@final
@dataclass(frozen=True)
class DiagonalEstimator(Solver[DiagonalEstimate]):
    """Estimator of the diagonal: the mean of `v ∘ A v` over random signs v (Bekas, Kokiopoulou, Saad 2007).

    It is exact for diagonal matrices.

    The variance of entry i is `Σ_{j≠i} a_ij²` for one probe. The sum of `v ∘ A v` over a block estimates the block's
    trace; what lies outside the block adds to the variance and nothing to the mean. The standard errors of entries have
    no interval: an entry of a row with few large neighbours is anything but normal. Those of blocks have, with the same
    limits as Hutchinson's.

    Attributes:
        probes: number of probes, at least 2.
        sizes: lengths of consecutive diagonal blocks, such as `ParameterSpace.sizes`; empty for no blocks.
        simultaneous: flag that all blocks' intervals hold together with `confidence` (Bonferroni), instead of each.
        confidence: nominal coverage of the blocks' t-intervals.
        block: probes that share a pass over the data; it does not change which probes are drawn.

    Raises:
        UsageError: a setting has no meaning, or the sizes do not add up to the operator's dimension.

    >>> from isoflat.core.rng import stream
    >>> from isoflat.linalg.operator import Dense
    >>> run = DiagonalEstimator(probes=2, sizes=(1, 2))(Dense(torch.diag(torch.arange(1.0, 4.0).double())), stream(0))
    >>> run.diagonal.tolist(), [part.value for part in run.blocks]
    ([1.0, 2.0, 3.0], [1.0, 5.0])
    """

    label: ClassVar[str] = "Diagonal"

    probes: int = 64
    sizes: tuple[int, ...] = ()
    simultaneous: bool = False
    confidence: float = 0.95
    block: int = 8

    def __post_init__(self) -> None:
        """Refuse settings without meaning."""
        check(self.probes, self.confidence, self.block)
        if any(size < 0 for size in self.sizes):
            raise UsageError(f"sizes of blocks cannot be negative, got {self.sizes}")

    def steps(self, domain: Domain, stream: torch.Generator) -> Steps[DiagonalEstimate]:
        """Update means and variances entry by entry (Welford 1962), so that no storage grows with the probes."""
        if self.sizes and sum(self.sizes) != domain.n:
            raise UsageError(f"expected blocks that add up to {domain.n}, got {self.sizes}")
        ends = tuple(accumulate(self.sizes, initial=0))
        parts = [(slice(a, b), QuadraticForms()) for a, b in pairwise(ends)]
        centre, spread = (torch.zeros(domain.n, dtype=torch.float64, device=domain.device) for _ in range(2))
        taken = 0

        def take(probe: Tensor, product: Tensor) -> None:
            nonlocal taken
            taken += 1
            entries = probe.double() * product
            apart = entries - centre
            centre.add_(apart, alpha=1 / taken)
            spread.addcmul_(apart, entries - centre)
            for where, forms in parts:
                forms.take(probe[where], product[where])

        draw = lambda k: rademacher(domain.n, k, stream)  # noqa: E731
        used = yield from ask(draw, take, self.probes, self.block, domain, "diagonal: probe")
        errors = spread.div_(self.probes * (self.probes - 1)).sqrt_()
        blocks = tuple(self._block(forms, used) for _, forms in parts)
        return DiagonalEstimate(centre, errors, blocks, self.confidence, used)

    def _block(self, forms: QuadraticForms, used: int) -> TraceEstimate:
        missed = (1 - self.confidence) / (len(self.sizes) if self.simultaneous else 1)
        error = deviation(forms.values) / math.sqrt(used)
        half = quantile(1 - missed, used - 1) * error
        return TraceEstimate(
            value=mean(forms.values),
            standard_error=error,
            half_width=half + forms.rounding,
            confidence=self.confidence,
            products=used,
            samples=tuple(forms.values),
            rounding=forms.rounding,
            concentration=forms.concentration,
            doubt=doubt(used, forms.concentration, half <= forms.rounding),
            stopped=f"all {used} probes taken",
        )
